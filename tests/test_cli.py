"""The command line as a user meets it: a whole round on tiny cases, and the mistakes people make."""

import os
import signal
import subprocess
import sys
import threading
import time

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from medseg_lite import context, inference, models, transforms
from medseg_lite.cli import _folds, main, make_parser
from medseg_lite.cli import train as train_command
from medseg_lite.cli._folds import FoldProcesses, find_gpus
from medseg_lite.datasets import nifti_folder
from medseg_lite.engine import distributed
from medseg_lite.files import read_nifti, write_case
from medseg_lite.recipes import RECIPES, cross_validate
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
        ("deep_plus", ["--fold", "2", "--channels", "flair"], "--fold, --folds-on-gpus and --folds-at-once are for --folds"),
        ("deep_plus", ["--folds-on-gpus", "--channels", "flair"], "--folds-on-gpus and --folds-at-once are for --folds"),
        ("deep_plus", ["--folds-at-once", "2", "--channels", "flair"], "say how many there are"),
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
    assert told.count("processes that can share an update: at most ") == len(RECIPES)


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


# ----------------------------------------------------------------------------------------------------- folds at once


@pytest.mark.slow
def test_folds_at_once(folder, tmp_path, capsys):
    """Real processes on the CPU: the files and the table of folds one after the other, also when one fold fails at first."""
    data = ["--data", str(folder), "--channels", "flair", "t1c", "--classes", "2", "--device", "cpu"]
    cross = ["train", "deep_plus", *data, "--steps", "2", "--width", "0.1", "--folds", "2"]
    assert main([*cross, "--out", str(tmp_path / "one")]) == 0
    told = capsys.readouterr().out.splitlines()
    at_once = [*cross, "--folds-at-once", "2", "--out", str(tmp_path / "two")]
    (tmp_path / "two" / "fold1").mkdir(parents=True)
    (tmp_path / "two" / "fold1" / "last.pt").write_text("no state")
    assert main(at_once) == 1
    found = capsys.readouterr()
    assert "fold 1: medseg_lite train: " in found.out and "last.pt is not a training state" in found.out
    assert found.err.splitlines()[-1].startswith("medseg_lite train: fold 1 (exit status 1) failed")
    assert "mean (standard deviation) over 2 cases" in found.out

    (tmp_path / "two" / "fold1" / "last.pt").unlink()
    assert main(at_once) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "deep_plus: 3 cases in 2 folds, 2 at once, each in a process of its own"
    own = [line for line in lines[1:] if not line.startswith("fold ")]
    assert sum("mean (standard deviation)" in line for line in lines) == 1
    assert own == told[1:], "what the processes say is marked, and the table stands once"
    for number in range(2):
        assert f"fold {number}: deep_plus: 3 cases in 2 folds, on cpu" in lines
        assert any(line.startswith(f"fold {number}: training: 100%") for line in lines)
    for name in ("evaluation.csv", "fold0/evaluation.csv", "fold1/model.safetensors", "predictions/case1.nii.gz"):
        one, two = (tmp_path / run / name for run in ("one", "two"))
        if name.endswith("csv"):
            assert one.read_text() == two.read_text()
        elif name.endswith("gz"):
            assert np.array_equal(read_nifti(one).array, read_nifti(two).array)
        else:
            ours, theirs = models.load(one).state_dict(), models.load(two).state_dict()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.fixture
def stand_ins(monkeypatch):
    """`stand_ins(script)`: in place of a training each process runs `script`; returns a list that collects how they are started."""

    def use(script: str) -> list[list[str]]:
        started, start = [], subprocess.Popen

        def stand_in(command, **options):
            assert command[:3] == [sys.executable, "-m", "medseg_lite"]
            started.append(command[3:])
            return start([sys.executable, "-c", script, command[command.index("--fold") + 1]], **options)

        monkeypatch.setattr(_folds.subprocess, "Popen", stand_in)
        return started

    return use


def test_every_gpu_takes_the_next_fold(stand_ins, capsys, monkeypatch):
    """Fold 0 takes long, so the other GPU has the rest. Fold 2 dies, which the others do not notice."""
    script = (
        "import os, sys, time\n"
        "fold, gpu = sys.argv[1], os.environ['CUDA_VISIBLE_DEVICES']\n"
        "print('on', gpu, 'with', os.environ['OMP_NUM_THREADS'])\n"
        "time.sleep(3 if fold == '0' else 0)\n"
        "sys.exit(7 if fold == '2' else 0)"
    )
    started = stand_ins(script)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    processes = FoldProcesses(
        ["train", "x", "--out", "y", "--halvings", ".5"], [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("5", "GPU-ab")]
    )
    processes([0, 1, 2, 3])
    ends = ["--device", "cuda"]
    assert started == [["train", "x", "--out", "y", "--halvings", ".5", "--fold", str(n), *ends] for n in range(4)]
    told = sorted(capsys.readouterr().out.splitlines())
    assert told == ["fold 0: on 5 with 6", *(f"fold {n}: on GPU-ab with 6" for n in (1, 2, 3))]
    assert processes.status == {0: 0, 1: 0, 2: 7, 3: 0} and not processes.running
    with pytest.raises(ChildProcessError, match=r"^fold 2 \(exit status 7\) failed, .* the same command goes on"):
        processes.check()


def test_no_more_processes_than_folds(stand_ins):
    started = stand_ins("pass")
    processes = FoldProcesses(["train"], [{}] * 5)
    processes([3])
    assert started == [["train", "--fold", "3"]] and processes.status == {3: 0}
    processes.check()


def test_a_process_that_cannot_be_started(monkeypatch):
    def fail(*_, **__):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(_folds.subprocess, "Popen", fail)
    processes = FoldProcesses(["train"], [{}, {}])
    with pytest.raises(BlockingIOError, match="temporarily"):
        processes([0, 1, 2])
    assert not processes.running and processes.status == {0: None, 1: None, 2: None}


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_reaches_every_fold_once_and_is_waited_for(stand_ins, monkeypatch, name):
    """A fold in training notes the first Ctrl-C, finishes its update and saves. A second one would stop it at once."""
    started = stand_ins(
        "import os, signal, sys, time\n"
        "heard = []\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        "print('ready', os.getsid(0) == os.getpid())\n"  # out of reach of the terminal's Ctrl-C
        "while not heard: time.sleep(.05)\n"
        "time.sleep(1.5)\n"
        "print('saved after', len(heard))\n"
        "sys.exit(130)"
    )
    processes, before = FoldProcesses(["train"], [{}, {}]), signal.getsignal(signal.SIGTERM)

    told: list[str] = []
    monkeypatch.setattr(_folds, "say", told.append)

    def press():
        deadline = time.monotonic() + 60
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), getattr(signal, name))

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt, match="the same command goes on with every fold"):
        processes(range(5))
    presser.join()
    assert sorted(told[:2]) == ["fold 0: ready True", "fold 1: ready True"]
    assert told[2] == "stopping: every fold finishes its update and keeps its state"
    assert sorted(told[3:]) == ["fold 0: saved after 1", "fold 1: saved after 1"]
    assert len(started) == 2 and processes.status == {0: 130, 1: 130, 2: None, 3: None, 4: None}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_progress_bar_is_printed_seldom(stand_ins, capsys, monkeypatch):
    """A bar is written over and over in one line, which ends at last."""
    stand_ins(
        "import sys, time\n"
        "for n in range(6): sys.stderr.write(f'\\rbar {n}') and sys.stderr.flush() or time.sleep(.2)\n"
        "print('\\ndone ×')"
    )
    FoldProcesses(["train"], [{}])([0])
    assert capsys.readouterr().out.splitlines() == ["fold 0: bar 5", "fold 0: done ×"]
    monkeypatch.setattr(_folds, "_BETWEEN_BARS", 0.3)
    FoldProcesses(["train"], [{}])([0])
    assert 4 <= len(capsys.readouterr().out.splitlines()) <= 6


@pytest.mark.parametrize(
    "visible, count, device, gpus",
    [
        (None, 3, "auto", ["0", "1", "2"]),
        (None, 3, "cuda", ["0", "1", "2"]),
        ("6, 7", 2, "auto", ["6", "7"]),
        ("GPU-1f,GPU-2e,-1,3", 2, "auto", ["GPU-1f", "GPU-2e"]),
        ("", 0, "auto", []),
        (None, 3, "cuda:1", []),
        (None, 3, "cpu", []),
    ],
)
def test_gpus_by_name(monkeypatch, visible, count, device, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpus(device) == gpus


def test_folds_on_gpus(folder, tmp_path, capsys, monkeypatch, stand_ins):
    """This process counts the GPUs and leaves them to the others, for which it stores the cases."""
    started = stand_ins("pass")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    data = ["--data", str(folder), "--channels", "flair", "t1c", "--classes", "2"]
    cross = ["train", "deep_plus", *data, "--folds", "3", "--out", str(tmp_path / "run"), "--folds-on-gpus", "--device", "cuda"]
    assert main(cross) == 0  # there is no CUDA device to touch
    assert capsys.readouterr().out == "deep_plus: 3 cases in 3 folds, 2 at once, each in a process of its own\n"
    assert sorted(started) == [[*cross, "--fold", str(n), "--device", "cuda"] for n in range(3)]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["cases", "run.json"]
    assert len(list((tmp_path / "run" / "cases").iterdir())) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(cross) == 1
    assert "start processes themselves; leave torchrun out" in capsys.readouterr().err


def test_one_gpu_or_none(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    data = ["--data", str(folder), "--channels", "flair", "t1c", "--classes", "2", "--steps", "1", "--width", "0.1"]
    assert main(["train", "deep_plus", *data, "--folds", "2", "--folds-on-gpus", "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert told.startswith(
        "--folds-on-gpus: no GPU for --device auto: one fold after the other\ndeep_plus: 3 cases in 2 folds, on "
    )
    assert (tmp_path / "run" / "fold1" / "model.safetensors").exists() and "over 3 cases" in told


def test_folds_with_scores_of_their_own_are_stored_by_their_processes(folder, tmp_path):
    cases = nifti_folder(
        folder, channels={c: f"{c}.nii.gz" for c in ("flair", "t1c")}, label="label.nii.gz", mask="mask.nii.gz"
    )
    recipe, launched = {"name": "x", "network": "deep_plus", "channels": ("flair", "t1c"), "classes": 2, "folds": 2}, []
    for scores in ("scores/fold{fold}", None):
        out = tmp_path / str(scores is None)
        table = cross_validate(recipe, cases, out, scores=scores, launch=launched.append, progress=False)
        assert table.empty and (out / "cases").exists() == (scores is None)
    assert launched == [[0, 1], [0, 1]]


def test_more_gpus_than_an_update_has_parts(folder, tmp_path, capsys, monkeypatch):
    """It is said before any case is read."""
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    data = ["--data", str(folder), "--channels", "flair", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["train", "kayalibay-brats2015", *data]) == 1
    assert "a batch of 1 and accumulate=1 leave nothing to do for some of the 8 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(distributed, "rank", lambda: 1)  # prints nothing
    monkeypatch.setattr(train_command, "cross_validate", lambda *_, **settings: calls.append(settings))
    calls: list[dict] = []
    assert main(["train", "kayalibay-brats2015", *data, "--batch-size", "8"]) == 0 and calls[0]["batch_size"] == 8


@pytest.mark.parametrize(
    "options, places, one_of_several",
    [
        ([], 0, False),
        (["--folds-on-gpus"], 2, False),
        (["--folds-at-once", "3"], 3, False),
        (["--fold", "1"], 0, False),
        (["--folds-on-gpus", "--fold", "1"], 0, True),  # a process that was started so starts no others
        (["--folds-at-once", "3", "--fold", "0"], 0, True),
    ],
)
def test_who_starts_processes(monkeypatch, options, places, one_of_several):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    parsed = make_parser().parse_args(["train", "deepmedic-brats2015", "--data", "x", "--out", "y", *options])
    assert len(_folds.find_places(parsed)) == places and _folds.is_one_of_several(parsed) == one_of_several
    others = make_parser().parse_args(["segment", "--model", "x", "--data", "x", "--out", "y"])
    assert _folds.find_places(others) == []
