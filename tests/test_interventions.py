"""Interventions of the feature explorer without a browser: against the network's own output, and against formulas of their own."""

from __future__ import annotations

import base64
import json
import re
import time
import zlib

import numpy as np
import pytest
import torch
import traitlets
from torch import nn

from medseg_lite import attribution, features, inference, metrics, models, paths, phantoms, transforms
from medseg_lite.volume import Case
from medseg_lite.widgets import FeatureExplorer
from medseg_lite.widgets import _interventions as module


def make_case(shape=(24, 27, 18), mask=True) -> Case:
    d, h, w = np.indices(shape)
    ball = ((d - 9) ** 2 + (h - 15) ** 2 + (w - 8) ** 2 < 40).astype(np.uint8)
    label = ball + 3 * ((d - 9) ** 2 + (h - 15) ** 2 + (w - 8) ** 2 < 12).astype(np.uint8)
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32) + label
    inside = ((d - 12) / 11) ** 2 + ((h - 13) / 12) ** 2 + ((w - 9) / 8) ** 2 < 1
    return Case(
        image=image,
        channels=("flair", "t1c"),
        name="ball",
        label=label,
        mask=inside if mask else None,
        info={"classes": {1: "shell", 4: "core"}},
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.deepmedic(in_channels=2, classes=5, width=0.2).eval()


@pytest.fixture
def explorer(model):
    return FeatureExplorer(model, make_case())


def asked(explorer, **content):
    """What the browser gets when it asks."""
    found = []
    explorer.send = lambda content, buffers: found.append((content, buffers))
    explorer._on_message(explorer, content, [])
    (answer,) = found
    json.dumps(answer[0], allow_nan=False)
    return answer


class Padded(nn.Module):
    """A module of nobody's, whose convolutions pad, with a shortcut and an operation in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(2, 6, 3, padding=1)
        self.second = nn.Conv3d(6, 6, 3, padding=1)
        self.last = nn.Conv3d(6, 5, 1)

    def forward(self, x):
        x = self.first(x).relu_()
        y = self.second(x)
        y += x
        return self.last(y)


# ----------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("layer", ["normal.0", "low.3", "hidden.1"])
def test_a_silenced_map_gives_the_networks_own_output_with_it_zeroed(explorer, model, layer):
    """The weights that read the map are set to zero, by hand, and the whole case is predicted."""
    reader = {"normal.0": "normal.1.conv", "low.3": "low.4.conv", "hidden.1": "classifier"}[layer]
    explorer.silence(1, layer=layer)
    for plane, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        explorer.plane = plane
        found = explorer.prediction
        with torch.no_grad():
            weight = model.get_submodule(reader).weight
            kept = weight[:, 1].clone()
            weight[:, 1] = 0
            wanted = inference.predict(model, explorer._case, progress=False)[explorer._box].take(
                [explorer.position[axis] - explorer._box[axis].start], axis
            )
            weight[:, 1] = kept
        assert found.shape == wanted.shape and (found == wanted).all(), plane
        assert (found != explorer._predict([])[0]).any(), "the network listens to this map"


def test_several_maps_are_scaled_at_once(model, explorer):
    """Logits with two channels scaled, against the same with the weights behind them scaled."""
    case = make_case()
    with attribution.scaled(model, "normal.7", {0: 0.5, 3: 2.0}), attribution.scaled(model, "low.7", {2: 0.0}):
        found = inference.predict(model, case, output="logits", progress=False)
    count = features.list_layers(model)["normal.7"].channels
    with torch.no_grad():
        weight = model.hidden[0].conv.weight
        for channel, factor in ((0, 0.5), (3, 2.0), (count + 2, 0.0)):
            weight[:, channel] *= factor
    np.testing.assert_allclose(found, inference.predict(model, case, output="logits", progress=False), atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules()) and "for_inference" not in vars(model)


def test_effect_is_dice_in_the_slice(explorer, model):
    explorer.silence(0, layer="hidden.0")
    explorer.silence(2, layer="hidden.0", factor=1.75)
    with attribution.scaled(model, "hidden.0", {0: 0, 2: 1.75}):
        changed = inference.predict(model, explorer._case, progress=False)
    here = np.s_[:, :, explorer.position[2]]
    table, whole = explorer.effect, inference.predict(model, explorer._case, progress=False)
    assert list(table.index) == ["shell", "core"]
    for k, name in ((1, "shell"), (4, "core")):
        truth = explorer._case.label[here] == k
        assert table.loc[name, "whole"] == metrics.dice(whole[here] == k, truth)
        assert table.loc[name, "changed"] == metrics.dice(changed[here] == k, truth)
    np.testing.assert_allclose(table["change"], table["changed"] - table["whole"])
    explorer.restore()
    assert explorer.changes == [] and (explorer.effect["change"] == 0).all()


@pytest.mark.parametrize("make", [Padded, lambda: models.Adapter(Padded(), in_channels=2, classes=5, halo=2)])
def test_networks_that_pad(make):
    torch.manual_seed(0)
    model, case = make(), make_case(mask=False)
    explorer = FeatureExplorer(model, case)
    layer = next(name for name in explorer._infos[0] if name.endswith("second"))
    explorer.silence(3, layer=layer)
    plain = model if isinstance(model, Padded) else model.module
    with torch.no_grad():
        plain.second.weight[3] = 0
        plain.second.bias[3] = 0
        wanted = plain(torch.tensor(case.image[None]))[0].argmax(0).numpy()
    with torch.no_grad():
        plain.second.weight[3] = torch.randn(6, 3, 3, 3)  # silenced, it does not matter
    assert (explorer.prediction == wanted[:, :, [explorer.position[2]]]).all()


def test_slices_outside_the_mask_are_background(explorer):
    explorer.silence(0)
    explorer.position = (0, 0, explorer._box[2].start)
    assert not explorer.prediction.any() and explorer.effect.isna().all(axis=None)


def test_without_a_label_there_is_a_prediction_but_no_dice(model):
    explorer = FeatureExplorer(model, make_case().replace(label=None))
    explorer.silence(0)
    assert explorer.effect.empty and explorer.prediction.shape[2] == 1
    assert explorer._scene["predicted"][3][:2] == (4, "core")


def test_training_makes_predictions_and_paths_anew(explorer, model):
    explorer.silence(1)
    before, path = explorer.prediction, explorer.fed_by(0, layer="normal.1")
    with torch.no_grad():
        model.classifier.bias[2] += 50
        model.normal[1].conv.weight.mul_(2)
    assert (before != 2).any() and (explorer.prediction[explorer._case.mask[explorer._box][:, :, [7]]] == 2).all()
    assert explorer.fed_by(0, layer="normal.1")[0][2] == pytest.approx(2 * path[0][2])


def test_a_slice_takes_less_than_half_a_second_on_two_cores():
    """The notebook's network. Seconds of computation are halved, because two cores share them; the machine may be busy."""
    network = models.load(paths.shipped("checkpoints", "deepmedic_phantoms.safetensors"))
    explorer = FeatureExplorer(network, transforms.standardise(phantoms.brain(101, site="C")), layer="normal.1")
    _ = explorer.prediction  # memory is measured once
    taken = []
    for channel in range(3):
        explorer.changes = [["normal.0", channel, 0.0]]  # the first layer: everything is computed again
        start = time.process_time()
        _ = explorer.prediction
        taken.append((time.process_time() - start) / 2)
    assert min(taken) < 0.5, taken


# ------------------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize(
    ["changes", "message"],
    [
        ([["middle", 0, 0]], "no layer 'middle'"),
        ([["normal.0", 99, 0]], r"no channel 99 in normal.0; there are 0 to 5"),
        ([["normal.0", -1, 0]], "no channel -1"),
        ([["normal.0", 0, 2.5]], "factor is 2.5; expected a number from 0 to 2"),
        ([["normal.0", 0, float("nan")]], "factor is nan"),
    ],
)
def test_bad_changes_are_refused(explorer, changes, message):
    explorer.silence(1)
    with pytest.raises(traitlets.TraitError, match=message):
        explorer.changes = changes
    assert explorer.changes == [["normal.0", 1, 0.0]]


def test_changes_are_sorted_and_the_last_counts(explorer):
    explorer.changes = [
        ["normal.1", 2, 0.5],
        ["hidden.0", 10, 0],
        ["hidden.0", 9, 2],
        ["normal.1", 2, 0.1 + 0.2],
        ["low.0", 0, 1],
    ]
    assert explorer.changes == [["hidden.0", 9, 2.0], ["hidden.0", 10, 0.0], ["normal.1", 2, 0.3]]
    explorer.silence(2, layer="normal.1", factor=1)
    assert len(explorer.changes) == 2


def test_the_browser_gets_what_python_computes(explorer):
    explorer.changes = [["normal.0", 1, 0.0], ["normal.0", 2, 0.25]]
    content, (labels,) = asked(explorer, predict="changes")
    assert content["answer"] == "0/axial/7/normal.0:1:0 normal.0:2:0.25"
    assert content["dice"] == pytest.approx(explorer.effect["changed"].to_dict())
    assert (unpacked(labels).reshape(explorer.prediction.shape) == explorer.prediction).all()
    content, (labels,) = asked(explorer, predict="whole")
    assert content["answer"] == "0/axial/7/" and (unpacked(labels) == explorer._predict([])[0].reshape(-1)).all()
    explorer.layer, explorer.channel = "normal.1", 3
    content, _ = asked(explorer, path=True)
    assert content == {"answer": "0/normal.1:3", "from": explorer.fed_by(3)}


def unpacked(data: bytes) -> np.ndarray:
    return np.frombuffer(zlib.decompress(data, wbits=31), np.uint8)


# ------------------------------------------------------------------------------------------------------------- path


def test_the_path_is_the_kernels_norm_times_the_deviation(explorer, model):
    explorer.layer = "normal.2"
    kernel = model.normal[3].conv.weight.detach()
    strength = kernel[2].flatten(1).norm(dim=1).numpy() * explorer.table["deviation"].to_numpy()
    found = explorer.fed_by(2, layer="normal.3")
    order = np.argsort(-strength)[:3]
    assert [(name, c) for name, c, _ in found] == [("normal.2", int(c)) for c in order]
    np.testing.assert_allclose([s for *_, s in found], strength[order], rtol=1e-3)


def test_paths_cross_joined_pathways_and_reach_the_input(explorer, model):
    counts = [features.list_layers(model)[name].channels for name in ("normal.7", "low.7")]
    _, sources = module.find_sources(model, "hidden.0")
    assert sources == [(j, "normal.7", j) for j in range(counts[0])] + [(counts[0] + j, "low.7", j) for j in range(counts[1])]
    for layer in ("normal.0", "low.0"):
        assert {(name, c) for name, c, _ in explorer.fed_by(0, layer=layer)} == {("", 0), ("", 1)}
    inside = explorer._case.mask[explorer._box]
    norms = model.normal[0].conv.weight.detach()[0].flatten(1).norm(dim=1).numpy()
    spread = explorer._case.image[(slice(None), *explorer._box)][:, inside].std(1)
    found = {c: s for _, c, s in explorer.fed_by(0, layer="normal.0")}
    np.testing.assert_allclose([found[0], found[1]], norms * spread, rtol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_paths_through_shortcuts_and_decoders():
    torch.manual_seed(0)
    _, sources = module.find_sources(Padded(), "last")
    assert sorted(sources) == sorted([(j, name, j) for j in range(6) for name in ("first", "second")])
    assert module.find_sources(Padded(), "")[1] == [], "the network itself is more than one convolution"
    unet = models.kayalibay_unet3d(in_channels=2, classes=3, width=0.25)
    assert all(module.find_sources(unet, name)[1] for name in features.list_layers(unet))


# ------------------------------------------------------------------------------------------------------------- twin


def test_the_twin_is_the_builders_network_with_fresh_weights(explorer, model):
    torch.manual_seed(0)
    fresh = models.deepmedic(in_channels=2, classes=5, width=0.2)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        model.normal[0].conv.weight.mul_(3)
    explorer.untrained = True
    plain = features.capture(fresh, explorer._case, "normal.0", region=explorer._box, progress=False)["normal.0"]
    assert (explorer.maps().data == plain.data).all() and (explorer.maps(panel=0).data != plain.data).any()
    assert (torch.random.get_rng_state() == state).all()
    assert explorer.table["mean"].to_numpy() == pytest.approx(
        plain.data[:, plain.sampled(explorer._case.mask)].astype(float).mean(1), abs=1e-3
    )
    explorer.silence(0)
    with attribution.ablate(fresh, "normal.0", 0):
        wanted = inference.predict(fresh, explorer._case, progress=False)[explorer._box][
            :, :, [explorer.position[2] - explorer._box[2].start]
        ]
    assert (explorer.prediction == wanted).all()
    about, _ = asked(explorer, want="2/normal.0")
    assert about["key"] == "2/normal.0"
    explorer.untrained = False
    assert (explorer.maps().data == explorer.maps(panel=0).data).all()


def test_the_twin_of_a_module_without_a_builder():
    torch.manual_seed(5)
    model = Padded()
    first, second = (module.untrained_twin(model).state_dict() for _ in range(2))
    for name, value in model.state_dict().items():
        assert first[name].shape == value.shape and (first[name] == second[name]).all() and (first[name] != value).any()
    explorer = FeatureExplorer(model, make_case())
    explorer.untrained = True
    assert explorer._scene["twin"] and explorer.maps().data.shape[0] == 6


def test_no_twin_where_it_cannot_be_had():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 3, 3, padding=1)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.gain * self.conv(x)

    explorer = FeatureExplorer(Own(), make_case())
    assert explorer._scene["twin"] is False
    with pytest.raises(traitlets.TraitError, match="Own has no builder"):
        explorer.untrained = True
    explorer.send = lambda *_: pytest.fail("answered")
    explorer._on_message(explorer, {"want": "2/conv"}, [])


# ------------------------------------------------------------------------------------------------------------- page


def state(text: str) -> dict:
    return json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])


def test_pages_hold_each_map_silenced(explorer, model):
    explorer.layer = "normal.5"
    text = explorer.to_html()
    answers, count = state(text)["_answers"], explorer._infos[0]["normal.5"].channels
    assert len(text) < 5e6 and len(answers) == 2 * count + 1
    for channel in (0, count - 1):
        explorer.changes = [["normal.5", channel, 0]]
        stored = answers[f"0/axial/7/normal.5:{channel}:0"]
        with attribution.ablate(model, "normal.5", channel):
            wanted = inference.predict(model, explorer._case, progress=False)[explorer._box][
                :, :, explorer.position[2] - explorer._box[2].start
            ]
        assert (unpacked(base64.b64decode(stored["labels"]["base64"])) == wanted.reshape(-1)).all()
        assert stored["dice"] == pytest.approx(explorer.effect["changed"].to_dict())
        assert [tuple(one) for one in answers[f"0/normal.5:{channel}"]["from"]] == explorer.fed_by(channel)
    assert not any("forward" in vars(m) for m in model.modules())


def test_pages_of_layers_inside_layers():
    """The module around a silenced layer has the same input every time; it must not give the same output."""
    torch.manual_seed(0)
    model, case = nn.Sequential(nn.Conv3d(2, 4, 1), nn.Sequential(nn.Conv3d(4, 4, 1), nn.Conv3d(4, 5, 1))), make_case()
    explorer = FeatureExplorer(model, case, layers=["", "0", "1", "1.0", "1.1"], layer="1.0")
    answers = state(explorer.to_html())["_answers"]
    for channel in range(4):
        with attribution.ablate(model, "1.0", channel):
            labels = model(torch.tensor(case.image[None]))[0].argmax(0).numpy() * case.mask
        stored = answers[f"0/axial/7/1.0:{channel}:0"]["labels"]["base64"]
        assert (unpacked(base64.b64decode(stored)) == labels[explorer._box][:, :, 7 - explorer._box[2].start].reshape(-1)).all()


def test_pages_without_room_hold_no_predictions(explorer):
    answers = state(explorer.to_html(megabytes=0.02))["_answers"]
    assert answers and all("labels" not in one for one in answers.values())


def test_layers_that_remember_give_the_same_output():
    torch.manual_seed(0)
    model, x = Padded(), torch.randn(1, 2, 9, 9, 9)
    wanted = model(x), model(x + 1)
    with module.remembering(model, ["first", "second"], 1e9):
        assert [torch.equal(model(v), w) for v, w in ((x, wanted[0]), (x, wanted[0]), (x + 1, wanted[1]), (x, wanted[0]))] == [
            True
        ] * 4
    with module.remembering(model, ["first", "second"], 0):
        assert torch.equal(model(x), wanted[0]) and torch.equal(model(x + 1), wanted[1])
