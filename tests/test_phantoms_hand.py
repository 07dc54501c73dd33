"""Hand phantoms: postures, bones, grids, and the class frequencies of the paper."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medseg_lite import phantoms


@pytest.fixture(scope="module")
def hands():
    return phantoms.hand_cohort(10)


def test_hands_have_the_papers_class_frequencies(hands):
    """Kayalibay et al. 2017, table 1, within 30 %."""
    frequencies = np.mean([np.bincount(c.label.ravel(), minlength=5) / c.label.size for c in hands], axis=0)
    np.testing.assert_allclose(frequencies[1:], [5.13e-3, 2.29e-3, 6.78e-4, 4.32e-4], rtol=0.3)
    assert frequencies[0] > 0.985


def test_a_hand_has_nineteen_bones(hands):
    assert hands[0].shape == (120, 120, 64) and hands[0].channels == ("t1",)
    for case in hands:
        assert set(np.unique(case.label)) == {0, 1, 2, 3, 4}
        assert case.image.min() >= 0 and np.array_equal(case.image, np.rint(case.image))
        assert len(case.info["classes"]) == 5
    straight = phantoms.hand(3, curl=0, spread=1, spacing=1)
    touching = ndimage.generate_binary_structure(3, 3)
    assert [ndimage.label(straight.label == k, touching)[1] for k in (2, 3, 4)] == [5, 4, 5]
    rows = np.flatnonzero((straight.label == 1).any(axis=(0, 2)))  # metacarpals touch at the wrist
    beyond_the_thumbs = straight.label[:, rows[int(0.65 * len(rows))]] == 1
    assert ndimage.label(beyond_the_thumbs, np.ones((3, 3)))[1] == 4


def test_bones_are_dark_around_bright_marrow_and_the_wrist_is_not_labelled(hands):
    for case in hands[:4]:
        image, bone = case.image[0], case.label > 0
        inner = ndimage.binary_erosion(case.label == 1, iterations=2)
        rim = bone & ~ndimage.binary_erosion(bone)
        assert image[inner].mean() > 1.4 * image[rim].mean()
        assert image[inner].mean() > 5 * np.median(image)  # air
        # Much that is nearly as bright lies behind the metacarpals too.
        first = np.flatnonzero(bone.any(axis=(0, 2)))[0]
        assert (image[:, : first - 3] > 0.65 * image[inner].mean()).sum() > 200


def test_fingers_curl_and_spread():
    def tip_heights(curl):
        case = phantoms.hand(1, curl=curl, spread=0.5, spacing=3.44)
        voxels = np.argwhere(case.label >= 3)
        return voxels[:, 1].mean(), voxels[:, 2].mean()

    (open_reach, open_level), (fist_reach, fist_level) = tip_heights(0), tip_heights(1)
    assert fist_reach < open_reach - 5 and fist_level < open_level - 5  # drawn in, and towards the palm
    width = [np.ptp(np.argwhere(phantoms.hand(1, curl=0, spread=s, spacing=3.44).label[:, 40:])[:, 0]) for s in (0, 1)]
    assert width[1] > width[0]


def test_the_same_hand_for_the_same_seed_on_every_grid():
    a, b, other = phantoms.hand(5), phantoms.hand(5), phantoms.hand(6)
    assert a.image.tobytes() == b.image.tobytes() and a.label.tobytes() == b.label.tobytes()
    assert not np.array_equal(a.label, other.label) and a.info["curl"] != other.info["curl"]
    coarse = phantoms.hand(5, spacing=3.44)
    assert coarse.shape == (60, 60, 32) and coarse.spacing == pytest.approx((3.44,) * 3)
    block = a.image[0].reshape(60, 2, 60, 2, 32, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(block.ravel(), coarse.image[0].ravel())[0, 1] > 0.9
    for k in range(1, 5):
        assert (coarse.label == k).sum() * 8 == pytest.approx((a.label == k).sum(), rel=0.3)


def test_the_grid_may_be_cropped():
    whole, part = phantoms.hand(2, spacing=3.44), phantoms.hand(2, spacing=3.44, shape=(52, 56, 32))
    assert part.shape == (52, 56, 32)
    assert np.array_equal(part.label, whole.label[4:-4, 2:-2])


def test_postures_of_a_cohort_are_spread_evenly():
    for first in (0, 17):
        cases = phantoms.hand_cohort(8, first_seed=first, spacing=6)
        for name in ("curl", "spread"):
            values = np.sort([c.info[name] for c in cases])
            assert np.diff([0, *values, 1]).max() < 0.3
    assert [c.info["curl"] for c in phantoms.hand_cohort(2, spacing=6, curl=0.25)] == [0.25, 0.25]


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(seed=-1), "seed is -1; expected a whole number, 0 or more"),
        (dict(seed=True), "seed is True"),
        (dict(spacing=0), "spacing is 0 mm; expected 0.5 to 8"),
        (dict(curl=1.5), "curl is 1.5; expected 0 to 1"),
        (dict(spread=-0.1), "spread is -0.1; expected 0 to 1"),
        (dict(shape=(64, 64)), r"shape is \(64, 64\); expected three"),
    ],
)
def test_bad_hands_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        phantoms.hand(options.pop("seed", 0), **options)
    with pytest.raises(ValueError, match="count is 0"):
        phantoms.hand_cohort(0)
