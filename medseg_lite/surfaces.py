"""The surfaces of objects and the distances between them, on which the surface metrics of `metrics` are built."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from .volume import bounding_box


def surface(mask: np.ndarray) -> np.ndarray:
    """Return the object's surface voxels: those with at least one neighbour across a face that lies outside the object.

    Voxels beyond the border of the array count as outside. In 2D these are the pixels with one of their four neighbours
    outside, in 3D the voxels with one of six.
    """
    return mask & ~ndimage.binary_erosion(mask)


def distances_between(prediction: np.ndarray, truth: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances from each surface voxel of one object to the nearest of the other, both ways; see `metrics`."""
    if not (prediction.any() and truth.any()):
        return np.empty(0), np.empty(0)
    box = bounding_box(prediction | truth)
    p, t = surface(prediction[box]), surface(truth[box])
    return distances_to_nearest(p, t, spacing), distances_to_nearest(t, p, spacing)


def distances_to_nearest(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Return the distance from each True voxel of `a` to the nearest True voxel of `b`."""
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
