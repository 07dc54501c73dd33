from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import ndimage

from medseg_lite import phantoms
from medseg_lite.phantoms import puzzles

NAMES = list(puzzles.PUZZLES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("needed", [0.0, 0.5, 1.0])
def test_cases_are_sound_and_follow_the_seed(name, needed):
    one, again, other = (puzzles.PUZZLES[name](seed, needed=needed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.image != other.image).any()
    assert set(np.unique(one.label)) <= {0, *one.info["classes"]} and one.label.any()
    assert one.channels == ("x",) and one.mask[one.label > 0].all()


@pytest.mark.parametrize(
    ("name", "pairs"), [("ring", [(1, 2)]), ("tube", [(1, 2)]), ("far_plate", [(1, 2)]), ("textures", [(1, 2), (3, 4)])]
)
def test_classes_of_a_pair_are_equally_common_where_the_property_is_needed(name, pairs):
    counts = sum(np.bincount(c.label.ravel(), minlength=5) for c in phantoms.puzzle_cohort(name, 40))
    for a, b in pairs:
        assert 0.8 < counts[a] / counts[b] < 1.25


@pytest.mark.parametrize(("needed", "seen"), [(1.0, False), (0.0, True)])
def test_ring_is_beyond_the_field_of_eight_convolutions_only_where_needed(needed, seen):
    """The middle of a ball sees 8 voxels to each side."""
    for case in phantoms.puzzle_cohort("ring", 5, needed=needed):
        bright = [
            (case.image[0][near & (case.label == 0)] > 1.6).mean()
            for near in (ndimage.binary_dilation(case.label == k, iterations=5) for k in (1, 2))
        ]
        assert (bright[0] > bright[1] + 0.1) == seen


def test_coins_and_tubes_have_the_same_discs():
    """Area and brightness of the discs in axial slices are alike, so no slice tells them apart."""
    areas = {1: [], 2: []}
    for case in phantoms.puzzle_cohort("tube", 10):
        for k in areas:
            for z in range(case.shape[2]):
                pieces, count = ndimage.label(case.label[:, :, z] == k)
                areas[k] += list(np.bincount(pieces.ravel())[1 : count + 1])
    assert abs(np.mean(areas[1]) - np.mean(areas[2])) < 0.5
    flat = phantoms.puzzle_cohort("tube", 3, needed=0.0)
    assert all((c.label == 2).sum() > 1.8 * (c.label == 1).sum() for c in flat)


def test_far_plate_stands_in_the_slices_of_marked_balls_and_far_from_them():
    for case in phantoms.puzzle_cohort("far_plate", 5):
        left = ndimage.uniform_filter(case.image[0][:9].mean(axis=(0, 1)), 3)  # brightness at the left border of each slice
        for k, marked in ((1, False), (2, True)):
            x, _, z = np.nonzero(case.label == k)
            assert x.min() - 9 >= 25
            assert ((left[np.unique(z)] > 1.2) == marked).all()


@pytest.mark.parametrize(("needed", "ratio"), [(1.0, 1.0), (0.0, 1.5)])
def test_balls_of_the_far_plate_differ_in_brightness_only_where_it_is_not_needed(needed, ratio):
    cases = phantoms.puzzle_cohort("far_plate", 10, needed=needed)
    bright = [np.concatenate([c.image[0][c.label == k] for c in cases]).mean() for k in (1, 2)]
    assert bright[1] / bright[0] == pytest.approx(ratio, abs=0.08)


def test_rare_is_rare():
    shares = [np.mean([(c.label == 2).mean() for c in phantoms.puzzle_cohort("rare", 20, needed=n)]) for n in (1.0, 0.5, 0.0)]
    assert shares == pytest.approx([1 / 5000, 1 / 500, 1 / 50], rel=0.15)


def test_decoys_have_twins_and_lesions_do_not():
    for case in phantoms.puzzle_cohort("decoys", 10):
        bright = ndimage.gaussian_filter(case.image[0], 1) > 1.5
        pieces, count = ndimage.label(bright)
        mirrored = ndimage.binary_dilation(bright[::-1], iterations=3)
        for number in range(1, count + 1):
            piece = pieces == number
            if piece.sum() < 60:
                continue
            lesion = case.label[piece].mean() > 0.5
            assert (mirrored & piece).any() != lesion


@pytest.mark.parametrize(("needed", "least", "most"), [(0.35, 12.9, 19.2), (1.0, 22, 40)])
def test_decoys_are_as_far_from_their_twins_as_the_dial_says(needed, least, most):
    """Each twin is moved by a voxel at most along each axis; some are cut by the border of the brain."""
    pairs = 0
    for case in phantoms.puzzle_cohort("decoys", 10, needed=needed):
        bright = (ndimage.gaussian_filter(case.image[0], 1) > 1.5) & (case.label == 0)
        pieces, count = ndimage.label(bright)
        large = 1 + np.flatnonzero(ndimage.sum(bright, pieces, range(1, count + 1)) >= 60)
        for middle, other in itertools.combinations(np.array(ndimage.center_of_mass(bright, pieces, large)), 2):
            across, along = abs(middle - other)[0], np.hypot(*(middle - other)[1:])
            if along < 4:  # other pairs are ten voxels apart
                pairs += 1
                assert least - 2.5 < across < most + 2.5
    assert pairs >= 10


@pytest.mark.parametrize("needed", [-0.1, 1.1, np.nan])
def test_the_dial_ends(needed):
    with pytest.raises(ValueError, match="needed is"):
        puzzles.ring(0, needed=needed)


def test_names():
    with pytest.raises(ValueError, match="no puzzle 'rings'; expected one of ring, tube"):
        phantoms.puzzle_cohort("rings", 1)
