"""The dense CRF by brute force, with all N × N pairs of voxels, and problems for its tests."""

from __future__ import annotations

import numpy as np
import torch

from medseg_lite.crf import DenseCRF, Permutohedral
from medseg_lite.volume import Case

SMOOTH_ONLY = dict(appearance_weight=0.0, learn=())
APPEARANCE_ONLY = dict(smoothness_weight=0.0, learn=())


def positions(shape) -> torch.Tensor:
    return torch.from_numpy(np.indices(shape).reshape(len(shape), -1)).double()


def gaussian(features: torch.Tensor) -> torch.Tensor:
    """exp(-|f_i - f_j|² / 2) of features `(d, N)`."""
    return torch.exp(-((features[:, :, None] - features[:, None, :]) ** 2).sum(0) / 2)


def per(sigma, count: int) -> torch.Tensor:
    return torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1).expand(count, 1)


def smoothness(shape, sigma) -> torch.Tensor:
    return gaussian(positions(shape) / per(sigma, len(shape)))


def features(image: torch.Tensor, near, alike) -> torch.Tensor:
    shape = image.shape[1:]
    alike = image.double().flatten(1) / per(alike, len(image))
    return torch.cat([positions(shape) / per(near, len(shape)), alike])


def lattice(features: torch.Tensor) -> torch.Tensor:
    """The matrix that the lattice applies."""
    return Permutohedral(features).filter(torch.eye(features.shape[1], dtype=features.dtype)).T


def normalise(kernel: torch.Tensor, how: str = "symmetric") -> torch.Tensor:
    n = kernel.sum(1)
    return {"symmetric": kernel / (n[:, None] * n).sqrt(), "before": kernel / n, "after": kernel / n[:, None], "none": kernel}[
        how
    ]


def mean_field(logits: torch.Tensor, kernels, *, iterations: int = 5, compatibility=None) -> torch.Tensor:
    """Q `(K, *space)`: every voxel hears every other, for each label in turn, as the update is written. kernels: (weight, matrix)."""
    u = logits.double().flatten(1)
    mu = 1 - torch.eye(len(u)) if compatibility is None else torch.as_tensor(compatibility)
    total = sum(weight * matrix for weight, matrix in kernels)
    q = u.softmax(0)
    for _ in range(iterations):
        energy = torch.stack([sum(mu[a, b] * (total @ q[b]) for b in range(len(u))) for a in range(len(u))])
        q = (u - energy).softmax(0)
    return q.view(logits.shape)


def problem(shape, channels=2, labels=3, *, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(K, *space)` and an image `(C, *space)`, float64."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(channels, *shape)).cumsum(1).cumsum(2) / 4
    return torch.from_numpy(1.5 * rng.normal(size=(labels, *shape))), torch.from_numpy(coarse)


def run(crf: DenseCRF, logits: torch.Tensor, image: torch.Tensor, mask=None, **options) -> torch.Tensor:
    """Q `(K, *space)` of one problem."""
    with torch.no_grad():
        return crf(logits[None], image[None], None if mask is None else mask[None], **options)[0].softmax(0)


def make_case(image, *, spacing=(1, 1, 1), **options) -> Case:
    image = np.asarray(image, np.float32)
    names = tuple(f"channel {c}" for c in range(len(image)))
    return Case(image=image, channels=names, affine=np.diag([*spacing, 1.0]), **options)
