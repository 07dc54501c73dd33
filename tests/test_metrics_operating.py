from __future__ import annotations

import numpy as np
import pytest

from medseg_lite import metrics

SCORES = np.array([[0.1, 0.2, 0.8, 0.6]])
TRUTH = np.array([[0, 0, 1, 1]])


def test_operating_points_by_hand():
    table = metrics.operating_points([SCORES], [TRUTH], thresholds=[0.5, 0.0, 0.7])
    assert list(table["threshold"]) == [0.0, 0.5, 0.7]
    assert list(table["dice"]) == pytest.approx([2 / 3, 1, 2 / 3])
    assert list(table["precision"]) == pytest.approx([0.5, 1, 1])
    assert list(table["sensitivity"]) == pytest.approx([1, 1, 0.5])
    assert list(table["specificity"]) == pytest.approx([0, 1, 1])


def test_means_are_over_cases():
    table = metrics.operating_points([SCORES, SCORES], [TRUTH, 1 - TRUTH], thresholds=[0.5])
    assert table["dice"][0] == pytest.approx(0.5)


def test_default_thresholds_span_the_scores():
    table = metrics.operating_points([SCORES], [TRUTH])
    assert len(table) == 101 and table["threshold"].min() == 0.1 and table["threshold"].max() == 0.8


def test_the_best_threshold_separates():
    assert 0.2 <= metrics.best_threshold([SCORES], [TRUTH]) < 0.6
    assert metrics.best_threshold([SCORES], [TRUTH], thresholds=[0.05, 0.3, 0.4, 0.5]) == 0.4  # the middle of equals


def test_rare_objects_and_other_metrics():
    rng = np.random.default_rng(0)
    truth = np.zeros(50_000, bool)
    truth[:20] = True  # one voxel in 2,500
    scores = rng.normal(size=truth.size) + 6 * truth
    threshold = metrics.best_threshold([scores], [truth])
    assert metrics.dice(scores > threshold, truth) > 0.8
    loose = metrics.best_threshold([scores], [truth], metric=metrics.sensitivity)
    assert loose < threshold


@pytest.mark.parametrize(
    ("scores", "truths", "message"),
    [
        ([], [], "0 maps of scores and 0 truths"),
        ([SCORES], [TRUTH, TRUTH], "1 maps of scores and 2 truths"),
        ([SCORES], [TRUTH[:, :3]], r"scores 0 have shape \(1, 4\) and the truth \(1, 3\)"),
    ],
)
def test_wrong_input(scores, truths, message):
    for function in (metrics.best_threshold, metrics.operating_points):
        with pytest.raises(ValueError, match=message):
            function(scores, truths)
