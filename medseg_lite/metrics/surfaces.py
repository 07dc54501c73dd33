"""Distances between the surfaces of two objects, and borders between classes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from ..volume import bounding_box
from .arrays import as_binary, as_labels, as_pair, check_same_shape


def surface(mask: np.ndarray) -> np.ndarray:
    """Return the object's surface voxels: those with at least one neighbour across a face that lies outside the object.

    Voxels beyond the border of the array count as outside. In 2D these are the pixels with one of their four neighbours
    outside, in 3D the voxels with one of six.
    """
    mask = as_binary(mask, "mask")
    return mask & ~ndimage.binary_erosion(mask)


def surface_distances(prediction, truth, *, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance in mm from each surface voxel of one object to the nearest surface voxel of the other, both ways.

    Distances run from voxel centre to voxel centre. The result is `(from_prediction, from_truth)`, two 1-D arrays. When
    either object is empty, both arrays are empty.

    Args:
        prediction, truth: the two objects, bool.
        spacing: voxel size in mm along each axis. For a grid whose axes are not at right angles, a square matrix whose columns are
            the steps along the axes, `case.affine[:3, :3]`.
    """
    prediction, truth = as_pair(prediction, truth)
    spacing = _checked(spacing, truth.ndim)
    if not (prediction.any() and truth.any()):
        return np.empty(0), np.empty(0)
    box = bounding_box(prediction | truth)
    p, t = surface(prediction[box]), surface(truth[box])
    return distances_to_nearest(p, t, spacing), distances_to_nearest(t, p, spacing)


def _checked(spacing: Sequence[float] | np.ndarray, dims: int) -> np.ndarray:
    """Return voxel sizes `(dims,)`, or the steps of a grid `(dims, dims)`, as an array."""
    spacing = np.asarray(spacing, float)
    if spacing.shape not in ((dims,), (dims, dims)) or not np.isfinite(spacing).all():
        good = False
    else:
        good = (spacing > 0).all() if spacing.ndim == 1 else np.linalg.matrix_rank(spacing) == dims
    if not good:
        raise ValueError(
            f"spacing is {spacing.tolist()}; expected {dims} positive voxel sizes in mm, one per axis, or a {dims}×{dims} matrix of "
            "the steps along the axes"
        )
    return spacing


def distances_to_nearest(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Return the distance from each True voxel of `a` to the nearest True voxel of `b`; `spacing` as in `surface_distances`."""
    if spacing.ndim == 2:
        return cKDTree(np.argwhere(b) @ spacing.T).query(np.argwhere(a) @ spacing.T)[0]
    # Both ways are exact; the choice is for speed only. A real surface has few voxels, so a search tree is faster. A network's
    # first noisy guess has very many, and then the distance transform of the whole box is faster.
    if 20 * (np.count_nonzero(a) + np.count_nonzero(b)) < a.size:
        return cKDTree(np.argwhere(b) * spacing).query(np.argwhere(a) * spacing)[0]
    return ndimage.distance_transform_edt(~b, sampling=spacing)[a]


def mean_distance(from_prediction: np.ndarray, from_truth: np.ndarray) -> float:
    """Return the mean over the voxels of both surfaces together, NaN if there are none."""
    count = len(from_prediction) + len(from_truth)
    return float((from_prediction.sum() + from_truth.sum()) / count) if count else float("nan")


def largest_distance(from_prediction: np.ndarray, from_truth: np.ndarray, percentile: float = 100) -> float:
    """Return the larger of both surfaces' percentiles, NaN if there are no voxels."""
    if not len(from_prediction):
        return float("nan")
    return float(max(np.percentile(from_prediction, percentile), np.percentile(from_truth, percentile)))


def assd(prediction, truth, *, spacing: Sequence[float]) -> float:
    """Return the average symmetric surface distance in mm: the mean over all voxels of both surfaces together.

    (sum over a in dA of d(a, dB) + sum over b in dB of d(b, dA)) / (|dA| + |dB|), as in the tables of Kamnitsas et al. 2017.
    """
    return mean_distance(*surface_distances(prediction, truth, spacing=spacing))


def boundary_distance(prediction, truth, *, spacing: Sequence[float]) -> float:
    """Return the average boundary distance in mm; PROMISE12 and Drozdzal et al. 2018 (table VI) give this name to `assd`."""
    return assd(prediction, truth, spacing=spacing)


def hausdorff(prediction, truth, *, spacing: Sequence[float], percentile: float = 100) -> float:
    """Return the Hausdorff distance in mm: the largest distance of a surface voxel of either object from the other surface.

    With `percentile=95` it is the distance that 95 % of a surface's voxels do not exceed, again the larger of the two
    directions. Single stray voxels then hardly matter.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; expected above 0 and up to 100, for example 95")
    return largest_distance(*surface_distances(prediction, truth, spacing=spacing), float(percentile))


def count_borders(label, *, axis: int, mask=None) -> int:
    """Count the faces between two neighbours along `axis` that differ in class.

    Args:
        label: class of each voxel.
        axis: axis along which the two voxels are neighbours.
        mask: voxels that count, bool; only faces between two of them are counted. By default all voxels count.
    """
    label = as_labels(label, "label")
    inside = np.ones(label.shape, bool) if mask is None else as_binary(mask, "mask")
    check_same_shape(inside, label, "mask")
    axis = operator.index(axis)
    before, after = (slice(None),) * axis + (slice(-1),), (slice(None),) * axis + (slice(1, None),)
    return np.count_nonzero((label[before] != label[after]) & inside[before] & inside[after])


def slice_inconsistency(label, *, axis: int, mask=None) -> float:
    """Return how much more often the class changes from slice to slice than within slices: the stripes of 2D networks.

    A face counts when it lies between two voxels of different classes. The result is the number of such faces across `axis`
    divided by the mean number across the other axes. A ball has as many in each direction, hence 1. An object that is flat
    across `axis` has more than 1 and a long one less, so compare with the same number of the truth. Voxels are taken to be cubes.

    Args:
        label: class of each voxel, `(D, H, W)` or any other number of dimensions from two on.
        axis: axis across the slices: 2 for axial ones in a `Case`, as in `context.PLANES`.
        mask: voxels that count, bool; only faces between two of them are counted. By default all voxels count.

    Returns:
        The ratio. It is infinite where classes change only from slice to slice, and NaN where they never change.

    Source: ours, for the stripes that Mlynarski et al. 2019 show in figure 11.
    Taught in notebook 12.
    """
    label = as_labels(label, "label")
    if label.ndim < 2 or not -label.ndim <= axis < label.ndim:
        raise ValueError(f"axis={axis} of a label of shape {label.shape}; expected one of at least two axes")
    axis = operator.index(axis)
    faces = [count_borders(label, axis=a, mask=mask) for a in range(label.ndim)]
    across = faces.pop(axis)
    within = sum(faces) / len(faces)
    if within == 0:
        return float("inf") if across else float("nan")
    return across / within
