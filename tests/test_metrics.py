"""Metrics against hand-computed tables, brute force, and MONAI."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_lite import metrics
from medseg_lite.volume import Case

OVERLAP = ("dice", "jaccard", "precision", "sensitivity", "specificity")
SURFACE = ("assd", "boundary_distance", "hausdorff")

# ---------------------------------------------------------------------------------------------------------- overlap

# TP 2, FP 1, FN 3, TN 4.
PREDICTION = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
TRUTH = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "metric, expected",
    [("dice", 4 / 8), ("jaccard", 2 / 6), ("precision", 2 / 3), ("sensitivity", 2 / 5), ("specificity", 4 / 5)],
)
def test_overlap_by_hand(metric, expected):
    assert getattr(metrics, metric)(PREDICTION, TRUTH) == pytest.approx(expected)


def test_volume_difference_is_signed_and_relative_to_the_truth():
    assert metrics.volume_difference(PREDICTION, TRUTH) == pytest.approx(-40)
    assert metrics.volume_difference(TRUTH, PREDICTION) == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float32])
def test_array_types_give_the_same_number(kind):
    assert metrics.dice(PREDICTION.astype(kind), TRUTH.astype(kind)) == 0.5
    assert metrics.dice(torch.tensor(PREDICTION.astype(kind)), torch.tensor(TRUTH.astype(kind))) == 0.5
    assert metrics.dice(torch.tensor(PREDICTION.astype(np.float32), requires_grad=True), TRUTH) == 0.5


NOTHING, SOME, ALL = np.zeros((2, 3)), np.eye(2, 3), np.ones((2, 3))


@pytest.mark.parametrize("metric", ["dice", "jaccard", "precision", "sensitivity"])
def test_empty_objects_in_overlap_metrics(metric):
    function = getattr(metrics, metric)
    assert function(NOTHING, NOTHING) == 1
    assert function(NOTHING, NOTHING, empty=0.0) == 0
    assert np.isnan(function(NOTHING, NOTHING, empty=float("nan")))
    assert function(SOME, NOTHING) == 0
    assert function(NOTHING, SOME) == 0


def test_specificity_without_any_background():
    assert metrics.specificity(SOME, ALL) == 1
    assert metrics.specificity(SOME, ALL, empty=0.0) == 0
    assert metrics.specificity(NOTHING, NOTHING, empty=0.0) == 1  # all background, all of it left alone
    assert metrics.specificity(ALL, NOTHING) == 0


def test_empty_objects_in_volume_difference():
    assert metrics.volume_difference(NOTHING, NOTHING) == 0
    assert metrics.volume_difference(NOTHING, SOME) == -100
    assert np.isnan(metrics.volume_difference(SOME, NOTHING))


@pytest.mark.parametrize("metric", SURFACE)
@pytest.mark.parametrize("pair", [(NOTHING, NOTHING), (SOME, NOTHING), (NOTHING, SOME)])
def test_surface_distances_to_nothing_are_nan(metric, pair):
    assert np.isnan(getattr(metrics, metric)(*pair, spacing=(1, 1)))


@given(seed=st.integers(0, 10**6), shape=st.lists(st.integers(1, 6), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_overlap_identities(seed, shape):
    rng = np.random.default_rng(seed)
    p, t = rng.random(shape) < rng.random(), rng.random(shape) < rng.random()
    dice, jaccard = metrics.dice(p, t), metrics.jaccard(p, t)
    assert jaccard == pytest.approx(dice / (2 - dice))
    assert dice == metrics.dice(t, p)
    assert metrics.precision(p, t) == metrics.sensitivity(t, p)
    if p.any() and (~p).any() and t.any() and (~t).any():
        assert metrics.specificity(p, t) == pytest.approx(metrics.sensitivity(~p, ~t))
    assert metrics.dice(p, p) == 1


def test_overlap_agrees_with_monai(blobs):
    from monai import metrics as monai

    p, t = blobs(0, (6, 7, 8)), blobs(1, (6, 7, 8))
    tensors = [torch.tensor(x[None, None]).float() for x in (p, t)]
    assert metrics.dice(p, t) == pytest.approx(monai.compute_dice(*tensors).item())
    assert metrics.jaccard(p, t) == pytest.approx(monai.compute_iou(*tensors).item())
    counts = monai.get_confusion_matrix(*tensors)
    for metric in ("precision", "sensitivity", "specificity"):
        assert getattr(metrics, metric)(p, t) == pytest.approx(monai.compute_confusion_matrix_metric(metric, counts).item())


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "p, t, message",
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), r"shape \(2, 3\) but the truth \(3, 2\)"),
        (np.full((2, 2), 4), np.zeros((2, 2)), "prediction holds 4; expected only 0 and 1"),
        (np.zeros((2, 2)), np.full((2, 2), 0.5), "truth holds 0.5"),
        (np.full((2, 2), np.nan), np.zeros((2, 2)), "prediction holds nan"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "expected an array of voxels"),
        (1, 1, "expected an array of voxels"),
    ],
)
def test_bad_arrays_are_named(p, t, message):
    for metric in OVERLAP:
        with pytest.raises(ValueError, match=message):
            getattr(metrics, metric)(p, t)
    with pytest.raises(ValueError, match=message):
        metrics.assd(p, t, spacing=(1, 1))


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1,), (1, 0), (1, -2), (1, np.nan), 1])
def test_bad_spacing_is_named(spacing):
    with pytest.raises(ValueError, match="expected 2 positive voxel sizes"):
        metrics.assd(SOME, SOME, spacing=spacing)


@pytest.mark.parametrize("percentile", [0, -5, 101])
def test_bad_percentile_is_named(percentile):
    with pytest.raises(ValueError, match="percentile is"):
        metrics.hausdorff(SOME, SOME, spacing=(1, 1), percentile=percentile)


# ------------------------------------------------------------------------------------------------- cases and cohorts


def labels(seed: int, shape=(8, 9, 7)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5, shape).astype(np.uint8)


def test_regions_hold_the_right_labels():
    assert metrics.regions["brats2015"] == {"whole": {1, 2, 3, 4}, "core": {1, 3, 4}, "enhancing": {4}}
    assert metrics.regions["brats2017"] == {"whole": {1, 2, 4}, "core": {1, 4}, "enhancing": {4}}


def test_evaluate_equals_the_metrics_one_by_one():
    p, t, spacing = labels(0), labels(1), (1.0, 2.0, 0.5)
    table = metrics.evaluate(
        torch.tensor(p), t, spacing=spacing, case="x", metrics=(*OVERLAP, *SURFACE, "hausdorff95", "volume_difference")
    )
    assert list(table.columns) == ["case", "region", *OVERLAP, *SURFACE, "hausdorff95", "volume_difference"]
    assert list(table.region) == ["whole", "core", "enhancing"]
    assert set(table.case) == {"x"}
    for row, region in zip(table.itertuples(), ({1, 2, 3, 4}, {1, 3, 4}, {4})):
        a, b = np.isin(p, list(region)), np.isin(t, list(region))
        for metric in OVERLAP:
            assert getattr(row, metric) == pytest.approx(getattr(metrics, metric)(a, b))
        for metric in SURFACE:
            assert getattr(row, metric) == pytest.approx(getattr(metrics, metric)(a, b, spacing=spacing))
        assert row.hausdorff95 == pytest.approx(metrics.hausdorff(a, b, spacing=spacing, percentile=95))
        assert row.volume_difference == pytest.approx(metrics.volume_difference(a, b))


def test_evaluate_counts_only_inside_the_mask():
    p, t = labels(0), labels(1)
    mask = np.zeros(p.shape, bool)
    mask[2:6, 1:8, 2:] = True
    inside = metrics.evaluate(p, t, spacing=(1, 1, 1), mask=mask)
    box = metrics.evaluate(p[2:6, 1:8, 2:], t[2:6, 1:8, 2:], spacing=(1, 1, 1))
    pd.testing.assert_frame_equal(inside, box)
    assert (inside.specificity < metrics.evaluate(p * mask, t * mask, spacing=(1, 1, 1)).specificity).all()


def test_evaluate_with_own_regions_in_two_dimensions():
    p, t = np.array([[0, 1, 2], [2, 2, 0]]), np.array([[0, 1, 1], [2, 2, 0]])
    table = metrics.evaluate(p, t, regions={"rim": 1, "all": (1, 2)}, metrics=("dice",)).set_index("region")
    assert table.dice.to_dict() == pytest.approx({"rim": 2 / 3, "all": 1.0})


def test_evaluate_passes_the_empty_policy_on():
    nothing = np.zeros((3, 3, 3), np.uint8)
    for empty in (1.0, 0.0):
        table = metrics.evaluate(nothing, nothing, spacing=(1, 1, 1), empty=empty)
        assert (table[["dice", "precision", "sensitivity"]] == empty).all(axis=None)
        assert table[["assd", "hausdorff"]].isna().all(axis=None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"metrics": ("dice", "dise")}, "'dise'; expected some of dice, jaccard"),
        ({"spacing": None}, "surface metrics need spacing"),
        ({"regions": "brats2014"}, "regions is 'brats2014'; expected 'brats2015' or 'brats2017'"),
        ({"regions": "brats2017"}, "holds label 3, which no region of brats2017 has"),
        ({"regions": {"x": ()}}, "region 'x' has the labels"),
        ({"regions": {"x": 300}}, "region 'x' has the labels"),
        ({"mask": np.zeros((8, 9, 7))}, "mask is empty"),
        ({"mask": np.ones((8, 9, 6))}, "the mask has shape"),
    ],
)
def test_evaluate_names_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(labels(0), labels(1), **{"spacing": (1, 1, 1), **options})


@pytest.mark.parametrize(
    "prediction, message",
    [
        (np.zeros((8, 9, 7), np.float32), "float32; expected integer class numbers"),
        (np.zeros((8, 9, 6), np.uint8), "prediction has shape"),
        (np.full((8, 9, 7), -1), "classes -1 to -1"),
        (np.full((8, 9, 7), 7), "prediction holds label 7"),
    ],
)
def test_evaluate_names_bad_predictions(prediction, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(prediction, labels(1), spacing=(1, 1, 1))


def case(seed: int, **changes) -> Case:
    options = {
        "image": np.zeros((1, 8, 9, 7), np.float32),
        "channels": ("t1",),
        "name": f"case{seed}",
        "label": labels(seed),
        "mask": labels(seed + 50) > 1,
        "affine": np.diag([1.0, 2.0, 0.5, 1.0]),
    }
    return Case(**{**options, **changes})


def test_cohort_is_the_cases_one_below_the_other():
    cases = [case(1), case(2)]
    table = metrics.evaluate_cohort([labels(3), labels(4)], cases, use_mask=True, metrics=("dice", "assd"))
    alone = metrics.evaluate(
        labels(4), cases[1].label, spacing=(1.0, 2.0, 0.5), mask=cases[1].mask, case="case2", metrics=("dice", "assd")
    )
    assert list(table.case) == ["case1"] * 3 + ["case2"] * 3
    pd.testing.assert_frame_equal(table[3:].reset_index(drop=True), alone)


def test_cohort_names_the_case_that_is_wrong():
    with pytest.raises(ValueError, match="case2 has no label"):
        metrics.evaluate_cohort([labels(1)] * 2, [case(1), case(2, label=None)])
    with pytest.raises(ValueError, match="case1 has no mask"):
        metrics.evaluate_cohort([labels(1)], [case(1, mask=None)], use_mask=True)
    with pytest.raises(ValueError, match="case1: the prediction has shape"):
        metrics.evaluate_cohort([labels(1)[1:]], [case(1)])
    for predictions in ([labels(1)], [labels(1)] * 3):
        with pytest.raises(ValueError, match="as many predictions as cases"):
            metrics.evaluate_cohort(predictions, [case(1), case(2)])
    with pytest.raises(ValueError, match="cohort is empty"):
        metrics.evaluate_cohort([], [])
