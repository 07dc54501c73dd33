"""The command line as a user meets it: a whole round on tiny cases, and the mistakes people make."""

import os
import subprocess
import sys

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from medseg_lite import context, inference, models, transforms
from medseg_lite.cli import main
from medseg_lite.datasets import nifti_folder
from medseg_lite.files import read_nifti, write_case
from medseg_lite.volume import Case

AFFINE = np.array([[-2.0, 0, 0, 40], [0, -2, 0, 50], [0, 0, 3, -20], [0, 0, 0, 1]])  # LPS, as scanners often write


@pytest.fixture
def folder(tmp_path):
    """Three cases with a bright cube, stored in LPS."""
    rng = np.random.default_rng(0)
    for n in range(3):
        label = np.zeros((22, 20, 18), np.uint8)
        label[6:14, 5 + n : 12 + n, 5:13] = 1
        image = rng.standard_normal((2, *label.shape)) + 3.0 * label + 20
        affine = AFFINE @ np.diag([-1, -1, 1, 1])
        case = Case(image.astype(np.float32), ("flair", "t1c"), f"case{n}", label, np.ones(label.shape, bool), affine, "LPS")
        write_case(tmp_path / "data" / case.name, case)
    return tmp_path / "data"


def train(folder, out, *more, steps=10):
    data = ["--data", str(folder), "--channels", "flair", "t1c"]
    options = ["--steps", str(steps), "--width", "0.1", "--out", str(out), "--device", "cpu"]
    return main(["train", "deep_plus", *data, *options, *more])


def test_train_segment_evaluate(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(folder, out, "--hold-out", "case2", steps=80) == 0
    assert {"last.pt", "history.csv", "model.safetensors", "held_out.csv"} <= {p.name for p in out.iterdir()}
    card = models.load(out / "model.safetensors").card
    assert card["channels"] == ["flair", "t1c"] and card["held_out"] == ["case2"] and card["trained_on"] == ["case0", "case1"]

    model = ["--model", str(out / "model.safetensors")]
    assert main(["segment", *model, "--data", str(folder), "--out", str(tmp_path / "pred"), "--probabilities"]) == 0
    prediction = read_nifti(tmp_path / "pred" / "case2.nii.gz")
    original = read_nifti(folder / "case2" / "flair.nii.gz")
    assert prediction.native_axes == original.native_axes == "LPS"
    assert prediction.array.shape == original.array.shape and np.allclose(prediction.affine, original.affine)
    probabilities = read_nifti(tmp_path / "pred" / "case2_probabilities.nii.gz").array
    assert probabilities.shape == (22, 20, 18, 2) and np.allclose(probabilities.sum(-1), 1, atol=1e-5)
    assert (probabilities.argmax(-1) == prediction.array).all()

    capsys.readouterr()
    data = ["--data", str(folder), "--channels", "flair", "--cases", "case2"]
    arguments = ["--predictions", str(tmp_path / "pred"), *data, "--out", str(tmp_path / "scores.csv")]
    assert main(["evaluate", *arguments]) == 0
    assert "dice" in capsys.readouterr().out
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert scores["case"].tolist() == ["case2"] and scores["region"].tolist() == ["lesion"]
    held_out = pd.read_csv(out / "held_out.csv")
    assert np.isclose(scores["dice"][0], held_out["dice"][0])
    assert scores["dice"][0] > 0.5  # a cube three standard deviations brighter than its surroundings


def test_prediction_on_another_grid_is_not_scored(folder, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    scan = nibabel.load(folder / "case0" / "label.nii.gz")
    moved = scan.affine.copy()
    moved[0, 3] += 4
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(scan.dataobj), moved), tmp_path / "p" / "case0.nii.gz")
    data = ["--data", str(folder), "--channels", "flair", "--cases", "case0"]
    assert main(["evaluate", "--predictions", str(tmp_path / "p"), *data]) == 1
    assert "affines differ by 4 mm" in capsys.readouterr().err


def test_training_resumes(folder, tmp_path):
    assert train(folder, tmp_path / "run") == 0
    first = models.load(tmp_path / "run" / "model.safetensors").state_dict()
    assert train(folder, tmp_path / "run") == 0  # finished already: nothing is trained again
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 10
    again = models.load(tmp_path / "run" / "model.safetensors").state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_ensemble(folder, tmp_path):
    out = tmp_path / "run"
    assert train(folder, out, "--members", "2") == 0
    paths = [str(out / f"member{n}" / "model.safetensors") for n in range(2)]
    first, second = (models.load(p) for p in paths)
    assert not np.array_equal(first.classifier.weight.detach(), second.classifier.weight.detach())
    assert main(["segment", "--model", *paths, "--data", str(folder), "--cases", "case0", "--out", str(tmp_path / "p")]) == 0
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["case0.nii.gz"]


def test_phantom(tmp_path):
    assert main(["phantom", "--out", str(tmp_path), "--seed", "3", "--spacing", "4"]) == 0
    (case,) = tmp_path.iterdir()
    assert {p.name for p in case.iterdir()} >= {"flair.nii.gz", "t1.nii.gz", "t1c.nii.gz", "t2.nii.gz", "label.nii.gz"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere", "--channels", "flair"], "nowhere"),
        (["--data", "{folder}"], "--channels is needed"),
        (["--data", "{folder}", "--channels", "t2"], "t2"),
        (["--data", "{folder}", "--channels", "flair", "--hold-out", "case9"], "no such case"),
        (["--data", "{folder}", "--channels", "flair", "--hold-out", "case0", "case1", "case2"], "held out"),
        (["--data", "{folder}", "--channels", "flair", "--device", "cuda:9"], "CUDA"),
        (["--data", "{folder}", "--channels", "flair", "--cases", "case7"], "case7"),
        (["--data", "{folder}", "--channels", "flair", "--classes", "1"], "holds label 1"),
    ],
)
def test_mistakes_end_with_one_readable_line(arguments, message, folder, tmp_path, capsys):
    arguments = [a.replace("{folder}", str(folder)) for a in arguments]
    assert main(["train", "deepmedic", *arguments, "--steps", "2", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("medseg_lite train: ") and message in error and "Traceback" not in error


def test_wrong_model_file(folder, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("hello")
    arguments = [
        "--model",
        str(tmp_path / "model.safetensors"),
        "--data",
        str(folder),
        "--channels",
        "flair",
        "--out",
        str(tmp_path),
    ]
    assert main(["segment", *arguments]) == 1
    assert "not a safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--steps", "many"], ["--network", "vgg"]])
def test_wrong_options_show_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "deepmedic", "--data", "x", "--out", "y", *arguments])
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- all the networks


@pytest.mark.parametrize(
    "network, options",
    [
        ("kayalibay_unet3d", ["--crop", "16", "--learning-rate", "1e-3"]),
        ("two_path_cnn", ["--phase2-steps", "1", "--batch-size", "4"]),
        ("unet2d", ["--crop", "16", "--batch-size", "2", "--patience", "3", "--validate-every", "1", "--hold-out", "case0"]),
        ("mlynarski_3d", ["--output", "4"]),
    ],
)
def test_every_paper_s_networks_train(folder, tmp_path, network, options):
    data = ["--data", str(folder), "--channels", "flair", "t1c", "--steps", "2", "--width", "0.1", "--device", "cpu"]
    assert main(["train", network, *data, *options, "--out", str(tmp_path / "run")]) == 0
    model = models.load(tmp_path / "run" / "model.safetensors")
    assert model.config["builder"] == network == model.card["network"]


@pytest.mark.parametrize(
    "network, options, message",
    [
        (
            "deepmedic",
            ["--crop", "16", "--phase2-steps", "2"],
            "--crop, --phase2-steps: the recipe of deepmedic has no such setting",
        ),
        ("kayalibay_unet3d", ["--output", "9"], "--output: the recipe of kayalibay_unet3d has no such setting"),
        ("unet2d", ["--plane", "axial"], "--plane is for mlynarski_2d"),
    ],
)
def test_settings_of_another_recipe(folder, tmp_path, capsys, network, options, message):
    data = ["--data", str(folder), "--channels", "flair", "t1c", "--out", str(tmp_path / "run")]
    assert main(["train", network, *data, *options]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_2d_networks_in_three_planes_help_a_3d_network(folder, tmp_path, capsys):
    data = ["--data", str(folder), "--channels", "flair", "t1c"]
    short = ["--steps", "1", "--width", "0.1", "--device", "cpu"]
    paths = []
    for plane in ("axial", "coronal", "sagittal"):
        out = tmp_path / plane
        options = ["--plane", plane, "--output", "16", "--batch-size", "2"]
        assert main(["train", "mlynarski_2d", *data, *short, *options, "--out", str(out)]) == 0
        paths.append(str(out / "model.safetensors"))
        assert models.load(paths[-1]).card.get("plane") == plane
    # A network of sagittal slices segments sagittal slices.
    assert main(["segment", "--model", paths[2], "--data", str(folder), "--out", str(tmp_path / "s"), "--device", "cpu"]) == 0
    network = models.load(paths[2])
    case = transforms.standardise(
        next(
            c
            for c in nifti_folder(folder, channels={n: f"{n}.nii.gz" for n in network.card["channels"]}, mask="mask.nii.gz")
            if c.name == "case1"
        )
    )
    expected = inference.predict(network, context.facing(case, "sagittal"), progress=False)
    found = read_nifti(tmp_path / "s" / "case1.nii.gz").array
    assert np.array_equal(context.facing(case.replace(label=found.astype(np.uint8)), "sagittal").label, expected)
    scores = str(tmp_path / "scores")
    capsys.readouterr()
    assert main(["scores", "--model", *paths[::-1], "--data", str(folder), "--out", scores, "--device", "cpu"]) == 1
    assert "planes sagittal, coronal, axial; expected axial, coronal, sagittal" in capsys.readouterr().err
    assert main(["scores", "--model", *paths, "--data", str(folder), "--out", scores, "--device", "cpu"]) == 0
    assert len(list((tmp_path / "scores").iterdir())) == 9
    out = tmp_path / "both"
    assert main(["train", "mlynarski_3d", *data, *short, "--output", "4", "--scores", scores, "--out", str(out)]) == 0
    model = models.load(out / "model.safetensors")
    assert model.config["variant"] == "a" and model.card["channels"][:3] == ["flair", "t1c", "axial 0"]
    segment = ["segment", "--model", str(out / "model.safetensors"), "--data", str(folder), "--out", str(tmp_path / "p")]
    assert main([*segment, "--scores", scores]) == 0
    assert (tmp_path / "p" / "case2.nii.gz").exists()
    capsys.readouterr()
    assert main(segment) == 1  # without the scores
    assert "axial 0" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- at scale


def test_named_recipe_on_folders_of_the_reader(folder, tmp_path, capsys):
    data = ["--data", str(folder), "--channels", "flair", "t1=t1c.nii.gz", "t1c", "t2=flair.nii.gz", "--device", "cpu"]
    short = ["--steps", "2", "--width", "0.1", "--batch-size", "4", "--folds", "3", "--out", str(tmp_path / "run")]
    assert main(["train", "deepmedic-brats2015", *data, *short]) == 0
    told = capsys.readouterr().out
    assert told.startswith("deepmedic-brats2015: 3 cases in 3 folds, on cpu")
    assert "the paper (Table 2, DeepMedic without CRF, five folds of the same 274 cases)" in told and "0.897" in told
    assert sorted(p.name for p in (tmp_path / "run" / "predictions").iterdir()) == [f"case{n}.nii.gz" for n in range(3)]
    table = pd.read_csv(tmp_path / "run" / "evaluation.csv")
    assert set(table["region"]) == {"whole", "core", "enhancing"} and len(table) == 9
    card = models.load(tmp_path / "run" / "fold2" / "model.safetensors").card
    assert card["recipe"] == "deepmedic-brats2015" and card["steps"] == 2 and "train" in card["command"]
    segment = ["segment", "--model", str(tmp_path / "run" / "fold0" / "model.safetensors"), "--device", "cpu", "--tile", "9"]
    assert main([*segment, *data[:-2], "--out", str(tmp_path / "again")]) == 0
    assert len(list((tmp_path / "again").iterdir())) == 3


def test_folds_of_a_network(folder, tmp_path):
    data = ["--data", str(folder), "--channels", "flair", "t1c", "--classes", "2", "--device", "cpu"]
    options = ["--steps", "2", "--width", "0.1", "--folds", "3", "--fold", "1", "--precision", "bfloat16", "--channels-last"]
    assert main(["train", "deep_plus", *data, *options, "--out", str(tmp_path / "run"), "--stored", str(tmp_path / "s")]) == 0
    assert [p.name for p in sorted((tmp_path / "run").iterdir())] == ["evaluation.csv", "fold1", "predictions", "run.json"]
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    "network, options, message",
    [
        ("kayalibay-hands", [], "which has no reader of its own: say how the files are named with --channels t1=PATTERN"),
        ("drozdzal-lits", ["--hold-out", "case0"], "with folds every case is held out once"),
        ("deepmedic-brats2015", ["--crop", "9"], "--crop: the recipe of deepmedic-brats2015 has no such setting"),
        ("deep_plus", ["--folds", "2", "--channels", "flair"], "needs --classes"),
        ("deep_plus", ["--fold", "2", "--channels", "flair"], "--fold is one of --folds"),
        ("deepmedic-brats2015", ["--channels", "flair", "--folds", "2"], "t1"),
    ],
)
def test_mistakes_with_recipes(folder, tmp_path, capsys, network, options, message):
    assert main(["train", network, "--data", str(folder), *options, "--device", "cpu", "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    told = capsys.readouterr().out
    assert "drozdzal-isbi2012\n  Drozdzal et al. 2018, section 4.1\n  ISBI 2012" in told and "steps 70000" in told
    assert "the paper, Tables 3 to 5, cross-validation over the same 274 cases: dice whole 0.9, core 0.79" in told


@pytest.mark.slow
def test_two_processes_segment_and_train(folder, tmp_path):
    """`torchrun` with two processes: each segments a part of the cases, and the first says so and writes the network."""
    assert train(folder, tmp_path / "one", steps=2) == 0
    data = ["--data", str(folder), "--channels", "flair", "t1c", "--device", "cpu"]
    segment = ["segment", "--model", str(tmp_path / "one" / "model.safetensors"), *data[:2], "--device", "cpu"]
    assert main([*segment, "--out", str(tmp_path / "alone")]) == 0
    cross = ["train", "deep_plus", *data, "--classes", "2", "--steps", "2", "--width", "0.1", "--folds", "3", "--fold", "0"]

    def torchrun(*arguments):
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
        command = [sys.executable, *launch, "127.0.0.1:0", "-m", "medseg_lite", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)

    done = torchrun(*segment, "--out", str(tmp_path / "both"))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == [f"case{n}.nii.gz" for n in range(3)]
    for path in (tmp_path / "both").iterdir():
        assert np.array_equal(read_nifti(path).array, read_nifti(tmp_path / "alone" / path.name).array)
    done = torchrun(*cross, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("deep_plus: 3 cases in 3 folds, on 2 processes") == 1 and done.stdout.count("mean (standard") == 1
    assert models.load(tmp_path / "run" / "fold0" / "model.safetensors").card["steps"] == 2
    assert len(pd.read_csv(tmp_path / "run" / "evaluation.csv")) == 1
