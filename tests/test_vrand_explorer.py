"""Merged and split cells: scores against metrics, faults by hand, traits, errors, static forms, the size of the state."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from medseg_lite import metrics, phantoms
from medseg_lite.volume import Case
from medseg_lite.widgets import VRandExplorer
from medseg_lite.widgets.vrand_explorer import GRID


def make(seed: int = 1) -> tuple[Case, np.ndarray]:
    """A small stack, and probabilities of which many are thresholds exactly."""
    case = phantoms.em(seed, slices=2, size=96)
    noise = np.random.default_rng(seed).normal(0, 0.3, case.shape)
    return case, np.clip(np.round(0.75 * (case.label == 0) + 0.1 + noise, 1), 0, 1).astype(np.float32)


def make_cells() -> tuple[np.ndarray, np.ndarray]:
    """Two cells of ten by twenty with a membrane between them, rows 10 and 11; a probability that finds them."""
    truth = np.zeros((22, 24), int)
    truth[:10, 2:22] = truth[12:, 2:22] = 1
    return truth, 0.8 * truth + 0.1


@pytest.fixture
def widget() -> VRandExplorer:
    case, probability = make()
    return VRandExplorer(case, probability, side=64)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_scores_are_those_of_metrics(index, kind):
    case, probability = make()
    probability = probability.astype(kind)
    widget = VRandExplorer(case, probability, index=index, corner=(5, 30), side=40)
    square = (slice(5, 45), slice(30, 70), index)
    truth = case.label[square] == 0
    for threshold in metrics.partitions.THRESHOLDS:
        widget.threshold = threshold
        inside, scores = probability[square] > threshold, widget.scores()
        assert scores["v_rand"] == metrics.v_rand(inside, truth) and scores["v_info"] == metrics.v_info(inside, truth)
        assert scores["dice"] == metrics.dice(~inside, case.label[square] == 1)
    # The official score is the best of these thresholds, which the curve has among others.
    tenths = [widget.curve["v_rand"][k] for k in range(0, 51, 5)]
    assert max(tenths) == pytest.approx(metrics.v_rand(probability[square].astype(np.float64), truth))


def test_a_gap_merges_and_a_line_splits():
    truth, probability = make_cells()
    widget = VRandExplorer(np.zeros(truth.shape), probability, truth)
    whole = widget.scores()
    assert whole == {"v_rand": 1, "v_info": 1, "dice": 1, "merged": 0, "split": 0}
    widget.edits = [[10, 9, 1], [11, 9, 1]]
    gap = widget.scores()
    assert (gap["merged"], gap["split"]) == (2, 0) and gap["v_rand"] < 0.7 and gap["dice"] > 0.95
    widget.edits = [[10, 9, 1], [11, 9, 1], [11, 9, 0]]  # closed again on one side
    closed = widget.scores()
    assert closed["merged"] == 0 and closed["v_rand"] > 0.99
    widget.edits = [[d, 11, 0] for d in range(10)]  # the upper cell in two halves
    halves = widget.scores()
    assert (halves["merged"], halves["split"]) == (0, 1) and gap["v_rand"] < halves["v_rand"] < 1
    widget.edits = [[d, 2, 0] for d in range(10)]  # thin pieces of membrane at the edge part nothing
    assert widget.scores()["split"] == 0


def test_a_part_has_a_tenth_of_the_cell_and_twenty_pixels():
    truth, probability = make_cells()
    widget = VRandExplorer(np.zeros(truth.shape), probability, truth)
    for columns, split in ((1, 0), (2, 1)):  # of the cell's 20, beyond a line; ten pixels or twenty
        widget.edits = [[d, 2 + columns, 0] for d in range(10)]
        assert widget.scores()["split"] == split


def test_the_square():
    case, probability = make()
    widget = VRandExplorer(case, probability, side=40)
    assert np.array_equal(widget._truth, case.label[28:68, 28:68, 0] == 0) and widget._scene["shape"] == [40, 40, 1]
    whole = VRandExplorer(case.image[0, :, :, 1], probability[:, :, 1], case.label[:, :, 1] == 0)
    assert whole._scene["shape"] == [96, 96, 1] and whole._scene["title"] == "slice"
    assert repr(widget) == "VRandExplorer('em-0001, slice 0', threshold 0.5, 0 pixels changed by the brush)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, p: (c.replace(label=None), p, {}), "em-0001 has no label; give the truth"),
        (lambda c, p: (c, np.stack([p, 1 - p]), {}), r"take those of being inside a cell: probabilities\[0\]"),
        (lambda c, p: (c, p[1:], {}), r"shapes \(96, 96\), \(95, 96\), \(96, 96\)"),
        (lambda c, p: (c, 2 * p, {}), "outside 0 to 1 somewhere; take the softmax"),
        (lambda c, p: (c, np.where(p > 0.5, np.nan, 0), {}), "is NaN or outside"),
        (lambda c, p: (c, p, {"index": 2}), "there is no slice 2; there are 0 to 1"),
        (lambda c, p: (c, p, {"side": 300}), "side is 300; expected 8 to 256"),
        (lambda c, p: (c, p, {"corner": (60, 0), "side": 40}), r"\[40, 40\] from \[60, 0\] leaves the slice"),
        (lambda c, p: (c, p, {"truth": np.zeros(c.shape)}), "no cell .*turned into 1 - map"),
        (lambda c, p: (c, p, {"truth": c.label + 1}), "the truth holds 2"),
        (lambda c, p: (c, p, {"truth": np.indices(c.shape).sum(0) % 2}), "cells; expected 255 at most"),
        (lambda c, p: (np.full((96, 96), np.inf), p[..., 0], {"truth": c.label[..., 0]}), "the image has 9216 NaN or infinite"),
        (lambda c, p: (c, p, {"threshold": 1.5}), "threshold is 1.5; expected a number from 0 to 1"),
    ],
)
def test_bad_input(change, message):
    image, probability, options = change(*make())
    with pytest.raises(ValueError, match=message):
        VRandExplorer(image, probability, **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("threshold", float("nan"), "threshold is nan"),
        ("brush", 4, "brush is 4; expected an odd number"),
        ("edits", [[0, 64, 1]], r"an edit \[0, 64, 1\]; expected \[d, h, inside\] in a square of \(64, 64\)"),
        ("edits", [[0, 1]], r"an edit \[0, 1\]"),
        ("tool", "saw", "saw"),
    ],
)
def test_bad_state_is_refused(widget, name, value, message):
    before = getattr(widget, name)
    with pytest.raises(ValueError if name != "tool" else Exception, match=message):
        setattr(widget, name, value)
    assert getattr(widget, name) == before


def test_thresholds_snap(widget):
    widget.threshold = 0.313
    assert widget.threshold == 0.32 == GRID[16]


def test_static_forms(widget, tmp_path):
    data, metadata = widget._repr_mimebundle_()
    s = widget.scores()
    assert data["image/png"] and f"V_rand {s['v_rand']:.3f}" in metadata["image/png"]["alt"]
    pictures = [np.asarray(Image.open(io.BytesIO(widget.snapshot())))]
    for name, value in {"threshold": 0.3, "edits": [[d, 30, 0] for d in range(64)], "opacity": 0.1}.items():
        setattr(widget, name, value)
        pictures.append(np.asarray(Image.open(io.BytesIO(widget.snapshot()))))
        assert (pictures[-1] != pictures[-2]).any()
    nasty = "</script><b>"
    case, probability = make()
    text = VRandExplorer(case.replace(name=nasty), probability).to_html(tmp_path / "v.html")
    assert nasty not in text and not re.search(r"(src|href)=|https?://", text)
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert state["_scene"]["title"] == f"{nasty}, slice 0" and len(text) < 150_000
