"""Overlap of two objects, voxel by voxel, and the difference of their volumes."""

from __future__ import annotations

import numpy as np

from .arrays import as_pair


def dice(prediction, truth, *, empty: float = 1.0) -> float:
    """Return the Dice similarity coefficient, 2 TP / (2 TP + FP + FN), in 0 to 1."""
    tp, fp, fn, _ = _count(prediction, truth)
    return _ratio(2 * tp, 2 * tp + fp + fn, empty)


def jaccard(prediction, truth, *, empty: float = 1.0) -> float:
    """Return the Jaccard index (intersection over union), TP / (TP + FP + FN), in 0 to 1."""
    tp, fp, fn, _ = _count(prediction, truth)
    return _ratio(tp, tp + fp + fn, empty)


def precision(prediction, truth, *, empty: float = 1.0) -> float:
    """Return the share of the predicted voxels that are right, TP / (TP + FP)."""
    tp, fp, fn, _ = _count(prediction, truth)
    return _ratio(tp, tp + fp, 0.0 if fn else empty)


def sensitivity(prediction, truth, *, empty: float = 1.0) -> float:
    """Return the share of the true voxels that were found (recall), TP / (TP + FN)."""
    tp, fp, fn, _ = _count(prediction, truth)
    return _ratio(tp, tp + fn, 0.0 if fp else empty)


def specificity(prediction, truth, *, empty: float = 1.0) -> float:
    """Return the share of the voxels outside the object that were predicted as such, TN / (TN + FP).

    It depends on the amount of background in the array: in a whole head volume nearly every method scores above 0.99.
    """
    _, fp, _, tn = _count(prediction, truth)
    return _ratio(tn, tn + fp, empty)


def volume_difference(prediction, truth) -> float:
    """Return the relative volume difference in percent, 100 (|prediction| - |truth|) / |truth|; negative when too small."""
    tp, fp, fn, _ = _count(prediction, truth)
    if tp + fn == 0:
        return 0.0 if fp == 0 else float("nan")
    return 100 * (fp - fn) / (tp + fn)


def _count(prediction, truth) -> tuple[int, int, int, int]:
    """Return the numbers of true positives, false positives, false negatives and true negatives."""
    p, t = as_pair(prediction, truth)
    tp, positive, true = int(np.count_nonzero(p & t)), int(np.count_nonzero(p)), int(np.count_nonzero(t))
    fp, fn = positive - tp, true - tp
    return tp, fp, fn, p.size - tp - fp - fn


def _ratio(part: int, whole: int, empty: float) -> float:
    return part / whole if whole else float(empty)
