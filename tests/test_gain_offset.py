"""Gain and offset: predictions against a direct computation, traits, errors, static forms, the size of the state."""

from __future__ import annotations

import io
import json
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from medseg_lite import inference, metrics, models, paths, phantoms, plotting, transforms
from medseg_lite.widgets import GainOffset

GAINS, OFFSETS = (0.5, 1, 3), (-400, 0, 900)


def make_case():
    return phantoms.em(3, slices=2, size=64, counts=True)


def load(name: str) -> models.Network:
    return models.load(paths.shipped("checkpoints", f"em_inputs_{name}.safetensors"))


@pytest.fixture(scope="module")
def networks() -> dict:
    return {"raw": load("learned"), "standardised": (load("standardised"), transforms.standardise)}


@pytest.fixture(scope="module")
def widget(networks) -> GainOffset:
    return GainOffset(networks, make_case(), index=1, gains=GAINS, offsets=OFFSETS)


@pytest.fixture(autouse=True)
def as_it_came(widget):
    widget.gain, widget.offset = 1, 0


def test_the_threshold_on_a_networks_card_is_used():
    case = phantoms.prostate(101, site="A", size=64, vary=True)
    network = models.load(paths.shipped("checkpoints", "drozdzal_prostate.safetensors"))
    threshold = network.card["threshold"]
    assert threshold != 0.5
    widget = GainOffset({"learned": network}, case, gains=(1, 2), offsets=(0, 1))
    probability = inference.predict(network, case, output="probabilities", progress=False)[1]
    here = plotting.busiest_position(case.label == 1, case.shape)[2]
    np.testing.assert_array_equal(widget.predictions["learned"], probability[:, :, here] > threshold)


@pytest.mark.parametrize(("gain", "offset"), [(1, 0), (0.5, 900), (3, -400)])
def test_predictions_are_those_of_the_changed_case(widget, networks, gain, offset):
    widget.gain, widget.offset = gain, offset
    case = make_case()
    changed = case.replace(image=(case.image.astype(np.float64) * gain + offset).astype(np.float32))
    given = {"raw": changed, "standardised": transforms.standardise(changed)}
    for number, (name, network) in enumerate({"raw": networks["raw"], "standardised": networks["standardised"][0]}.items()):
        found = inference.predict(network, given[name], progress=False)[:, :, 1] == 1
        assert np.array_equal(widget.predictions[name], found) and 0 < found.sum() < found.size
        row = widget.table.loc[name]
        assert row["dice"] == metrics.dice(found, case.label[:, :, 1] == 1)
        assert widget.dice[name][GAINS.index(gain), OFFSETS.index(offset)] == row["dice"]
        seen = given[name].image[0, :, :, 1]
        assert row[["mean", "deviation"]].tolist() == pytest.approx([seen.mean(), seen.std()], rel=1e-4)
        place = GAINS.index(gain) * 3 + OFFSETS.index(offset)
        sent = np.frombuffer(zlib.decompress(widget._predictions[number][place], 31), np.uint8)
        assert np.array_equal(sent.reshape(64, 64), found)


def test_who_minds(widget):
    """Standardising takes gain and offset away; the raw network minds them."""
    assert np.ptp(widget.dice["standardised"]) < 0.01 and np.ptp(widget.dice["raw"]) > 0.05


def test_default_gains_and_offsets():
    torch.manual_seed(0)
    case = make_case()
    widget = GainOffset({"one": models.unet2d(width=0.05)}, case)
    assert (len(widget.gains), len(widget.offsets)) == (9, 5) and widget.gains[4] == 1 and widget.offsets[2] == 0
    assert 0.5 * case.image.std() < widget.offsets[3] < 2 * case.image.std() and widget.offsets[3] == -widget.offsets[1]


def test_networks_of_volumes_get_the_volume():
    torch.manual_seed(0)
    network, case = models.fcn_preprocessor(classes=2, width=0.25, dims=3), phantoms.em(3, slices=16, size=64)
    widget = GainOffset({"volume": network}, case, gains=[1], offsets=[0, 50])
    widget.offset = 50
    found = inference.predict(network, case.replace(image=case.image + 50), progress=False)
    assert np.array_equal(widget.predictions["volume"], found[:, :, widget._index] == 1)


def test_settings_snap(widget):
    widget.gain, widget.offset = 1.9, -170
    assert (widget.gain, widget.offset) == (1, 0)
    widget.gain, widget.offset = 99, -250
    assert (widget.gain, widget.offset) == (3, -400)
    for name in ("gain", "offset"):
        with pytest.raises(ValueError, match=f"{name} is nan; expected a number from"):
            setattr(widget, name, float("nan"))
    assert widget.gain == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: ({}, c, {}), "there are 0 networks; expected one to 3"),
        (lambda n, c: (dict.fromkeys("abcd", n), c, {}), "there are 4 networks"),
        (lambda n, c: ({"a": n}, c.replace(label=None), {}), "em-0003 has no label to compare with"),
        (lambda n, c: ({"a": n}, c, {"channel": "t2"}), "or no channel 't2'"),
        (lambda n, c: ({"a": n}, c, {"index": 2}), "slice 2 of em-0003 has no voxel of class 1"),
        (lambda n, c: ({"a": n}, c, {"label": 3}), "has no voxel of class 3"),
        (
            lambda n, c: ({"a": n}, c, {"gains": [2, 1]}),
            r"gains are \[2.0, 1.0\]; expected one finite number or several, each larger",
        ),
        (lambda n, c: ({"a": n}, c, {"offsets": []}), r"offsets are \[\]"),
        (lambda n, c: ({"a": n}, c, {"offsets": [0, float("inf")]}), "offsets are"),
    ],
)
def test_bad_input(networks, change, message):
    given, case, options = change(networks["raw"], make_case())
    with pytest.raises(ValueError, match=message):
        GainOffset(given, case, **options)


def test_static_forms(widget, networks, tmp_path):
    assert repr(widget).startswith("GainOffset('em-0003', slice 1, gain 1, offset 0, Dice: raw 0.")
    data, metadata = widget._repr_mimebundle_()
    assert data["image/png"] and f"raw {widget.table['dice']['raw']:.3f}" in metadata["image/png"]["alt"]
    pictures = [np.asarray(Image.open(io.BytesIO(widget.snapshot())))]
    for name, value in {"gain": 0.5, "offset": 900}.items():
        setattr(widget, name, value)
        pictures.append(np.asarray(Image.open(io.BytesIO(widget.snapshot()))))
        assert (pictures[-1] != pictures[-2]).any()
    nasty = "</script><b>"
    one = GainOffset({nasty: networks["raw"]}, make_case(), gains=[1], offsets=[0])
    text = one.to_html(tmp_path / "g.html")
    assert nasty not in text and not re.search(r"(src|href)=|https?://", text)
    assert json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])["_scene"]["names"] == [nasty]
    assert len(widget.to_html()) < 120_000
