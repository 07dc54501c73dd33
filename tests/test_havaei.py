from __future__ import annotations

import pytest
import torch
from network_table import CASCADES, HAVAEI, by_name, patch
from torch import nn
from torch.nn import functional as F

from medseg_lite import models
from medseg_lite.features import measured_receptive_field, receptive_field_recursion
from medseg_lite.models.havaei import WideConv2d


def by_hand(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A valid convolution followed by maxout, unit by unit."""
    y = F.conv2d(x, conv.weight, conv.bias)
    units = conv.out_channels // 2
    return torch.stack([torch.stack([y[:, u], y[:, units + u]]).amax(0) for u in range(units)], dim=1)


def features_by_hand(model: nn.Module, x: torch.Tensor, probabilities: torch.Tensor | None = None) -> torch.Tensor:
    """Both pathways of a two-pathway network, as the table of layers says."""
    detail = F.max_pool2d(by_hand(model.local1[0], x), 4, stride=1)
    if model.joins == "local":
        detail = torch.cat([detail, probabilities], 1)
    detail = F.max_pool2d(by_hand(model.local2[0], detail), 2, stride=1)
    return torch.cat([detail, by_hand(model.global1[0], x)], 1)


def test_two_pathways_by_hand(stir):
    model = stir(models.two_path_cnn())
    x = torch.randn(2, 4, 33, 33)
    assert model.local1(x).shape == (2, 64, 24, 24) and model.local2(model.local1(x)).shape == (2, 64, 21, 21)
    assert model.global1(x).shape == (2, 160, 21, 21)
    expected = F.linear(features_by_hand(model, x).flatten(1), model.output.weight.flatten(1), model.output.bias)
    torch.testing.assert_close(model(x).flatten(1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers, field", [([7, 4], 10), ([7, 4, 3, 2], 13), ([13], 13), ([7, 4, 3, 2, 21], 33)])
def test_fields_of_the_pathways(layers, field):
    assert receptive_field_recursion(layers)[-1] == field
    model = models.two_path_cnn(width=0.1)
    part = {10: "local1", 13: "local2" if len(layers) > 1 else "global1", 33: "output"}[field]
    assert measured_receptive_field(model, layer=part).side == (field, field)


@pytest.mark.parametrize(
    "name, sides, joined",
    [("input_cascade_cnn", (65, 33), 9), ("local_cascade_cnn", (56, 24), 69), ("mf_cascade_cnn", (53, 21), 229)],
)
def test_where_the_first_network_enters(name, sides, joined, stir):
    """Sizes as in the paper: the first network's input and output, and the channels where they are joined."""
    model = stir(getattr(models, name)())
    second, (whole, map_side) = model.second, sides
    side = 2 * model.margin + 1
    x = torch.randn(1, 4, side, side)
    maps = model.first(x[..., :whole, :whole]).softmax(1)
    assert maps.shape == (1, 5, map_side, map_side) and whole in (side, side - 1)
    entry = {"input": second.local1[0], "local": second.local2[0], "output": second.output}[second.joins]
    assert entry.in_channels == joined
    rim = model.margin - 16
    inner = x[..., rim : rim + 33, rim : rim + 33]
    if second.joins == "input":
        inner = torch.cat([inner, maps], 1)
    features = features_by_hand(second, inner, maps)
    if second.joins == "output":
        features = torch.cat([features, maps], 1)
    torch.testing.assert_close(model(x), F.conv2d(features, second.output.weight, second.output.bias), rtol=1e-4, atol=1e-5)


@by_name(CASCADES)
def test_the_first_network_is_copied_frozen_and_saved(network, tmp_path, stir):
    first = stir(models.two_path_cnn(in_channels=2, classes=3, width=0.1))
    model = network(in_channels=2, classes=3, first=first).train()
    with torch.no_grad():
        first.output.bias += 1
    assert not torch.equal(model.first.output.bias, first.output.bias)
    assert model.second.training and not model.first.training and not any(p.requires_grad for p in model.first.parameters())
    again = models.load(models.save(tmp_path / "net.safetensors", model, {}))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in again.first.parameters()) and all(
        p.requires_grad for p in again.second.parameters()
    )
    assert model.output is model.second.output


@by_name(CASCADES)
def test_cascades_refuse_another_first_network(network):
    for first in (models.two_path_cnn(classes=3, width=0.1), models.local_path_cnn(width=0.1), nn.Conv2d(4, 5, 3)):
        with pytest.raises(ValueError, match=r"first is .* this cascade needs .*'builder': 'two_path_cnn'.*'width': 0.1"):
            network(first=first)


@pytest.mark.parametrize("shape", [(21, 21), (27, 30), (28, 21), (40, 33)])
def test_wide_convolution_is_a_convolution(shape):
    """Both ways of working it out, forwards and backwards."""
    torch.manual_seed(0)
    conv = WideConv2d(6, 3, 21)
    x = torch.randn(2, 6, *shape, requires_grad=True)
    expected = F.conv2d(x, conv.weight, conv.bias)
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
    mix = torch.randn_like(expected)
    inputs = (x, *conv.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((conv(x) * mix).sum(), inputs), torch.autograd.grad((expected * mix).sum(), inputs)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@by_name(HAVAEI)
def test_a_whole_slice_equals_its_patches(network, stir):
    model = stir(network(in_channels=2, classes=3))
    m, shape = model.margin, (11, 9)
    x = torch.randn(2, *(n + 2 * m for n in shape))
    patches = x.unfold(1, 2 * m + 1, 1).unfold(2, 2 * m + 1, 1).permute(1, 2, 0, 3, 4)  # (11, 9, C, 2m + 1, 2m + 1)
    with torch.no_grad():
        dense = model(x[None])[0]
        single = torch.stack([model(row)[..., 0, 0] for row in patches]).permute(2, 0, 1)
    torch.testing.assert_close(dense, single, rtol=0, atol=1e-4)
    assert single.std() > 1e-3


def test_unknown_start():
    with pytest.raises(ValueError, match="init='glorot'; expected uniform or he"):
        models.mf_cascade_cnn(init="glorot")


@by_name(HAVAEI)
def test_he_start_calls_all_classes_equally_likely(network):
    model = network(init="he").eval()
    assert not model(patch(model)).any() and model.config["init"] == "he"
    assert not model.output.weight.any()
