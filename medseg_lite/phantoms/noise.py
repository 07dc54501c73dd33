"""The tools that all phantoms share: random streams, smooth random fields, grids, soft edges, checks of arguments, and cohorts.

Smooth random fields are cubic B-spline interpolations of white noise on a coarse lattice. They are cheap because the
interpolation is separable: one small matrix for each axis. The lattice is laid out in millimetres, so the same random
numbers give the same field on a coarse and on a fine grid.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from ..volume import Case

Axes = Sequence[np.ndarray]  # positions of the voxels along D, H and W, in mm

# ------------------------------------------------------------------------------------------------------- random fields


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Return the random generator for one purpose; it is independent of those for every other purpose of the same seed."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def bspline_noise(
    rng: np.random.Generator,
    axes: Axes,
    scale: float | Sequence[float],
    *,
    extent: Sequence[tuple[float, float]] | None = None,
    count: int | None = None,
) -> np.ndarray:
    """Draw smooth Gaussian noise with mean 0 and standard deviation 1, on a regular grid of any dimension.

    Args:
        rng: source of the random numbers.
        axes: positions of the samples along each axis, in mm (or pixels), one 1-D array per axis.
        scale: distance between lattice points in the same unit, for all axes or per axis. Features come out about
            three times as long (one bright and one dark blob).
        extent: (first, last) position that the lattice spans along each axis, by default that of `axes`. Fix it to get
            the same field on grids of different size. Beyond it the field continues with its edge value.
        count: number of independent fields, stacked first. By default one field without that axis.

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
        field = multiply_axis(field, axis, matrix)
    return field if count is not None else field[0]


def spline_matrix(positions: np.ndarray, scale: float, extent: tuple[float, float]) -> np.ndarray:
    """Return the matrix `(positions, lattice points)` of cubic B-spline weights, each row of unit length.

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


# ------------------------------------------------------------------------------------------------- filters and edges


def multiply_axis(array: np.ndarray, axis: int, matrix: np.ndarray) -> np.ndarray:
    """Multiply every line of `array` along `axis` by `matrix`, `(new length, old length)`."""
    # torch's batched product is many times faster here than NumPy's, which calls BLAS once per small matrix.
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    array, matrix = torch.from_numpy(array), torch.from_numpy(matrix)
    if not after:
        return (array.flatten(0, -2) @ matrix.T).numpy().reshape(*before, -1)
    return (matrix @ array.reshape(-1, array.shape[axis], int(np.prod(after)))).numpy().reshape(*before, -1, *after)


def blur(image: np.ndarray, sd: float, *, axes: Sequence[int] = (0, 1)) -> np.ndarray:
    """Blur an image with a Gaussian of standard deviation `sd` voxels, by default within slices."""
    for axis in axes:
        i = np.arange(image.shape[axis])
        weights = np.exp(-0.5 * ((i[:, None] - i) / sd) ** 2)
        image = multiply_axis(image, axis, (weights / weights.sum(1, keepdims=True)).astype(np.float32))
    return image


def soft_step(x: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Return the sigmoid 1 / (1 + exp(-x / width)), a soft step from 0 to 1 at x = 0."""
    return 1 / (1 + np.exp(-np.clip(x / width, -30, 30)))


# ------------------------------------------------------------------------------------------------------------- grids


def centred_axes(shape: Sequence[int], spacing: Sequence[float]) -> Axes:
    """Return the positions in mm of the voxels of a grid whose middle is at 0."""
    return [((np.arange(n) - (n - 1) / 2) * mm).astype(np.float32) for n, mm in zip(shape, spacing)]


def make_affine(axes: Axes, spacing: Sequence[float]) -> np.ndarray:
    """Return the matrix `(4, 4)` from voxel indices to mm for such a grid."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [a[0] for a in axes]
    return affine


# ------------------------------------------------------------------------------------------------ checks and cohorts


def check_whole(name: str, value, least: int, most: int | None = None) -> int:
    """Return the argument as an int. Raise a ValueError unless it is a whole number of any kind in this range."""
    try:
        whole = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = -1
    if whole < least or (most is not None and whole > most):
        raise ValueError(f"{name} is {value!r}; expected a whole number, {least} {f'to {most}' if most else 'or more'}")
    return whole


def check_grid(spacing: float, shape: Sequence[int] | None, usual: str) -> None:
    """Raise a ValueError unless a phantom can be made with this voxel size and grid; `usual` names the common sizes."""
    if not 0.5 <= spacing <= 8:
        raise ValueError(f"spacing is {spacing!r} mm; expected 0.5 to 8, usually {usual}")
    if shape is not None and (len(shape) != 3 or any(int(n) != n or n < 8 for n in shape)):
        raise ValueError(f"shape is {tuple(shape)}; expected three whole numbers (D, H, W) of at least 8 voxels")


def make_cohort(
    make: Callable[..., Case], count: int, *, first_seed: int, progress: bool, sites: Sequence[str] | None = None, **options
) -> list[Case]:
    """Make `count` cases with consecutive seeds.

    Args:
        make: generator of one case, called as `make(seed, **options)`, or as `make(seed, site=..., **options)` with `sites`.
        count: number of cases, 1 or more.
        first_seed: seed of the first case.
        progress: whether to show a bar.
        sites: names of sites, which take turns.
        options: further arguments of `make`.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one case")
    if sites is not None and not len(sites):
        raise ValueError('sites is empty; name at least one site, for example sites="A"')
    turns = [{} if sites is None else {"site": sites[i % len(sites)]} for i in range(count)]
    bar = tqdm(turns, desc="phantoms", unit="case", disable=not progress)
    return [make(seed, **turn, **options) for seed, turn in enumerate(bar, first_seed)]
