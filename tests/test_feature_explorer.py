"""The feature explorer without a browser: its traits, what it sends, its static forms, its errors."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
import traitlets
from scipy.stats import mannwhitneyu

from medseg_lite import features, models
from medseg_lite.volume import Case
from medseg_lite.widgets import FeatureExplorer
from medseg_lite.widgets import _feature_numbers as numbers
from medseg_lite.widgets import feature_explorer as module


def make_case(shape=(24, 27, 18), channels=("flair", "t1c")) -> Case:
    d, h, w = np.indices(shape)
    ball = ((d - 9) ** 2 + (h - 15) ** 2 + (w - 8) ** 2 < 20).astype(np.uint8) * 4
    rng = np.random.default_rng(0)
    image = rng.normal(size=(len(channels), *shape)).astype(np.float32) + ball
    mask = ((d - 12) / 11) ** 2 + ((h - 13) / 12) ** 2 + ((w - 9) / 8) ** 2 < 1
    return Case(
        image=image,
        channels=channels,
        name="ball",
        label=ball,
        mask=mask,
        extra={"wm": (h / shape[1]).astype(np.float16)},
        info={"classes": {4: "core"}},
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.deepmedic(in_channels=2, classes=3, width=0.1).eval()


@pytest.fixture
def explorer(model):
    return FeatureExplorer(model, make_case())


def sent(explorer, key="0/normal.0"):
    """What the browser gets when it asks for a layer: numbers, and values decoded from their bytes."""
    found = []
    explorer.send = lambda content, buffers: found.append((content, buffers))
    explorer._on_message(explorer, {"want": key}, [])
    ((about, (data,)),) = found
    json.dumps(about, allow_nan=False)
    levels = np.frombuffer(zlib.decompress(data, wbits=31), np.uint8).reshape(about["shape"])
    low, step = (np.reshape(about[n], (-1, 1, 1, 1)) for n in ("low", "step"))
    return about, low + step * levels


def test_opens_with_the_first_layer_at_the_lesion(explorer):
    assert (explorer.layer, explorer.channel, explorer.compare_layer) == ("normal.0", 0, "")
    assert explorer.position == (8, 14, 7) and explorer.class_name == "core" and explorer.map_name == "wm"
    assert repr(explorer) == "FeatureExplorer('ball', 'normal.0', channel 0, at (8, 14, 7))"
    scene = explorer.get_state()["_scene"]
    low = next(layer for layer in scene["panels"][0]["layers"] if layer["name"] == "low.7")
    assert (low["channels"], low["stride"], low["side"]) == (5, [3, 3, 3], (49, 49, 49))
    json.dumps(scene, allow_nan=False)


@pytest.mark.parametrize("layer", ["normal.3", "low.7", "classifier"])
def test_what_is_sent_are_the_maps(explorer, model, layer):
    about, values = sent(explorer, f"0/{layer}")
    plain = features.capture(model, explorer._case, layer, region=explorer._box, progress=False)[layer]
    assert about["offset"] == plain.offset and about["stride"] == plain.stride
    data, inside = plain.data.astype(np.float32), plain.sampled(explorer._case.mask)
    both = [np.percentile(v.reshape(len(data), -1), (0.1, 99.9), axis=1) for v in (data, data[:, inside])]
    ends = np.stack([np.minimum(both[0][0], both[1][0]), np.maximum(both[0][1], both[1][1])]).reshape(2, -1, 1, 1, 1)
    step = np.reshape(about["step"], (-1, 1, 1, 1))
    assert (np.abs(values - np.clip(data, *ends)) <= 1.1 * step).all()
    np.testing.assert_allclose(about["mean"], data[:, inside].mean(1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(about["inactive"], (data[:, inside] <= 0).mean(1), atol=1e-4)
    assert sum(about["histogram"][0]) == inside.sum()


def test_selectivity_and_correlation_against_scipy(explorer):
    explorer.layer = "normal.2"
    table, maps = explorer.table, explorer.maps()
    inside = maps.sampled(explorer._case.mask)
    label, wm = (maps.sampled(v)[inside] for v in (explorer._case.label, explorer._case.extra["wm"]))
    for c, values in enumerate(maps.data[:, inside].astype(np.float32)):
        auc = mannwhitneyu(values[label == 4], values[label != 4]).statistic / ((label == 4).sum() * (label != 4).sum())
        assert table["selectivity: core"][c] == pytest.approx(2 * auc - 1, abs=0.02)
        assert table["correlation: wm"][c] == pytest.approx(np.corrcoef(values, wm)[0, 1], abs=2e-3)
    for sort, column in [("activity", "activity"), ("selectivity", "selectivity: core"), ("correlation", "correlation: wm")]:
        explorer.sort = sort
        ranked = table[column].abs().to_numpy()[list(explorer.order)]
        assert sorted(explorer.order) == list(range(4)) and (np.diff(ranked) <= 0).all()
    explorer.sort = "index"
    assert explorer.order == (0, 1, 2, 3)


def test_state_can_be_set_clamped_and_observed(explorer):
    seen = []
    explorer.observe(lambda change: seen.append(change["new"]), "position")
    explorer.position = np.array([10, -5, 99])
    assert seen == [(10, explorer._box[1].start, explorer._box[2].stop - 1)] and type(seen[0][0]) is int
    explorer.layer, explorer.channel = "hidden.1", 14
    explorer.layer = "low.0"
    assert explorer.channel == 2  # the last there is
    explorer.set_state({"opacity": 3, "channel": -4, "sort": "activity"})
    assert (explorer.opacity, explorer.channel, explorer.sort) == (1, 0, "activity")


@pytest.mark.parametrize(
    ["name", "value", "message"],
    [
        ("layer", "middle", "DeepMedic has no layer 'middle' here; there are normal.0, "),
        ("compare_layer", "low.1", "nothing to compare; create the explorer with compare="),
        ("position", (1, 2), "three whole voxel indices"),
        ("sequence", "t2", "ball has no channel 't2'; there are 'flair', 't1c'"),
        ("class_name", "oedema", "no voxel of class 'oedema'; there are 'core'"),
        ("map_name", "gm", "no map 'gm'; there are 'wm', 'flair', 't1c'"),
        ("opacity", float("nan"), "opacity is NaN"),
        ("sort", "colour", "sort"),
        ("plane", "oblique", "plane"),
    ],
)
def test_bad_state_is_refused_and_changes_nothing(explorer, name, value, message):
    before = getattr(explorer, name)
    with pytest.raises((ValueError, traitlets.TraitError), match=message):
        setattr(explorer, name, value)
    assert getattr(explorer, name) == before


def test_bad_input(model):
    case = make_case()
    with pytest.raises(ValueError, match=r"ball has 1 channels .* expects 2"):
        FeatureExplorer(model, case.select(["t1c"]))
    with pytest.raises(ValueError, match="no layer 'x'"):
        FeatureExplorer(model, case, layers="x")
    with pytest.raises(ValueError, match=r"map 'm' has shape \(2, 2\)"):
        FeatureExplorer(model, case, maps={"m": np.zeros((2, 2))})
    image = case.image.copy()
    image[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="ball, flair has 1 NaN"):
        FeatureExplorer(model, case.replace(image=image))


def test_messages_that_ask_for_nothing_there_is_are_ignored(explorer):
    explorer.send = lambda *_: pytest.fail("answered")
    for want in ("", "0/", "1/normal.0", "0/none", "9/normal.0", "-1/normal.0", 7, None):
        explorer._on_message(explorer, {"want": want}, [])
    explorer._on_message(explorer, {}, [])


def test_layers_are_computed_once_then_all_in_one_run(model, monkeypatch):
    runs = []
    capture = features.capture
    monkeypatch.setattr(features, "capture", lambda m, c, names, **o: runs.append(list(names)) or capture(m, c, names, **o))
    explorer = FeatureExplorer(model, make_case())
    explorer.maps()
    explorer.maps()
    assert runs == [["normal.0"]]
    explorer.maps("low.3")
    assert len(runs) == 2 and len(runs[1]) == 18
    for layer in explorer._infos[0]:
        explorer.maps(layer)
    assert len(runs) == 2
    tight = FeatureExplorer(model, make_case(), memory=1e5)
    for layer in tight._infos[0]:
        tight.maps(layer)
    assert len(tight._kept) < 19 and all(len(names) == 1 for names in runs[2:])


def test_a_model_changed_while_the_explorer_is_open(explorer, model):
    _, before = sent(explorer)
    with torch.no_grad():
        model.normal[0].conv.weight.mul_(2)
        model.normal[0].conv.weight.add_(0.3)
    about, after = sent(explorer)
    assert about["version"] == explorer._version == 1 and np.abs(after - before).max() > 0.1
    plain = features.capture(model, explorer._case, "normal.0", region=explorer._box, progress=False)["normal.0"]
    assert (explorer.maps().data == plain.data).all()
    explorer.refresh()
    assert explorer._version == 2 and not explorer._kept


def test_two_explorers_on_one_model_and_training_goes_on(model):
    first, second = FeatureExplorer(model.train(), make_case()), FeatureExplorer(model, make_case())
    assert (sent(first, "0/low.2")[1] == sent(second, "0/low.2")[1]).all()
    assert model.training and not any(m._forward_hooks for m in model.modules())
    first.layer, second.layer = "low.1", "low.2"
    assert (first.layer, second.layer) == ("low.1", "low.2")


def test_compare_layers_and_networks(model):
    case = make_case()
    pair = FeatureExplorer(model, case, layer="normal.7", compare="low.7")
    assert (pair.layer, pair.compare_layer) == ("normal.7", "low.7")
    pair.compare_channel = 99
    assert pair.compare_channel == 4 and "'low.7', channel 4" in repr(pair)
    assert sent(pair, "1/low.7")[0]["stride"] == (3, 3, 3)
    other = models.dm2d_seg(in_channels=2, classes=3, width=0.1)
    pair = FeatureExplorer(model, case, compare=other)
    about, values = sent(pair, "1/normal.0")
    plain = features.capture(other, case, "normal.0", region=pair._box, progress=False)["normal.0"].data
    assert about["key"] == "1/normal.0" and np.abs(np.median(values) - np.median(plain.astype(np.float32))) < 0.05


def test_a_large_layer_is_thinned(model, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 5000)
    explorer = FeatureExplorer(model, make_case())
    about, values = sent(explorer)
    assert values.size <= 5000 and about["every"] == about["stride"] and max(about["every"]) > 1
    assert explorer.bytes_sent < 6000


def test_quantisation_keeps_zero_and_extremes():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(4, 9, 9, 9)).astype(np.float16)
    data[1] = np.maximum(data[1], 0)
    data[2] = 0
    data[3] = 0
    data[3, 4, 4, 4] = 5  # a channel that fires once
    levels, low, step = numbers.quantise(data)
    back = low.reshape(-1, 1, 1, 1) + step.reshape(-1, 1, 1, 1) * levels
    assert (back[1][data[1] == 0] == 0).all() and np.abs(back[2]).max() < 1e-6
    assert back[3].max() == pytest.approx(5, rel=0.01) and np.abs(back[:2] - data[:2]).max() < 0.5
    assert numbers.is_signed(data[:1]) and not numbers.is_signed(data[1:2])


def test_dead_channels(model):
    with torch.no_grad():
        model.normal[1].conv.weight[0] = 0
        model.normal[1].norm.bias[0] = -1
    explorer = FeatureExplorer(model, make_case(), layer="normal.1")
    assert explorer.table["dead"].tolist() == [True, False, False] and explorer.table["inactive"][0] == 1


def test_receptive_field(explorer):
    explorer.layer, explorer.position = "normal.2", (9, 15, 8)
    assert explorer.receptive_field == np.s_[6:13, 12:19, 5:12]
    explorer.layer = "low.7"
    assert explorer.receptive_field == (slice(0, 24), slice(0, 27), slice(0, 18))


def test_snapshot_and_mimebundle(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"])[:4] == b"\x89PNG"
    assert "channel 0 of layer normal.0 over flair" in metadata["image/png"]["alt"]
    assert explorer._ipython_display_ is None
    before = explorer.snapshot()
    for name, value in [
        ("layer", "classifier"),
        ("position", (12, 12, 9)),
        ("plane", "sagittal"),
        ("sort", "activity"),
        ("scale", "layer"),
        ("colours", "sequential"),
    ]:
        setattr(explorer, name, value)
        after = explorer.snapshot()
        assert after != before, name
        before = after


def test_html_holds_the_layers_asked_for_and_escapes_names(model, tmp_path):
    nasty = "</script><script>alert(1)</script>"
    case = make_case(channels=(nasty, "t1c")).replace(name=nasty, info={"classes": {4: nasty}})
    text = FeatureExplorer(model, case).to_html(tmp_path / "f.html", layers=["low.2"])
    assert (tmp_path / "f.html").read_text(encoding="utf-8") == text
    assert nasty not in text and text.count("</script>") == 2
    assert not re.search(r"(src|href)=|https?://", text)
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert list(state["_maps"]) == ["0/normal.0", "0/low.2"] and state["sequence"] == nasty
    assert not any(key in state for key in ("_esm", "_css", "tabbable", "layout"))
    with pytest.raises(ValueError, match="no layer 'x'"):
        FeatureExplorer(model, case).to_html(layers="x")


def test_the_layer_shown_travels_with_the_state(explorer):
    """Nothing has to be asked for when the widget is shown: a kernel that runs the next cells could not answer."""
    assert explorer.get_state()["_maps"] == {}
    explorer.layer = "low.2"
    explorer._repr_mimebundle_()
    (key, layer), *others = explorer.get_state()["_maps"].items()
    assert (key, others) == ("0/low.2", []) and layer["about"]["shape"][0] == 4
    assert explorer.bytes_sent == len(layer["data"])
    explorer._repr_mimebundle_()
    assert explorer.bytes_sent == len(layer["data"])
    explorer.refresh()
    assert explorer._maps == {}


def test_pages_are_small(model):
    """Large layers lose voxels until the page is as small as wanted; small ones and all numbers stay as they are."""
    explorer = FeatureExplorer(model, make_case((48, 54, 36)).replace(mask=None), layer="normal.7")
    small, large = (explorer.to_html(layers=["low.2"], megabytes=size) for size in (0.5, 50))
    assert len(small) < 0.65e6 < len(large)  # the script and the styles come on top
    (thin, low), (full, same) = (
        json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])["_maps"].values() for text in (small, large)
    )
    assert low == same and full["about"]["every"] == [1, 1, 1]
    every = thin["about"]["every"]
    assert np.prod(every) > 1 and thin["about"]["stride"] == [float(k) for k in every]
    assert thin["about"]["selectivity"] == full["about"]["selectivity"]
    levels = [
        np.frombuffer(zlib.decompress(base64.b64decode(one["data"]["base64"]), wbits=31), np.uint8).reshape(
            one["about"]["shape"]
        )
        for one in (thin, full)
    ]
    assert (levels[0] == levels[1][:, :: every[0], :: every[1], :: every[2]]).all()


def test_the_picture_can_leave_out_what_lies_outside_the_mask(explorer):
    assert explorer.brain_only and not FeatureExplorer(explorer._models[0], explorer._case.replace(mask=None)).brain_only
    before = explorer.snapshot()
    explorer.brain_only = False
    assert explorer.snapshot() != before
