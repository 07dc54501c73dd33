"""How well a segmentation agrees with the truth: overlap, surface distance, volume.

Every metric takes `(prediction, truth)`, two arrays of the same shape and of any number of dimensions that are True (or
1) inside the object; torch tensors are accepted on any device. Surface metrics also take `spacing`, the voxel size in
mm along each axis.

Empty objects. Cases without a lesion, and predictions that find nothing, decide many an average, so here is what each
metric returns:

| metric                                | both empty       | only the prediction | only the truth | full truth |
|---------------------------------------|------------------|---------------------|----------------|------------|
| dice, jaccard, precision, sensitivity | `empty`, 1       | 0                   | 0              |            |
| specificity                           |                  |                     |                | `empty`, 1 |
| assd, boundary_distance, hausdorff    | nan              | nan                 | nan            |            |
| volume_difference                     | 0                | -100                | nan            |            |

The default `empty=1.0` is the rule of Kayalibay's published code; `empty=0.0` is that of the BRATS 2015 platform, which
counts cases without enhancing tumour as 0 (Kamnitsas 2017, footnote 3). Both are in use, and averages made with one
cannot be compared with averages made with the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.segmentation import watershed

from .volume import Case, bounding_box

# Label numbers that make up each region of the BRATS challenges. 2012 to 2015: 1 necrosis, 2 oedema, 3 non-enhancing
# core, 4 enhancing core. From 2017 on: 1 necrosis and non-enhancing core, 2 oedema, 4 enhancing core.
regions: dict[str, dict[str, frozenset[int]]] = {
    "brats2015": {"whole": frozenset({1, 2, 3, 4}), "core": frozenset({1, 3, 4}), "enhancing": frozenset({4})},
    "brats2017": {"whole": frozenset({1, 2, 4}), "core": frozenset({1, 4}), "enhancing": frozenset({4})},
}

DEFAULT_METRICS = ("dice", "precision", "sensitivity", "specificity", "assd", "hausdorff")


# ---------------------------------------------------------------------------------------------------------- overlap


def dice(prediction, truth, *, empty: float = 1.0) -> float:
    """Dice similarity coefficient, 2 TP / (2 TP + FP + FN), in 0 to 1."""
    return _dice(*_count(prediction, truth), empty)


def jaccard(prediction, truth, *, empty: float = 1.0) -> float:
    """Jaccard index (intersection over union), TP / (TP + FP + FN), in 0 to 1."""
    return _jaccard(*_count(prediction, truth), empty)


def precision(prediction, truth, *, empty: float = 1.0) -> float:
    """Share of the predicted voxels that are right, TP / (TP + FP)."""
    return _precision(*_count(prediction, truth), empty)


def sensitivity(prediction, truth, *, empty: float = 1.0) -> float:
    """Share of the true voxels that were found (recall), TP / (TP + FN)."""
    return _sensitivity(*_count(prediction, truth), empty)


def specificity(prediction, truth, *, empty: float = 1.0) -> float:
    """Share of the voxels outside the object that were left alone, TN / (TN + FP).

    It depends on how much background the array holds: in a whole head volume nearly every method scores above 0.99.
    """
    return _specificity(*_count(prediction, truth), empty)


def volume_difference(prediction, truth) -> float:
    """Relative volume difference in percent, 100 (|prediction| - |truth|) / |truth|; negative when too small."""
    return _volume_difference(*_count(prediction, truth))


# --------------------------------------------------------------------------------------------------------- surfaces


def surface(mask: np.ndarray) -> np.ndarray:
    """The object's surface voxels: those with at least one neighbour across a face that lies outside the object.

    Beyond the border of the array counts as outside. In 2-D these are the pixels with one of their four neighbours
    outside, in 3-D the voxels with one of six.
    """
    padded = np.pad(mask, 1)
    inside = mask.copy()
    middle = [slice(1, -1)] * mask.ndim
    for axis in range(mask.ndim):
        for neighbour in (slice(None, -2), slice(2, None)):
            inside &= padded[tuple(neighbour if a == axis else middle[a] for a in range(mask.ndim))]
    return mask & ~inside


def surface_distances(prediction, truth, *, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Distance in mm from each surface voxel of one object to the nearest surface voxel of the other, both ways.

    Distances run from voxel centre to voxel centre. Returns `(from_prediction, from_truth)`, two 1-D arrays; when
    either object is empty both are empty.
    """
    return _surface_distances(*_pair(prediction, truth), spacing)


def assd(prediction, truth, *, spacing: Sequence[float]) -> float:
    """Average symmetric surface distance in mm: the mean over all voxels of both surfaces together.

    (sum over a in dA of d(a, dB) + sum over b in dB of d(b, dA)) / (|dA| + |dB|), as in the tables of Kamnitsas 2017.
    """
    return _assd(*surface_distances(prediction, truth, spacing=spacing))


def boundary_distance(prediction, truth, *, spacing: Sequence[float]) -> float:
    """Average boundary distance in mm, the name that PROMISE12 and Drozdzal 2018 (Table VI) give to `assd`."""
    return assd(prediction, truth, spacing=spacing)


def hausdorff(prediction, truth, *, spacing: Sequence[float], percentile: float | None = None) -> float:
    """Hausdorff distance in mm: how far the worst surface voxel of either object lies from the other surface.

    With `percentile=95` the distance that 95 % of a surface's voxels keep within, again the worse of the two
    directions; it forgives single stray voxels.
    """
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; expected above 0 and up to 100, for example 95")
    return _hausdorff(*surface_distances(prediction, truth, spacing=spacing), percentile)


# ------------------------------------------------------------------------------------------------- cases and cohorts


def evaluate(
    prediction,
    truth,
    *,
    regions: str | Mapping[str, Iterable[int] | int] = "brats2015",
    spacing: Sequence[float] | None = None,
    mask=None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    empty: float = 1.0,
    case: str = "case",
) -> pd.DataFrame:
    """Metrics of each region of one case, as a table with one row per region.

    Args:
        prediction: class of each voxel, integers.
        truth: true class of each voxel, the same shape.
        regions: "brats2015", "brats2017", or label numbers by region, `{"tumour": {1, 4}, "oedema": 2}`.
        spacing: voxel size in mm along each axis (`case.spacing`); only surface metrics need it.
        mask: count only the voxels where this is True (the brain); the others are background in both.
        metrics: columns to compute, among dice, jaccard, precision, sensitivity, specificity, assd, boundary_distance,
            hausdorff, hausdorff95 (mm) and volume_difference (%).
        empty: value of overlap metrics where a region is in neither array; see the head of this module.
        case: what the column `case` says.

    Returns:
        A DataFrame with the columns case, region and one per metric. Tables of several cases go together with
        `pandas.concat`, or come at once from `evaluate_cohort`.
    """
    unknown = [m for m in metrics if m not in _OVERLAP and m not in _SURFACE and m != "volume_difference"]
    if unknown:
        known = ", ".join([*_OVERLAP, *_SURFACE, "volume_difference"])
        raise ValueError(f"metrics holds {', '.join(map(repr, unknown))}; expected some of {known}")
    surfaces = any(m in _SURFACE for m in metrics)
    if surfaces and spacing is None:
        raise ValueError("surface metrics need spacing=(mm, mm, mm), for example case.spacing; or leave them out")
    prediction, truth = _labels(prediction, "prediction"), _labels(truth, "truth")
    _check_same_shape(prediction, truth)
    wanted = _regions(regions)
    if isinstance(regions, str):
        _check_covered(prediction, "prediction", wanted, regions)
        _check_covered(truth, "truth", wanted, regions)
    if mask is not None:
        mask = _binary(mask, "mask")
        _check_same_shape(mask, truth, "mask")
        if not mask.any():
            raise ValueError("the mask is empty: no voxel would be evaluated; pass mask=None for the whole volume")

    rows = []
    for region, labels in wanted.items():
        p, t = _lookup(labels)[prediction], _lookup(labels)[truth]
        if mask is not None:
            p, t = p & mask, t & mask
        tp, fp, fn, tn = _count_bool(p, t)
        if mask is not None:
            tn -= mask.size - np.count_nonzero(mask)
        distances = _surface_distances(p, t, spacing) if surfaces else ()
        row = {"case": case, "region": region}
        for metric in metrics:
            if metric in _OVERLAP:
                row[metric] = _OVERLAP[metric](tp, fp, fn, tn, empty)
            elif metric in _SURFACE:
                row[metric] = _SURFACE[metric](*distances)
            else:
                row[metric] = _volume_difference(tp, fp, fn, tn)
        rows.append(row)
    return pd.DataFrame(rows, columns=["case", "region", *metrics])


def evaluate_cohort(predictions: Iterable, cases: Iterable[Case], *, use_mask: bool = False, **options) -> pd.DataFrame:
    """`evaluate` for a cohort: one row per case and region.

    Args:
        predictions: `(D, H, W)` class maps, one per case, in the order of `cases`.
        cases: cases with a label; their spacing and name are taken from them.
        use_mask: count only the voxels inside each case's mask.
        options: passed to `evaluate`.

    `statistics.summary` turns the result into means and standard deviations.
    """
    tables = []
    for prediction, case in zip_longest(predictions, cases):
        if prediction is None or case is None:
            raise ValueError(
                f"{'predictions' if prediction is None else 'cases'} ended after {len(tables)}; "
                "expected as many predictions as cases, in the same order"
            )
        if case.label is None:
            raise ValueError(f"{case.name} has no label to compare with; leave it out of the evaluation")
        if use_mask and case.mask is None:
            raise ValueError(f"{case.name} has no mask; pass use_mask=False")
        try:
            table = evaluate(
                prediction, case.label, spacing=case.spacing, mask=case.mask if use_mask else None, case=case.name, **options
            )
        except ValueError as error:
            raise ValueError(f"{case.name}: {error}") from error
        tables.append(table)
    if not tables:
        raise ValueError("the cohort is empty: there are no predictions to evaluate")
    return pd.concat(tables, ignore_index=True)


# --------------------------------------------------------------------------------------------------------- formulas


def _ratio(part: int, whole: int, tp_fp_fn: int, empty: float) -> float:
    """`part / whole`; where that is 0/0, `empty` if neither object has a voxel and 0 if one has been missed or made up."""
    if whole == 0:
        return float(empty) if tp_fp_fn == 0 else 0.0
    return part / whole


def _dice(tp, fp, fn, tn, empty) -> float:
    return _ratio(2 * tp, 2 * tp + fp + fn, tp + fp + fn, empty)


def _jaccard(tp, fp, fn, tn, empty) -> float:
    return _ratio(tp, tp + fp + fn, tp + fp + fn, empty)


def _precision(tp, fp, fn, tn, empty) -> float:
    return _ratio(tp, tp + fp, tp + fp + fn, empty)


def _sensitivity(tp, fp, fn, tn, empty) -> float:
    return _ratio(tp, tp + fn, tp + fp + fn, empty)


def _specificity(tp, fp, fn, tn, empty) -> float:
    return _ratio(tn, tn + fp, 0, empty)


def _volume_difference(tp, fp, fn, tn) -> float:
    if tp + fn == 0:
        return 0.0 if fp == 0 else float("nan")
    return 100 * (fp - fn) / (tp + fn)


def _assd(from_prediction, from_truth) -> float:
    count = len(from_prediction) + len(from_truth)
    return float((from_prediction.sum() + from_truth.sum()) / count) if count else float("nan")


def _hausdorff(from_prediction, from_truth, percentile: float | None = None) -> float:
    if not len(from_prediction):
        return float("nan")
    worst = 100 if percentile is None else percentile
    return float(max(np.percentile(from_prediction, worst), np.percentile(from_truth, worst)))


_OVERLAP = {
    "dice": _dice,
    "jaccard": _jaccard,
    "precision": _precision,
    "sensitivity": _sensitivity,
    "specificity": _specificity,
}
_SURFACE = {
    "assd": _assd,
    "boundary_distance": _assd,
    "hausdorff": _hausdorff,
    "hausdorff95": lambda *distances: _hausdorff(*distances, percentile=95),
}


def _surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    spacing = np.asarray(spacing, float)
    if spacing.shape != (truth.ndim,) or not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise ValueError(f"spacing is {spacing.tolist()}; expected {truth.ndim} positive voxel sizes in mm, one per axis")
    if not (prediction.any() and truth.any()):
        return np.empty(0), np.empty(0)
    box = bounding_box(prediction | truth)
    p, t = surface(prediction[box]), surface(truth[box])
    return _to_nearest(p, t, spacing), _to_nearest(t, p, spacing)


def _to_nearest(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance from each True voxel of `a` to the nearest of `b`. Exact either way; the choice is for speed only."""
    # A real surface has few voxels, so a search tree wins; a network's first noisy guess has very many, and then the
    # distance transform of the whole box does.
    if 20 * (np.count_nonzero(a) + np.count_nonzero(b)) < a.size:
        return cKDTree(np.argwhere(b) * spacing).query(np.argwhere(a) * spacing)[0]
    return ndimage.distance_transform_edt(~b, sampling=spacing)[a]


# ------------------------------------------------------------------------------------------------------- partitions

THRESHOLDS = tuple(np.arange(11) / 10)


def v_rand(prediction, truth) -> float:
    """How well a membrane map parts an electron microscopy image into cells: the Rand F-score, best over thresholds.

    Args:
        prediction: probability of being inside a cell (not membrane), `(H, W)` or a stack `(D, H, W)` of slices along its last
            axis. Of a bool array there is only one threshold.
        truth: 1 (or True) inside cells, 0 on membranes, of the same shape.

    Returns:
        2 Σ p_ij² / (Σ s_i² + Σ t_j²) in 0 to 1, averaged over slices and then maximised over the thresholds 0, .1, … 1. p_ij is
        the share of pixels that lie in cell i of the truth and segment j of the prediction, s and t are its marginals. Cells
        are 4-connected; the segments of the prediction grow until lines one pixel wide are left, whose pixels count as segments
        of their own. Only pixels inside true cells count.

    Source: Arganda-Carreras et al. 2015, "Crowdsourcing the creation of image segmentation algorithms for connectomics",
    equations 1 to 5, and the challenge's published script; tables III and IV of Drozdzal et al. 2018.
    """
    return max(rand for rand, _ in _partition_scores(prediction, truth))


def v_info(prediction, truth) -> float:
    """The information-theoretic sibling of `v_rand`: 2 I(S; T) / (H(S) + H(T)), of the same arguments.

    S and T are the true cell and the predicted segment of a random pixel, I their mutual information and H entropies.
    """
    return max(info for _, info in _partition_scores(prediction, truth))


def _partition_scores(prediction, truth) -> list[tuple[float, float]]:
    """V_rand and V_info for every threshold."""
    prediction, truth = _array(prediction, "prediction"), _binary(truth, "truth")
    _check_same_shape(prediction, truth)
    if truth.ndim not in (2, 3):
        raise ValueError(f"the truth has shape {truth.shape}; expected one slice (H, W) or a stack of them")
    thresholds = (0.0,) if prediction.dtype == bool else THRESHOLDS
    if not np.isfinite(prediction).all() or prediction.min() < 0 or prediction.max() > 1:
        raise ValueError(f"the prediction reaches from {prediction.min()} to {prediction.max()}; expected 0 to 1")
    slices = [(prediction, truth)] if truth.ndim == 2 else list(zip(np.moveaxis(prediction, -1, 0), np.moveaxis(truth, -1, 0)))
    if not all(t.any() for _, t in slices):
        raise ValueError("a slice of the truth has no cells (no 1); is it a membrane map that must be turned into 1 - map?")
    true_cells = [ndimage.label(t)[0] for _, t in slices]
    scores = [[_partition_score(_thinned(p > th), cells) for (p, _), cells in zip(slices, true_cells)] for th in thresholds]
    return [tuple(np.mean(of_slices, axis=0).tolist()) for of_slices in scores]


def _thinned(inside: np.ndarray) -> np.ndarray:
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


# ----------------------------------------------------------------------------------------------------------- stripes


def slice_inconsistency(label, *, axis: int, mask=None) -> float:
    """How much more often the class changes from slice to slice than within slices: the stripes that 2D networks leave.

    The faces between voxels of different classes are counted, those that part two neighbours along `axis` against the mean of
    those along the other axes. A ball has as many of each, hence 1; an object that is flat across `axis` has more than 1 and a
    long one less, so compare with the same number of the truth. Voxels are taken to be cubes.

    Args:
        label: class of each voxel, `(D, H, W)` or of any other number of dimensions from two on.
        axis: across the slices: 2 for axial ones in a `Case`, as in `context.PLANES`.
        mask: count only faces between two voxels of the mask.

    Returns:
        The ratio; infinite where classes change from slice to slice only, nan where they never change.

    Source: ours, for what Mlynarski et al. 2019 show in figure 11.
    """
    label = _labels(label, "label")
    if label.ndim < 2 or not -label.ndim <= axis < label.ndim:
        raise ValueError(f"axis={axis} of a label of shape {label.shape}; expected one of at least two axes")
    inside = np.ones(label.shape, bool) if mask is None else _binary(mask, "mask")
    _check_same_shape(inside, label, "mask")

    def faces(a: int) -> int:
        before, after = (slice(None),) * a + (slice(-1),), (slice(None),) * a + (slice(1, None),)
        return np.count_nonzero((label[before] != label[after]) & inside[before] & inside[after])

    axis %= label.ndim
    across = faces(axis)
    within = sum(faces(a) for a in range(label.ndim) if a != axis) / (label.ndim - 1)
    if within == 0:
        return float("inf") if across else float("nan")
    return across / within


# ----------------------------------------------------------------------------------------------------------- inputs


def _array(array, what: str) -> np.ndarray:
    array = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    if array.size == 0 or array.ndim == 0:
        raise ValueError(f"the {what} has shape {array.shape}; expected an array of voxels")
    return array


def _binary(array, what: str) -> np.ndarray:
    array = _array(array, what)
    if array.dtype == bool:
        return array
    inside = array != 0
    if not np.array_equal(inside, array):
        odd = array[inside != array].flat[0]
        raise ValueError(
            f"the {what} holds {odd}; expected only 0 and 1, or a bool array. "
            f"Compare it first, for example {what} == 4 or {what} > 0.5"
        )
    return inside


def _labels(array, what: str) -> np.ndarray:
    array = _array(array, what)
    if array.dtype.kind not in "bui":
        raise ValueError(f"the {what} is {array.dtype}; expected integer class numbers (of logits, take the argmax)")
    if array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"the {what} holds classes {array.min()} to {array.max()}; expected 0 to 255")
        array = array.astype(np.uint8)
    return array


def _pair(prediction, truth) -> tuple[np.ndarray, np.ndarray]:
    prediction, truth = _binary(prediction, "prediction"), _binary(truth, "truth")
    _check_same_shape(prediction, truth)
    return prediction, truth


def _check_same_shape(array: np.ndarray, truth: np.ndarray, what: str = "prediction") -> None:
    if array.shape != truth.shape:
        raise ValueError(f"the {what} has shape {array.shape} but the truth {truth.shape}; they must share one grid")


def _count(prediction, truth) -> tuple[int, int, int, int]:
    return _count_bool(*_pair(prediction, truth))


def _count_bool(p: np.ndarray, t: np.ndarray) -> tuple[int, int, int, int]:
    tp, positive, true = int(np.count_nonzero(p & t)), int(np.count_nonzero(p)), int(np.count_nonzero(t))
    fp, fn = positive - tp, true - tp
    return tp, fp, fn, p.size - tp - fp - fn


def _regions(wanted: str | Mapping[str, Iterable[int] | int]) -> dict[str, list[int]]:
    if isinstance(wanted, str):
        if wanted not in regions:
            raise ValueError(f"regions is {wanted!r}; expected {' or '.join(map(repr, regions))} or labels by name")
        wanted = regions[wanted]
    named = {name: [labels] if isinstance(labels, int) else sorted(labels) for name, labels in wanted.items()}
    for name, labels in named.items():
        if not labels or min(labels) < 0 or max(labels) > 255:
            raise ValueError(f"region {name!r} has the labels {labels}; expected one or more from 0 to 255")
    return named


def _check_covered(array: np.ndarray, what: str, named: dict[str, list[int]], scheme: str) -> None:
    found = set(np.flatnonzero(np.bincount(array.reshape(-1), minlength=1)).tolist())
    stray = sorted(found - {0}.union(*named.values()))
    if stray:
        raise ValueError(
            f"the {what} holds label {', '.join(map(str, stray))}, which no region of {scheme} has; "
            "map its labels first or pass the regions as a dict"
        )


def _lookup(labels: list[int]) -> np.ndarray:
    table = np.zeros(256, bool)
    table[labels] = True
    return table
