"""Methods at thresholds: numbers against metrics, the best threshold, traits, errors, static forms, the size of the state."""

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
from medseg_lite.widgets import OperatingPoint
from medseg_lite.widgets.operating_point import THRESHOLDS, count_below, score_levels


def make(seed: int = 0, name: str = "ball") -> tuple[Case, dict[str, np.ndarray]]:
    """A ball of two classes that lies partly outside the mask, and probabilities, many of which are thresholds exactly."""
    rng = np.random.default_rng(seed)
    d, h, w = np.indices((20, 24, 16))
    radius = (d - 9 - seed) ** 2 + (h - 12) ** 2 + (w - 8) ** 2
    label = (radius < 30).astype(np.uint8) + 3 * (radius < 8).astype(np.uint8)
    image = rng.normal(size=(2, *label.shape)).astype(np.float32) + label
    mask = np.ones(label.shape, bool)
    mask[:6] = mask[:, 20:] = False
    case = Case(image=image, channels=("flair", "t1c"), name=name, label=label, mask=mask)
    sure = np.clip((label > 0) * 0.6 + rng.normal(0.2, 0.25, label.shape), 0, 1)
    return case, {"sure": sure.astype(np.float32), "votes": np.round(np.clip(sure + 0.1, 0, 1), 1)}


def make_two() -> tuple[list[Case], dict[str, list[np.ndarray]]]:
    (a, p), (b, q) = make(0, "a"), make(3, "b")
    return [a, b], {name: [p[name], q[name]] for name in p}


@pytest.fixture
def widget() -> OperatingPoint:
    return OperatingPoint(*make(), label=[1, 4])


def measure(case: Case, probability: np.ndarray, threshold: float) -> dict[str, float]:
    """Return scores and voxels at a threshold, by the functions of `metrics`."""
    truth = case.label > 0
    counts = truth | case.mask
    p, t = (probability > threshold)[counts], truth[counts]
    scores = {name: getattr(metrics, name)(p, t) for name in ("dice", "sensitivity", "precision", "specificity")}
    return scores | {"found": (p & t).sum(), "missed": (t & ~p).sum(), "made_up": (p & ~t).sum()}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_are_those_of_metrics_at_every_threshold(kind):
    case, probabilities = make()
    probabilities = {name: p.astype(kind) for name, p in probabilities.items()}
    curves = OperatingPoint(case, probabilities, label=[1, 4], chosen={"sure": 0.12345}).curves
    assert 0.12345 in set(curves["threshold"]) and len(curves) == 2 * (len(THRESHOLDS) + 1)
    for row in curves.to_dict("records"):
        expected = measure(case, probabilities[row["method"]], row["threshold"])
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-12), row


def test_scores_of_several_cases_are_means_and_voxels_are_sums():
    cases, probabilities = make_two()
    curves = OperatingPoint(cases, probabilities, label=[1, 4]).curves.set_index(["method", "threshold"])
    whole = [c.replace(mask=None) for c in cases]
    unmasked = OperatingPoint(whole, probabilities, label=[1, 4]).curves.set_index(["method", "threshold"])
    for name, maps in probabilities.items():
        points = metrics.operating_points(maps, [c.label > 0 for c in cases], thresholds=THRESHOLDS).set_index("threshold")
        for threshold in (0.0, 0.3, 0.5, 0.95, 1.0):
            each = [measure(c, p, threshold) for c, p in zip(cases, maps)]
            row = curves.loc[name, threshold]
            assert row["dice"] == pytest.approx(np.mean([e["dice"] for e in each]))
            assert row["made_up"] == sum(e["made_up"] for e in each)
            assert unmasked.loc[(name, threshold), points.columns].to_dict() == pytest.approx(points.loc[threshold].to_dict())


def test_the_best_threshold_is_that_of_metrics():
    cases, probabilities = make_two()
    widget = OperatingPoint([c.replace(mask=None) for c in cases], probabilities, label=[1, 4])
    for name, maps in probabilities.items():
        assert widget.best[name] == metrics.best_threshold(maps, [c.label > 0 for c in cases], thresholds=THRESHOLDS)
    assert len(set(widget.best.values())) == 2


def test_levels_by_hand():
    thresholds = np.array([0.0, 0.25, 0.5])
    level = count_below(np.array([0.0, 0.1, 0.25, 0.3, 0.5, 0.9]), thresholds)
    assert level.dtype == np.uint8 and level.tolist() == [0, 1, 1, 2, 2, 3]
    scores = score_levels(np.array([0, 1, 2, 3]), np.array([4, 3, 2, 0]))
    assert scores["found"].tolist() == [6, 5, 3] and scores["made_up"].tolist() == [5, 2, 0]
    assert scores["specificity"].tolist() == pytest.approx([4 / 9, 7 / 9, 1])
    assert score_levels(np.array([0, 1]), np.array([0, 0]))["specificity"].tolist() == [1]  # no voxel outside, as in metrics


def test_thresholds_snap_merge_and_move_together(widget):
    assert widget.thresholds == {"sure": 0.5, "votes": 0.5} and widget.shared
    widget.thresholds = {"votes": 0.123}
    assert widget.thresholds == {"sure": 0.5, "votes": 0.12}
    table = widget.table
    assert table["threshold"].tolist() == [0.5, 0.12]
    assert table["dice"].tolist() == [measure(*(make()[0], make()[1][n], t))["dice"] for n, t in widget.thresholds.items()]
    widget.shared = False
    widget.shared = True
    assert widget.thresholds == {"sure": 0.5, "votes": 0.5}
    chosen = OperatingPoint(*make(), label=[1, 4], chosen={"votes": 0.3333})
    assert chosen.thresholds == {"sure": 0.5, "votes": 0.3333} and not chosen.shared
    chosen.thresholds = {"sure": 0.33333}
    assert chosen.thresholds["sure"] == 0.3333  # the shared slider stops there too


def test_case_and_slice():
    cases, probabilities = make_two()
    widget = OperatingPoint(cases, probabilities, label=4, plane="sagittal", index=7, channel="t1c")
    assert (widget.case, widget.index) == ("a", 7)
    widget.case = "b"
    assert widget.index == (cases[1].label == 4).sum((1, 2)).argmax() == 11
    widget.index = 99
    assert widget.index == 19
    assert [c["title"] for c in widget._scene["cases"]] == ["a", "b"]
    twins = OperatingPoint([cases[0], cases[0]], {"p": [probabilities["sure"][0]] * 2})
    assert [c["title"] for c in twins._scene["cases"]] == ["a", "a 2"]


@pytest.mark.parametrize(
    ["change", "message"],
    [
        (lambda c, p: (c.replace(label=None), p), "ball has no label"),
        (lambda c, p: (c, p, 2), r"ball has no voxel of label \[2\]; it has \[0, 1, 4\]"),
        (lambda c, p: (c, {}), "one to six methods"),
        (lambda c, p: (c, p["sure"]), "one to six methods"),
        (lambda c, p: ([], p), "there is no case"),
        (lambda c, p: (c, {3: p["sure"]}), "a method is called 3; expected a text"),
        (lambda c, p: (c, {" ": p["sure"]}), "a method is called ' '"),
        (
            lambda c, p: (c, {"a": p["sure"][1:]}),
            r"'a' has probabilities of shape \(19, 24, 16\) for ball; expected \(20, 24, 16\)",
        ),
        (lambda c, p: (c, {"a": np.stack([p["sure"]] * 2)}), r"such as probabilities\[1\]"),
        (lambda c, p: (c, {"a": np.where(c.label > 0, np.nan, 0)}), "NaN or outside 0 to 1 for ball"),
        (lambda c, p: (c, {"a": 5 * p["sure"]}), "take the softmax of logits first"),
        (lambda c, p: (c, {"a": p["sure"] - 0.5}), "outside 0 to 1"),
        (lambda c, p: (c, {"a": p["sure"] + 0j}), "the probabilities of 'a' are complex64; expected real numbers"),
        (lambda c, p: ([c, c], {"a": [p["sure"]]}), "'a' has probabilities of 1 cases; expected a list of 2"),
    ],
)
def test_bad_input(change, message):
    case, probabilities, *label = change(*make())
    with pytest.raises(ValueError, match=message):
        OperatingPoint(case, probabilities, **({"label": label[0]} if label else {}))


@pytest.mark.parametrize(
    ["options", "message"],
    [
        ({"chosen": {"tree": 0.5}}, "there is no method 'tree'; there are 'sure', 'votes'"),
        ({"chosen": {"sure": 1.5}}, "the threshold of 'sure' is 1.5; expected a number from 0 to 1"),
        ({"chosen": {"sure": "half"}}, "the threshold of 'sure' is 'half'"),
        ({"plane": "oblique"}, "oblique"),
        ({"channel": "t2"}, "ball has no channel 't2'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        OperatingPoint(*make(), **options)


@pytest.mark.parametrize(
    ["name", "value", "message"],
    [
        ("thresholds", {"tree": 0.5}, "no method 'tree'"),
        ("thresholds", {"sure": float("nan")}, "'sure' is nan"),
        ("case", "x", "there is no case 'x'; there are 'ball'"),
    ],
)
def test_bad_state_is_refused(widget, name, value, message):
    before = getattr(widget, name)
    with pytest.raises(ValueError, match=message):
        setattr(widget, name, value)
    assert getattr(widget, name) == before


def test_static_forms(widget, tmp_path):
    data, metadata = widget._repr_mimebundle_()
    alt = metadata["image/png"]["alt"]
    score = 100 * measure(make()[0], make()[1]["sure"], 0.5)["dice"]
    assert f"sure above 0.5: Dice {score:.1f} %" in alt and f"Axial slice {widget.index} of ball" in alt
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))))]
    for change in ({"thresholds": {"sure": 0.05}}, {"curve": "ROC"}, {"index": widget.index + 2}):
        for name, value in change.items():
            setattr(widget, name, value)
        pictures.append(np.asarray(Image.open(io.BytesIO(widget.snapshot()))))
        assert (pictures[-1] != pictures[-2]).any()
    case, probabilities = make()
    many = OperatingPoint(case, {f"p{i}": probabilities["sure"] ** i for i in range(1, 6)}, label=[1, 4])._draw()
    assert [axes.get_title().partition(" ")[0] for axes in many.axes if axes.get_title()] == ["p1", "p2", "p3", "p4", "p5"]
    nasty = "</script><b>"
    page = OperatingPoint(case.replace(name=nasty), {nasty: probabilities["sure"]}, chosen={nasty: 0.3})
    text = page.to_html(tmp_path / "o.html")
    assert nasty not in text and not re.search(r"(src|href)=|https?://", text)
    assert json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])["_scene"]["methods"] == [nasty]


def test_the_state_is_a_byte_a_voxel_at_most():
    """Image, truth and a level for each method; the scores at the thresholds do not grow with the volume."""
    cases, probabilities = make_two()
    widget = OperatingPoint(cases, probabilities, label=[1, 4])
    voxels = sum(np.prod(c["shape"]) for c in widget._scene["cases"])
    assert voxels < sum(c.label.size for c in cases)  # the box leaves out what does not count
    assert sum(len(v) for case in widget._volumes for v in case) <= 4 * voxels * 1.01 + 200
    assert len(json.dumps(widget._scene)) < 20_000 * len(probabilities)
