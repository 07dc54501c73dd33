"""Liver and prostate phantoms, and the shapes from which both are painted."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import ndimage

from medseg_lite import phantoms
from medseg_lite.phantoms import shapes

# --------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_have_their_distances():
    axes = [np.arange(-20, 21, dtype=np.float32)] * 3
    scene = shapes.Scene(axes, np.zeros((3, 41, 41, 41), np.float32), 5)
    x, y, z = np.meshgrid(*axes, indexing="ij")
    box, d = scene.ellipsoid((2, 0, -1), (6, 6, 6))
    near = np.abs(d) < 2
    np.testing.assert_allclose(d[near], (np.sqrt((x - 2) ** 2 + y**2 + (z + 1) ** 2) - 6)[box][near], atol=0.5)
    turned = shapes.ellipsoid([x, y, z], (0, 0, 0), (12, 4, 4), np.pi / 2)
    assert turned[20, 30, 20] < 0 < turned[30, 20, 20]  # the long axis has come to lie along H
    box, d = scene.tube((-5, 0, 0), (5, 0, 0), 3, 3)
    expected = np.sqrt(np.maximum(np.abs(x) - 5, 0) ** 2 + y**2 + z**2) - 3
    np.testing.assert_allclose(d, expected[box], atol=1e-4)
    assert (expected[box] < 0).sum() == (expected < 0).sum()  # nothing of it lies beyond the box
    scene.paint(box, d, 9)
    np.testing.assert_allclose(scene.image[expected < -1], 9, atol=1e-5)
    np.testing.assert_allclose(scene.image[expected > 1], 5, atol=1e-5)
    a, b = np.float32([-3, 1, 4]), np.float32([2, -2, 4])
    np.testing.assert_allclose(shapes.join(a, b, 0.1), [-3, -2, 3.975], atol=1e-5)
    np.testing.assert_allclose(shapes.carve(a, b, 0.1), [-2, 2, 4], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- liver


@pytest.fixture(scope="module")
def livers():
    return phantoms.liver_cohort(4, lesions=5, size=96)


def test_livers_are_ct_in_hounsfield_units(livers):
    for case in livers:
        assert case.channels == ("ct",) and case.info["classes"] == ("background", "liver", "lesion")
        assert case.image.dtype == np.float32 and np.array_equal(case.image, np.rint(case.image))
        assert set(np.unique(case.label)) == {0, 1, 2}
        image, organ = case.image[0], case.label == 1
        assert 65 < np.median(image[organ]) < 145 and image[organ].std() < 40
        assert 900 < case.info["liver_ml"] < 2200  # people have about 1.5 litres
        # Outside the scanner's circle, and only there, are the values that it writes where it did not measure.
        padding = case.info["padding"]
        assert padding in (-3024, -2048, -1024)
        assert (image[0, 0] == padding).all() and (image[48, 48] > -1024).all()
        assert (image[~case.mask] == padding).all() and case.mask.mean() == pytest.approx(np.pi / 4, abs=0.02)
        assert not case.label[~case.mask].any()
        # Air, fat, muscle and bone are all there.
        shares = np.histogram(image, [-1024, -500, -140, -60, 20, 90, 250, 3071])[0] / image.size
        assert (shares[[0, 2, 4, 6]] > [0.1, 0.02, 0.02, 0.001]).all()


def test_livers_lie_on_the_right_under_the_diaphragm(livers):
    for case in livers:
        organ = case.label > 0
        right = ndimage.center_of_mass(organ)[0] - (case.shape[0] - 1) / 2
        assert right * case.spacing[0] > 25  # mm to the patient's right
        top = np.flatnonzero(organ.any((0, 1)))[-1]
        assert top < case.shape[2] - 2
        above = case.image[0][..., top + 2][organ[..., top - 3]]
        assert np.median(above) < -600  # lung
        assert ndimage.label(organ)[1] == 1


def test_lesions_are_darker_than_the_liver_and_inside_it():
    for kind, low, high in (("hypodense", 25, 70), ("rim", 5, 75), ("subtle", 4, 30)):
        differences = []
        for seed in (1, 2):
            case = phantoms.liver(seed, lesions=6, kind=kind, size=96)
            assert case.info["kind"] == kind and 3 <= case.info["lesions"] <= 6
            image, lesion = case.image[0], case.label == 2
            assert case.info["lesion_ml"] == pytest.approx(lesion.sum() * np.prod(case.spacing) / 1000, abs=0.06)
            differences.append(image[case.label == 1].mean() - image[lesion].mean())
            around = ndimage.binary_dilation(lesion) & ~lesion
            assert (case.label[around] == 1).mean() > 0.6
        assert low < np.mean(differences) < high
    healthy = phantoms.liver(1, lesions=0, size=64)
    assert not (healthy.label == 2).any() and healthy.info["kind"] is None
    rim = phantoms.liver(2, lesions=4, kind="rim", size=192, slice_mm=8)
    lesion = rim.label == 2
    edge = lesion & ~ndimage.binary_erosion(lesion)
    assert rim.image[0][edge].mean() > rim.image[0][lesion & ~edge].mean() + 15


def test_the_same_abdomen_for_the_same_seed_on_every_grid():
    a, b, other = phantoms.liver(3, size=64), phantoms.liver(3, size=64), phantoms.liver(4, size=64)
    assert a.image.tobytes() == b.image.tobytes() and a.label.tobytes() == b.label.tobytes()
    assert not np.array_equal(a.label, other.label)
    fine = phantoms.liver(3, size=128)
    assert fine.spacing[0] * 2 == pytest.approx(a.spacing[0])
    block = fine.image[0].reshape(64, 2, 64, 2, -1).mean(axis=(1, 3))
    assert np.corrcoef(block.ravel(), a.image[0].ravel())[0, 1] > 0.97
    assert fine.info["liver_ml"] == pytest.approx(a.info["liver_ml"], rel=0.05)


def test_grids_of_livers_differ_as_those_of_scanners_do():
    cases = [phantoms.liver(seed, size=32, slice_mm=None) for seed in range(12)]
    pixels, slices = (np.array([c.spacing[i] for c in cases]) for i in (0, 2))
    assert (pixels * 32 / 512 >= 0.53 - 1e-9).all() and (pixels * 32 / 512 <= 1.25).all() and np.ptp(pixels) > 1
    assert slices.min() >= 0.5 and slices.max() <= 5 and len(np.unique(slices)) > 3
    assert len({c.info["padding"] for c in cases}) == 3 and len({c.info["kind"] for c in cases}) >= 3


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(seed=-1), "seed is -1; expected a whole number, 0 or more"),
        (dict(size=16), "size is 16; expected a whole number, 32 to 512"),
        (dict(slice_mm=0.1), "slice_mm is 0.1; expected 0.5 to 10 mm"),
        (dict(slice_mm=float("nan")), "slice_mm is nan"),
        (dict(lesions=21), "lesions is 21; expected a whole number, 0 to 20"),
        (dict(kind="cyst"), "kind is 'cyst'; expected one of 'hypodense', 'rim', 'subtle'"),
    ],
)
def test_bad_livers_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        phantoms.liver(options.pop("seed", 0), **options)
    with pytest.raises(ValueError, match="count is 0"):
        phantoms.liver_cohort(0)


# ------------------------------------------------------------------------------------------------------------- prostate


def test_prostates_at_every_site():
    means = {}
    for site, scanner in phantoms.PROSTATE_SITES.items():
        case = phantoms.prostate(2, site=site)
        assert case.shape == (scanner.size, scanner.size, scanner.slices) and case.channels == ("t2",)
        assert case.spacing == pytest.approx((scanner.pixel_mm, scanner.pixel_mm, scanner.slice_mm))
        assert np.array_equal(case.image, np.rint(case.image)) and case.image.min() >= 0
        assert set(np.unique(case.label)) == {0, 1} and ndimage.label(case.label)[1] == 1
        assert 15 < case.info["prostate_ml"] < 130
        ends = case.label.any((0, 1))
        assert not ends[0] and not ends[-1]  # all of it is in view
        means[site] = case.image.mean()
    assert 112 <= min(s.size for s in phantoms.PROSTATE_SITES.values()) and means["B"] > 2.5 * means["C"]


def test_the_peripheral_zone_is_brighter_than_the_middle():
    for seed in range(3):
        case = phantoms.prostate(seed)
        image, gland = case.image[0], case.label == 1
        w = int(np.median(np.flatnonzero(gland.any((0, 1)))))
        rows = np.flatnonzero(gland[..., w].any(0))
        behind, middle = np.zeros_like(gland), np.zeros_like(gland)
        behind[:, rows[1] : rows[0] + len(rows) // 5 + 1, w] = True  # H grows to the front
        middle[:, rows[0] + len(rows) // 2 : rows[0] + 3 * len(rows) // 4, w] = True
        assert image[behind & gland].mean() > 1.2 * image[middle & gland].mean()


def test_an_endorectal_coil_shades_the_image():
    for site, seed in (("B", 0), ("D", 1)):
        case = phantoms.prostate(seed, site=site)
        assert case.info["coil"]
        near = ndimage.binary_dilation(case.label == 1, iterations=3)
        profile = case.image[0].mean(axis=(0, 2))
        front = profile[int(0.85 * len(profile)) :].mean()
        assert case.image[0][near].mean() > 2 * front
    assert not phantoms.prostate(0, site="D").info["coil"] and not phantoms.prostate(1, site="A").info["coil"]


def test_the_same_pelvis_for_the_same_seed_at_every_site_and_size():
    a, b, other = (phantoms.prostate(seed, size=64) for seed in (5, 5, 6))
    assert a.image.tobytes() == b.image.tobytes() and a.label.tobytes() == b.label.tobytes()
    assert not np.array_equal(a.label, other.label)
    for case in (phantoms.prostate(5), phantoms.prostate(5, site="B"), phantoms.prostate(5, site="C")):
        assert case.info["prostate_ml"] == pytest.approx(a.info["prostate_ml"], rel=0.15)
    volumes = [c.info["prostate_ml"] for c in phantoms.prostate_cohort(12, size=48)]
    assert 35 < np.median(volumes) < 60 and np.ptp(volumes) > 20
    assert [c.info["site"] for c in phantoms.prostate_cohort(4, size=32, sites="AD", first_seed=1)] == list("ADAD")


def test_prostates_that_vary_lie_anywhere_and_differ_in_size(monkeypatch):
    def centre(case):  # mm from the middle of the field of view, along D and H
        return np.argwhere(case.label > 0).mean(0)[:2] * case.spacing[:2] + case.affine[:2, 3]

    usual, varied = (phantoms.prostate_cohort(16, size=48, vary=vary) for vary in (False, True))
    assert max(np.abs(centre(case)).max() for case in usual) < 8
    spread = np.array([centre(case) for case in varied])
    assert np.abs(spread).max() < 32 and (np.ptp(spread, axis=0) > 24).all()
    monkeypatch.setattr(sys.modules["medseg_lite.phantoms.prostate"], "ZOOM", 0.0)
    alike = phantoms.prostate_cohort(16, size=48, vary=True)
    zooms = [(b.info["prostate_ml"] / a.info["prostate_ml"]) ** (1 / 3) for a, b in zip(alike, varied)]
    assert 0.82 < min(zooms) < 0.92 and 1.08 < max(zooms) < 1.18
    monkeypatch.undo()
    # The same patient lies at the same place at every site, and on a finer grid.
    for options in (dict(site="B", size=48), dict(site="D", size=64)):
        other = phantoms.prostate(0, vary=True, **options)
        assert centre(other) == pytest.approx(centre(varied[0]), abs=3)
        assert other.info["prostate_ml"] == pytest.approx(varied[0].info["prostate_ml"], rel=0.2)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(seed=1.0), "seed is 1.0; expected a whole number, 0 or more"),
        (dict(site="E"), "site is 'E'; expected one of A, B, C, D"),
        (dict(size=16), "size is 16; expected a whole number, 32 to 512"),
    ],
)
def test_bad_prostates_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        phantoms.prostate(options.pop("seed", 0), **options)
    with pytest.raises(ValueError, match="count is 0"):
        phantoms.prostate_cohort(0)
    with pytest.raises(ValueError, match="sites is empty"):
        phantoms.prostate_cohort(2, sites="")
