"""Segment it yourself: the slice, scores against metrics, the painted slice to and from the browser, errors, static forms."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from medseg_lite import metrics
from medseg_lite.volume import Case
from medseg_lite.widgets import SegmentYourself


def make_case(**changes) -> Case:
    """A ball with a core, brightest in its middle slice, with flat voxels."""
    d, h, w = np.indices((20, 24, 8))
    radius = np.sqrt((d - 8) ** 2 + (h - 13) ** 2 + (3 * (w - 5)) ** 2)
    label = (radius < 7).astype(np.uint8) + 3 * (radius < 3).astype(np.uint8)
    image = np.stack([100 + 60 * (label > 0), 50 + h]).astype(np.float32)
    case = Case(image=image, channels=("flair", "t2"), name="ball", label=label, affine=np.diag([1, 2, 3, 1]))
    return case.replace(**changes)


@pytest.fixture
def widget() -> SegmentYourself:
    case = make_case()
    return SegmentYourself(case, np.roll(case.label, 3, axis=0), {"large": case.label > -1, "nothing": 0 * case.label})


def test_scores_are_those_of_metrics_in_the_busiest_slice(widget):
    truth = make_case().label[:, :, 5] > 0
    np.testing.assert_array_equal(widget.truth, truth)
    widget.painted = np.roll(truth, 2, axis=1)
    drawn = {"you": widget.painted, "network": np.roll(truth, 3, axis=0), "large": truth >= 0, "nothing": truth & False}
    assert widget.scores.index.tolist() == list(drawn)
    for name, array in drawn.items():
        expected = [metrics.dice(array, truth), metrics.precision(array, truth), metrics.sensitivity(array, truth)]
        assert widget.scores.loc[name].tolist() == expected
    assert 0 < widget.scores["Dice"]["you"] < 1 and widget.scores["precision"]["nothing"] == 0


def test_a_region_is_cut_out_of_labels_but_not_of_masks():
    case = make_case()
    widget = SegmentYourself(case, case.label, {"all": case.label > 0}, region=4)
    np.testing.assert_array_equal(widget.truth, case.label[:, :, 5] == 4)
    assert widget.scores["Dice"]["network"] == 1 and widget.scores["precision"]["all"] < 0.5
    assert SegmentYourself(case, case.label, region=[1, 4], index=4).truth.sum() == (case.label[:, :, 4] > 0).sum()


def test_what_is_painted_goes_to_the_browser_and_back(widget):
    assert not widget.painted.any() and widget.painted.dtype == bool
    seen = []
    widget.observe(lambda change: seen.append(change.new.sum()), "painted")
    widget.painted = widget.truth
    text = widget.get_state("painted")["painted"]
    assert set(text) == {"0", "1"} and text.count("1") == widget.truth.sum() and text[8 * 24 + 13] == "1"
    widget.set_state({"painted": text.translate({48: "1", 49: "0"})})  # as the browser sends it
    np.testing.assert_array_equal(widget.painted, ~widget.truth)
    assert seen == [widget.truth.sum(), (~widget.truth).sum()]
    with pytest.raises(ValueError, match=r"painted has shape \(3, 3\); expected \(20, 24\)"):
        widget.painted = np.ones((3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (c.replace(label=None), c.label, {}), "ball has no label to compare with"),
        (lambda c: (c, c.label[:, :, :3], {}), r"network has shape \(20, 24, 3\); expected that of the case, \(20, 24, 8\)"),
        (lambda c: (c, c.label, {"readers": {"me": c.label[0]}}), "me has shape"),
        (lambda c: (c, c.label, {"readers": {"you": c.label}}), "a reader is called 'you'"),
        (lambda c: (c, c.label, {"index": 8}), "slice 8 of ball shows nothing of the object"),
        (lambda c: (c, c.label, {"index": 0}), "slice 0 of ball shows nothing"),
        (lambda c: (c, c.label, {"region": 2}), "shows nothing of the object"),
        (lambda c: (c, c.label, {"channel": "t1"}), "ball has no channel 't1'; there are 'flair', 't2'"),
    ],
)
def test_bad_input(change, message):
    case, network, options = change(make_case())
    with pytest.raises(ValueError, match=message):
        SegmentYourself(case, network, **options)


def test_static_forms(widget, tmp_path):
    assert repr(widget).startswith("SegmentYourself('ball, slice 5', Dice: you 0.000, network 0.")
    data, metadata = widget._repr_mimebundle_()
    before = Image.open(io.BytesIO(widget.snapshot()))
    widget.painted = np.roll(widget.truth, 1, axis=0)
    after = Image.open(io.BytesIO(widget.snapshot()))
    assert data["image/png"] and "Dice: you 0.000" in metadata["image/png"]["alt"]
    assert after.width > before.width, "a panel for you as soon as you have painted"
    case, nasty = make_case(), "</script><b>"
    text = SegmentYourself(case, case.label, {nasty: case.label}).to_html(tmp_path / "s.html")
    assert nasty not in text and not re.search(r"(src|href)=|https?://", text)
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert state["painted"] == "0" * 480 and state["_scene"]["names"] == ["network", nasty] and len(state["_images"]) == 2
    assert len(text) < 80_000
