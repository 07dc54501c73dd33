"""The loss bench: its numbers are those of the package's losses and of central differences, and its state is checked."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from medseg_lite import losses
from medseg_lite.widgets import LossBench
from medseg_lite.widgets.loss_bench import BATCHES, LOSSES


def compute(bench: LossBench, logits: np.ndarray) -> float:
    """Return the loss of logits, (true class of the voxel, predicted class), by the function of the package."""
    truth = torch.from_numpy(np.stack(bench._images[bench.batch]).astype(np.int64))
    of_voxels = torch.from_numpy(logits)[truth].movedim(-1, 1)
    weights = 256 / np.array([192, 60, 4])
    function = {
        "Jaccard distance": losses.jaccard_distance,
        "cross-entropy": losses.cross_entropy,
        "weighted cross-entropy": lambda *pair: losses.cross_entropy(*pair, class_weights=weights),
        "Dice loss": losses.dice_loss,
    }[bench.loss]
    return float(function(of_voxels, truth))


@pytest.mark.parametrize(["loss", "batch"], list(itertools.product(LOSSES, BATCHES)))
def test_loss_and_pushes_are_those_of_the_package(loss, batch):
    bench = LossBench(loss=loss, batch=batch, large=0.7, tiny=0.2, alarm=0.3)
    logits = np.log([[0.7, 0.15, 0.15], [0.3, 0.7, 1e-300], [0.8, 1e-300, 0.2]])
    numbers = bench.numbers
    assert numbers["loss"] == pytest.approx(compute(bench, logits), abs=1e-6)
    assert sum(numbers["parts"]) == pytest.approx(numbers["loss"], abs=1e-9)
    for k, voxels in enumerate(numbers["voxels"]):
        ends = []
        for step in (1e-4, -1e-4):
            moved = logits.copy()
            moved[k, k] += step
            ends.append(compute(bench, moved))
        total = -(ends[0] - ends[1]) / 2e-4  # all voxels of the class move together
        assert numbers["total"][k] == pytest.approx(total, abs=1e-6)
        assert numbers["push"][k] == pytest.approx(total / max(voxels, 1), abs=1e-6)


def test_an_absent_class_costs_one_and_pushes_nothing_unless_it_has_company():
    bench = LossBench(batch="an empty image")
    for alarm in (0.01, 0.5, 0.99):
        bench.alarm = alarm
        assert bench.numbers["parts"][1:] == pytest.approx([1, 1]) and bench.numbers["total"][1:] == [0, 0]
    bench.batch = "both images"
    bench.large = bench.tiny = 0.99
    large = []
    for alarm in (0.99, 0.01):
        bench.alarm = alarm
        large.append(bench.numbers["parts"][1])
    assert large[1] < 0.1 < 0.6 < large[0]


def test_what_the_bench_is_there_to_show():
    """The background is a cheap answer for cross-entropy, not for the Jaccard distance, and weights make all classes pull alike."""
    bench, left, tiny = LossBench(), {}, {}
    for loss in LOSSES:
        bench.loss = loss
        bench.large = bench.tiny = bench.alarm = 0.5
        numbers = bench.numbers
        tiny[loss] = numbers["total"][2] / sum(numbers["total"])
        bench.large = bench.alarm = 0.01
        bench.tiny = 0.99
        good = bench.numbers["loss"]
        bench.tiny = 0.01
        left[loss] = bench.numbers["loss"] - good
    assert 4 * tiny["cross-entropy"] < tiny["Jaccard distance"]
    assert tiny["weighted cross-entropy"] == pytest.approx(1 / 3)
    assert left["cross-entropy"] < 0.1 < 0.9 < left["Jaccard distance"]


@pytest.mark.parametrize(
    ["name", "value", "message"],
    [
        ("loss", "hinge", "there is no loss 'hinge'; there are 'Jaccard distance', 'cross-entropy'"),
        ("batch", "three", "there is no batch 'three'; there are 'the image'"),
        ("large", 1.0, "large is 1; expected a probability from 0.01 to 0.99"),
        ("tiny", float("nan"), "tiny is nan"),
        ("alarm", 0.0, "alarm is 0"),
    ],
)
def test_bad_state_is_refused(name, value, message):
    bench = LossBench()
    before = getattr(bench, name)
    with pytest.raises(ValueError, match=message):
        setattr(bench, name, value)
    assert getattr(bench, name) == before
    with pytest.raises(ValueError, match=message):
        LossBench(**{name: value})


def test_static_forms(tmp_path):
    bench = LossBench()
    assert repr(bench) == "LossBench(Jaccard distance of the image: 0.8596, large 0.50, tiny 0.50, false alarm 0.10)"
    data, metadata = bench._repr_mimebundle_()
    assert "Push on one voxel" in metadata["image/png"]["alt"] and "tiny 0.073 and 0.29" in metadata["image/png"]["alt"]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))))]
    for name, value in {"loss": "Dice loss", "batch": "both images", "large": 0.9, "alarm": 0.6}.items():
        setattr(bench, name, value)
        pictures.append(np.asarray(Image.open(io.BytesIO(bench.snapshot()))))
        assert (pictures[-1] != pictures[-2]).any()
    text = bench.to_html(tmp_path / "bench.html")
    assert not re.search(r"(src|href)=|https?://", text)
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert state["alarm"] == 0.6 and state["_scene"]["counts"]["both images"] == [448, 60, 4]
