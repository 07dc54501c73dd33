"""V_rand and V_info against their definition written out, and the stripes between slices by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.segmentation import watershed

from medseg_lite import metrics
from medseg_lite.metrics import partitions

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
    assert metrics.v_rand(partitions._thin(large) > 0, large) > 0.99  # lines get thin, cells stay


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
    np.testing.assert_allclose(partitions.partition_scores(probability, truth), expected, atol=1e-6)  # every threshold
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
