"""Residual blocks switched off: predictions against attribution.without, the state of the network, traits, errors, static forms."""

from __future__ import annotations

import io
import json
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from medseg_lite import attribution, inference, metrics, models, paths, phantoms, transforms
from medseg_lite.widgets import BlockSwitchboard


def make_case(size: int = 64):
    return transforms.standardise(phantoms.em(3, slices=2, size=size, counts=True))


@pytest.fixture(scope="module")
def model() -> models.Network:
    return models.load(paths.shipped("checkpoints", "em_inputs_standardised.safetensors"))


@pytest.fixture(scope="module")
def board(model) -> BlockSwitchboard:
    return BlockSwitchboard(model, make_case(), index=1)


@pytest.fixture(autouse=True)
def all_on(board):
    board.off = []


def unpack(packed: bytes) -> np.ndarray:
    return np.frombuffer(zlib.decompress(packed, 31), np.uint8).reshape(64, 64)


def predict(model, off, case=None, **options) -> np.ndarray:
    """Return a prediction with some blocks taken out, by the functions of the package, of the whole case."""
    with attribution.without(model, off):
        return inference.predict(model, case or make_case(), progress=False, **options)


CHOICES = [[], ["down.0"], ["up.1.3"], ["up.3"], ["down.1.0", "across.2", "up.0.9"]]


@pytest.mark.parametrize("off", CHOICES, ids=lambda off: ",".join(off) or "none")
def test_a_prediction_is_that_of_without(model, board, off):
    board.off = off
    expected = predict(model, off)[:, :, 1] == 1
    assert np.array_equal(board.prediction, expected) and 0 < expected.sum() < expected.size
    assert board.dice == metrics.dice(expected, make_case().label[:, :, 1] == 1)


def test_what_the_browser_gets_is_that_of_without(model, board):
    """Each block alone, and the head read after each block: what is predicted, and the probability."""
    assert len(board.blocks) == 47 and len(board._pictures) == 47 + 48
    for n in (0, 3, 24, 46):
        places = {n: [board.blocks[n]], 47 + n: board.blocks[n:]}
        for place, off in places.items():
            levels = unpack(board._pictures[place])
            assert np.array_equal(levels % 2, predict(model, off)[:, :, 1] == 1)
            probability = predict(model, off, output="probabilities")[1, :, :, 1]
            assert np.abs(levels // 2 / 127 - probability).max() < 0.5 / 127 + 1e-4
    assert np.array_equal(unpack(board._pictures[-1]) % 2, predict(model, [])[:, :, 1] == 1), (
        "after the last block: the whole network"
    )


def test_other_combinations_are_answered(model, board):
    board.off = ["up.0.1", "down.1.1"]
    assert board.off == ["down.1.1", "up.0.1"], "in the order of the network"
    assert board._answer["off"] == board.off and board._answer["dice"] == board.dice
    expected = predict(model, board.off)[:, :, 1] == 1
    assert np.array_equal(unpack(board._answer["picture"]) % 2, expected)
    assert not np.array_equal(expected, predict(model, ["down.1.1"])[:, :, 1] == 1)
    before = board._answer
    board.off = ["down.1.1"]
    board.read_after(4)
    assert board._answer is before, "these were known"


def test_read_after_and_table(board):
    board.read_after(5)
    assert board.off == board.blocks[5:]
    table = board.table
    assert len(table) == 48 and table["after"][5] == board.dice
    assert table["block"][25] == "across.2" and table["shortcut"].value_counts().to_dict() == {
        "identity": 34,
        "changes": 13,
        "": 1,
    }
    board.off = ["down.0"]
    assert table["without"][table["block"] == "down.0"].item() == board.dice < table["after"][47]
    for count in (-1, 48):
        with pytest.raises(ValueError, match=f"count is {count}; expected 0 to 47"):
            board.read_after(count)


def test_the_network_stays_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    BlockSwitchboard(model, make_case()).off = ["down.0", "up.1.1"]
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()


def test_rows_follow_the_u(board):
    rows = board._scene["rows"]
    assert [name for name, _ in rows] == ["down.0", "down.1", "down.2", "down.3", "across", "up.0", "up.1", "up.2", "up.3"]
    assert [len(blocks) for _, blocks in rows] == [1, 3, 8, 10, 3, 10, 8, 3, 1]
    assert [b for _, blocks in rows for b in blocks] == board.blocks


@pytest.mark.parametrize(("classes", "label"), [(1, 1), (3, 2)])
def test_pipelines_sigmoids_and_several_classes(classes, label):
    torch.manual_seed(0)
    model = models.fcn_fc_resnet(width=0.1, classes=classes).eval()
    case = make_case().replace(label=np.indices((64, 64, 2)).sum(axis=0).astype(np.uint8) % (label + 1))
    board = BlockSwitchboard(model, case, index=0, label=label)
    assert len(board.blocks) == 47 and board.blocks[0] == "segmenter.down.0" and board._scene["rows"][4][0] == "across"
    for off in (["segmenter.up.0.2"], board.blocks[3:]):
        board.off = off
        assert np.array_equal(board.prediction, predict(model, off, case)[:, :, 0] == label)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, c: (models.unet2d(width=0.05), c, {}), "UNet has no FC-ResNet; expected models.fc_resnet"),
        (lambda m, c: (m, c.replace(label=None), {}), "em-0003 has no label"),
        (lambda m, c: (m, c, {"index": 2}), "there is no slice 2; there are 0 to 1"),
        (lambda m, c: (m, c, {"label": 2}), "there is no class 2; the network has classes 1 to 1"),
    ],
)
def test_bad_input(model, change, message):
    model, case, options = change(model, make_case())
    with pytest.raises(ValueError, match=message):
        BlockSwitchboard(model, case, **options)


def test_unknown_blocks_are_refused(board):
    with pytest.raises(ValueError, match=r"there is no block 'down.9'; board.blocks has their names, such as 'down.0'"):
        board.off = ["up.3", "down.9"]
    assert board.off == []


def test_static_forms(board, tmp_path):
    assert re.fullmatch(r"BlockSwitchboard\('em-0003', slice 1, 0 of 47 blocks off, Dice 0\.\d{3}\)", repr(board))
    data, metadata = board._repr_mimebundle_()
    assert data["image/png"] and f"all on: Dice {board.dice:.3f}" in metadata["image/png"]["alt"]
    pictures = [np.asarray(Image.open(io.BytesIO(board.snapshot())))]
    for off in (["down.0"], board.blocks[2:], ["down.1.1", "up.0.3"]):
        board.off = off
        pictures.append(np.asarray(Image.open(io.BytesIO(board.snapshot()))))
        assert (pictures[-1] != pictures[-2]).any()
    text = board.to_html(tmp_path / "b.html")
    assert not re.search(r"(src|href)=|https?://", text) and len(text) < 1_000_000
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert state["_kernel"] is False and board._kernel is True
