"""Names as keys: what is called alike is kept apart or refused, and names that look like something else stay names."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_lite import crf, datasets, files, inference, metrics, models, recipes, statistics
from medseg_lite.cli import main
from medseg_lite.recipes import crossvalidation
from medseg_lite.volume import Case, new_name
from medseg_lite.widgets import CompareSegmentations

NAMES = ["001", "1E5", "NA", "nan", "None", "null", "True", "a,b", "a 'b'", " leading", "-", "1_000", "ünï"]
# Names of regions need not be names of files.
TEXTS = [
    *NAMES,
    "",
    'a "b"',
    "line\nbreak",
    "carriage\rreturn",
    "both\r\n",
    "#",
    "=1+1",
    "\t",
    "trailing ",
    "N/A",
    "<NA>",
    "1e400",
    "0x1",
]

# ------------------------------------------------------------------------------------------------- tables of scores


def table_of(texts) -> pd.DataFrame:
    scores = np.random.default_rng(0).random(len(texts))
    table = pd.DataFrame(
        {"case": texts, "region": texts[::-1], "dice": scores, "assd": 100 * scores, "fold": range(len(texts))}
    )
    table.loc[0, "assd"] = np.nan
    table.loc[len(texts) - 1, "assd"] = np.inf
    return table


def test_names_survive_a_csv_file(tmp_path):
    table = table_of(TEXTS)
    again = metrics.read_table(metrics.write_table(tmp_path / "t.csv", table))
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    plain = metrics.read_table(
        metrics.write_table(tmp_path / "u.csv", table.assign(method=TEXTS)), text=("case", "region", "method")
    )
    assert plain["method"].tolist() == TEXTS


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_text_survives_a_csv_file(tmp_path_factory, texts):
    table = table_of(texts)
    path = metrics.write_table(tmp_path_factory.mktemp("t") / "t.csv", table)
    pd.testing.assert_frame_equal(metrics.read_table(path), table, check_exact=True)


def test_columns_that_are_not_numbers_stay_texts(tmp_path):
    table = pd.DataFrame({"case": ["1", "2"], "method": ["a", "1"], "n": [1, 2], "x": [0.1, np.nan]})
    again = metrics.read_table(metrics.write_table(tmp_path / "t.csv", table))
    pd.testing.assert_frame_equal(again, table)
    assert again["n"].dtype == np.int64 and "region" not in again


@pytest.fixture
def untrained(monkeypatch):
    """Networks are not trained and find the label."""

    def train(cases, *, network, classes, folder, **_):
        model = models.unet2d(in_channels=1, classes=classes, width=0.1)
        model.card = {"trained_on": [case.name for case in cases]}
        return model

    monkeypatch.setattr(crossvalidation, "recipe_for", lambda network: train)
    monkeypatch.setattr(inference, "predict", lambda model, case, **_: case.label)


def make_case(name: str, seed: int = 0) -> Case:
    rng, label = np.random.default_rng(seed), np.zeros((8, 8, 8), np.uint8)
    label[2:6, 2:6, 2:6] = 1
    return Case(rng.normal(size=(1, 8, 8, 8)) + label, ("t1",), name=name, label=label)


def test_names_of_patients_in_a_cross_validation(untrained, tmp_path):
    names = ["001", "1E5", "NA", "nan", "None", "1_000", "ünï", "a,b", "a 'b'"]
    recipe = recipes.Recipe("x", network="unet2d", channels=("t1",), classes=2, regions={"NA": [1], "01": [1]}, folds=3)
    cases = [make_case(name, n) for n, name in enumerate(names)]
    table = recipes.cross_validate(recipe, cases, tmp_path, progress=False)
    for found in (table, metrics.read_table(tmp_path / "evaluation.csv")):
        assert (
            sorted(found["case"]) == sorted(2 * names) and set(found["region"]) == {"NA", "01"} and (found["dice"] == 1).all()
        )
    assert sorted(p.name for p in (tmp_path / "predictions").iterdir()) == sorted(f"{name}.nii.gz" for name in names)
    assert sorted(n for part in json.loads((tmp_path / "run.json").read_text("utf-8"))["folds"] for n in part) == sorted(names)
    cards = [models.load(tmp_path / f"fold{k}" / "model.safetensors").card for k in range(3)]
    assert sorted(n for card in cards for n in card["held_out"]) == sorted(names)
    pd.testing.assert_frame_equal(recipes.cross_validate(recipe, cases, tmp_path, progress=False, fold=1), table)
    assert statistics.summary(table).index.tolist() == ["NA", "01"]


def test_names_of_patients_on_the_command_line(tmp_path):
    for n, name in enumerate(["001", "002", "NA"]):
        files.write_case(tmp_path / "data" / name, make_case(name, n))
    data = ["--data", str(tmp_path / "data"), "--channels", "t1", "--mask", "all"]
    train = ["train", "deep_plus", *data, "--hold-out", "001", "NA", "--steps", "1", "--width", "0.1", "--output", "1"]
    assert main([*train, "--batch-size", "2", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    assert metrics.read_table(tmp_path / "run" / "held_out.csv")["case"].tolist() == ["001", "NA"]
    model, out = str(tmp_path / "run" / "model.safetensors"), str(tmp_path / "p")
    assert main(["segment", "--model", model, *data, "--cases", "001", "NA", "--device", "cpu", "--out", out]) == 0
    evaluate = ["evaluate", "--predictions", out, *data, "--cases", "NA", "001", "--out", str(tmp_path / "t.csv")]
    assert main(evaluate) == 0
    assert metrics.read_table(tmp_path / "t.csv")["case"].tolist() == ["NA", "001"]


# ------------------------------------------------------------------------------------------------- called alike


def test_new_names():
    taken: list[str] = []
    for name in ["a", "a", "a 2", "a", "b"]:
        taken.append(new_name(name, taken))
    assert taken == ["a", "a 2", "a 2 2", "a 3", "b"]


def task(root, modality: list[str], entries: list[str] = ("a",)):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(6, 7, 8, len(modality))).astype(np.float32) + 100 * np.arange(len(modality))
    label = np.zeros((6, 7, 8), np.uint8)
    label[2:4] = 1
    for name in set(entries):
        for folder, array in (("imagesTr", image.astype(np.float32)), ("labelsTr", label)):
            path = root / folder / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    listed = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in entries]
    content = {"modality": dict(enumerate(modality)), "labels": {"0": "b", "1": "x"}, "training": listed, "test": []}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    "modality, channels",
    [
        (["CT", "CT"], ("ct", "ct 2")),
        (["MRI", "mri", "MRI"], ("mri", "mri 2", "mri 3")),
        (["MR", "MR 2", "MR"], ("mr", "mr 2", "mr 3")),
        (["T2", "ADC"], ("t2", "adc")),
    ],
)
def test_channels_of_one_name_in_the_decathlon(modality, channels, tmp_path):
    case = datasets.msd(task(tmp_path, modality))[0]
    assert case.channels == channels
    np.testing.assert_allclose(case.image.mean((1, 2, 3)), 100 * np.arange(len(modality)), atol=1)


def test_cases_of_one_name_in_a_data_set(tmp_path):
    with pytest.raises(ValueError, match="two cases are called a"):
        other = task(tmp_path / "msd", ["CT"], ["a", "b"])
        content = json.loads((other / "dataset.json").read_text())
        content["training"][1]["image"] = "./other/a.nii.gz"
        (other / "dataset.json").write_text(json.dumps(content))
        datasets.msd(other)
    layouts = {
        datasets.brats2017: ["x/p1/p1_flair.nii.gz", "y/p1/p1_flair.nii.gz"],
        datasets.promise12: ["x/Case00.mhd", "y/Case00.mhd"],
        datasets.lits: ["volume-0.nii", "b/volume-0.nii"],
        datasets.brats2015: ["HGG/p1/a.mha", "LGG/p1/a.mha"],
    }
    for n, (reader, paths) in enumerate(layouts.items()):
        for path in paths:
            (tmp_path / str(n) / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(n) / path).touch()
        with pytest.raises(ValueError, match=r"two cases are called .*: .* and .*; rename one, or move it away"):
            reader(tmp_path / str(n))


def test_channels_of_one_name_in_a_file(tmp_path):
    path = task(tmp_path, ["CT", "CT"]) / "imagesTr" / "a.nii.gz"
    with pytest.raises(ValueError, match=r"2 volumes of .*a\.nii\.gz are called 'ct'; give each channel a name of its own"):
        files.read_case(path, channels=["ct", "ct"])


def test_channels_of_one_name_on_the_command_line(tmp_path, capsys):
    files.write_case(tmp_path / "data" / "p1", make_case("p1"))
    for channels in (["t1=a.nii.gz", "t1=b.nii.gz"], ["t1", "t1"]):
        data = ["--data", str(tmp_path / "data"), "--channels", *channels]
        train = ["train", "deepmedic", *data, "--out", str(tmp_path / "run")]
        assert main(train) == 1
        assert "--channels names t1 twice; give each file a channel of its own, as in t1=" in capsys.readouterr().err


def test_cases_of_one_name_in_a_table():
    cases = [make_case(name, n) for n, name in enumerate(["p", "p", "p 2", "q"])]
    predictions = [case.label * (n != 1) for n, case in enumerate(cases)]
    table = metrics.evaluate_cohort(iter(predictions), iter(cases), regions={"a": [1]}, metrics=["dice", "dice"])
    assert table.values.tolist() == [["p", "a", 1], ["p 2", "a", 0], ["p 2 2", "a", 1], ["q", "a", 1]]


def test_cases_of_one_name_elsewhere(tmp_path):
    cases = [make_case("p"), make_case("p", 1)]
    p = np.stack([cases[0].label == k for k in range(2)]).astype(np.float32)
    for call in (
        lambda: datasets.store(cases, tmp_path, progress=False),
        lambda: recipes.split_folds(datasets.case_names(cases), 2),
        lambda: crf.search(cases, [p, p], trials=1, progress=False),
    ):
        with pytest.raises(ValueError, match="two cases"):
            call()


def test_predictions_and_classes_of_one_name_in_a_widget():
    case = make_case("p")
    case.label = np.where(case.image[0] > 2, 2, case.label)
    widget = CompareSegmentations(case, {1: case.label, "1": 0 * case.label}, classes=["background", "tumour", "tumour"])
    assert widget._scene["predictions"] == ["1", "1 2"]
    assert widget._scene["regions"] == {"all labels": [1, 2], "tumour": [1], "tumour 2": [2]}


def test_channels_with_names_of_the_reader(tmp_path):
    for name in ("there", "t1"):
        files.write_case(tmp_path / "p1", make_case("p1").replace(channels=[name]))
    case = datasets.nifti_folder(tmp_path, channels={"there": "there.nii.gz", "t1": "t1.nii.gz"}, mask="all")[0]
    assert case.channels == ("there", "t1")
    for name in ("the label", "the mask", "all files"):
        with pytest.raises(ValueError, match=f"a channel is called '{name}', which stands for something else here"):
            datasets.nifti_folder(tmp_path, channels={name: "t1.nii.gz"})
