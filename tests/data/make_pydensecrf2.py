"""Writes pydensecrf2.npz: a few small problems, and what pydensecrf2 1.1, the C++ code of Krähenbühl and Koltun, makes of them.

    pip install pydensecrf2==1.1 && python tests/data/make_pydensecrf2.py

It needs a compiler, so tests read the stored answers. Inputs are stored too, as float16, which is what the answers are for;
the answers Q are in 65535ths. `<kind>/image` is `(problems, C, *space)`, `<kind>/logits` and `<kind>/q` `(problems, K, *space)`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydensecrf.densecrf
from scipy.ndimage import gaussian_filter

PROBLEMS = 4  # of each kind
KINDS = [((12, 13), 1, 2), ((12, 13), 2, 3), ((12, 11), 4, 2), ((7, 8, 6), 1, 2), ((7, 6, 8), 2, 3), ((7, 7, 6), 4, 5)]
PARAMETERS = {
    "smoothness_weight": 1.0,
    "smoothness_sigma": [2.0, 1.5, 2.5],  # along each axis
    "appearance_weight": 2.0,
    "appearance_sigma": [4.0, 3.0, 5.0],
    "intensity_sigma": [1.5, 1.0, 2.0, 1.0],  # of each channel
    "iterations": 5,
}


def problem(seed: int, shape: tuple[int, ...], channels: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image and noisy logits."""
    rng = np.random.default_rng(seed)
    smooth = lambda sigma, height: height * gaussian_filter(rng.standard_normal(shape), sigma)  # noqa: E731
    image = np.stack([smooth(1.5, 8) for _ in range(channels)])
    logits = np.stack([smooth(1, 6) for _ in range(labels)]) + rng.standard_normal((labels, *shape))
    return image.astype(np.float16), logits.astype(np.float16)


def peer(image: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Q `(K, *space)`: both kernels as features, symmetric normalisation, the library's default."""
    shape, p = logits.shape[1:], PARAMETERS
    positions = np.indices(shape, dtype=np.float32).reshape(len(shape), -1)
    sigmas = {name: np.array(p[name], np.float32)[:, None] for name in p if name.endswith("sigma")}
    smooth = positions / sigmas["smoothness_sigma"][: len(shape)]
    near = positions / sigmas["appearance_sigma"][: len(shape)]
    alike = image.reshape(len(image), -1).astype(np.float32) / sigmas["intensity_sigma"][: len(image)]
    logits = logits.astype(np.float64).reshape(len(logits), -1)
    energy = np.log(np.exp(logits).sum(0)) - logits

    crf = pydensecrf.densecrf.DenseCRF(logits.shape[1], len(logits))
    crf.setUnaryEnergy(np.ascontiguousarray(energy, np.float32))
    crf.addPairwiseEnergy(np.ascontiguousarray(smooth), p["smoothness_weight"])
    crf.addPairwiseEnergy(np.ascontiguousarray(np.concatenate([near, alike])), p["appearance_weight"])
    return np.array(crf.inference(p["iterations"])).reshape(-1, *shape)


if __name__ == "__main__":
    arrays = {name: np.asarray(value) for name, value in PARAMETERS.items()}
    for shape, channels, labels in KINDS:
        problems = [problem(seed, shape, channels, labels) for seed in range(PROBLEMS)]
        kind = f"{len(shape)}-D, {channels} channel(s), {labels} labels"
        arrays[f"{kind}/image"] = np.stack([image for image, _ in problems])
        arrays[f"{kind}/logits"] = np.stack([logits for _, logits in problems])
        answers = np.stack([peer(*one) for one in problems])
        arrays[f"{kind}/q"] = np.round(answers * 65535).astype(np.uint16)
    np.savez_compressed(Path(__file__).with_name("pydensecrf2.npz"), **arrays)
