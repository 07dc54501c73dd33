"""Metrics against hand-computed tables, brute force, and MONAI."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import watershed

from medseg_lite import metrics
from medseg_lite.volume import Case

OVERLAP = ("dice", "jaccard", "precision", "sensitivity", "specificity")
SURFACE = ("assd", "boundary_distance", "hausdorff")


def blobs(seed: int, shape: tuple[int, ...], density: float = 0.3) -> np.ndarray:
    """A random object whose voxels cluster a little, never empty."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    mask |= np.roll(mask, 1, axis=0) & (rng.random(shape) < 0.5)
    mask.flat[rng.integers(mask.size)] = True
    return mask


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


def test_overlap_agrees_with_monai():
    from monai import metrics as monai

    p, t = blobs(0, (6, 7, 8)), blobs(1, (6, 7, 8))
    tensors = [torch.tensor(x[None, None]).float() for x in (p, t)]
    assert metrics.dice(p, t) == pytest.approx(monai.compute_dice(*tensors).item())
    assert metrics.jaccard(p, t) == pytest.approx(monai.compute_iou(*tensors).item())
    counts = monai.get_confusion_matrix(*tensors)
    for metric in ("precision", "sensitivity", "specificity"):
        assert getattr(metrics, metric)(p, t) == pytest.approx(monai.compute_confusion_matrix_metric(metric, counts).item())


# ---------------------------------------------------------------------------------------------------------- surface


def test_surface_of_a_block_with_a_bay():
    block = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    # Row 1, columns 1 and 2, and row 2, columns 1 to 3 have all four neighbours inside; the array's border counts as outside.
    inner = {(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)}
    assert {tuple(map(int, i)) for i in np.argwhere(block & ~metrics.surface(block))} == inner
    assert not (metrics.surface(block) & ~block).any()


def brute_force(p: np.ndarray, t: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    def points(mask):
        found = []
        for index in np.argwhere(mask):
            for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
                beside = index.copy()
                beside[axis] += step
                outside = not 0 <= beside[axis] < mask.shape[axis]
                if outside or not mask[tuple(beside)]:
                    found.append(index * np.asarray(spacing))
                    break
        return np.array(found)

    a, b = points(p), points(t)
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return distance.min(1), distance.min(0)


SHAPES = [((9, 11), (1.0, 1.0)), ((12, 9), (0.6, 3.0)), ((7, 8, 6), (1.0, 1.0, 1.0)), ((6, 7, 8), (0.5, 1.25, 5.0))]


@pytest.mark.parametrize("shape, spacing", SHAPES)
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])  # few points: search tree; many: distance transform
@pytest.mark.parametrize("seed", range(3))
def test_surface_metrics_against_brute_force(shape, spacing, density, seed):
    p, t = blobs(seed, shape, density), blobs(seed + 100, shape, density)
    a, b = brute_force(p, t, spacing)
    assert metrics.assd(p, t, spacing=spacing) == pytest.approx((a.sum() + b.sum()) / (len(a) + len(b)))
    assert metrics.boundary_distance(p, t, spacing=spacing) == metrics.assd(p, t, spacing=spacing)
    assert metrics.hausdorff(p, t, spacing=spacing) == pytest.approx(max(a.max(), b.max()))
    worst = max(np.percentile(a, 95), np.percentile(b, 95))
    assert metrics.hausdorff(p, t, spacing=spacing, percentile=95) == pytest.approx(worst)
    assert metrics.hausdorff(p, t, spacing=spacing) == metrics.hausdorff(t, p, spacing=spacing)


def test_both_ways_to_the_nearest_voxel_agree(monkeypatch):
    sparse, dense = np.zeros((20, 20, 20), bool), blobs(3, (20, 20, 20), 0.5)
    sparse[2, 3, 4] = sparse[15, 10, 19] = True
    spacing = np.array([0.7, 1.0, 2.5])
    used = []
    tree = metrics.cKDTree
    monkeypatch.setattr(metrics, "cKDTree", lambda points: used.append("tree") or tree(points))
    near = metrics._to_nearest(sparse, np.roll(sparse, 3, 1), spacing)
    assert used == ["tree"]
    assert near == pytest.approx(brute_force(sparse, np.roll(sparse, 3, 1), spacing)[0])
    far = metrics._to_nearest(sparse, dense, spacing)
    assert used == ["tree"]  # the dense one went the other way
    points = np.argwhere(dense) * spacing
    expected = [np.sqrt(((i * spacing - points) ** 2).sum(1)).min() for i in np.argwhere(sparse)]
    assert far == pytest.approx(expected)


@pytest.mark.parametrize("shape, spacing", SHAPES)
def test_surface_metrics_agree_with_monai(shape, spacing):
    from monai import metrics as monai

    p, t = blobs(5, shape), blobs(6, shape)
    tensors = [torch.tensor(x[None, None]).float() for x in (p, t)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        options = {"include_background": True, "spacing": spacing}
        assd = monai.compute_average_surface_distance(*tensors, symmetric=True, **options).item()
        plain = monai.compute_hausdorff_distance(*tensors, **options).item()
        most = monai.compute_hausdorff_distance(*tensors, percentile=95, **options).item()
    assert metrics.assd(p, t, spacing=spacing) == pytest.approx(assd, rel=1e-5)
    assert metrics.hausdorff(p, t, spacing=spacing) == pytest.approx(plain, rel=1e-5)
    assert metrics.hausdorff(p, t, spacing=spacing, percentile=95) == pytest.approx(most, rel=1e-5)


def test_two_squares_by_hand():
    p, t = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    p[2:4, 2:4] = True
    t[2:4, 5:7] = True
    # Columns 2, 3 against 5, 6 at 0.5 mm: each object has two pixels at 1 mm and two at 1.5 mm.
    assert metrics.assd(p, t, spacing=(2.0, 0.5)) == pytest.approx(1.25)
    assert metrics.hausdorff(p, t, spacing=(2.0, 0.5)) == pytest.approx(1.5)
    assert metrics.hausdorff(p, t, spacing=(2.0, 0.5), percentile=50) == pytest.approx(1.25)


def test_a_stray_voxel_moves_the_maximum_but_not_the_percentile():
    t = np.zeros((40, 40), bool)
    t[5:15, 5:15] = True
    p = t.copy()
    p[39, 39] = True
    assert metrics.hausdorff(p, t, spacing=(1, 1)) == pytest.approx(np.hypot(25, 25))
    assert metrics.hausdorff(p, t, spacing=(1, 1), percentile=95) == 0


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


# ------------------------------------------------------------------------------------------------------- partitions


def slow_partition_scores(probability, truth, thresholds):
    """V_rand and V_info of one slice written out: every pair of pixels, every pair of segments."""
    cells = ndimage.label(truth)[0]
    pixels = [tuple(p) for p in np.argwhere(cells)]
    results = []
    for threshold in thresholds:
        inside = probability > threshold
        segments = watershed(~inside, ndimage.label(inside)[0], connectivity=1, watershed_line=True)
        name = {p: int(segments[p]) or ("line", p) for p in pixels}
        same_truth = same_found = same_both = 0
        for a in pixels:
            for b in pixels:
                same_truth += cells[a] == cells[b]
                same_found += name[a] == name[b]
                same_both += cells[a] == cells[b] and name[a] == name[b]
        rand = 2 * same_both / (same_truth + same_found)

        def entropy(keys):
            counts = Counter(keys)
            return -sum(c / len(pixels) * math.log(c / len(pixels)) for c in counts.values())

        s, t = entropy([cells[p] for p in pixels]), entropy([name[p] for p in pixels])
        joint = entropy([(cells[p], name[p]) for p in pixels])
        results.append((rand, 2 * (s + t - joint) / (s + t) if s + t else 1.0))
    return results


def rooms():
    """Four cells of 4 x 4 pixels, parted by a cross of membrane one pixel wide."""
    truth = np.ones((9, 9), bool)
    truth[4] = truth[:, 4] = False
    return truth


def test_perfect_partition_scores_1_at_any_scale_and_order():
    truth = rooms()
    for prediction in (truth, truth.astype(float), 0.35 + 0.5 * truth, np.where(truth, 0.999, 0.001)):
        assert metrics.v_rand(prediction, truth) == 1 and metrics.v_info(prediction, truth) == pytest.approx(1)
    mirrored = truth[::-1].copy()
    assert metrics.v_rand(mirrored, truth) == 1
    large = np.kron(truth, np.ones((3, 3))) > 0
    assert metrics.v_rand(metrics._thinned(large) > 0, large) > 0.99  # lines get thin, cells stay


def test_one_merge_and_one_split_by_hand():
    truth = rooms()
    merged = truth.copy()
    merged[1:3, 4] = True  # a door between the two upper rooms: one segment of 32 of the 64 pixels
    # S: four times 1/4; T: 1/2, 1/4, 1/4; joint: four times 1/4
    s, t, joint = 4 / 16, 1 / 4 + 2 / 16, 4 / 16
    assert metrics.v_rand(merged, truth) == pytest.approx(2 * joint / (s + t))
    h_s, h_t, h_joint = math.log(4), 1.5 * math.log(2), math.log(4)
    assert metrics.v_info(merged, truth) == pytest.approx(2 * (h_s + h_t - h_joint) / (h_s + h_t))

    split = truth.copy()
    split[2, :4] = False  # a wall in the upper left room: 8 pixels above, 4 on the wall, 4 below
    p = np.array([8, 4, 1, 1, 1, 1, 16, 16, 16]) / 64
    s, t = 4 / 16, (p**2).sum()
    assert metrics.v_rand(split, truth) == pytest.approx(2 * t / (s + t))
    h_t = -(p * np.log(p)).sum()
    assert metrics.v_info(split, truth) == pytest.approx(2 * math.log(4) / (math.log(4) + h_t))


@pytest.mark.parametrize("seed", range(4))
def test_partition_scores_by_definition(seed):
    rng = np.random.default_rng(seed)
    truth = ndimage.gaussian_filter(rng.normal(size=(17, 14)), 1.5) > -0.05
    probability = np.clip(truth * 0.6 + 0.3 * ndimage.gaussian_filter(rng.normal(size=truth.shape), 1) + 0.2, 0, 1)
    expected = slow_partition_scores(probability, truth, np.arange(11) / 10)
    np.testing.assert_allclose(metrics._partition_scores(probability, truth), expected, atol=1e-6)  # every threshold
    assert metrics.v_rand(probability, truth) == pytest.approx(max(r for r, _ in expected), abs=1e-6)
    assert metrics.v_info(probability, truth) == pytest.approx(max(i for _, i in expected), abs=1e-6)
    one = slow_partition_scores(probability > 0.5, truth, [0])[0]
    assert metrics.v_rand(probability > 0.5, truth) == pytest.approx(one[0], abs=1e-6)


def test_a_stack_is_averaged_before_the_best_threshold_is_taken():
    truth = rooms()
    early, late = np.where(truth, 0.25, 0.05), np.where(truth, 0.85, 0.65)  # right at .1 and .2; at .7 and .8
    stack, truths = np.stack([early, late], axis=-1), np.stack([truth, truth], axis=-1)
    assert metrics.v_rand(early, truth) == metrics.v_rand(late, truth) == 1
    assert metrics.v_rand(stack, truths) < 0.9
    assert metrics.v_rand(np.stack([early, early], axis=-1), truths) == 1


def test_one_cell_found_whole():
    truth = np.ones((5, 5), bool)
    assert metrics.v_rand(truth, truth) == 1 and metrics.v_info(truth, truth) == 1


def test_partitions_refuse():
    truth = rooms()
    with pytest.raises(ValueError, match="share one grid"):
        metrics.v_rand(truth[:5], truth)
    with pytest.raises(ValueError, match=r"from 0 to 255; expected 0 to 1"):
        metrics.v_rand(truth * 255, truth)
    with pytest.raises(ValueError, match="no cells"):
        metrics.v_info(truth, np.zeros_like(truth))
    with pytest.raises(ValueError, match=r"expected 0 to 1"):
        metrics.v_info(np.full((9, 9), np.nan), truth)
    with pytest.raises(ValueError, match=r"one slice \(H, W\) or a stack"):
        metrics.v_rand(truth[0], truth[0])


# ------------------------------------------------------------------------------------------------------------ stripes


def test_slice_inconsistency_by_hand():
    cube = np.zeros((5, 6, 7), np.uint8)
    cube[1:4, 2:5, 2:5] = 2
    assert all(metrics.slice_inconsistency(cube, axis=axis) == 1 for axis in (0, 1, 2, -1))
    plate = np.zeros((6, 6, 6), np.uint8)
    plate[1:5, 1:5, 3] = 1  # 32 faces across axis 2, 8 across each of the others
    assert metrics.slice_inconsistency(plate, axis=2) == 4
    assert metrics.slice_inconsistency(plate, axis=0) == 8 / 20
    assert metrics.slice_inconsistency(torch.from_numpy(plate), axis=2) == 4
    # Two classes side by side are a border too; a face counts once.
    halves = np.zeros((2, 2, 2), np.uint8)
    halves[1] = 1
    halves[1, 0, 0] = 3
    assert metrics.slice_inconsistency(halves, axis=0) == 4 / 1
    assert metrics.slice_inconsistency(np.array([[0, 1], [1, 1]]), axis=0) == 1


def test_slice_inconsistency_of_stripes_and_masks():
    ball = np.linalg.norm(np.indices((21, 21, 21)) - 10, axis=0) < 8
    assert metrics.slice_inconsistency(ball.astype(np.uint8), axis=2) == 1
    striped = ball.astype(np.uint8)
    striped[:, :, ::2] = 0
    assert metrics.slice_inconsistency(striped, axis=2) > 5
    assert metrics.slice_inconsistency(striped, axis=0) < 0.3
    mask = np.zeros(ball.shape, bool)
    mask[:, :, 9] = True  # within one slice nothing can change across
    assert metrics.slice_inconsistency(striped, axis=2, mask=mask) == 0
    mask[:, :, 10] = True  # slice 10 is empty: one face for every voxel of the disc in slice 9
    within = sum(np.abs(np.diff(striped[:, :, 9].astype(int), axis=a)).sum() for a in (0, 1)) / 2
    assert metrics.slice_inconsistency(striped, axis=2, mask=mask) == striped[:, :, 9].sum() / within


def test_slice_inconsistency_where_nothing_or_only_slices_change():
    assert np.isnan(metrics.slice_inconsistency(np.zeros((3, 3, 3), int), axis=0))
    layers = np.zeros((3, 3, 3), int)
    layers[:, 1] = 1
    assert metrics.slice_inconsistency(layers, axis=1) == np.inf
    with pytest.raises(ValueError, match=r"axis=3 of a label of shape \(3, 3, 3\)"):
        metrics.slice_inconsistency(layers, axis=3)
    with pytest.raises(ValueError, match="must share one grid"):
        metrics.slice_inconsistency(layers, axis=0, mask=np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="expected integer class numbers"):
        metrics.slice_inconsistency(layers * 0.5, axis=0)
