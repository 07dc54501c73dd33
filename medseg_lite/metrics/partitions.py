"""V_rand and V_info: how well a map of membranes parts an image of nerve tissue into cells."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from .arrays import as_binary, as_voxels, check_same_shape

THRESHOLDS = tuple(np.arange(11) / 10)


def v_rand(prediction, truth) -> float:
    """Return the Rand F-score of a membrane map that parts an electron-microscopy image into cells, at the best threshold.

    Args:
        prediction: probability of being inside a cell (not membrane), `(H, W)` or a stack `(D, H, W)` of slices along its last
            axis. A bool array has only one threshold.
        truth: 1 (or True) inside cells, 0 on membranes, of the same shape.

    Returns:
        2 Σ p_ij² / (Σ s_i² + Σ t_j²) in 0 to 1, averaged over slices and then maximised over the thresholds 0, .1, … 1. p_ij is
        the share of pixels that lie in cell i of the truth and segment j of the prediction, s and t are its marginals. Cells
        are 4-connected. The segments of the prediction grow until lines one pixel wide are left, whose pixels count as
        segments of their own. Only pixels inside true cells count.

    Source: Arganda-Carreras et al. 2015, "Crowdsourcing the creation of image segmentation algorithms for connectomics",
    equations 1 to 5, and the challenge's published script; Drozdzal et al. 2018, tables III and IV.
    Taught in notebook 10.
    """
    return max(rand for rand, _ in partition_scores(prediction, truth))


def v_info(prediction, truth) -> float:
    """Return the information-theoretic F-score 2 I(S; T) / (H(S) + H(T)) for the same arguments as `v_rand`.

    S and T are the true cell and the predicted segment of a random pixel, I is their mutual information and H an entropy.
    """
    return max(info for _, info in partition_scores(prediction, truth))


def partition_scores(prediction, truth) -> list[tuple[float, float]]:
    """Return V_rand and V_info at every threshold, for the same arguments as `v_rand`: a single pair for a bool array."""
    prediction, truth = as_voxels(prediction, "prediction"), as_binary(truth, "truth")
    check_same_shape(prediction, truth)
    if truth.ndim not in (2, 3):
        raise ValueError(f"the truth has shape {truth.shape}; expected one slice (H, W) or a stack of them")
    thresholds = (0.0,) if prediction.dtype == bool else THRESHOLDS
    if prediction.dtype.kind not in "biuf":
        raise ValueError(f"the prediction holds {prediction.dtype}; expected probabilities from 0 to 1")
    if not np.isfinite(prediction).all() or prediction.min() < 0 or prediction.max() > 1:
        raise ValueError(f"the prediction reaches from {prediction.min()} to {prediction.max()}; expected 0 to 1")
    slices = [(prediction, truth)] if truth.ndim == 2 else list(zip(np.moveaxis(prediction, -1, 0), np.moveaxis(truth, -1, 0)))
    if not all(t.any() for _, t in slices):
        raise ValueError("a slice of the truth has no cells (no 1); is it a membrane map that must be turned into 1 - map?")
    true_cells = [ndimage.label(t)[0] for _, t in slices]
    scores = [[_partition_score(_thin(p > th), cells) for (p, _), cells in zip(slices, true_cells)] for th in thresholds]
    return [tuple(np.mean(per_slice, axis=0).tolist()) for per_slice in scores]


def _thin(inside: np.ndarray) -> np.ndarray:
    """Number the 4-connected segments and let them grow until only lines one pixel wide, numbered 0, are left."""
    return watershed(~inside, ndimage.label(inside)[0], connectivity=1, watershed_line=True)


def _partition_score(segments: np.ndarray, cells: np.ndarray) -> tuple[float, float]:
    counted = cells > 0
    s, t = cells[counted], segments[counted].astype(np.int64)
    lines = t == 0
    t[lines] = -1 - np.arange(np.count_nonzero(lines))  # segments of a single pixel
    joint = np.unique(np.stack([s, t]), axis=1, return_counts=True)[1] / len(s)
    true, found = (np.unique(x, return_counts=True)[1] / len(s) for x in (s, t))
    rand = 2 * (joint**2).sum() / ((true**2).sum() + (found**2).sum())
    h_true, h_found, h_joint = (-(p * np.log(p)).sum() for p in (true, found, joint))
    both = h_true + h_found
    return rand, 2 * (both - h_joint) / both if both > 0 else 1.0  # one segment in one cell
