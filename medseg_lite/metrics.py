"""Agreement of a segmentation with the truth: overlap, surface distance, volume.

Every metric takes `(prediction, truth)`, two arrays of the same shape and of any number of dimensions that are True (or
1) inside the object. Torch tensors are accepted on any device. Surface metrics also take `spacing`, the voxel size in
mm along each axis.

Empty objects. Cases without a lesion, and predictions that find nothing, decide many an average. Each metric returns:

| metric                                | both empty       | only the prediction | only the truth | full truth |
|---------------------------------------|------------------|---------------------|----------------|------------|
| dice, jaccard, precision, sensitivity | `empty`, 1       | 0                   | 0              |            |
| specificity                           |                  |                     |                | `empty`, 1 |
| assd, boundary_distance, hausdorff    | nan              | nan                 | nan            |            |
| volume_difference                     | 0                | -100                | nan            |            |

The default `empty=1.0` is the rule of Kayalibay's published code. `empty=0.0` is that of the BRATS 2015 platform, which
counts cases without enhancing tumour as 0 (Kamnitsas et al. 2017, footnote 3). Both are in use, and averages made with
one cannot be compared with averages made with the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from skimage.segmentation import watershed

from .surfaces import distances_between, largest_distance, mean_distance
from .volume import Case

# Label numbers that make up each region of the BRATS challenges. 2012 to 2015: 1 necrosis, 2 oedema, 3 non-enhancing
# core, 4 enhancing core. From 2017 on: 1 necrosis and non-enhancing core, 2 oedema, 4 enhancing core.
regions: dict[str, dict[str, frozenset[int]]] = {
    "brats2015": {"whole": frozenset({1, 2, 3, 4}), "core": frozenset({1, 3, 4}), "enhancing": frozenset({4})},
    "brats2017": {"whole": frozenset({1, 2, 4}), "core": frozenset({1, 4}), "enhancing": frozenset({4})},
}

DEFAULT_METRICS = ("dice", "precision", "sensitivity", "specificity", "assd", "hausdorff")


# ---------------------------------------------------------------------------------------------------------- overlap


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


# --------------------------------------------------------------------------------------------------------- surfaces


def surface_distances(prediction, truth, *, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance in mm from each surface voxel of one object to the nearest surface voxel of the other, both ways.

    Distances run from voxel centre to voxel centre. The result is `(from_prediction, from_truth)`, two 1-D arrays. When
    either object is empty, both arrays are empty.
    """
    prediction, truth = _pair(prediction, truth)
    spacing = np.asarray(spacing, float)
    if spacing.shape != (truth.ndim,) or not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise ValueError(f"spacing is {spacing.tolist()}; expected {truth.ndim} positive voxel sizes in mm, one per axis")
    return distances_between(prediction, truth, spacing)


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
    return largest_distance(*surface_distances(prediction, truth, spacing=spacing), percentile)


# ------------------------------------------------------------------------------------------------- cases and cohorts

OVERLAP = {metric.__name__: metric for metric in (dice, jaccard, precision, sensitivity, specificity)}
# Metrics of the two arrays of `surface_distances`.
SURFACE = {
    "assd": mean_distance,
    "boundary_distance": mean_distance,
    "hausdorff": largest_distance,
    "hausdorff95": partial(largest_distance, percentile=95),
}


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
    """Compute the metrics of each region of one case, as a table with one row per region.

    Args:
        prediction: class of each voxel, integers.
        truth: true class of each voxel, of the same shape.
        regions: "brats2015", "brats2017", or label numbers by region, `{"tumour": {1, 4}, "oedema": 2}`.
        spacing: voxel size in mm along each axis (`case.spacing`). Only surface metrics need it.
        mask: where voxels count, for example inside the brain. The others are background in both arrays.
        metrics: columns to compute, among dice, jaccard, precision, sensitivity, specificity, assd, boundary_distance,
            hausdorff, hausdorff95 (mm) and volume_difference (%).
        empty: value of overlap metrics where a region is in neither array; see the head of this module.
        case: value of the column `case`.

    Returns:
        A DataFrame with the columns case, region and one per metric. `pandas.concat` joins the tables of several cases, and
        `evaluate_cohort` makes them at once.
    """
    known = [*OVERLAP, *SURFACE, "volume_difference"]
    unknown = [m for m in metrics if m not in known]
    if unknown:
        raise ValueError(f"metrics holds {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}")
    surfaces = any(m in SURFACE for m in metrics)
    if surfaces and spacing is None:
        raise ValueError("surface metrics need spacing=(mm, mm, mm), for example case.spacing; or leave them out")
    prediction, truth = _labels(prediction, "prediction"), _labels(truth, "truth")
    _check_same_shape(prediction, truth)
    wanted = as_regions(regions)
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
        counted = (p, t) if mask is None else (p[mask], t[mask])
        if surfaces:
            distances = surface_distances(*((p, t) if mask is None else (p & mask, t & mask)), spacing=spacing)
        row = {"case": case, "region": region}
        for metric in metrics:
            if metric in OVERLAP:
                row[metric] = OVERLAP[metric](*counted, empty=empty)
            elif metric in SURFACE:
                row[metric] = SURFACE[metric](*distances)
            else:
                row[metric] = volume_difference(*counted)
        rows.append(row)
    return pd.DataFrame(rows, columns=["case", "region", *metrics])


def evaluate_cohort(predictions: Iterable, cases: Iterable[Case], *, use_mask: bool = False, **options) -> pd.DataFrame:
    """Apply `evaluate` to a cohort and return one row per case and region.

    `statistics.summary` turns the result into means and standard deviations.

    Args:
        predictions: class maps `(D, H, W)`, one per case, in the order of `cases`.
        cases: cases with a label; `evaluate` gets their spacing and name.
        use_mask: whether to count only the voxels inside each case's mask.
        options: further arguments of `evaluate`.
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


# ------------------------------------------------------------------------------------------------------- partitions

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
    Taught in notebook 08.
    """
    return max(rand for rand, _ in _partition_scores(prediction, truth))


def v_info(prediction, truth) -> float:
    """Return the information-theoretic F-score 2 I(S; T) / (H(S) + H(T)) for the same arguments as `v_rand`.

    S and T are the true cell and the predicted segment of a random pixel, I is their mutual information and H an entropy.
    """
    return max(info for _, info in _partition_scores(prediction, truth))


def _partition_scores(prediction, truth) -> list[tuple[float, float]]:
    """Return V_rand and V_info for every threshold."""
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


# ----------------------------------------------------------------------------------------------------------- stripes


def count_borders(label, *, axis: int, mask=None) -> int:
    """Count the faces between two neighbours along `axis` that differ in class.

    Args:
        label: class of each voxel.
        axis: axis along which the two voxels are neighbours.
        mask: count only faces between two voxels of the mask.
    """
    label = _labels(label, "label")
    inside = np.ones(label.shape, bool) if mask is None else _binary(mask, "mask")
    _check_same_shape(inside, label, "mask")
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
        mask: where voxels count. Only faces between two voxels of the mask are counted.

    Returns:
        The ratio. It is infinite where classes change only from slice to slice, and NaN where they never change.

    Source: ours, for the stripes that Mlynarski et al. 2019 show in figure 11.
    Taught in notebook 09.
    """
    label = _labels(label, "label")
    if label.ndim < 2 or not -label.ndim <= axis < label.ndim:
        raise ValueError(f"axis={axis} of a label of shape {label.shape}; expected one of at least two axes")
    faces = [count_borders(label, axis=a, mask=mask) for a in range(label.ndim)]
    across = faces.pop(axis)
    within = sum(faces) / len(faces)
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
    """Return the numbers of true positives, false positives, false negatives and true negatives."""
    p, t = _pair(prediction, truth)
    tp, positive, true = int(np.count_nonzero(p & t)), int(np.count_nonzero(p)), int(np.count_nonzero(t))
    fp, fn = positive - tp, true - tp
    return tp, fp, fn, p.size - tp - fp - fn


def _ratio(part: int, whole: int, empty: float) -> float:
    return part / whole if whole else float(empty)


def as_regions(wanted: str | Mapping[str, Iterable[int] | int]) -> dict[str, list[int]]:
    """Return the label numbers of each region, for the name of a scheme in `regions` or for label numbers by region."""
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
