"""Class numbers: what a recipe's network calls a class, and what the data call it. Predictions are in the numbers of the data."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_lite import datasets, files, inference, metrics, models, recipes
from medseg_lite.cli import main
from medseg_lite.recipes import crossvalidation
from medseg_lite.recipes.numbers import find_numbers, name_numbers, regions_in_data
from medseg_lite.volume import Case, label_table

# The labels that each data set has, as its reader returns them.
LABELS = {"brats2015": [0, 1, 2, 3, 4], "brats2017": [0, 1, 2, 4], "promise12": [0, 1], "lits": [0, 1, 2], "isbi2012": [0, 1]}
LABELS |= {"deepmedic-msd-brain": [0, 1, 2, 4], "drozdzal-msd-prostate": [0, 1, 2], "kayalibay-hands": [0, 1, 2, 3, 4]}


def labels_of(recipe: recipes.Recipe) -> list[int]:
    return LABELS.get(recipe.name) or LABELS[recipe.loader]


def make_cases(recipe: recipes.Recipe, count: int = 4) -> list[Case]:
    """Return cases as the recipe's reader would: blocks of all classes side by side, in one piece."""
    cases = []
    for n in range(count):
        rng, labels = np.random.default_rng(n), labels_of(recipe)
        label = np.zeros((16, 10, 8), np.uint8)
        for k, value in enumerate(labels[1:]):
            label[2 + 3 * k : 5 + 3 * k, 2:7, 1 : 6 + n % 2] = value
        image = rng.normal(100, 5, (len(recipe.channels), *label.shape)).astype(np.float32) + label
        names = {value: f"kind {value}" for value in labels}
        cases.append(
            Case(image, recipe.channels, name=f"{n:03d}", label=label, affine=np.diag([2, 1, 1, 1]), info={"classes": names})
        )
    return cases


@pytest.fixture
def perfect(monkeypatch):
    """`perfect(recipe)`: the recipe's loader finds a tiny data set, and its networks make no mistake. Returns the cases."""

    def train(cases, *, network, classes, folder, **_):
        model = models.unet2d(in_channels=1, classes=classes, width=0.1)
        model.card = {"channels": list(cases[0].channels), "classes": classes}
        return model

    def predict(model, case, *, output="labels", **_):
        assert case.label.max() < max(model.classes, 2)
        if output == "labels":
            return case.label
        return np.stack([case.label == k for k in range(max(model.classes, 2))]).astype(np.float32)

    def install(recipe: recipes.Recipe) -> list[Case]:
        cases = make_cases(recipe)
        if recipe.loader == "isbi2012":
            stack = cases[0].replace(name="stack", label=np.tile(cases[0].label[..., 3:4], 8))
            monkeypatch.setattr(datasets, "isbi2012", lambda root: stack)
        elif recipe.loader:
            cohort = datasets.Cohort({case.name: (lambda case=case: case) for case in cases})
            monkeypatch.setattr(datasets, recipe.loader, lambda root, **_: cohort)
        monkeypatch.setattr(crossvalidation, "recipe_for", lambda network: train)
        monkeypatch.setattr(inference, "predict", predict)
        monkeypatch.setattr(crossvalidation.context, "with_scores", lambda case, scores: case)
        return cases

    return install


def read(path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_perfect_network_scores_1(name, perfect, tmp_path, capsys):
    recipe = recipes.RECIPES[name]
    cases, data = perfect(recipe), ["--data", "somewhere"]
    if recipe.loader is None:  # the reader's own folder
        for case in cases:
            files.write_case(tmp_path / "data" / case.name, case)
        data = ["--data", str(tmp_path / "data"), "--channels", *recipe.channels, "--mask", "all"]
        cohort = datasets.nifti_folder(tmp_path / "data", channels={"t1": "t1.nii.gz"}, label="label.nii.gz", mask="all")
    else:
        cohort = recipes.load_cases(name, tmp_path)
    needs = {"scores": {"scores": tmp_path}, "first": {"first": "x"}}.get(recipe.needs, {})
    table = recipes.cross_validate(recipe, cohort, tmp_path / "run", folds=2, progress=False, **needs)
    columns = ["v_rand", "v_info"] if recipe.regions == "cells" else ["dice", "precision", "sensitivity"]
    assert (table[columns] == 1).all(axis=None)

    written = [read(path) for path in sorted((tmp_path / "run" / "predictions").iterdir())]
    if len({recipe.label_map.get(k, k) for k in labels_of(recipe)}) == len(labels_of(recipe)):  # no two became one
        for found, case in zip(written, cohort):
            np.testing.assert_array_equal(found, case.label)
    assert {int(k) for found in written for k in np.unique(found)} <= set(labels_of(recipe))

    evaluate = ["evaluate", "--predictions", str(tmp_path / "run" / "predictions"), *data, "--out", str(tmp_path / "t.csv")]
    assert main([*evaluate, "--regions", name]) == 0, capsys.readouterr().err
    table = metrics.read_table(tmp_path / "t.csv")
    assert (table[columns] == 1).all(axis=None) and len(table)
    assert set(table["region"]) == ({"cells"} if recipe.regions == "cells" else set(metrics.as_regions(recipe.regions)))


def test_what_the_numbers_stand_for_is_written_down(perfect, tmp_path):
    expected = {
        "deepmedic-msd-brain": ([0, 1, 2, 4], {"0": "kind 0", "1": "kind 1", "2": "kind 2", "4": "kind 4"}),
        "drozdzal-msd-prostate": ([0, 1], {"0": "kind 0", "1": "classes 1 and 2 of the data: kind 1, kind 2"}),
        "drozdzal-lits": ([0, 2], {"0": "classes 0 and 1 of the data: kind 0, kind 1", "2": "kind 2"}),
    }
    for name, (numbers, classes) in expected.items():
        perfect(recipes.RECIPES[name])
        out = tmp_path / name
        recipes.cross_validate(name, recipes.load_cases(name, tmp_path), out, folds=2, progress=False)
        assert json.loads((out / "classes.json").read_text("utf-8")) == classes
        assert models.load(out / "fold1" / "model.safetensors").card["data_labels"] == numbers


@pytest.mark.parametrize("card", [{"data_labels": [0, 1, 2, 4]}, {"label_map": {"4": 3}}, {}])
@pytest.mark.parametrize("probabilities", [[], ["--probabilities"]])
def test_segment_writes_the_numbers_of_the_card(card, probabilities, tmp_path, monkeypatch, capsys):
    case = make_cases(recipes.RECIPES["deepmedic-msd-brain"], 1)[0]
    files.write_case(tmp_path / "data" / "a", case)
    inside = case.relabelled({4: 3}).label

    def predict(model, case, *, output="labels", **_):
        return inside if output == "labels" else np.stack([inside == k for k in range(4)]).astype(np.float32)

    monkeypatch.setattr(inference, "predict", predict)
    model = models.unet2d(in_channels=4, classes=4, width=0.1)
    path = models.save(tmp_path / "m.safetensors", model, {"channels": list(case.channels), **card})
    segment = [
        "segment",
        "--data",
        str(tmp_path / "data"),
        "--mask",
        "all",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        *probabilities,
    ]
    assert main([*segment, "--model", str(path)]) == 0
    np.testing.assert_array_equal(read(tmp_path / "out" / "a.nii.gz"), case.label if card else inside)
    other = models.save(tmp_path / "o.safetensors", model, {"channels": list(case.channels), "data_labels": [0, 1, 2, 7]})
    assert main([*segment, "--model", str(path), str(other)]) == 1
    assert "trained on data with other class numbers: [[0, 1, 2, " in capsys.readouterr().err


def test_evaluate_scores_each_class_by_itself(tmp_path, capsys):
    case = make_cases(recipes.RECIPES["drozdzal-lits"], 1)[0]
    files.write_case(tmp_path / "data" / "001", case)
    prediction = np.where(case.label == 2, 7, case.label).astype(np.uint8)
    files.write_nifti(tmp_path / "p" / "001.nii.gz", prediction, case)
    evaluate = [
        "evaluate",
        "--predictions",
        str(tmp_path / "p"),
        "--data",
        str(tmp_path / "data"),
        "--channels",
        "ct",
        "--mask",
        "all",
    ]
    assert main([*evaluate, "--regions", "classes", "--out", str(tmp_path / "t.csv")]) == 0
    table = metrics.read_table(tmp_path / "t.csv")
    assert table[["case", "region", "dice"]].values.tolist() == [
        ["001", "class_1", 1],
        ["001", "class_2", 0],
        ["001", "class_7", 0],
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*evaluate, "--regions", "nonsense"])


@given(
    label_map=st.dictionaries(st.integers(0, 6), st.integers(0, 6), max_size=5),
    present=st.sets(st.integers(0, 6)),
    classes=st.integers(1, 7),
)
@settings(max_examples=200, deadline=None)
def test_numbers_lead_back_to_their_class(label_map, present, classes):
    table, numbers = label_table(label_map), find_numbers(label_map, classes, present)
    for k, number in enumerate(numbers):
        sources = [n for n in range(256) if table[n] == k]
        assert number in (sources or [k])
        occurring = [n for n in sources if n in present]
        assert not occurring or number == occurring[0]
    assert len(numbers) == max(classes, 2) and set(name_numbers(numbers, label_map, present)) == set(map(str, numbers))


def test_numbers_by_hand():
    assert find_numbers({}, 4) == [0, 1, 2, 3] == find_numbers({4: 3}, 4, {0, 1, 2, 3})
    assert find_numbers({4: 3}, 4, {0, 1, 2, 4}) == find_numbers({4: 3}, 4) == [0, 1, 2, 4]
    assert find_numbers({2: 1}, 1, {0, 1, 2}) == [0, 1] and find_numbers({1: 0, 2: 1}, 1, {0, 1, 2}) == [0, 2]
    assert name_numbers([0, 1], {2: 1}, {0, 1, 2}) == {"0": "background", "1": "classes 1 and 2 of the data: class 1, class 2"}
    assert regions_in_data(recipes.RECIPES["drozdzal-lits"]) == {"lesion": [2]}
    assert regions_in_data(recipes.RECIPES["drozdzal-msd-prostate"]) == {"prostate": [1, 2]}
    assert regions_in_data(recipes.RECIPES["deepmedic-msd-brain"])["enhancing"] == [3, 4]
    assert regions_in_data(recipes.RECIPES["deepmedic-brats2015"]) == "brats2015"
