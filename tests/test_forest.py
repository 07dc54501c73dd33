"""Box features are compared with plain loops over the voxels of each box; the forest with scikit-learn on those features."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medseg_lite import forest
from medseg_lite.forest import Box, BoxFeatures, Feature, Integrals, RandomForest
from medseg_lite.volume import Case

SPACINGS = [(2.0, 2.0, 2.0), (1.0, 2.5, 4.0)]


@pytest.fixture
def spaced(noise_case):
    """Noise on a small grid of some voxel size: many boxes reach beyond it, some lie outside altogether."""

    def make(spacing, shape=(7, 6, 5), channels=("flair", "t1c"), **options) -> Case:
        return noise_case(shape, channels=channels, **options).replace(affine=np.diag([*spacing, 1]))

    return make


def box_mean(case: Case, box: Box, voxel) -> float:
    """Mean over one box, voxel by voxel."""
    covered = []
    for v, offset, size, mm, n in zip(voxel, box.offset, box.size, case.spacing, case.shape):
        count = max(1, round(size / mm))
        first = v + round(offset / mm - (count - 1) / 2)
        nearest = 0 if first < 0 else n - 1
        covered.append([i for i in range(first, first + count) if 0 <= i < n] or [nearest])
    values = [float(case.image[box.channel, d, h, w]) for d in covered[0] for h in covered[1] for w in covered[2]]
    return sum(values) / len(values)


def feature(case: Case, drawn: Feature, voxel) -> float:
    return box_mean(case, drawn.box, voxel) - (box_mean(case, drawn.minus, voxel) if drawn.minus else 0)


# ---------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("spacing", SPACINGS)
def test_features_equal_loops_over_boxes(spaced, spacing):
    case = spaced(spacing)
    features = BoxFeatures(2, count=30, seed=1)
    voxels = np.argwhere(np.ones(case.shape, bool))
    expected = np.array([[feature(case, drawn, v) for drawn in features.drawn] for v in voxels.tolist()])

    table = features.at(case, voxels)
    assert table.dtype == np.float32 and table.shape == (voxels.shape[0], 30)
    np.testing.assert_allclose(table, expected, atol=1e-6)
    for index, volume in enumerate(features.volumes(case)):
        assert volume.dtype == np.float32 and volume.shape == case.shape
        np.testing.assert_allclose(volume.reshape(-1), expected[:, index], atol=1e-6)
    assert np.array_equal(features.volume(case, 29), volume)
    # The test is worth its name only if boxes do leave this volume, in part and altogether.
    first, count = zip(*(Integrals(case)._in_voxels(drawn.box) for drawn in features.drawn))
    stop = np.add(first, count)
    assert (stop < 0).any() and (np.array(first) > case.shape).any() and (np.array(count) > 3).any()


@pytest.mark.parametrize(
    "offset, size, spacing, voxels",
    [
        (0, 0, 2, [0]),
        (0, 6, 2, [-1, 0, 1]),
        (10, 6, 2, [4, 5, 6]),
        (-10, 2, 2, [-5]),
        (20, 20, 4, [3, 4, 5, 6, 7]),
        (3, 4, 2, [1, 2]),
        (0, 1, 2.5, [0]),  # thinner than a voxel
    ],
)
def test_boxes_are_placed_in_mm(offset, size, spacing, voxels):
    """The image is 1 at one voxel: its box means tell from which voxels it is seen."""
    image = np.zeros((1, 41, 1, 1))
    image[0, 20] = 1
    case = Case(image, ("x",), affine=np.diag([spacing, 1, 1, 1]))
    mean = Integrals(case).mean(Box(0, (offset, 0, 0), (size, 0, 0)), (slice(0, 41), slice(0, 1), slice(0, 1)))
    seen_from = 20 - np.flatnonzero(mean.round(9))
    assert sorted(seen_from.tolist()) == voxels
    assert mean.max() == pytest.approx(1 / len(voxels))


def test_centred_boxes_equal_a_uniform_filter(noise_case):
    case = noise_case((20, 18, 16))
    mean = Integrals(case).mean(Box(1, size=(5, 3, 7)), tuple(slice(0, n) for n in case.shape))
    inner = (slice(3, -3),) * 3
    expected = ndimage.uniform_filter(case.image[1].astype(np.float64), (5, 3, 7))
    np.testing.assert_allclose(mean[inner], expected[inner], atol=1e-12)


def test_part_of_a_volume_equals_the_whole(spaced):
    integrals = Integrals(spaced((2, 2, 2), (9, 8, 7)))
    box = Box(0, (3.0, -7.0, 5.0), (8.0, 3.0, 11.0))
    whole = integrals.mean(box, (slice(0, 9), slice(0, 8), slice(0, 7)))
    for region in [(slice(0, 1), slice(7, 8), slice(3, 4)), (slice(2, 9), slice(1, 5), slice(0, 6))]:
        np.testing.assert_allclose(integrals.mean(box, region), whole[region], atol=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_constant_image_has_no_differences(spaced, spacing):
    case = spaced(spacing)
    case = case.replace(image=np.full_like(case.image, 0.7))
    features = BoxFeatures(2, count=60)
    for drawn, volume in zip(features.drawn, features.volumes(case)):
        np.testing.assert_allclose(volume, 0.7 if drawn.minus is None else 0, atol=1e-6)


def test_small_boxes_stay_exact_in_a_large_volume_of_large_values(noise_case):
    case = noise_case((60, 60, 60), channels=("t2",))
    case = case.replace(image=case.image + np.float32(5000))
    np.testing.assert_allclose(BoxFeatures(1).volume(case, 0), case.image[0], rtol=1e-6)


def test_integer_images_are_summed_without_overflow():
    case = Case(np.full((1, 4, 4, 40), 30000, np.int16), ("ct",))
    np.testing.assert_allclose(BoxFeatures(1).volume(case, 0), 30000)


def test_the_draw():
    features = BoxFeatures(4, count=500, reach_mm=12, seed=3)
    assert [f.box for f in features.drawn[:4]] == [Box(c) for c in range(4)]
    assert all(f.minus is None for f in features.drawn[:4])
    drawn = features.drawn[4:]
    boxes = [b for f in drawn for b in f if b is not None]
    assert np.abs([b.offset for b in boxes]).max() <= 12 and np.min([b.size for b in boxes]) >= 0
    assert 11 < np.max([b.size for b in boxes]) <= 12 and 11 < np.max(np.abs([b.offset for b in boxes]))
    around = [f for f in drawn if f.minus is None]
    less_voxel = [f for f in drawn if f.minus is not None and f.minus == Box(f.minus.channel)]
    assert all(f.box.offset == (0, 0, 0) for f in around)
    assert all(130 < n < 200 for n in (len(around), len(less_voxel), len(drawn) - len(around) - len(less_voxel)))
    pairs = {(i, j) for i in range(4) for j in range(4)}
    assert {(f.box.channel, f.minus.channel) for f in less_voxel} == pairs
    assert {(f.box.channel, f.minus.channel) for f in drawn if f.minus and f not in less_voxel} == pairs
    assert BoxFeatures(4, count=500, reach_mm=12, seed=3).drawn == features.drawn
    assert BoxFeatures(4, count=500, reach_mm=12, seed=4).drawn != features.drawn
    assert len(BoxFeatures(4, count=2)) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 0}, "channels=0"),
        ({"count": 0}, "count=0"),
        ({"reach_mm": 0.0}, "reach_mm=0"),
        ({"reach_mm": float("nan")}, "reach_mm=nan"),
    ],
)
def test_features_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        BoxFeatures(**options)


def test_features_of_a_case_refuse(noise_case):
    case, features = noise_case(), BoxFeatures(2, count=5)
    with pytest.raises(ValueError, match=r"noise has 2 channels \(flair, t1c\) but the features were drawn for 3"):
        BoxFeatures(3).volume(case, 0)
    with pytest.raises(ValueError, match="index=5; expected 0 to 4"):
        features.volume(case, 5)
    with pytest.raises(ValueError, match=r"expected whole numbers \(N, 3\)"):
        features.at(case, np.zeros((4, 2), int))
    with pytest.raises(ValueError, match="float64; expected whole numbers"):
        features.at(case, np.zeros((4, 3)))
    for outside in ([0, 0, 9], [-1, 0, 0]):
        with pytest.raises(ValueError, match="outside noise"):
            features.at(case, np.array([outside]))
    case.image[1, 3, 3, 3] = np.nan
    with pytest.raises(ValueError, match="noise has NaN"):
        features.volume(case, 0)


# ------------------------------------------------------------------------------------------------------------ forest


def small(**options) -> RandomForest:
    return RandomForest(BoxFeatures(2, count=12), **{"trees": 8, "jobs": 1} | options)


def test_learns_what_one_channel_tells(noise_case):
    trained = small().fit([noise_case(seed=0), noise_case(seed=1)], points_per_case=400)
    unseen = noise_case(seed=2)
    assert (trained.predict(unseen, progress=False).argmax(0) == unseen.label).mean() > 0.95


def test_learns_context_that_the_voxel_itself_does_not_tell(noise_case):
    """The label is the sign of a mean over 5³ voxels: the voxel's own value alone is right in little more than half."""
    cases = []
    for seed in range(3):
        case = noise_case((24, 24, 24), seed=seed)
        cases.append(case.replace(label=(ndimage.uniform_filter(case.image[0], 5) > 0).astype(np.uint8)))
    features = BoxFeatures(2, count=150, reach_mm=8)
    trained = RandomForest(features, trees=15, jobs=1).fit(cases[:2], points_per_case=800)
    right = (trained.predict(cases[2], progress=False).argmax(0) == cases[2].label).mean()
    assert right > 0.75 > 0.6 > ((cases[2].image[0] > 0) == cases[2].label).mean()


def test_prediction_is_scikit_learns(noise_case, monkeypatch):
    case = noise_case(mask=True)
    trained = small().fit([case], points_per_case=200)
    monkeypatch.setattr(forest, "SLAB", 1)  # one plane at a time
    probabilities = trained.predict(case, progress=False)
    voxels = np.argwhere(case.mask)
    expected = trained.classifier.predict_proba(trained.features.at(case, voxels))
    np.testing.assert_allclose(probabilities[:, case.mask].T, expected, atol=1e-6)


def test_probabilities_look_like_those_of_a_network(noise_case):
    case = noise_case(mask=True)
    trained = small(depth=3).fit([case], points_per_case=200)
    probabilities = trained.predict(case, progress=False)
    assert probabilities.shape == (2, *case.shape) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-6)
    assert (probabilities[0][~case.mask] == 1).all() and (probabilities[1][~case.mask] == 0).all()
    assert 0.2 < probabilities[1][case.mask].mean() < 0.8

    everywhere = trained.predict(case, inside_mask=False, progress=False)
    np.testing.assert_allclose(everywhere.sum(0), 1, atol=1e-6)
    assert np.array_equal(everywhere[:, case.mask], probabilities[:, case.mask])
    assert np.array_equal(everywhere, trained.predict(case.replace(mask=None), progress=False))
    assert everywhere[1][~case.mask].any()


def test_classes_keep_their_numbers(noise_case):
    cases = [c.replace(label=c.label * 3) for c in (noise_case(seed=0), noise_case(seed=1))]
    trained = small().fit(cases, points_per_case=400)
    probabilities = trained.predict(cases[1], progress=False)
    assert probabilities.shape[0] == 4 and not probabilities[1:3].any()
    assert (probabilities.argmax(0) == cases[1].label).mean() > 0.9


def test_deterministic_by_seed_whatever_the_threads_and_slabs(noise_case, monkeypatch):
    cases = [noise_case((12, 15, 9), seed=s, mask=True) for s in range(2)]

    def run(**options):
        return small(**options).fit(cases, points_per_case=100).predict(cases[1], progress=False)

    first = run()
    assert np.array_equal(run(), first)
    assert not np.array_equal(run(seed=1), first)
    monkeypatch.setattr(forest, "WORKSPACE", 4 * 12 * 200)
    assert len(list(forest._slabs((slice(0, 12), slice(0, 15), slice(0, 9)), 200))) == 12
    assert np.array_equal(run(jobs=3), first)


def test_features_are_drawn_for_the_cases_where_none_are_given(noise_case):
    case = noise_case(channels=("a", "b", "c"))
    trained = RandomForest(trees=2, seed=5, jobs=1).fit([case], points_per_case=50)
    assert trained.features.drawn == BoxFeatures(3, seed=5).drawn and len(trained.features) == 200
    assert len(trained.classifier.estimators_) == 2


class Recorder(BoxFeatures):
    """Features that remember which voxels they were asked for."""

    def at(self, case, voxels):
        self.asked = [*getattr(self, "asked", []), voxels]
        return super().at(case, voxels)


def test_points_are_drawn_as_asked(noise_case):
    healthy, rare, common = (noise_case(seed=s, mask=True, name=str(s)) for s in range(3))
    healthy = healthy.replace(label=np.zeros_like(healthy.label))
    label = np.zeros_like(rare.label)
    label[5, 5, 5] = label[0, 0, 0] = 1  # the second one lies outside the mask
    rare = rare.replace(label=label)
    recorder = Recorder(2, count=3)
    RandomForest(recorder, trees=1, jobs=1).fit([healthy, rare, common], points_per_case=200, balance=0.2)
    for case, points, lesion in zip((healthy, rare, common), recorder.asked, (0, 40, 40)):
        labels, inside = case.label[tuple(points.T)], case.mask[tuple(points.T)]
        assert np.count_nonzero(labels) == lesion and np.count_nonzero(labels == 0) == 160
        assert inside[labels == 0].all()
    different = [len(np.unique(points, axis=0)) for points in recorder.asked]
    assert different == [160, 162, 200]  # repeated only where there are too few


def test_training_refuses(noise_case):
    case = noise_case()
    with pytest.raises(ValueError, match="no cases to train on"):
        small().fit([])
    with pytest.raises(ValueError, match="noise has no label"):
        small().fit([case.replace(label=None)])
    with pytest.raises(ValueError, match=r"other has channels \('t1c', 'flair'\) but noise has"):
        small().fit([case, case.select(["t1c", "flair"]).replace(name="other")])
    with pytest.raises(ValueError, match="none of the 1 cases has a labelled voxel"):
        small().fit([case.replace(label=np.zeros_like(case.label))])
    with pytest.raises(ValueError, match="none of the 1 cases has a background voxel inside its mask"):
        small().fit([case.replace(label=np.ones_like(case.label))])
    with pytest.raises(ValueError, match="noise: the mask is empty"):
        small().fit([case.replace(mask=np.zeros(case.shape, bool))])
    with pytest.raises(ValueError, match="noise has 2 channels"):
        RandomForest(BoxFeatures(4)).fit([case])
    for balance in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            small().fit([case], balance=balance)
    with pytest.raises(ValueError, match=r"points_per_case=10 with balance=0.01"):
        small().fit([case], points_per_case=10, balance=0.01)
    for options in ({"trees": 0}, {"depth": 0}, {"jobs": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=0"):
            small(**options)


def test_prediction_refuses(noise_case):
    case = noise_case()
    with pytest.raises(RuntimeError, match="not trained; call fit"):
        small().predict(case)
    trained = small(trees=1).fit([case], points_per_case=20)
    with pytest.raises(ValueError, match=r"trained on flair, t1c; use case.select\(\['flair', 't1c'\]\)"):
        trained.predict(case.select(["t1c", "flair"]))
    with pytest.raises(ValueError, match="noise: the mask is empty"):
        trained.predict(case.replace(mask=np.zeros(case.shape, bool)))
    assert trained.predict(case.replace(mask=np.zeros(case.shape, bool)), inside_mask=False, progress=False).any()
