"""The command line with `--device cuda`, on a GPU in name only: what it says, writes and goes on from."""

from __future__ import annotations

import fake_device
import numpy as np
import pandas as pd
import pytest
import torch

from medseg_lite import models
from medseg_lite.cli import main
from medseg_lite.files import read_nifti, write_case
from medseg_lite.volume import Case

CASES = ("case0", "case1", "case2")


@pytest.fixture
def data(tmp_path) -> list[str]:
    """The options that name three cases with a bright cube."""
    rng = np.random.default_rng(0)
    for name in CASES:
        label = np.zeros((16, 16, 16), np.uint8)
        label[4:10, 5:11, 3:9] = 1
        image = rng.standard_normal((2, *label.shape)) + 3.0 * label
        write_case(tmp_path / "data" / name, Case(image.astype(np.float32), ("flair", "t1c"), name, label))
    return ["--data", str(tmp_path / "data"), "--channels", "flair", "t1c", "--mask", "all", "--device", "cuda"]


def train(data, out, *options, network="deep_plus", steps=2) -> models.Network:
    assert main(["train", network, *data, "--width", "0.1", "--steps", str(steps), "--out", str(out), *options]) == 0
    return models.load(out / "model.safetensors")


def test_train_resume_segment_and_evaluate(data, tmp_path, capsys):
    with fake_device.cuda("T4") as gpu:
        whole = train(data, tmp_path / "whole", "--hold-out", "case2")
        told, used = capsys.readouterr().out, gpu.launches["float32"]
        assert "2 cases to train on, 1 held out, on cuda\n" in told and used > 0
        train(data, tmp_path / "parts", "--hold-out", "case2", steps=1)
        resumed = train(data, tmp_path / "parts", "--hold-out", "case2")
        segment = ["segment", "--model", str(tmp_path / "whole" / "model.safetensors"), *data, "--out", str(tmp_path / "gpu")]
        before = gpu.launches.total()
        assert main(segment) == 0 and gpu.launches.total() > before
    assert whole.card["device"] == "cuda:0"
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in resumed.state_dict().items())
    history = pd.read_csv(tmp_path / "parts" / "history.csv")
    assert history["step"].tolist() == [1, 2]

    assert main([*segment[:-1], str(tmp_path / "cpu"), "--device", "cpu"]) == 0
    for name in CASES:
        on_gpu, on_cpu = (read_nifti(tmp_path / where / f"{name}.nii.gz").array for where in ("gpu", "cpu"))
        assert on_gpu.shape == (16, 16, 16) and (on_gpu == on_cpu).mean() > 0.99

    evaluate = ["evaluate", "--predictions", str(tmp_path / "gpu"), *data[:-2], "--cases", "case2"]
    assert main([*evaluate, "--out", str(tmp_path / "scores.csv")]) == 0
    scores, held_out = (pd.read_csv(tmp_path / name) for name in ("scores.csv", "whole/held_out.csv"))
    pd.testing.assert_frame_equal(scores, held_out)


@pytest.mark.parametrize(
    "gpu, precision, kind",
    [("T4", "auto", "float32"), ("T4", "float16", "half"), ("A100", "auto", "half"), ("A100", "float32", "float32")],
)
def test_precision(data, tmp_path, gpu, precision, kind):
    """The number type of the convolutions in training, as `train --help` says it."""
    with fake_device.cuda(gpu) as device:
        train(data, tmp_path / "run", "--precision", precision, steps=1)
    assert (device.flops["half"] > device.flops["float32"]) == (kind == "half")


def test_scores_of_2d_networks(data, tmp_path):
    scores, short = str(tmp_path / "scores"), ["--accumulate", "1", "--batch-size", "2"]
    with fake_device.cuda("T4") as gpu:
        paths = []
        for plane in ("axial", "coronal", "sagittal"):
            train(data, tmp_path / plane, *short, "--plane", plane, "--output", "16", network="mlynarski_2d", steps=1)
            paths.append(str(tmp_path / plane / "model.safetensors"))
        before = gpu.launches.total()
        assert main(["scores", "--model", *paths, *data, "--out", scores]) == 0
        assert gpu.launches.total() > before and len(list((tmp_path / "scores").iterdir())) == 9
        model = train(data, tmp_path / "3d", *short, "--scores", scores, "--output", "4", network="mlynarski_3d", steps=1)
    assert model.card["channels"][:3] == ["flair", "t1c", "axial 0"]


def test_folds(data, tmp_path, capsys):
    """One GPU has no folds at once. The table is that of the folds one after the other."""
    folds = ["train", "deep_plus", *data, "--classes", "2", "--width", "0.1", "--steps", "1", "--folds", "3"]
    with fake_device.cuda("A100"):
        assert main([*folds, "--folds-on-gpus", "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("--folds-on-gpus: one GPU for --device cuda: one fold after the other\n")
    assert "deep_plus: 3 cases in 3 folds, on cuda\n" in told and "mean (standard deviation) over 3 cases" in told
    assert pd.read_csv(tmp_path / "run" / "evaluation.csv")["fold"].tolist() == [0, 1, 2]


def test_a_gpu_that_is_not_there(data, tmp_path, capsys):
    with fake_device.cuda():
        assert main(["train", "deep_plus", *data, "--device", "cuda:1", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith("medseg_lite train: device cuda:1: ")
