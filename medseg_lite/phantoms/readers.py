"""Simulated readers: people who outline the same object, each with a habit, and how far they agree.

Two experts who outline one tumour do not draw the same line. The readers here start from the truth, so it is known what each of them
does wrong. Real readers have all habits at once, do not know the truth, and disagree most where the scan is faint.

| habit | what the reader does |
|---|---|
| `generous` | draws outside: all voxels within `strength` of the border belong to the object |
| `cautious` | draws inside: all voxels within `strength` of the border belong to the background |
| `smooth` | rounds corners and thin parts off: a Gaussian filter with `strength` as standard deviation, cut at one half |
| `unsteady` | wanders to both sides of the border, smoothly, by `strength` at most and two thirds of it typically |
| `slip` | shifts the outline in a third of the axial slices, by `strength`, each in a direction of its own |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from .. import metrics
from ..arrays import as_array
from .noise import bspline_noise, stream

WANDERING = 6.0  # mm between the lattice points of an unsteady hand; its bulges are about three times as long


def draw_as_reader(
    label: np.ndarray, habit: str, seed: int = 0, *, strength: float = 1.5, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> np.ndarray:
    """Return the object as a reader with a habit outlines it.

    Two habits are exact opposites: the cautious reader's background is what the generous one would draw for the background. The
    cautious outline lies inside that of the unsteady reader, and this one inside the generous outline, at the same strength. A voxel's
    distance to the border is that to the nearest voxel beyond it, less half the smallest spacing. So a strength below half the spacing
    changes nothing, and an object thinner than twice the strength vanishes under a cautious hand.

    Args:
        label: truth `(D, H, W)`. All labels above 0 are one object.
        habit: "generous", "cautious", "smooth", "unsteady" or "slip"; see the table in `phantoms.readers`.
        seed: seed of the unsteady hand and of the slips. The other habits do not depend on it.
        strength: size of the error in mm.
        spacing: size of a voxel in mm along D, H and W: `case.spacing`.

    Returns:
        Outlined object, bool `(D, H, W)`. An empty object stays empty.

    Raises:
        ValueError: for an unknown habit, a label without three axes, or a strength or spacing that is not positive.

    Taught in notebook 00.
    """
    if habit not in HABITS:
        raise ValueError(f"there is no habit {habit!r}; expected one of {', '.join(HABITS)}")
    truth = as_array(label, "the label") > 0
    if truth.ndim != 3:
        raise ValueError(f"the label has shape {truth.shape}; expected (D, H, W)")
    size = np.asarray(spacing, float)
    if size.shape != (3,) or not (np.isfinite([strength, *size]).all() and min(strength, *size) > 0):
        raise ValueError(f"strength is {strength}, spacing {spacing}; expected positive numbers of mm, three for the spacing")
    return HABITS[habit](truth, strength, size, stream(seed, habit)) if truth.any() else truth.copy()


def mean_pairwise_dice(labels: Sequence[np.ndarray]) -> float:
    """Return the mean Dice of all pairs of readers.

    A method that does as well as one more reader scores about this much when it is judged against one of them. It is no bound: the
    truth that all readers miss in their own ways may agree with each of them better than they agree with each other, and a method that
    has learnt a reader's habit agrees with that reader better still.

    Args:
        labels: object of each reader, on one grid. All labels above 0 are one object.

    Raises:
        ValueError: for fewer than two readers, or for arrays of different shapes.

    Taught in notebook 00.
    """
    if len(labels) < 2:
        raise ValueError(f"the number of readers is {len(labels)}; expected two or more")
    drawn = [as_array(label, "the label") > 0 for label in labels]
    return float(np.mean([metrics.dice(a, b) for a, b in itertools.combinations(drawn, 2)]))


def _move_border(truth: np.ndarray, size: np.ndarray, by: float | np.ndarray) -> np.ndarray:
    """Return the object with its border moved outwards by so many mm, inwards where the number is negative."""
    half = size.min() / 2  # from the border to the centres of the nearest voxels
    outside = ndimage.distance_transform_edt(~truth, size) - half
    inside = np.full(truth.shape, np.inf) if truth.all() else ndimage.distance_transform_edt(truth, size) - half
    return np.where(truth, inside > -by, outside <= by)


def _wander(truth: np.ndarray, strength: float, size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = bspline_noise(rng, [n * np.arange(count) for n, count in zip(size, truth.shape)], WANDERING)
    return _move_border(truth, size, strength * np.clip(noise, -1, 1))


def _slip(truth: np.ndarray, strength: float, size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    drawn, slices = truth.copy(), np.flatnonzero(truth.any(axis=(0, 1)))
    for index in rng.choice(slices, math.ceil(len(slices) / 3), replace=False):
        angle = rng.uniform(0, 2 * math.pi)
        steps = np.rint(strength * np.array([math.cos(angle), math.sin(angle)]) / size[:2])
        drawn[:, :, index] = ndimage.shift(truth[:, :, index].astype(np.uint8), steps, order=0)
    return drawn


HABITS: dict[str, Callable[[np.ndarray, float, np.ndarray, np.random.Generator], np.ndarray]] = {
    "generous": lambda truth, strength, size, rng: _move_border(truth, size, strength),
    "cautious": lambda truth, strength, size, rng: _move_border(truth, size, -strength),
    "smooth": lambda truth, strength, size, rng: ndimage.gaussian_filter(truth.astype(float), strength / size) > 0.5,
    "unsteady": _wander,
    "slip": _slip,
}
