"""The table of named recipes, folds, and cross-validation from a folder of scans to predictions beside them."""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import replace
from importlib import import_module

import nibabel
import numpy as np
import pandas as pd
import pytest

from medseg_lite import datasets, inference, metrics, models, recipes, transforms
from medseg_lite.files import read_nifti, write_case
from medseg_lite.models.kayalibay import KayalibayUNet3d
from medseg_lite.recipes import Recipe, crossvalidation
from medseg_lite.volume import Case

mlynarski = import_module("medseg_lite.recipes.mlynarski")  # the name `recipes.mlynarski` is the function
AFFINE = np.array([[-2.0, 0, 0, 40], [0, -2, 0, 50], [0, 0, 3, -20], [0, 0, 0, 1]])


@pytest.fixture
def folder(tmp_path):
    """Five cases with a bright block, stored in LPS, with BRATS 2017's gap in the label numbers."""
    rng = np.random.default_rng(0)
    for n in range(5):
        label = np.zeros((22, 20, 18), np.uint8)
        label[6:14, 5 + n : 12 + n, 5:13] = 2
        label[8:12, 7 + n : 10 + n, 7:10] = 4
        image = rng.standard_normal((2, *label.shape)) + 2.0 * label + 20
        affine = AFFINE @ np.diag([-1, -1, 1, 1])
        case = Case(image.astype(np.float32), ("t1c", "flair"), f"case{n}", label, label >= 0, affine, "LPS")
        write_case(tmp_path / "data" / case.name, case)
    return tmp_path / "data"


@pytest.fixture
def cases(folder):
    return datasets.nifti_folder(
        folder, channels={c: f"{c}.nii.gz" for c in ("t1c", "flair")}, label="label.nii.gz", mask="mask.nii.gz"
    )


RECIPE = Recipe(
    "tiny",
    network="deep_plus",
    channels=("flair", "t1c"),
    label_map={4: 1},
    classes=3,
    regions={"inner": [1], "all": [1, 2]},
    folds=2,
    settings={"steps": 3, "width": 0.1, "batch_size": 4},
    paper="Nobody et al.",
    data="five blocks",
    departs="there is no such paper",
    reported={"where": "Table 0, on other blocks", "dice": {"all": 0.91}},
)


def run(cases, out, recipe=RECIPE, **options):
    return recipes.cross_validate(recipe, cases, out, progress=False, **options)


# ------------------------------------------------------------------------------------------------------------ table


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_complete(name):
    """Every setting is one of the paper's recipe or its network, and regions, classes and labels fit each other."""
    recipe = recipes.find_recipe(name)
    assert recipe.paper and recipe.data and recipe.departs and recipe.network in models.NETWORKS and recipe.folds > 1
    parameters = inspect.signature(recipes.recipe_for(recipe.network)).parameters
    known = {
        *parameters,
        *inspect.signature(models.BUILDERS[recipe.network]).parameters,
        *inspect.signature(KayalibayUNet3d).parameters,
    }
    assert set(recipe.settings) <= known and recipe.settings.get("steps", parameters["steps"].default) >= 10_000
    regions = recipe.regions
    if isinstance(regions, dict):
        assert max(max(labels) for labels in regions.values()) == max(recipe.classes, 2) - 1
    else:
        assert regions in ("cells", *metrics.regions)
    if recipe.reported:
        wanted = {"cells"} if regions == "cells" else set(regions if isinstance(regions, dict) else metrics.regions[regions])
        for metric, row in recipe.reported.items():
            assert metric == "where" or (
                set(row) <= wanted and all(0 < value <= 1 or metric == "boundary_distance" for value in row.values())
            )
    assert recipe.loader is None or callable(getattr(datasets, recipe.loader))
    json.dumps(dataclasses.asdict(recipe))  # plain data


def settings_of(name: str) -> dict:
    return recipes.find_settings(recipes.find_recipe(name))


def test_numbers_of_the_papers():
    """Some of the numbers, written down a second time from the papers."""
    assert settings_of("deepmedic-brats2015")["steps"] == 35 * 20 * 100
    assert recipes.RECIPES["deepmedic-brats2015"].reported["dice"] == {"whole": 0.897, "core": 0.75, "enhancing": 0.72}
    hands = settings_of("kayalibay-hands")
    assert hands["steps"] == 600 * 20 and hands["patience"] * hands["validate_every"] == 100 * 20
    assert settings_of("kayalibay-brats2015")["crop"] == (160, 144, 128)
    prostate, em = (settings_of(f"drozdzal-{d}") for d in ("promise12", "isbi2012"))
    assert (prostate["learning_rate"], prostate["weight_decay"], prostate["batch_size"]) == (4e-4, 1e-5, 24)
    assert (em["shear"], em["angle"], em["batch_size"], em["crop"], em["weight_decay"]) == (0.41, 25, 8, 256, 1e-4)
    assert mlynarski.class_weights(4, 0.4) == pytest.approx((0.4, 0.2, 0.2, 0.2))
    assert mlynarski.SAMPLES_3D["accumulate"] == 5 and mlynarski.SAMPLES_2D["accumulate"] == 10


def test_a_recipe_for_slices_takes_slices(tmp_path, monkeypatch, noise_case):
    stack = noise_case((8, 9, 12), channels=("em",), name="isbi2012-train")
    monkeypatch.setattr(datasets, "isbi2012", lambda folder: stack)
    slices = recipes.load_cases("drozdzal-isbi2012", tmp_path)
    assert [s.name for s in slices] == [f"isbi2012-train-{n:02}" for n in range(12)]
    assert np.array_equal(slices[7].image, stack.image[..., 7:8]) and slices[7].shape == (8, 9, 1)
    assert [s.name for s in recipes.load_cases("drozdzal-isbi2012", tmp_path, cases=["isbi2012-train-03"])] == [
        "isbi2012-train-03"
    ]
    with pytest.raises(ValueError, match="isbi2012-train-99: no such slice"):
        recipes.load_cases("drozdzal-isbi2012", tmp_path, cases=["isbi2012-train-99"])
    with pytest.raises(ValueError, match=r"kayalibay-hands is for .* no reader of its own: say .* --channels t1=PATTERN"):
        recipes.load_cases("kayalibay-hands", tmp_path)
    with pytest.raises(ValueError, match="recipe 'deepmedic-moon'; expected one of deepmedic-brats2015"):
        recipes.find_recipe("deepmedic-moon")


@pytest.mark.parametrize(
    "name, options", [("deepmedic-msd-brain", {"as_brats": True}), ("drozdzal-promise12", {}), ("deepmedic-brats2015", {})]
)
def test_loaders_are_given_the_folder(name, options, tmp_path, monkeypatch):
    loader, calls = recipes.RECIPES[name].loader, []
    monkeypatch.setattr(datasets, loader, lambda root, **given: calls.append((root, given)))
    recipes.load_cases(name, tmp_path)
    recipes.load_cases(name, loader, cases=["a"])
    assert calls == [(tmp_path, {"cases": None, **options}), ("msd" if loader == "msd" else None, {"cases": ["a"], **options})]


def test_prepared(cases):
    case = cases["case1"]
    found = crossvalidation.prepare_case(case, channels=("flair",), label_map={4: 1}, normalise="none", plane="sagittal")
    assert found.channels == ("flair",) and set(np.unique(found.label)) == {0, 1, 2}
    assert np.array_equal(found.image[0], case.image[1].transpose(1, 2, 0))
    assert np.array_equal(found.label == 1, (case.label == 4).transpose(1, 2, 0))
    standard = crossvalidation.prepare_case(case, channels=("flair", "t1c"))
    np.testing.assert_allclose(standard.image, transforms.standardise(case).image[::-1], atol=1e-6)
    assert np.median(crossvalidation.prepare_case(case, channels=("flair",), normalise="median").image) == pytest.approx(
        1, abs=0.01
    )
    with pytest.raises(ValueError, match="normalise='log'; expected one of standardise, median, none"):
        crossvalidation.prepare_case(case, channels=("flair",), normalise="log")


# ------------------------------------------------------------------------------------------------------------ folds


def test_folds():
    names = [f"case{n:03}" for n in range(23)]
    parts = recipes.split_folds(names, 5)
    assert sorted(len(p) for p in parts) == [4, 4, 5, 5, 5] and sorted(n for p in parts for n in p) == names
    assert recipes.split_folds(names[::-1], 5) == parts != recipes.split_folds(names, 5, seed=1)
    assert recipes.split_folds(["a", "b", "c", "d"], 2) == [["c", "d"], ["a", "b"]]  # on any machine
    with pytest.raises(ValueError, match="5 folds of 3 cases; expected 2 to 3"):
        recipes.split_folds(["a", "b", "c"], 5)
    with pytest.raises(ValueError, match="two cases have the same name"):
        recipes.split_folds(["a", "a"], 2)


def test_cross_validation(cases, folder, tmp_path, capsys):
    out = tmp_path / "run"
    table = run(cases, out, command="python -m …")
    parts = recipes.split_folds(cases.names, 2)
    assert json.loads((out / "run.json").read_text())["folds"] == parts
    facts = json.loads((out / "run.json").read_text())
    assert facts["settings"] == RECIPE.settings and facts["command"] == "python -m …" and facts["paper"] == "Nobody et al."
    assert json.loads((out / "classes.json").read_text()) == {"0": "background", "4": "class 4", "2": "class 2"}
    assert sorted(table["case"].unique()) == cases.names and set(table["region"]) == {"inner", "all"}
    pd.testing.assert_frame_equal(pd.read_csv(out / "evaluation.csv"), table)
    for k, part in enumerate(parts):
        model = models.load(out / f"fold{k}" / "model.safetensors")
        assert model.card["label_map"] == {"4": 1} and model.card["data_labels"] == [0, 4, 2]
        assert model.card["held_out"] == part and sorted(model.card["trained_on"]) == sorted(set(cases.names) - set(part))
        assert set(table.loc[table["fold"] == k, "case"]) == set(part)
        for name in part:
            case = crossvalidation.prepare_case(cases[name], channels=("flair", "t1c"), label_map={4: 1})
            expected = np.array([0, 4, 2])[inference.predict(model, case, progress=False)]  # in the numbers of the data
            found = read_nifti(out / "predictions" / f"{name}.nii.gz")
            scan = nibabel.load(folder / name / "flair.nii.gz")
            written = nibabel.load(out / "predictions" / f"{name}.nii.gz")
            assert np.allclose(written.affine, scan.affine) and written.shape == scan.shape  # overlays it in any viewer
            assert (found.array == expected).mean() > 0.99  # the stored image is rounded
            dice = metrics.dice(found.array > 0, case.label > 0)
            row = table[(table["case"] == name) & (table["region"] == "all")]
            assert row["dice"].item() == pytest.approx(dice)

    told = crossvalidation.report(table, RECIPE)
    assert "over 5 cases" in told and "the paper (Table 0, on other blocks)" in told and "0.91" in told
    assert "for five blocks" in told and "there is no such paper" in told
    again = run(cases, out)  # nothing is trained anew
    pd.testing.assert_frame_equal(again, table)
    with pytest.raises(ValueError, match=r"run.json is of another run: settings.steps was 3 and is 4; choose"):
        run(cases, out, steps=4)
    with pytest.raises(ValueError, match=r"run.json is of another run: seed was 0 and is 5; folds was"):
        run(cases, out, seed=5)


def test_folds_one_by_one(cases, tmp_path):
    whole = run(cases, tmp_path / "whole")
    first = run(cases, tmp_path / "parts", fold=1)
    assert set(first["fold"]) == {1} and not (tmp_path / "parts" / "fold0").exists()
    both = run(cases, tmp_path / "parts", fold=0)
    pd.testing.assert_frame_equal(both, whole)
    with pytest.raises(ValueError, match="fold 2 of 2; expected 0 to 1"):
        run(cases, tmp_path / "parts", fold=2)


def test_members_validation_and_early_stopping(cases, tmp_path):
    settings = {"steps": 6, "width": 0.1, "crop": 16, "validate_every": 2, "patience": 2, "learning_rate": 1e-3}
    recipe = replace(RECIPE, network="kayalibay_unet3d", validation=0.3, settings=settings)
    run(cases, tmp_path, recipe, fold=0, members=2)
    held = recipes.split_folds(cases.names, 2)[0]
    networks = [models.load(tmp_path / "fold0" / f"member{m}" / "model.safetensors") for m in range(2)]
    seen = [set(n.card["trained_on"]) for n in networks]
    assert seen[0] == seen[1] and not seen[0] & set(held) and len(seen[0]) + len(held) == 4  # one case decides when to stop
    assert not np.array_equal(*[next(n.parameters()).detach() for n in networks])
    history = pd.read_csv(tmp_path / "fold0" / "member0" / "history.csv")
    assert history["dice_class_1"].notna().sum() >= 2
    best = models.load(tmp_path / "fold0" / "member0" / "best.safetensors")
    assert best.card["channels"] == ["flair", "t1c"] and best.card["step"] in (2, 4, 6)


def test_all_cases_without_folds(cases, tmp_path):
    assert run(cases, tmp_path, folds=1).empty
    model = models.load(tmp_path / "model.safetensors")
    assert sorted(model.card["trained_on"]) == cases.names and not (tmp_path / "predictions").exists()


def test_a_plane_is_segmented_and_turned_back(cases, tmp_path):
    settings = {"steps": 1, "width": 0.1, "output": 16, "batch_size": 2, "accumulate": 1}
    recipe = replace(RECIPE, network="mlynarski_2d", plane="sagittal", settings=settings)
    table = run(cases, tmp_path, recipe, fold=0)
    model = models.load(tmp_path / "fold0" / "model.safetensors")
    assert model.card["plane"] == "sagittal"
    for name in table["case"].unique():
        found = read_nifti(tmp_path / "predictions" / f"{name}.nii.gz").array
        assert found.shape == cases[name].shape == (22, 20, 18)
        row = table[(table["case"] == name) & (table["region"] == "all")]
        assert row["dice"].item() == pytest.approx(metrics.dice(found > 0, cases[name].label > 0))


def test_cells_are_scored_by_partitions(tmp_path, noise_case):
    slices = [noise_case((32, 32, 1), channels=("em",), seed=n, name=f"s{n}") for n in range(3)]
    settings = {"steps": 1, "width": 0.1, "crop": 32, "batch_size": 2}
    recipe = replace(
        RECIPE, network="unet2d", channels=("em",), label_map={}, classes=1, regions="cells", settings=settings, folds=3
    )
    table = run(slices, tmp_path, recipe)
    assert table.columns.tolist() == ["case", "region", "v_rand", "v_info", "fold"] and table["v_rand"].between(0, 1).all()
    assert "v_rand" in crossvalidation.report(
        table, replace(recipe, reported={"where": "Table IV", "v_rand": {"cells": 0.981}})
    )


def test_what_a_recipe_needs(cases, tmp_path):
    with pytest.raises(ValueError, match="mlynarski-brats2017-3d is told what 2D networks see: give it the folder"):
        run(cases, tmp_path, "mlynarski-brats2017-3d")
    with pytest.raises(ValueError, match="havaei-brats2013-cascade starts from a trained two_path_cnn"):
        run(cases, tmp_path, "havaei-brats2013-cascade")
    assert not (tmp_path / "run.json").exists()
