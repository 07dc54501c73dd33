"""Smooth random fields: cubic B-spline interpolation of white noise on a coarse lattice.

Every phantom builds on these. They are cheap because the interpolation is separable (one small matrix per axis), and
because the lattice is laid out in millimetres, the same random numbers give the same field on a coarse and a fine grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def bspline_noise(
    rng: np.random.Generator,
    axes: Sequence[np.ndarray],
    scale: float | Sequence[float],
    *,
    extent: Sequence[tuple[float, float]] | None = None,
    count: int | None = None,
) -> np.ndarray:
    """Smooth Gaussian noise with mean 0 and standard deviation 1, on a regular grid of any dimension.

    Args:
        rng: where the random numbers come from.
        axes: positions of the samples along each axis, in mm (or pixels), one 1-D array per axis.
        scale: distance between lattice points in the same unit, for all axes or per axis; features come out about
            three times as long (one bright and one dark blob).
        extent: (first, last) position that the lattice spans along each axis, by default that of `axes`. Fix it to get
            the same field on grids of different size; beyond it the field is continued by its edge value.
        count: draw this many independent fields, stacked first; by default one field without that axis.

    Returns:
        float32, `(len(axes[0]), len(axes[1]), ...)` or `(count, ...)`.
    """
    scales = np.broadcast_to(scale, (len(axes),))
    if np.any(scales <= 0):
        raise ValueError(f"scale is {scale}; expected a positive distance between lattice points")
    if extent is None:
        extent = [(float(np.min(a)), float(np.max(a))) for a in axes]
    matrices = [spline_matrix(a, s, e) for a, s, e in zip(axes, scales, extent)]
    field = rng.standard_normal((count or 1, *(m.shape[1] for m in matrices)), dtype=np.float32)
    for axis, matrix in enumerate(matrices, 1):
        field = along(field, axis, matrix)
    return field if count is not None else field[0]


def along(array: np.ndarray, axis: int, matrix: np.ndarray) -> np.ndarray:
    """Multiply every line of `array` along `axis` by `matrix`, `(new length, old length)`."""
    # torch's batched product is many times faster here than NumPy's, which calls BLAS once per small matrix.
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    array, matrix = torch.from_numpy(array), torch.from_numpy(matrix)
    if not after:
        return (array.flatten(0, -2) @ matrix.T).numpy().reshape(*before, -1)
    return (matrix @ array.reshape(-1, array.shape[axis], int(np.prod(after)))).numpy().reshape(*before, -1, *after)


def spline_matrix(positions: np.ndarray, scale: float, extent: tuple[float, float]) -> np.ndarray:
    """Matrix `(positions, lattice points)` of cubic B-spline weights, each row of unit length.

    Rows of unit length turn white noise of variance 1 into a field of variance 1 at every position.
    """
    first, last = extent
    knots = max(1, int(np.ceil((last - first) / scale)))
    t = np.clip((np.asarray(positions, np.float64) - first) / scale, 0, knots)
    cell = np.minimum(t.astype(int), knots - 1)
    f = t - cell
    weights = np.stack([(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3], 1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    matrix = np.zeros((len(t), knots + 3), np.float32)
    np.put_along_axis(matrix, cell[:, None] + np.arange(4), weights.astype(np.float32), 1)
    return matrix
