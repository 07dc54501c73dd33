"""Segmentations against the truth: counts, worst slices, traits, static forms; and in a page of its own."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from medseg_lite import metrics
from medseg_lite.volume import Case
from medseg_lite.widgets import CompareSegmentations


def make() -> tuple[Case, dict[str, np.ndarray]]:
    d, h, w = np.indices((20, 24, 16))
    label = ((d - 9) ** 2 + (h - 12) ** 2 + (w - 8) ** 2 < 30).astype(np.uint8) + 3 * (
        (d - 9) ** 2 + (h - 12) ** 2 + (w - 8) ** 2 < 8
    )
    image = np.random.default_rng(0).normal(size=(2, *label.shape)).astype(np.float32) + label
    case = Case(
        image=image,
        channels=("flair", "t1c"),
        name="ball",
        label=label.astype(np.uint8),
        info={"classes": {1: "shell", 4: "core"}},
    )
    moved, empty = np.roll(label, 2, axis=0), np.zeros_like(label)
    moved[2:6, 3:9, 2] = 1  # the worst slice
    return case, {"moved": moved, "nothing": empty}


@pytest.fixture
def compare() -> CompareSegmentations:
    return CompareSegmentations(*make())


def test_table_and_worst_slice(compare):
    case, predictions = make()
    assert list(compare._regions) == ["all labels", "shell", "core"] and compare.region == "all labels"
    table = compare.table.set_index(["prediction", "region"])
    for name, prediction in predictions.items():
        for region, labels in {"all labels": [1, 4], "core": [4]}.items():
            p, t = np.isin(prediction, labels), np.isin(case.label, labels)
            row = table.loc[name, region]
            assert row["dice"] == pytest.approx(metrics.dice(p, t))
            assert tuple(row[["found", "missed", "made up"]]) == ((p & t).sum(), (t & ~p).sum(), (p & ~t).sum())
    wrong = (predictions["moved"] > 0) != (case.label > 0)
    assert compare.position[2] == wrong.sum((0, 1)).argmax()
    compare.position, compare.region = (3, 4, 5), "core"
    assert compare.worst("nothing") == compare.position == (3, 4, (case.label == 4).sum((0, 1)).argmax())
    compare.plane = "coronal"
    assert compare.worst("nothing")[1] == (case.label == 4).sum((0, 2)).argmax()
    with pytest.raises(ValueError, match="no prediction 'x'; there are 'moved', 'nothing'"):
        compare.worst("x")


@pytest.mark.parametrize(
    ["change", "message"],
    [
        (lambda c, p: (c.replace(label=None), p), "ball has no label"),
        (lambda c, p: (c, {}), "one to six entries"),
        (lambda c, p: (c, c.label), "one to six entries"),
        (lambda c, p: (c, {"a": c.label[1:]}), r"prediction 'a' has shape \(19, 24, 16\); expected \(20, 24, 16\)"),
        (lambda c, p: (c, {"a": c.label + 0.5}), "prediction 'a'"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        CompareSegmentations(*change(*make()))


@pytest.mark.parametrize(
    ["name", "value", "message"],
    [
        ("region", "x", "no region 'x'; there are 'all labels'"),
        ("sequence", "t2", "no channel 't2'"),
        ("position", 3, "three whole"),
        ("opacity", float("nan"), "NaN"),
    ],
)
def test_bad_state_is_refused(compare, name, value, message):
    before = getattr(compare, name)
    with pytest.raises(ValueError, match=message):
        setattr(compare, name, value)
    assert getattr(compare, name) == before


def test_static_forms(compare, tmp_path):
    data, metadata = compare._repr_mimebundle_()
    assert "moved" in metadata["image/png"]["alt"] and "nothing 0 %" in metadata["image/png"]["alt"]
    assert all(word in metadata["image/png"]["alt"] for word in ("region all labels", "flair", "axial"))
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))))
    compare.region = "core"
    assert (np.asarray(Image.open(io.BytesIO(compare.snapshot()))) != first).any()
    case, predictions = make()
    nasty = "</script><b>"
    text = CompareSegmentations(case.replace(name=nasty), {nasty: predictions["moved"]}).to_html(tmp_path / "c.html")
    assert nasty not in text and not re.search(r"(src|href)=|https?://", text)
    assert json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])["_scene"]["predictions"] == [nasty]


def test_regions_of_brats():
    case, predictions = make()
    compare = CompareSegmentations(case, predictions, regions="brats2015", region="enhancing")
    assert list(compare._regions) == ["whole", "core", "enhancing"] and compare.region == "enhancing"


def test_the_picture_says_what_its_dice_is_of(compare):
    figure = compare._draw()
    assert figure.get_suptitle() == f"ball, region all labels over flair, axial slice {compare.position[2]}; Dice of all slices"
    assert [text.get_text() for text in figure.axes[0].texts] == list("RLAP")
