"""Phantoms of electron microscopy: the statistics of the real stack, the power diagram of the cells, and determinism."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import ndimage

from medseg_lite import phantoms

EM = sys.modules["medseg_lite.phantoms.em"]  # the package shows the function under the module's name


@pytest.fixture(scope="module")
def stacks():
    return phantoms.em_cohort(4)


def neighbours(image: np.ndarray, step: int) -> float:
    """Correlation of pixels that lie `step` apart within a slice, mean over both directions and all slices."""
    pairs = [(s[step:], s[:-step]) for w in range(image.shape[2]) for s in (image[..., w], image[..., w].T)]
    return np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs])


def test_em_has_the_statistics_of_the_real_stack(stacks):
    """Of the training stack of ISBI 2012, within 15 %."""
    images = [c.image[0] for c in stacks]
    found = {
        "membrane": np.mean([c.label.mean() for c in stacks]),
        "mean": np.mean(images),
        "sd": np.std(images),
        **{lag: np.mean([neighbours(i, lag) for i in images]) for lag in (1, 2, 3)},
        "next slice": np.mean([np.corrcoef(i[..., 0].ravel(), i[..., 1].ravel())[0, 1] for i in images]),
    }
    real = {"membrane": 0.22, "mean": 126, "sd": 44, 1: 0.91, 2: 0.76, 3: 0.63, "next slice": 0.25}
    np.testing.assert_allclose(list(found.values()), list(real.values()), rtol=0.15, err_msg=str(found))
    for case in stacks:  # each for itself more loosely
        assert 0.15 < case.label.mean() < 0.29 and 100 < case.image.mean() < 150


def test_em_is_whole_numbers_and_membranes_are_dark_lines_around_cells(stacks):
    for case in stacks:
        assert case.shape == (512, 512, 3) and case.channels == ("em",) and case.info["classes"] == ("cell", "membrane")
        assert case.spacing == pytest.approx((4e-6, 4e-6, 5e-5))
        assert np.array_equal(case.image, np.rint(case.image)) and case.image.min() >= 0 and case.image.max() <= 255
        assert set(np.unique(case.label)) == {0, 1}
        image, membrane = case.image[0], case.label == 1
        assert image[~membrane].mean() - image[membrane].mean() > 40
        # Grey values alone do not tell them apart: vesicles and mitochondria are dark too.
        assert (image[~membrane] < image[membrane].mean()).mean() > 0.04
        for w in range(3):
            areas = np.bincount(ndimage.label(~membrane[..., w])[0].ravel())[1:]
            assert 60 < (areas > 50).sum() < 350 and areas.max() > 4000
            thickness = ndimage.distance_transform_edt(membrane[..., w])
            assert np.quantile(thickness[membrane[..., w]], 0.9) < 8


def test_em_is_the_same_for_the_same_seed_however_many_slices_follow():
    a, b, other = phantoms.em(3, slices=1, size=128), phantoms.em(3, slices=3, size=128), phantoms.em(4, size=128)
    assert a.image.tobytes() == phantoms.em(3, slices=1, size=128).image.tobytes()
    assert np.array_equal(a.image, b.image[..., :1]) and np.array_equal(a.label, b.label[..., :1])
    assert not np.array_equal(b.label, other.label)
    assert not np.array_equal(b.label[..., 0], b.label[..., 1])


def test_em_cells_go_on_through_a_long_stack():
    case = phantoms.em(0, slices=64, size=64)
    assert all(0.02 < case.label[..., w].mean() < 0.6 for w in range(64))
    assert case.label[..., 48:].mean() == pytest.approx(case.label.mean(), abs=0.12)


@pytest.mark.parametrize("time", [0, 7])
def test_em_cells_are_a_power_diagram(time):
    """Against brute force over all cells and pixels."""
    tissue = EM._Tissue(1, 96)
    cell, distance, move = tissue.cells(time)
    centre, speed = tissue.motion(time)
    turn = 0.7 * time
    shift = tissue.bend + np.cos(turn) * tissue.wobble[0] + np.sin(turn) * tissue.wobble[1]
    shift += tissue.jitter[time][:, None, None]
    x, y = (g + s for g, s in zip(np.mgrid[:96, :96], shift))
    dd, dh, hh = tissue.metric
    u, v = x[..., None] - centre[:, 0], y[..., None] - centre[:, 1]
    power = dd * u * u + 2 * dh * u * v + hh * v * v - tissue.radius**2
    power = np.concatenate([power, np.full((96, 96, 1), EM.GLIA)], -1)
    assert (cell == power.argmin(-1)).mean() > 0.999
    # Without the warp, distances to the membrane are those to the nearest pixel of another cell (half a pixel beyond it).
    tissue.bend, tissue.wobble = 0 * tissue.bend, [0 * w for w in tissue.wobble]
    cell, distance, move = tissue.cells(time)
    edge = np.pad(cell[1:] != cell[:-1], ((0, 1), (0, 0))) | np.pad(cell[:, 1:] != cell[:, :-1], ((0, 0), (0, 1)))
    around = ndimage.distance_transform_edt(~edge)
    near = (around >= 2) & (around < 5)
    assert np.median(distance[near] / around[near]) == pytest.approx(1, abs=0.25)
    assert (move >= 0).all() and (distance >= 0).all()
    ahead, behind = tissue.motion(time + 1e-4)[0], tissue.motion(time - 1e-4)[0]
    np.testing.assert_allclose(speed, (ahead - behind) / 2e-4, atol=1e-4)


def test_em_as_a_detector_counts():
    """The same tissue at a gain and on an offset that differ from stack to stack, but not within one."""
    gains, offsets = [], []
    for seed in range(6):
        plain, counted = (phantoms.em(seed, slices=2, size=64, counts=c) for c in (False, True))
        gain, offset = np.polyfit(plain.image.ravel(), counted.image.ravel(), 1)
        np.testing.assert_allclose(counted.image, gain * plain.image + offset, atol=1)
        assert np.array_equal(counted.image, np.rint(counted.image)) and np.array_equal(counted.label, plain.label)
        assert 4 <= gain <= 24 and -1 <= offset <= 2001
        gains.append(gain)
        offsets.append(offset)
    assert max(gains) > 2 * min(gains) and np.ptp(offsets) > 500


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(seed=-1), "seed is -1; expected a whole number, 0 or more"),
        (dict(seed=True), "seed is True"),
        (dict(slices=0), "slices is 0; expected a whole number, 1 to 64"),
        (dict(size=63), "size is 63; expected a whole number, 64 to 1024"),
        (dict(size=128.0), "size is 128.0"),
    ],
)
def test_bad_em_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        phantoms.em(options.pop("seed", 0), **options)
    with pytest.raises(ValueError, match="count is 0"):
        phantoms.em_cohort(0)
