"""The phantoms' tools, and brain phantoms: determinism, labels, anatomy of the lesions, physics, and the numbers of real cases."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg_lite import paths, phantoms
from medseg_lite.phantoms import lesions, mri
from medseg_lite.phantoms.anatomy import EXTENT, Person, sample, template
from medseg_lite.phantoms.noise import bspline_noise, multiply_axis, spline_matrix


@pytest.fixture(scope="module")
def cohort():
    return phantoms.brain_cohort(12)


def z_scores(case, channel):
    values = case.image[case.channels.index(channel)]
    return (values - values[case.mask].mean()) / values[case.mask].std()


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noise_has_unit_variance_and_the_right_grain():
    axes = [np.arange(0, 400, 2.0), np.arange(0, 300, 2.0)]
    field = bspline_noise(np.random.default_rng(0), axes, 8, count=4)
    assert field.shape == (4, 200, 150) and field.dtype == np.float32
    assert field.mean() == pytest.approx(0, abs=0.05)
    assert field.std() == pytest.approx(1, abs=0.05)
    neighbours = np.mean(field[:, 1:] * field[:, :-1])
    far = np.mean(field[:, 20:] * field[:, :-20])  # 40 mm = 5 lattice steps: nothing shared
    assert neighbours > 0.95 and abs(far) < 0.1


def test_noise_is_the_same_field_on_a_finer_and_on_a_smaller_grid():
    def draw(*axes):
        return bspline_noise(np.random.default_rng(3), axes, 9, extent=[(-50, 50)] * 2)

    coarse = draw(np.arange(-50, 51, 2.0), np.arange(-50, 51, 2.0))
    fine = draw(np.arange(-50, 51, 1.0), np.arange(-20, 21, 1.0))
    np.testing.assert_allclose(fine[::2, ::2], coarse[:, 15:36], atol=1e-5)


def test_spline_matrix_is_the_cubic_b_spline():
    weights = spline_matrix(np.array([0.0, 2.0]), 4.0, (0.0, 8.0))
    assert weights.shape == (2, 5)
    np.testing.assert_allclose(weights[0], np.array([1, 4, 1, 0, 0]) / 18**0.5, atol=1e-6)  # at a knot: 1/6 4/6 1/6
    np.testing.assert_allclose(weights[1], np.array([1, 23, 23, 1, 0]) / 1060**0.5, atol=1e-6)  # halfway: 1 23 23 1 / 48


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_along_multiplies_one_axis(axis):
    rng = np.random.default_rng(axis)
    array, matrix = rng.normal(size=(4, 5, 6)), rng.normal(size=(7, (4, 5, 6)[axis]))
    expected = np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)
    np.testing.assert_allclose(multiply_axis(array, axis, matrix), expected)


def test_noise_needs_a_positive_scale():
    with pytest.raises(ValueError, match="scale is 0; expected a positive distance"):
        bspline_noise(np.random.default_rng(0), [np.arange(5)], 0)


# -------------------------------------------------------------------------------------------------------------- anatomy


def test_anatomy_ships_with_its_notice():
    path = paths.shipped("anatomy", "icbm152_2009a.npz")
    assert path.stat().st_size < 5e6
    assert "provided that the above copyright notice appear in all copies" in " ".join(
        paths.shipped("anatomy", "LICENSE-ICBM152.txt").read_text().split()
    )


def test_sample_is_linear_interpolation():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 7, 8, 9)).astype(np.float32)
    first, step = np.array([-3.0, 2.0, 0.5]), 1.5
    points = rng.uniform(-6, 16, (3, 500)).astype(np.float32)
    expected = [ndimage.map_coordinates(m, (points - first[:, None]) / step, order=1, mode="nearest") for m in maps]
    table = torch.from_numpy(np.ascontiguousarray(np.moveaxis(maps, 0, -1)))
    np.testing.assert_allclose(sample(table, first, step, points), expected, atol=0.02)


def test_template_knows_its_landmarks():
    points = np.array([[0, 0, 25], [0, 0, -90], [20, 0, 25], [-60, -60, -30], [25, -43, 12], [0, -70, -4]], np.float32)
    maps = template().look_up(points.T)
    assert maps["callosum"][0] > 0.9 and maps["callosum"][2] < 0.1
    assert maps["depth"][1] == 0
    assert maps["wm"][2] > 0.8
    assert maps["ventricle"][4] > 0.5 and maps["vessel"][4] > 0.4  # choroid plexus
    assert maps["vessel"][5] > 0.2  # straight sinus


def test_people_have_plausible_brains():
    for seed in range(3):
        person = Person(seed)
        maps = person.look(person.positions(lesions.LATTICE))
        inside = maps["depth"] > 0.9
        ml = {t: maps[t][inside].sum() * 0.008 for t in ("csf", "gm", "wm")}
        assert 400 < ml["gm"] < 750 and 280 < ml["wm"] < 560 and 60 < ml["csf"] < 300


# -------------------------------------------------------------------------------------------------------------- physics


def test_signals_follow_the_equations():
    still = SimpleNamespace(normal=lambda mean, sd, size: np.zeros(size))  # no differences between people
    site = phantoms.SITES["A"]
    table = mri.signals(site, ("t1", "flair"), still, np.random.default_rng(1))
    gm, wm, csf = (list(mri.TISSUES).index(t) for t in ("gm", "wm", "csf"))
    (t1g, t2g, pdg, *_), (t1w, t2w, pdw, *_) = mri.TISSUES["gm"], mri.TISSUES["wm"]
    expected = (pdg * (1 - np.exp(-600 / t1g)) * np.exp(-12 / t2g)) / (pdw * (1 - np.exp(-600 / t1w)) * np.exp(-12 / t2w))
    assert table[0, gm] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(table[:, wm], 1, rtol=1e-6)
    assert table[1, csf] < 0.4 < table[1, gm]  # FLAIR suppresses fluid


def test_contrast_is_as_a_radiologist_expects():
    order = list(mri.TISSUES)
    for site in phantoms.SITES.values():
        channels = ("flair", "t1", "t1c", "t2", "dwi")
        table = mri.signals(site, channels, np.random.default_rng(0), np.random.default_rng(1))
        s = {c: dict(zip(order, row)) for c, row in zip(channels, table)}
        assert s["t1"]["wm"] > s["t1"]["gm"] > s["t1"]["csf"]
        assert s["t2"]["csf"] > s["t2"]["oedema"] > s["t2"]["gm"] > s["t2"]["wm"]
        assert s["flair"]["oedema"] > 1.3 * s["flair"]["gm"] and s["flair"]["csf"] < s["flair"]["wm"]
        assert s["t1c"]["enhancing"] > 1.2 * s["t1c"]["wm"] and s["t1"]["enhancing"] < s["t1"]["wm"]
        assert max(s["dwi"], key=s["dwi"].get) == "infarct"


def test_slices_average_and_interpolate():
    down, up = mri.slice_matrices(64, 1.0, 5.0)
    assert down.shape == (13, 64) and up.shape == (64, 13)
    np.testing.assert_allclose(down.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(up.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(down[6, 29:35], [0.1, 0.2, 0.2, 0.2, 0.2, 0.1], atol=1e-6)  # the middle slice, 5 mm thick
    line = np.arange(64.0)
    np.testing.assert_allclose((up @ (down @ line))[7:-7], line[7:-7], atol=1e-4)


def test_motion_of_zero_changes_nothing_and_ghosts_spread_along_h():
    image = np.zeros((16, 32, 16), np.float32)
    image[6:10, 14:18, 6:10] = 1
    np.testing.assert_allclose(mri.shake(image, 0.0, np.random.default_rng(0)), image, atol=1e-6)
    moved = mri.shake(image, 1.0, np.random.default_rng(0))
    away = np.ones(image.shape, bool)
    away[:, 11:21] = False
    assert moved[away].max() > 0.01
    assert np.sum(moved**2) == pytest.approx(np.sum(image**2), rel=1e-3)  # shifts keep the energy


# ---------------------------------------------------------------------------------------------------------- whole cases


def test_a_case_is_complete(cohort):
    for i, case in enumerate(cohort):
        site = "ABC"[i % 3]
        assert case.name == f"brain-{site}-{i:04d}" and case.info["site"] == site and case.info["seed"] == i
        assert case.channels == ("flair", "t1", "t1c", "t2") and case.image.shape == (4, 72, 80, 64)
        assert case.image.dtype == np.float32 and case.label.dtype == np.uint8 and case.mask.dtype == bool
        assert case.axes == "RAS" and case.spacing == (2, 2, 2)
        centre = case.affine @ [*(np.array(case.shape) - 1) / 2, 1]
        np.testing.assert_allclose(centre[:3], 0, atol=1e-4)
        assert (case.image == np.rint(case.image)).all() and case.image.min() == 0
        np.testing.assert_array_equal(case.image > 0, np.broadcast_to(case.mask, case.image.shape))
        assert not case.label[~case.mask].any() and case.label.max() <= 4
        tissue = sum(case.extra[t].astype(np.float32) for t in ("csf", "gm", "wm"))
        np.testing.assert_allclose(tissue[case.mask], 1, atol=2e-3)
        assert not tissue[~case.mask].any()
        assert ndimage.label(case.mask)[1] == 1
        core = np.isin(case.label, (1, 3, 4)).sum() * 0.008
        assert case.info["core_ml"] == pytest.approx(core, abs=0.01) and 2 < core < 100
        assert case.info["grade"] == "high" or not (case.label == 1).any()


def test_same_seed_same_bytes_whatever_the_global_state(cohort):
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    again = phantoms.brain(1, site="B")
    for ours, theirs in ((again.image, cohort[1].image), (again.label, cohort[1].label)):
        assert ours.tobytes() == theirs.tobytes()
    assert all(again.extra[k].tobytes() == cohort[1].extra[k].tobytes() for k in again.extra)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert not np.array_equal(again.label, cohort[2].label)


def test_a_seed_is_the_same_patient_at_every_site(cohort):
    medians = []
    for site in phantoms.SITES:
        case = phantoms.brain(2, site=site)
        np.testing.assert_array_equal(case.label, cohort[2].label)
        np.testing.assert_array_equal(case.mask, cohort[2].mask)
        medians.append([np.median(x[case.mask]) for x in case.image])
    medians = np.array(medians)
    for a in range(4):
        for b in range(a):
            assert np.abs(np.log(medians[a] / medians[b])).max() > 0.5


def test_random_scanners_see_the_same_patient_otherwise(cohort):
    sites = [phantoms.random_site(seed) for seed in range(40)]
    assert sites[3] == phantoms.random_site(3) and len(set(map(repr, sites))) == 40
    for name, site in phantoms.SITES.items():  # the ranges hold the settings of all sites
        for what in ("noise", "bias", "gamma"):
            values = [getattr(s, what) for s in sites]
            assert min(values) <= getattr(site, what) * 1.1 and max(values) >= getattr(site, what) * 0.9, (name, what)
    still = SimpleNamespace(normal=lambda mean, sd, size: np.zeros(size))
    oedema, wm = (list(mri.TISSUES).index(t) for t in ("oedema", "wm"))
    for site in sites:  # whatever the scanner, a tumour's oedema is bright
        for row in mri.signals(site, ("flair", "t2"), still, np.random.default_rng(1)):
            assert row[oedema] > 1.3 * row[wm]
    one, again, other = (phantoms.brain(2, site=sites[i]) for i in (0, 0, 1))
    assert one.image.tobytes() == again.image.tobytes() and one.name == "brain-own-0002"
    np.testing.assert_array_equal(one.label, cohort[2].label)
    assert np.abs(np.log(one.image[0][one.mask].mean() / other.image[0][one.mask].mean())) > 0.05


def test_a_seed_is_the_same_patient_on_every_grid(cohort):
    fine = phantoms.brain(2, site="C", spacing=1.5)
    assert fine.shape == (96, 107, 85)
    world = np.stack(np.meshgrid(*map(np.arange, fine.shape), indexing="ij")).reshape(3, -1)
    world = fine.affine[:3, :3] @ world + fine.affine[:3, 3:]
    index = np.linalg.solve(cohort[2].affine[:3, :3], world - cohort[2].affine[:3, 3:])
    coarse = ndimage.map_coordinates(cohort[2].label, index, order=0, mode="nearest").reshape(fine.shape)
    for labels in ((1, 2, 3, 4), (1, 3, 4)):
        a, b = np.isin(fine.label, labels), np.isin(coarse, labels)
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85
    cropped = phantoms.brain(2, site="C", shape=(40, 48, 32))
    np.testing.assert_array_equal(cropped.label[cropped.mask], cohort[2].label[16:56, 16:64, 16:48][cropped.mask])


def test_frequencies_and_contrast_match_real_cases(cohort):
    share = 100 * np.mean([np.bincount(c.label.ravel(), minlength=5) / c.label.size for c in cohort], 0)
    # BRATS (Kayalibay et al. 2017, table 1): 96, 0.2, 2.4, 0.5, 0.6 %; benchmarks/phantoms.md has 32 cases.
    for value, low, high in zip(share, (95.5, 0.15, 1.6, 0.35, 0.42), (97.3, 0.45, 2.9, 0.70, 0.80)):
        assert low < value < high
    for channel, label, low, high in (("flair", 2, 1.7, 2.7), ("t1c", 4, 1.5, 4.0), ("t1c", 1, -2.4, -0.8)):
        means = [z_scores(c, channel)[c.label == label].mean() for c in cohort if (c.label == label).sum() > 30]
        assert low < np.mean(means) < high, (channel, label)


def test_balanced_numbers_fill_the_cube_evenly():
    u = np.array([lesions.quasirandom(seed) for seed in range(32)])
    assert u.min() >= 0 and u.max() < 1
    counts = np.stack([np.histogram(column, 4, (0, 1))[0] for column in u.T])
    assert counts.min() >= 6 and counts.max() <= 10  # of 8; independent draws would range over 2 to 15
    assert lesions.quasirandom(10**30) != lesions.quasirandom(10**30 + 1)


# ------------------------------------------------------------------------------------------------------ falx and mirror


def crossings(case) -> np.ndarray:
    """Oedema beyond the falx, seen from the core."""
    side = 1 if case.info["side"] == "right" else -1
    return (case.label > 0) & (case.extra["midline"] * side < 0)


CROSSES = 7  # a seed whose oedema reaches the other hemisphere


def test_no_core_beyond_the_falx_and_oedema_only_through_the_corpus_callosum(cohort):
    fine = phantoms.brain(CROSSES, spacing=1.5)
    crossed = 0
    for case in [*cohort, fine]:
        beyond = crossings(case)
        assert set(np.unique(case.label[beyond])) <= {2}
        crossed += beyond.any()
        # Wherever labelled voxels face each other across the falx, both lie in the corpus callosum.
        person = Person(case.info["seed"])
        disease = lesions.glioma(person)
        axes = [case.affine[i, 3] + case.affine[i, i] * np.arange(n) for i, n in enumerate(case.shape)]
        _, maps = disease.view(person, [a.astype(np.float32) for a in axes])
        bridge = maps["callosum"] > 0
        if case is fine:  # a lesion is worked out on 2 mm voxels: its edge may lie one of these off
            bridge = ndimage.binary_dilation(bridge, iterations=2)
        right = case.extra["midline"] > 0
        for axis in range(3):
            a, b = [(slice(None),) * axis + (s,) for s in (slice(None, -1), slice(1, None))]
            faces = (case.label[a] > 0) & (case.label[b] > 0) & (right[a] != right[b])
            assert bridge[a][faces].all() and bridge[b][faces].all()
    assert crossings(fine).any() and 2 <= crossed < len(cohort)


def test_mirrored_brain_is_healthy_and_symmetric(cohort):
    seed = next(c.info["seed"] for c in cohort if not crossings(c).any())
    ill = phantoms.brain(seed)
    case = phantoms.brain(seed, mirrored=True)
    assert case.name == f"brain-A-{seed:04d}-mirrored" and case.info["lesion"] is None and "core_ml" not in case.info
    assert not case.label.any() and case.mask.any()
    side = 1 if ill.info["side"] == "right" else -1
    sound = case.extra["midline"] * side < 0
    np.testing.assert_array_equal(case.image[:, sound], ill.image[:, sound])
    assert not ill.label[sound].any()
    index = np.argwhere(case.mask & ~sound)
    left = np.count_nonzero(case.extra["midline"] < 0, axis=0)
    twin = 2 * left[index[:, 1], index[:, 2]] - 1 - index[:, 0]
    np.testing.assert_array_equal(case.image[:, *index.T], case.image[:, twin, index[:, 1], index[:, 2]])
    # The bright oedema is gone.
    assert np.percentile(z_scores(case, "flair")[case.mask], 99.5) < np.percentile(z_scores(ill, "flair")[ill.mask], 99.5)


# -------------------------------------------------------------------------------------------------------- other lesions


def test_healthy_brains_hold_what_fools_networks():
    for seed in (0, 1):
        case = phantoms.brain(seed, lesion=None)
        assert case.name == f"brain-A-{seed:04d}-healthy" and not case.label.any()
        assert "grade" not in case.info and "core_ml" not in case.info
        assert (z_scores(case, "t1c") > 3).sum() > 20  # vessels, choroid plexus
    old = max(range(12), key=lambda s: Person(s).atrophy)
    young = min(range(12), key=lambda s: Person(s).atrophy)
    spots = [(z_scores(phantoms.brain(s, lesion=None), "flair") > 2).sum() for s in (young, old)]
    assert spots[1] > spots[0]


def test_spots_look_like_oedema_and_belong_to_the_background():
    ill, sound = (phantoms.brain(1, site="B", spacing=4, spots=1, lesion=lesion) for lesion in ("glioma", None))
    plain = phantoms.brain(1, site="B", spacing=4, spots=0)
    few = phantoms.brain(1, site="B", spacing=4)
    np.testing.assert_array_equal(plain.image, few.image)  # the default changes no phantom
    np.testing.assert_array_equal(ill.label, few.label)
    assert not sound.label.any()
    for case, without in ((ill, few), (sound, phantoms.brain(1, site="B", spacing=4, lesion=None))):
        bright = [(z_scores(c, "flair") > 2) & (c.label == 0) & c.mask for c in (case, without)]
        assert bright[0].sum() > bright[1].sum() + 20
    with pytest.raises(ValueError, match="spots is 3; expected 0 to 2"):
        phantoms.brain(3, spots=3)


def test_the_same_person_before_and_after(cohort):
    before = phantoms.brain(2, site="C", lesion=None)
    assert np.mean(before.mask == cohort[2].mask) > 0.99
    # The hemisphere without tumour is untouched far from the midline.
    side = 1 if cohort[2].info["side"] == "right" else -1
    far = (before.extra["midline"] * side < -35) & before.mask
    np.testing.assert_allclose(before.extra["wm"][far], cohort[2].extra["wm"][far], atol=0.05)


def test_contusions_lie_under_the_skull():
    for seed in (0, 3):
        case = phantoms.brain(seed, lesion="contusions")
        assert case.name == f"brain-A-{seed:04d}-contusions"
        assert set(np.unique(case.label)) == {0, 1}
        assert 1 < case.info["lesion_ml"] < 90
        assert z_scores(case, "flair")[case.label == 1].mean() > 1
        depth = ndimage.distance_transform_edt(case.mask, 2.0)
        assert np.median(depth[case.label == 1]) < 16


def test_stroke_is_bright_on_dwi_and_in_one_hemisphere():
    for seed in (0, 4):
        case = phantoms.brain(seed, lesion="stroke", site="B")
        assert case.channels == ("flair", "t1", "t1c", "t2", "dwi")
        assert set(np.unique(case.label)) == {0, 1} and 2 < case.info["lesion_ml"] < 130
        assert case.info["artery"] in ("middle", "anterior", "posterior")
        assert z_scores(case, "dwi")[case.label == 1].mean() > 2.5
        side = 1 if case.info["side"] == "right" else -1
        assert (case.extra["midline"][case.label == 1] * side > 0).all()


def test_grade_can_be_chosen():
    low = phantoms.brain(0, grade="low", shape=(36, 40, 32), spacing=4)
    assert low.info["grade"] == "low" and not (low.label == 1).any() and (low.label == 3).any()
    assert phantoms.brain(0, grade="high", shape=(36, 40, 32), spacing=4).info["grade"] == "high"


# -------------------------------------------------------------------------------------------------------------- options


def test_missing_channels_are_left_out_and_the_rest_unchanged(cohort):
    case = phantoms.brain(0, missing=("t1c", "flair"))
    assert case.channels == ("t1", "t2")
    np.testing.assert_array_equal(case.image, cohort[0].image[[1, 3]])


def test_motion_changes_the_image_only(cohort):
    case = phantoms.brain(0, motion=2.0)
    np.testing.assert_array_equal(case.label, cohort[0].label)
    np.testing.assert_array_equal(case.mask, cohort[0].mask)
    assert not np.array_equal(case.image, cohort[0].image)


def test_cut_removes_its_share(cohort):
    case = phantoms.brain(0, cut=0.25)
    assert case.mask.sum() / cohort[0].mask.sum() == pytest.approx(0.75, abs=0.01)
    np.testing.assert_array_equal(case.image[:, case.mask], cohort[0].image[:, case.mask])
    np.testing.assert_array_equal(case.label, np.where(case.mask, cohort[0].label, 0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(seed=-1), "seed is -1; expected a whole number"),
        (dict(seed=1.5), "seed is 1.5"),
        (dict(seed=True), "seed is True"),
        (dict(site="E"), "site is 'E'; expected one of A, B, C, D"),
        (dict(spacing=0), "spacing is 0 mm; expected 0.5 to 8"),
        (dict(spacing=float("nan")), "spacing is nan"),
        (dict(lesion="tumour"), "lesion is 'tumour'; expected one of 'glioma', 'contusions', 'stroke', None"),
        (dict(grade="medium"), "grade is 'medium'; expected 'high', 'low' or None"),
        (dict(lesion=None, grade="high"), "only a glioma has a grade"),
        (dict(lesion="contusions", mirrored=True), "mirrored needs a lesion in one hemisphere"),
        (dict(lesion=None, mirrored=True), "mirrored needs a lesion in one hemisphere"),
        (dict(missing=("t3",)), "missing names 't3'; this case has flair, t1, t1c, t2"),
        (dict(missing=("dwi",)), "missing names 'dwi'"),
        (dict(missing="t1"), r"expected a collection of channel names, such as \('t1',\)"),
        (dict(missing=("flair", "t1", "t1c", "t2")), "missing names every channel"),
        (dict(motion=-1), "motion is -1 mm; expected 0 to 20"),
        (dict(cut=1.0), "cut is 1.0; expected a share of the brain"),
        (dict(shape=(64, 64)), r"shape is \(64, 64\); expected three whole numbers"),
        (dict(shape=(64, 64, 4)), "of at least 8 voxels"),
    ],
)
def test_bad_input_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        phantoms.brain(options.pop("seed", 0), **options)


def test_cohort_checks_its_input():
    with pytest.raises(ValueError, match="count is 0; expected at least one case"):
        phantoms.brain_cohort(0)
    with pytest.raises(ValueError, match="sites is empty"):
        phantoms.brain_cohort(2, sites="")
    with pytest.raises(ValueError, match="site is 'Z'"):
        phantoms.brain_cohort(2, sites="Z")


def test_fields_span_the_largest_grid():
    assert all(low <= -mm / 2 and high >= mm / 2 for (low, high), mm in zip(EXTENT, (144, 160, 128)))
