"""The dense CRF on cases: refinement of a network's probabilities, the recipe for tumours, and the search for parameters."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from crf_by_brute_force import SMOOTH_ONLY, make_case, problem, run

from medseg_lite.crf import SPACE, DenseCRF, kernels, search, whole_tumour
from medseg_lite.statistics import paired_t_test
from medseg_lite.volume import Case

# --- refine: probabilities of a case ------------------------------------------------------------------------------------


def test_refine_is_forward_on_log_probabilities():
    logits, image = problem((6, 5, 4))
    mask = np.random.default_rng(0).random((6, 5, 4)) < 0.7
    case = make_case(image, mask=mask)
    p = logits.softmax(0).float().numpy()
    crf = DenseCRF(intensity_sigma=1.0)
    original = p.copy()
    refined = crf.refine(p, case)
    assert isinstance(refined, np.ndarray) and refined.dtype == np.float32 and refined.shape == p.shape
    assert np.array_equal(p, original)
    expected = run(crf, torch.from_numpy(p).log(), image.float(), torch.from_numpy(mask))
    np.testing.assert_allclose(refined, expected, atol=1e-5)
    assert np.array_equal(refined[:, ~mask], p[:, ~mask])
    everywhere = crf.refine(p, case, inside_mask=False)
    np.testing.assert_allclose(everywhere, crf.refine(p, case.replace(mask=None)))
    assert abs(everywhere[:, ~mask] - p[:, ~mask]).max() > 0.01
    prepared = crf.prepare(image.float(), torch.from_numpy(mask))
    np.testing.assert_allclose(crf.refine(p, case, prepared=prepared), refined)
    np.testing.assert_allclose(crf.refine(torch.from_numpy(p), case), refined)
    np.testing.assert_allclose(crf.refine(p.astype(np.float16), case), refined, atol=3e-3)
    float64 = case.replace(image=case.image.astype(np.float64))
    np.testing.assert_allclose(crf.refine(p.astype(np.float64), float64), refined, atol=1e-5)


def test_clip_lets_certainty_be_talked_out_of():
    """A voxel with probability exactly 0 among tumour: kept from `clip` on."""
    p = np.zeros((2, 5, 5, 5), np.float32)
    p[1], p[:, 2, 2, 2] = 1, (1, 0)
    case = make_case(np.zeros((1, 5, 5, 5)))
    crf = DenseCRF(smoothness_weight=6.0, smoothness_sigma=2.0, **SMOOTH_ONLY)
    assert crf.refine(p, case, clip=1e-2)[1, 2, 2, 2] > 0.5
    assert crf.refine(p, case, clip=1e-30)[1, 2, 2, 2] < 0.5
    assert np.isfinite(crf.refine(p, case)).all()


# --- Whole tumour -------------------------------------------------------------------------------------------------------


def tumour_problem() -> tuple[np.ndarray, Case]:
    """A cube of tumour, its two classes side by side, with a false positive and a hole whose best tumour class is 2."""
    shape = (9, 10, 8)
    tumour = np.zeros(shape, bool)
    tumour[2:7, 3:8, 2:6] = True
    left = np.arange(9)[:, None, None] < 4
    p = np.empty((3, *shape), np.float32)
    p[1:] = np.where(tumour & left, [[[[0.8]]], [[[0.1]]]], np.where(tumour, [[[[0.2]]], [[[0.7]]]], 0.05))
    p[1:, 8, 9, 7] = 0.5, 0.3  # a false positive
    p[1:, 3, 5, 4] = 0.1, 0.3  # a hole
    p[0] = 1 - p[1:].sum(0)
    mask = np.ones(shape, bool)
    mask[:, 0] = False
    p[:, 0, 0, 0] = 0.1, 0.2, 0.7  # tumour outside the mask
    return p, make_case(2.0 * tumour[None], mask=mask, label=tumour.astype(np.uint8) * (2 - left))


def test_whole_tumour():
    p, case = tumour_problem()
    crf = DenseCRF(smoothness_weight=2, smoothness_sigma=1.5, appearance_weight=2, appearance_sigma=5, intensity_sigma=0.5)
    before, labels = p.argmax(0), whole_tumour(crf, p, case)
    assert labels.dtype == np.uint8 and labels.shape == case.shape
    assert before[8, 9, 7] == 1 and labels[8, 9, 7] == 0  # lost
    assert before[3, 5, 4] == 0 and labels[3, 5, 4] == 2  # gained: its most probable tumour class, though class 1 is around it
    untouched = np.ones(case.shape, bool)
    untouched[8, 9, 7] = untouched[3, 5, 4] = False
    assert np.array_equal(labels[untouched], before[untouched])
    assert labels[0, 0, 0] == 2  # outside the mask nothing changes
    prepared = crf.prepare(torch.from_numpy(case.image), torch.from_numpy(case.mask))
    assert np.array_equal(whole_tumour(crf, p, case, prepared=prepared), labels)
    off = DenseCRF(iterations=0)
    assert np.array_equal(whole_tumour(off, p, case), before)


def test_whole_tumour_refines_the_merged_classes():
    """Two tumour classes of .3 make a tumour of .6; one class is left as `refine` leaves it."""
    case = make_case(np.zeros((1, 4, 4, 4)))
    p = np.broadcast_to(np.array([0.4, 0.25, 0.35])[:, None, None, None], (3, 4, 4, 4))
    assert (whole_tumour(DenseCRF(), p, case) == 2).all()
    logits, image = problem((6, 5, 4), labels=2)
    case, p, crf = make_case(image), logits.softmax(0).numpy(), DenseCRF(intensity_sigma=1.0)
    assert np.array_equal(whole_tumour(crf, p, case), crf.refine(p, case).argmax(0))


def test_whole_tumour_keeps_the_most_probable_class_outside_the_mask():
    probabilities = np.zeros((3, 4, 4, 4), np.float32)
    probabilities[:] = np.array([0.4, 0.3, 0.3])[:, None, None, None]  # background leads, though the tumour's sum is larger
    mask = np.zeros((4, 4, 4), bool)
    mask[1:3, 1:3, 1:3] = True
    case = Case(np.zeros((1, 4, 4, 4), np.float32), ("flair",), "uniform", mask=mask)
    labels = whole_tumour(DenseCRF(), probabilities, case)
    assert (labels[mask] == 1).all() and not labels[~mask].any()


# --- Search -------------------------------------------------------------------------------------------------------------

SMALL = dict(trials=7, weights_per_lattice=3, progress=False, iterations=3)


@pytest.fixture(scope="module")
def cohort():
    """Three noisy segmentations of a block that the image shows well."""
    cases, maps = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        label = np.zeros((10, 9, 8), np.uint8)
        label[2 + seed : 8, 2:7, 2:6] = 1
        image = np.stack([label + 0.3 * rng.normal(size=label.shape), rng.normal(size=label.shape)])
        p = 1 / (1 + np.exp(-(2.0 * label - 1 + 1.2 * rng.normal(size=label.shape))))
        mask = None if seed else np.pad(np.ones((10, 9, 6), bool), ((0, 0), (0, 0), (1, 1)))
        cases.append(make_case(image, name=f"case {seed}", label=label, mask=mask))
        maps.append(np.stack([1 - p, p]).astype(np.float32))
    return cases, maps


def equal(a, b) -> bool:
    return a.table.equals(b.table) and a.scores.equals(b.scores) and a.baseline.equals(b.baseline)


def dice_by_hand(a, b) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_search(cohort):
    cases, maps = cohort
    found = search(cases, maps, **SMALL)
    assert list(found.table.columns) == [*SPACE, "dice", "gain", "p"]
    assert found.scores.shape == (7, 3) and list(found.scores.columns) == ["case 0", "case 1", "case 2"]
    for name, (low, high) in SPACE.items():
        assert found.table[name].between(low, high).all()
    # Weights are drawn for each trial, sigmas for each three.
    assert found.table["smoothness_weight"].nunique() == found.table["appearance_weight"].nunique() == 7
    assert found.table["intensity_sigma"].tolist() == found.table["intensity_sigma"].iloc[[0, 0, 0, 3, 3, 3, 6]].tolist()
    assert found.table["intensity_sigma"].nunique() == 3

    table = found.table["dice"]
    assert table.max() > table.min() + 0.02 and found.table["gain"].max() > 0.05
    for c, (case, p) in enumerate(zip(cases, maps)):
        assert found.baseline.iloc[c] == pytest.approx(dice_by_hand(p[1] > 0.5, case.label > 0))
        best = DenseCRF(**found.best, iterations=3).refine(p, case)[1] > 0.5
        assert found.scores.loc[table.idxmax()].iloc[c] == pytest.approx(dice_by_hand(best, case.label > 0), abs=1e-3)
    np.testing.assert_allclose(table, found.scores.mean(axis=1))
    np.testing.assert_allclose(found.table["gain"], table - found.baseline.mean())
    test = found.test()
    assert test == paired_t_test(found.scores.loc[table.idxmax()], found.baseline)
    assert found.table["p"][table.idxmax()] == pytest.approx(test.p)
    assert found.test(2).mean == pytest.approx(found.table["gain"][2])
    assert found.test(alternative="greater").p == pytest.approx(test.p / 2)


def test_search_is_deterministic_and_its_trials_do_not_depend_on_their_number(cohort):
    first, again = (search(*cohort, **SMALL) for _ in range(2))
    assert equal(first, again)
    fewer = search(*cohort, **(SMALL | dict(trials=4)))
    assert fewer.table.equals(first.table.iloc[:4]) and fewer.scores.equals(first.scores.iloc[:4])
    other = search(*cohort, **SMALL, seed=1)
    assert not other.table[list(SPACE)].isin(first.table[list(SPACE)].to_numpy().ravel()).any().any()


@pytest.fixture
def refined(monkeypatch):
    """Counts refinements; `refined.stop_at` interrupts the one with that number."""

    class Refined:
        count, stop_at = 0, None

    original = DenseCRF.mean_field

    def mean_field(self, *args, **options):
        Refined.count += 1
        if Refined.count == Refined.stop_at:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(DenseCRF, "mean_field", mean_field)
    return Refined


@pytest.mark.parametrize("stop_at", [1, 5, 14, 21])
def test_search_goes_on_where_it_was_interrupted(cohort, tmp_path, refined, stop_at):
    whole = search(*cohort, **SMALL)
    assert refined.count == 7 * 3
    refined.count, refined.stop_at = 0, stop_at
    with pytest.raises(KeyboardInterrupt):
        search(*cohort, **SMALL, folder=tmp_path / "new")
    refined.count, refined.stop_at = 0, None
    resumed = search(*cohort, **SMALL, folder=tmp_path / "new")
    assert equal(resumed, whole)
    finished = (stop_at - 1) // 9 * 9  # trials of one lattice, on all cases, are kept together
    assert refined.count == 21 - finished
    refined.count = 0
    assert equal(search(*cohort, **SMALL, folder=tmp_path / "new"), whole)
    assert refined.count == 0
    more = search(*cohort, **(SMALL | dict(trials=8)), folder=tmp_path / "new")
    assert refined.count == 3 and more.table.iloc[:7].equals(whole.table)
    (file,) = (tmp_path / "new").iterdir()
    assert json.loads(file.read_text())["seed"] == 0


@pytest.fixture
def threads():
    """`threads(n)` for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_search_is_the_same_in_any_number_of_threads(cohort, tmp_path, threads):
    one = search(*cohort, **SMALL)
    threads(3)
    assert equal(search(*cohort, **SMALL, folder=tmp_path), one)
    assert torch.get_num_threads() == 3  # as before the search
    # Refined one after another and by other threads, but with the same numbers: each alone has one thread.
    assert equal(search(*cohort, **SMALL, folder=tmp_path), one)


def test_an_error_in_one_of_several_threads_ends_the_search(cohort, threads, refined):
    threads(3)
    refined.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        search(*cohort, **SMALL)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("name", "lattices", "grids"), [("smoothness_sigma", 3, 9), ("intensity_sigma", 9, 3)])
def test_search_builds_once_what_does_not_change(cohort, monkeypatch, name, lattices, grids):
    """Three cases and three draws: the kernel without the searched sigma is built once for each case."""
    built = Counter()
    for kind in (kernels.Permutohedral, kernels.GridGaussian):

        def build(*args, kind=kind):
            built[kind.__name__] += 1
            return kind(*args)

        monkeypatch.setattr(kernels, kind.__name__, build)
    search(*cohort, trials=3, weights_per_lattice=1, progress=False, space={name: (0.5, 2.0)})
    assert built == {"Permutohedral": lattices, "GridGaussian": grids}


def test_search_does_not_take_another_search_s_results(cohort, tmp_path, refined):
    """Other images, probabilities with the same argmax, parameters or draws are another question."""
    cases, maps = cohort
    options = dict(trials=1, weights_per_lattice=1, iterations=1, progress=False, folder=tmp_path)
    brighter = [case.replace(image=2 * case.image) for case in cases]
    surer = [p**2 / (p**2).sum(0) for p in maps]
    unmasked = [case.replace(mask=None) for case in cases]
    search(cases, maps, **options)
    for changed in (
        lambda: search(brighter, maps, **options),
        lambda: search(cases, surer, **options),
        lambda: search(unmasked, maps, **options),
        lambda: search(cases, maps, **(options | dict(iterations=2))),
        lambda: search(cases, maps, **options, seed=1),
        lambda: search(cases, maps, **options, space={"smoothness_sigma": (1, 2)}),
        lambda: search(cases[:2], maps[:2], **options),
    ):
        refined.count = 0
        changed()
        assert refined.count >= 2
    refined.count = 0
    search(cases, maps, **options)
    assert refined.count == 0


def test_search_of_one_parameter_beside_fixed_ones(cohort):
    cases, maps = cohort
    found = search(
        cases[:1],
        maps[:1],
        trials=3,
        weights_per_lattice=1,
        progress=False,
        space={"smoothness_sigma": (0.5, 2.0)},
        smoothness_weight=2.0,
        appearance_weight=0.0,
    )
    assert set(found.best) == {"smoothness_sigma"} and len(found.table) == 3
    assert found.table["p"].isna().all()  # one case is no test
    DenseCRF(**found.best)


def test_search_with_several_classes_uses_the_recipe_for_tumours():
    p, case = tumour_problem()
    found = search([case], [p], trials=2, weights_per_lattice=1, progress=False)
    for trial, row in found.table[list(SPACE)].iterrows():
        labels = whole_tumour(DenseCRF(**row), p, case)
        assert found.scores.loc[trial].item() == pytest.approx(dice_by_hand(labels > 0, case.label > 0))


def test_search_refuses(cohort):
    cases, maps = cohort
    for args, options, message in [
        (([], []), {}, "0 cases and 0 probability maps"),
        ((cases, maps[:2]), {}, "3 cases and 2 probability maps"),
        (([cases[0].replace(label=None)], maps[:1]), {}, "case 0 has no label"),
        ((cases[:1], [maps[0][:, 1:]]), {}, r"case 0 have shape \(2, 9, 9, 8\)"),
        ((cases[:1], [maps[0][:1]]), {}, r"case 0 have shape \(1, 10, 9, 8\)"),
        (([cases[0], cases[0]], [maps[0], maps[0]]), {}, "two cases share one name"),
        ((cases, maps), dict(trials=0), "trials=0"),
        ((cases, maps), dict(weights_per_lattice=0), "weights_per_lattice=0"),
        ((cases, maps), dict(space={"sigma": (1, 2)}), "space has 'sigma'; what can be searched is smoothness_weight"),
        ((cases, maps), dict(space={"smoothness_sigma": (2, 1)}), r"space\['smoothness_sigma'\]=\(2, 1\)"),
        ((cases, maps), dict(space={"smoothness_sigma": (0, 1)}), "expected 0 < low <= high"),
        ((cases, maps), dict(smoothness_sigma=1.0), "smoothness_sigma cannot be both searched and fixed"),
    ]:
        with pytest.raises(ValueError, match=message):
            search(*args, **options, progress=False)
