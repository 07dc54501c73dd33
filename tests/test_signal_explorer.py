"""Signal, gradient and first update: numbers against a direct computation, traits, errors, static forms, the size of the state."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from medseg_lite import losses, models, vitals
from medseg_lite.optimizers import RMSpropNesterov
from medseg_lite.widgets import SignalExplorer
from medseg_lite.widgets.signal_explorer import DEPTHS, EPSILONS, SLOPES, STARTS


def make(side: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    segments = torch.randn(2, 3, *[side + 24] * 3, generator=generator)
    return segments, torch.randint(0, 2, (2, *[side] * 3), generator=generator)


@pytest.fixture(scope="module")
def widget() -> SignalExplorer:
    return SignalExplorer(*make())


@pytest.fixture(autouse=True)
def first_setting(widget):
    widget.start, widget.slope, widget.depth, widget.normalise, widget.epsilon = "N(0, 0.01)", 0.01, 8, False, 1e-4
    widget.layer = 1


def rms(tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("epsilon", [1e-4, 1e-16])
@pytest.mark.parametrize(("std", "start"), [(0.01 * 5**0.5, "N(0, 0.01)"), (None, "He")])
@pytest.mark.parametrize(("depth", "slope", "normalise"), [(4, 1.0, False), (8, 0.01, False), (8, 0.0, True)])
def test_numbers_are_those_of_a_training_step(widget, start, std, depth, slope, normalise, epsilon):
    """The layers one by one, and one step of the optimiser on all weights."""
    segments, truth = make()
    torch.manual_seed(0)
    model = models.deep(in_channels=3, classes=2, widths=[8] * depth, batch_norm=normalise)
    for conv in [block.conv for block in model.normal] + [model.classifier]:
        torch.nn.init.normal_(conv.weight, std=std or (2 / conv.weight[0].numel()) ** 0.5)
    before, y, signals = [block.conv.weight.detach().clone() for block in model.normal], segments, []
    cut = 12 - depth
    y = y[..., cut : cut + 2 + 2 * depth, cut : cut + 2 + 2 * depth, cut : cut + 2 + 2 * depth]
    for block in model.normal:
        z = F.conv3d(y, block.conv.weight, block.conv.bias)
        z.retain_grad()
        signals.append(z)
        if normalise:
            mean, var = z.mean((0, 2, 3, 4), keepdim=True), z.var((0, 2, 3, 4), keepdim=True, unbiased=False)
            z = (z - mean) / (var + 1e-5).sqrt()
        y = z.clamp(min=0) + slope * z.clamp(max=0)
    losses.cross_entropy(model.classifier(y), truth).backward()
    gradients = [block.conv.weight.grad.clone() for block in model.normal]
    RMSpropNesterov(model.parameters(), lr=1e-3, eps=epsilon).step()

    widget.start, widget.depth, widget.slope, widget.normalise, widget.epsilon = start, depth, slope, normalise, epsilon
    table = widget.table
    assert list(table.index) == list(range(1, depth + 1))
    changed = [block.conv.weight - old for block, old in zip(model.normal, before)]
    expected = {"signal": signals, "gradient": [z.grad for z in signals], "kernel_gradient": gradients, "update": changed}
    for name, tensors in expected.items():
        # A weight of .02 that changes by 1e-9 does not show it in 32 bits.
        known = [n for n, t in enumerate(tensors) if name != "update" or rms(t) > 1e-6]
        assert table[name].to_numpy()[known] == pytest.approx([rms(tensors[n]) for n in known], rel=0.01), name


def test_a_network_of_two_pathways_has_signals_too():
    torch.manual_seed(0)
    model = models.deepmedic(in_channels=2, classes=3, width=0.1, dropout=0.0)
    found = vitals.signals(model, torch.randn(2, 2, 57, 57, 57), torch.zeros(2, 9, 9, 9, dtype=torch.long))
    assert {name: len(tensors) for name, tensors in found.items()} == {"signal": 19, "gradient": 19, "kernel_gradient": 19}
    assert found["signal"][-1].shape == found["gradient"][-1].shape == (2, 3, 9, 9, 9)
    assert all(not conv._forward_hooks for conv in model.modules())


def test_small_weights_lose_the_signal_and_epsilon_decides_the_update(widget):
    lost = widget.table
    assert lost["signal"].iloc[-1] < 1e-4 * lost["signal"].iloc[0] and lost["update"].max() < 1e-5
    widget.epsilon = 1e-24
    full = widget.table["update"]
    assert full.min() > 1e-3 and widget.table.drop(columns="update").equals(lost.drop(columns="update"))
    widget.start, widget.epsilon = "He", 1e-4
    assert widget.table["signal"].iloc[-1] > 0.1 * widget.table["signal"].iloc[0] and widget.table["update"].min() > 1e-5


def test_every_setting_is_there_and_finite(widget):
    states = widget._scene["states"]
    assert len(states) == len(STARTS) * len(SLOPES) * len(DEPTHS) * 2
    for state in states.values():
        assert len(state["update"]) == len(EPSILONS)
        assert np.isfinite([*state["signal"], *state["gradient"], *np.ravel(state["update"])]).all()
    assert len(json.dumps(widget._scene)) < 150_000


def test_the_reader_s_random_numbers_stay():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    SignalExplorer._compute(*make(), "He", 0.0, 4, False)
    assert torch.equal(torch.rand(1), expected)


def test_layer_stays_inside(widget):
    widget.layer = 99
    assert widget.layer == 8
    widget.depth = 4
    assert widget.layer == 4
    widget.layer = 0
    assert widget.layer == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("start", "zeros", r"start is 'zeros'; expected one of N\(0, 0.01\), Xavier"),
        ("slope", 0.3, "slope is 0.3; expected one of 0.0, 0.01"),
        ("depth", 5, "depth is 5; expected one of 4, 8, 12"),
        ("epsilon", float("nan"), "epsilon is nan"),
        ("normalise", "yes", "normalise is 'yes'; expected one of False, True"),
    ],
)
def test_bad_state_is_refused(widget, name, value, message):
    before = getattr(widget, name)
    with pytest.raises(ValueError, match=message):
        setattr(widget, name, value)
    assert getattr(widget, name) == before


@pytest.mark.parametrize("change", [lambda s, t: (s[..., 1:], t), lambda s, t: (s[0], t), lambda s, t: (s, t[0])])
def test_segments_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match="at least 24 voxels longer than m"):
        SignalExplorer(*change(*make()))


def test_static_forms(widget, tmp_path):
    data, metadata = widget._repr_mimebundle_()
    assert data["image/png"] and f"signal {widget.table.signal[1]:.2g} and" in metadata["image/png"]["alt"]
    pictures = [np.asarray(Image.open(io.BytesIO(widget.snapshot())))]
    for name, value in {"epsilon": 1e-16, "start": "He", "depth": 12}.items():
        setattr(widget, name, value)
        pictures.append(np.asarray(Image.open(io.BytesIO(widget.snapshot()))))
        assert (pictures[-1] != pictures[-2]).any()
    assert repr(widget) == "SignalExplorer(He, slope 0.01, 12 layers, no normalisation, epsilon 1e-16, layer 1)"
    text = widget.to_html(tmp_path / "s.html")
    assert not re.search(r"(src|href)=|https?://", text)
