"""Thresholds: what a method that gives probabilities finds at each of them, and the one that suits the validation cases best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from .arrays import as_binary, as_voxels
from .overlap import dice, precision, sensitivity, specificity


def operating_points(scores: Sequence, truths: Sequence, *, thresholds: Sequence[float] | None = None) -> pd.DataFrame:
    """Return what a method finds at each threshold: the means over cases of Dice, precision, sensitivity and specificity.

    Args:
        scores: one map of probabilities, or of any other score that is high inside the object, for each case.
        truths: the objects, in the same order.
        thresholds: thresholds to try, in any order; by default 101 from the lowest score to the highest. A voxel belongs to the object
            where its score is above the threshold.

    Returns:
        One row for each threshold, in rising order.
    """
    pairs = _pairs(scores, truths)
    if thresholds is None:
        low, high = min(float(s.min()) for s, _ in pairs), max(float(s.max()) for s, _ in pairs)
        thresholds = np.linspace(low, high, 101)
    metrics = {"dice": dice, "precision": precision, "sensitivity": sensitivity, "specificity": specificity}
    rows = []
    for threshold in sorted(map(float, thresholds)):
        found = {name: np.mean([metric(s > threshold, t) for s, t in pairs]) for name, metric in metrics.items()}
        rows.append({"threshold": threshold, **found})
    return pd.DataFrame(rows)


def best_threshold(
    scores: Sequence, truths: Sequence, *, thresholds: Sequence[float] | None = None, metric: Callable = dice
) -> float:
    """Return the threshold with the highest mean score over validation cases.

    A threshold is a parameter of a method, as its weights are. Choose it on validation cases, never on test cases, for every method of
    a comparison alike.

    Args:
        scores: one map of probabilities, or of any other score that is high inside the object, for each case.
        truths: the objects, in the same order.
        thresholds: thresholds to try. By default 101 quantiles of all scores, so that each try cuts off as many voxels as the next.
        metric: function of prediction and truth, such as `metrics.dice`.

    Returns:
        Of several thresholds with the same score the middle one.
    """
    pairs = _pairs(scores, truths)
    if thresholds is None:
        values = np.concatenate([s.ravel()[:: max(1, s.size // 100_000)] for s, _ in pairs])
        thresholds = np.quantile(values, 1 - np.geomspace(1e-4, 1, 101))
    thresholds = np.unique(np.asarray(thresholds, float))
    means = np.array([np.mean([metric(s > threshold, t) for s, t in pairs]) for threshold in thresholds])
    best = np.flatnonzero(means == means.max())
    return float(thresholds[best[len(best) // 2]])


def _pairs(scores: Sequence, truths: Sequence) -> list[tuple[np.ndarray, np.ndarray]]:
    scores, truths = list(scores), list(truths)
    if len(scores) != len(truths) or not scores:
        raise ValueError(
            f"{len(scores)} maps of scores and {len(truths)} truths; expected one truth for each map, and at least one"
        )
    pairs = [(as_voxels(s, "scores"), as_binary(t, "truth")) for s, t in zip(scores, truths)]
    for number, (s, t) in enumerate(pairs):
        if s.shape != t.shape:
            raise ValueError(f"scores {number} have shape {s.shape} and the truth {t.shape}; they must share one grid")
    return pairs
