"""Where training segments come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .engine.stored import StoredCase, copied
from .volume import Case, bounding_box, padded_region

SCHEMES = ("foreground", "uniform", "equal")
Augment = Callable[..., tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    """Network input (a tensor `(B, C, *n)`, or a tuple of them where the network has several) and labels `(B, *n_out)`."""

    inputs: Tensor | tuple[Tensor, ...]
    label: Tensor


@dataclass
class _InMemory:
    """A case that segments are cut from: the part of it that they can reach."""

    image: np.ndarray  # (C, *(region + 2 margin)), mirrored beyond the border of the volume
    label: np.ndarray  # (*region)
    groups: list[np.ndarray]  # flat voxel numbers within the region, from which centres are drawn
    std: np.ndarray  # (C,) inside the mask

    def count(self, group: int) -> int:
        return len(self.groups[group])

    def segment(self, group: int, number: int, block, margin) -> tuple[np.ndarray, np.ndarray]:
        """Patch and label of the block centred on voxel `number` of the group, as far as the border allows."""
        centre = np.unravel_index(self.groups[group][number], self.label.shape)
        start, stop = _around(centre, block, self.label.shape)
        patch = tuple(slice(a, b + 2 * m) for a, b, m in zip(start, stop, margin))
        return self.image[(slice(None), *patch)], self.label[tuple(map(slice, start, stop))]


@dataclass
class _OnDisk:
    """The same of a stored case, of which nothing is kept in memory."""

    case: StoredCase
    groups: list[str]

    @property
    def std(self) -> np.ndarray:
        return self.case.std

    def count(self, group: int) -> int:
        return self.case.counts.get(self.groups[group], 0)

    def segment(self, group: int, number: int, block, margin) -> tuple[np.ndarray, np.ndarray]:
        file = self.case.open()
        start, stop = _around(file.voxel(self.groups[group], number), block, self.case.shape)
        patch = file.block([a - m for a, m in zip(start, margin)], [b + m for b, m in zip(stop, margin)], raw=True)
        return patch, file.label_block(start, stop)


def _around(centre, block, shape) -> tuple[list[int], list[int]]:
    start = [min(max(int(c) - b // 2, 0), n - b) for c, b, n in zip(centre, block, shape)]
    return start, [a + b for a, b in zip(start, block)]


class SegmentSampler:
    """Draws batches of image segments and the labels of the voxels that the network predicts for them.

    `batch(step)` depends on the seed and the step alone: any worker can make it, in any order, and a resumed run sees the
    segments that the interrupted one would have seen.

    Schemes (Kamnitsas et al. 2017, sections 2.2 and 3.2), each choosing the centre of a segment among the mask's voxels:
        "foreground": half of each batch centred on a labelled voxel, half on background: the paper's proposal;
        "uniform": every voxel equally likely (P_uni with `output=1`);
        "equal": every class equally likely (P_eq with `output=1`).
    Cases are drawn with equal probability among those that have such a voxel. Near the border of the volume a centre moves
    inwards until all its predicted voxels exist.

    Args:
        cases: labelled cases, normalised as the network is to see them, all with the same channels. Segments of stored cases
            (`datasets.store`) are read from disk when they are drawn, those of others from memory; both are the same segments.
        output: side of the predicted block in voxels (9 for the paper's 25³ segments).
        margin: voxels of context on each side, `model.margin`.
        cut: `model.cut` of networks that take several inputs; it is applied to each patch before anything is copied.
        batch_size: segments per batch.
        scheme: one of the above.
        flip: mirror each segment left to right with probability one half.
        shift: standard deviation of the random intensity shift r_c · σ_c of each channel (.1 for TBI, section 4.1.2;
            σ_c is the channel's standard deviation inside the mask).
        spatial_dims: 3, or 2 for axial slices.
        augment: `augment(image, label, rng=...)` for every batch, such as `transforms.distort`; for networks with one input
            that lose no margin.
        seed: of all random choices.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        output: int = 9,
        margin: int = 0,
        cut: Callable | None = None,
        batch_size: int = 10,
        scheme: str = "foreground",
        flip: bool = True,
        shift: float = 0.0,
        spatial_dims: int = 3,
        augment: Augment | None = None,
        seed: int = 0,
    ):
        if augment is not None and (margin or cut is not None):
            raise ValueError("augment= moves image and label together, so the network must predict all voxels that it sees")
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r}; expected one of {', '.join(SCHEMES)}")
        if output < 1 or batch_size < 1:
            raise ValueError(f"output={output}, batch_size={batch_size}; both must be at least 1")
        _check_cases(cases)
        self.block = (output,) * spatial_dims + (1,) * (3 - spatial_dims)
        self.margin = (margin,) * spatial_dims + (0,) * (3 - spatial_dims)
        self.cut = cut or (lambda patch: (patch,))
        self.batch_size, self.scheme, self.flip, self.shift = batch_size, scheme, flip, shift
        self.spatial_dims, self.augment, self.seed = spatial_dims, augment, seed
        self._classes = 1 + max(c.highest_label for c in cases)
        self._cases = [self._prepare(c) for c in cases]
        # For every group of voxels, the cases that have any.
        self._holders = [
            np.array([n for n, case in enumerate(self._cases) if case.count(g)]) for g in range(len(self._cases[0].groups))
        ]
        if scheme == "equal":  # a class that no case has cannot be drawn
            self._present = [g for g, holders in enumerate(self._holders) if len(holders)]
        elif not all(len(holders) for holders in self._holders):
            empty = ["labelled", "background"][[len(h) > 0 for h in self._holders].index(False)]
            raise ValueError(
                f"none of the {len(cases)} cases has a {empty} voxel inside its mask; scheme={scheme!r} needs some"
            )

    def _prepare(self, case: Case) -> _InMemory | _OnDisk:
        half = [b // 2 for b in self.block]
        for what, need, have in zip("DHW", self.block, case.shape):
            if have < need:
                raise ValueError(
                    f"{case.name} is only {have} voxels along {what}; the predicted block needs {need}: choose a smaller output"
                )
        stored = isinstance(case, StoredCase)
        mask = None if stored else np.ones(case.shape, bool) if case.mask is None else case.mask
        if not (case.counts["mask"] if stored else mask.any()):
            raise ValueError(f"{case.name}: the mask is empty; correct it, or leave it out to sample the whole volume")
        if stored:
            classes = [f"class {c}" for c in range(1, self._classes)]
            groups = {"uniform": ["mask"], "foreground": ["labelled", "background"], "equal": ["background", *classes]}
            return _OnDisk(case, groups[self.scheme])
        box = bounding_box(mask | (case.label > 0))
        start = [max(0, min(s.start - h, n - b)) for s, h, n, b in zip(box, half, case.shape, self.block)]
        stop = [min(n, max(s.stop + h, a + b)) for s, h, n, a, b in zip(box, half, case.shape, start, self.block)]
        region = tuple(slice(a, b) for a, b in zip(start, stop))
        image = padded_region(
            case.image, [a - m for a, m in zip(start, self.margin)], [b + m for b, m in zip(stop, self.margin)]
        )
        label, mask = np.ascontiguousarray(case.label[region]), mask[region]
        if self.scheme == "uniform":
            groups = [mask]
        elif self.scheme == "foreground":
            groups = [label > 0, mask & (label == 0)]
        else:
            groups = [(label == c) & (mask | (c > 0)) for c in range(self._classes)]
        return _InMemory(
            image=np.ascontiguousarray(image, np.float32),
            label=label,
            groups=[np.flatnonzero(g).astype(np.int32) for g in groups],
            std=case.image[:, case.mask].std(axis=1) if case.mask is not None else case.image.std(axis=(1, 2, 3)),
        )

    def batch(self, step: int) -> Batch:
        """Batch number `step`."""
        rng = np.random.default_rng([self.seed, step])
        inputs, label = None, None
        for n, group in enumerate(self._draw_groups(rng)):
            case = self._cases[rng.choice(self._holders[group])]
            patch, target = case.segment(group, rng.integers(case.count(group)), self.block, self.margin)
            if self.spatial_dims == 2:
                patch, target = patch[..., 0], target[..., 0]
            if self.flip and rng.random() < 0.5:
                patch, target = patch[:, ::-1], target[::-1]
            parts = self.cut(patch)
            if inputs is None:
                inputs = tuple(np.empty((self.batch_size, *p.shape), np.float32) for p in parts)
                label = np.empty((self.batch_size, *target.shape), np.int64)
            offset = rng.normal(0, self.shift, len(patch)) * case.std if self.shift else None
            for store, part in zip(inputs, parts):
                store[n] = copied(part) if part.dtype == np.float16 else part
                if offset is not None:
                    store[n] += offset.astype(np.float32).reshape(-1, *(1,) * self.spatial_dims)
            label[n] = target
        tensors = tuple(torch.from_numpy(i) for i in inputs)
        label = torch.from_numpy(label)
        if self.augment is not None:
            return Batch(*self.augment(tensors[0], label, rng=rng))
        return Batch(tensors if len(tensors) > 1 else tensors[0], label)

    def _draw_groups(self, rng: np.random.Generator) -> np.ndarray:
        if self.scheme == "uniform":
            return np.zeros(self.batch_size, int)
        if self.scheme == "equal":
            return rng.choice(self._present, self.batch_size)
        return (np.arange(self.batch_size) + rng.integers(2)) % 2


class VolumeSampler:
    """Draws whole volumes, or crops of them, for networks that put out as many voxels as they take in.

    Every case comes up once before any comes up again, in a new order each time. `batch(step)` depends on the seed and
    the step alone, as `SegmentSampler`'s does.

    Args:
        cases: labelled cases, normalised as the network is to see them, all with the same channels. Stored cases
            (`datasets.store`) are read when they are drawn, others are kept in memory, on `device`.
        crop: voxels along each axis (one number, or three) of a crop from anywhere in the volume; None for whole volumes.
        multiple: whole volumes are filled up to a multiple of this by mirroring, `model.multiple`.
        batch_size: volumes per batch; they must be of one size.
        augment: `augment(image, label, rng=...)` for every batch, such as `transforms.augment`.
        seed: of all random choices.
        device: where batches are made and augmented.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        crop: int | Sequence[int] | None = None,
        multiple: int = 1,
        batch_size: int = 1,
        augment: Augment | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        if batch_size < 1 or multiple < 1:
            raise ValueError(f"batch_size={batch_size}, multiple={multiple}; both must be at least 1")
        _check_cases(cases)
        self.crop = None if crop is None else (crop,) * 3 if isinstance(crop, int) else tuple(crop)
        if self.crop is not None:
            if len(self.crop) != 3 or any(n < 1 or n % multiple for n in self.crop):
                raise ValueError(f"crop={crop}; expected one number of voxels, or three, each a multiple of {multiple}")
            for case in cases:
                if any(n < c for n, c in zip(case.shape, self.crop)):
                    raise ValueError(
                        f"{case.name} is {'×'.join(map(str, case.shape))} voxels, smaller than the crop of {self.crop}; choose a smaller one"
                    )
        elif batch_size > 1 and len({case.shape for case in cases}) > 1:
            raise ValueError("the cases are of different sizes, so whole volumes make no batch; use batch_size=1 or a crop")
        self.batch_size, self.augment, self.seed, self.device = batch_size, augment, seed, torch.device(device)
        self._sizes = [c.shape if self.crop else tuple(-(-n // multiple) * multiple for n in c.shape) for c in cases]
        self._volumes = [c if isinstance(c, StoredCase) else self._load(c, (0, 0, 0), s) for c, s in zip(cases, self._sizes)]

    def batch(self, step: int) -> Batch:
        """Batch number `step`."""
        rng = np.random.default_rng([self.seed, step])
        images, labels = zip(*(self._cut(n, rng) for n in self._turns(step)))
        image, label = torch.stack(images), torch.stack(labels)
        if self.augment is not None:
            image, label = self.augment(image, label, rng=rng)
        return Batch(image, label)

    def _turns(self, step: int) -> list[int]:
        """Which cases a batch holds."""
        count = len(self._volumes)
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        order = {r: np.random.default_rng([self.seed, r, 1]).permutation(count) for r in {n // count for n in numbers}}
        return [int(order[n // count][n % count]) for n in numbers]

    def _cut(self, number: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        volume, size = self._volumes[number], self._sizes[number]
        crop = self.crop or size
        start = [int(rng.integers(n - c + 1)) if self.crop else 0 for n, c in zip(size, crop)]
        stop = [a + c for a, c in zip(start, crop)]
        if isinstance(volume, StoredCase):
            return self._load(volume, start, stop)
        block = tuple(map(slice, start, stop))
        return volume[0][(slice(None), *block)], volume[1][block]

    def _load(self, case: Case, start, stop) -> tuple[Tensor, Tensor]:
        """A part of the image and label, mirrored beyond the border, where batches are made."""
        if isinstance(case, StoredCase):
            image, label = case.block(start, stop), case.label_block(start, stop)
        else:
            image, label = padded_region(case.image, start, stop), padded_region(case.label[None], start, stop)[0]
        image, label = np.ascontiguousarray(image, np.float32), np.ascontiguousarray(label, np.int64)
        return torch.from_numpy(image).to(self.device), torch.from_numpy(label).to(self.device)


def _check_cases(cases: Sequence[Case]) -> None:
    """Raise ValueError unless there are cases, all labelled and of the same channels."""
    if not cases:
        raise ValueError("no cases to sample from; give at least one labelled case")
    for case in cases:
        if not case.labelled:
            raise ValueError(f"{case.name} has no label; training needs one")
        if case.channels != cases[0].channels:
            raise ValueError(f"{case.name} has channels {case.channels} but {cases[0].name} has {cases[0].channels}")
