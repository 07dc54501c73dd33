"""Simulated readers: what holds of each habit by construction, against brute force and by hand, and bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg_lite import phantoms
from medseg_lite.metrics import dice
from medseg_lite.phantoms import HABITS, draw_as_reader, mean_pairwise_dice

SPACING = (1.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """A ball with a box at its side, of two classes."""
    d, h, w = np.indices((24, 28, 16))
    label = ((1.5 * (d - 10)) ** 2 + (h - 12) ** 2 + (2 * (w - 8)) ** 2 < 90).astype(np.uint8)
    label[10:20, 14:24, 5:9] = 4
    return label


def distance_to(points: np.ndarray) -> np.ndarray:
    """Distance of every voxel to the nearest of some voxels in mm, by comparing all pairs."""
    grid = np.indices(points.shape).reshape(3, -1).T * SPACING
    return np.sqrt(((grid[:, None] - np.argwhere(points)[None] * SPACING) ** 2).sum(-1).min(1)).reshape(points.shape)


def test_generous_and_cautious_by_brute_force(truth):
    part = truth[4:16, 8:22, 4:9]
    for strength in (1.0, 2.0, 3.2):
        generous, cautious = (draw_as_reader(part, h, strength=strength, spacing=SPACING) for h in ("generous", "cautious"))
        np.testing.assert_array_equal(generous, distance_to(part > 0) - 0.5 <= strength)
        np.testing.assert_array_equal(cautious, (part > 0) & (distance_to(part == 0) - 0.5 > strength))


def test_generous_and_cautious_are_opposites(truth):
    background = draw_as_reader(truth == 0, "generous", strength=2.5, spacing=SPACING)
    np.testing.assert_array_equal(draw_as_reader(truth, "cautious", strength=2.5, spacing=SPACING), ~background)


@pytest.mark.parametrize("seed", range(4))
def test_the_unsteady_outline_lies_between_cautious_and_generous(truth, seed):
    drawn = {h: draw_as_reader(truth, h, seed, strength=3, spacing=SPACING) for h in ("cautious", "unsteady", "generous")}
    assert (drawn["cautious"] <= drawn["unsteady"]).all() and (drawn["unsteady"] <= drawn["generous"]).all()
    assert (drawn["unsteady"] & (truth == 0)).any() and (~drawn["unsteady"] & (truth > 0)).any(), "both sides of the border"
    assert (drawn["cautious"] <= (truth > 0)).all() and ((truth > 0) <= drawn["generous"]).all()


def test_cautious_and_generous_disagree_most_of_nested_outlines(truth):
    """For nested outlines Dice is 2 small / (small + large), so the widest gap in size has the lowest Dice."""
    drawn = [truth > 0, *(draw_as_reader(truth, h, strength=3, spacing=SPACING) for h in ("cautious", "unsteady", "generous"))]
    pairs = {(a, b): dice(drawn[a], drawn[b]) for a, b in itertools.combinations(range(4), 2)}
    assert min(pairs, key=pairs.get) == (1, 3)
    small, large = drawn[1].sum(), drawn[3].sum()
    assert pairs[1, 3] == 2 * small / (small + large) < min(pairs[0, 1], pairs[0, 3])


def test_smooth_keeps_straight_borders_rounds_corners_and_fills_notches():
    half = np.zeros((20, 20, 20), bool)
    half[:10] = True
    np.testing.assert_array_equal(draw_as_reader(half, "smooth"), half)
    corner = half.copy()
    corner[:, 10:] = False
    rounded = draw_as_reader(corner, "smooth")
    assert not rounded[9, 9].any() and (rounded <= corner).all() and rounded[:6, :6].all()
    np.testing.assert_array_equal(draw_as_reader(~corner, "smooth"), ~rounded)
    wire = np.zeros((20, 20, 20), bool)
    wire[10, 10] = True
    assert not draw_as_reader(wire, "smooth").any()


def test_a_slip_shifts_a_third_of_the_slices(truth):
    drawn = draw_as_reader(truth, "slip", 3, strength=4, spacing=SPACING)
    mask = truth > 0
    moved = [k for k in range(16) if (drawn[:, :, k] != mask[:, :, k]).any()]
    assert len(moved) == -(-mask.any((0, 1)).sum() // 3)
    for k in moved:
        steps = np.argwhere(drawn[:, :, k]).mean(0) - np.argwhere(mask[:, :, k]).mean(0)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-9)
        np.testing.assert_array_equal(drawn[:, :, k], np.roll(mask[:, :, k], np.rint(steps).astype(int), (0, 1)))
        assert abs(np.hypot(*steps * SPACING[:2]) - 4) < np.hypot(1.5, 1.0) / 2 + 1e-9


def test_seeds_and_strengths(truth):
    for habit in HABITS:
        first, again, other = (draw_as_reader(truth, habit, seed, spacing=SPACING) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert first.dtype == bool and (first != other).any() == (habit in ("unsteady", "slip"))
        weak, strong = (draw_as_reader(truth, habit, strength=s, spacing=SPACING) for s in (2, 5))
        assert dice(weak, truth > 0) > dice(strong, truth > 0)
        np.testing.assert_array_equal(draw_as_reader(0 * truth, habit), 0 * truth > 0)
    full = np.ones((4, 5, 6), bool)
    for habit in ("generous", "cautious", "unsteady"):
        assert draw_as_reader(full, habit).all(), "without background there is no border"


def test_two_readers_agree_less_with_each_other_than_with_the_truth_of_a_phantom():
    case = phantoms.brain(seed=1, spacing=3.0)
    truth = case.label > 0
    generous, cautious = (draw_as_reader(truth, h, strength=3.0, spacing=case.spacing) for h in ("generous", "cautious"))
    assert dice(generous, cautious) < min(dice(generous, truth), dice(cautious, truth)) < 1


def test_mean_pairwise_dice_by_hand():
    a, b, c = np.zeros((3, 1, 1, 8), int)
    a[..., :4], b[..., 2:6], c[..., :2] = 1, 3, 2
    assert mean_pairwise_dice([a, b, c]) == pytest.approx((2 * 2 / 8 + 2 * 2 / 6 + 0) / 3)
    assert mean_pairwise_dice([a, a]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"habit": "drunk"}, "there is no habit 'drunk'; expected one of generous, cautious, smooth, unsteady, slip"),
        ({"label": np.ones((4, 4))}, r"the label has shape \(4, 4\); expected \(D, H, W\)"),
        ({"strength": 0}, "strength is 0, spacing"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"spacing": (1, 1)}, r"spacing \(1, 1\); expected positive numbers"),
        ({"spacing": (1, 1, -2)}, "expected positive numbers"),
    ],
)
def test_bad_input(arguments, message):
    given = {"label": np.ones((4, 4, 4)), "habit": "smooth"} | arguments
    with pytest.raises(ValueError, match=message):
        draw_as_reader(**given)


def test_one_reader_has_nobody_to_agree_with():
    with pytest.raises(ValueError, match="the number of readers is 1; expected two or more"):
        mean_pairwise_dice([np.ones((2, 2, 2))])
