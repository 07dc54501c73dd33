"""One battery for all networks. A new network is one more row of NETWORKS."""

from __future__ import annotations

import copy
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from medseg_lite import attribution, inference, models
from medseg_lite.features import measured_receptive_field, receptive_field_recursion
from medseg_lite.models.drozdzal import Bottleneck, Pipeline, resample
from medseg_lite.models.havaei import WideConv2d
from medseg_lite.models.layers import ConvBlock, RollingBatchNorm, convolutions, init_normal, scaled
from medseg_lite.volume import padded_region


class Network(NamedTuple):
    name: str
    parameters: dict[tuple[int, int], int]  # (in_channels, classes): trainable scalars
    field: int  # receptive field in voxels along each axis
    init: str | float = "he"  # or the standard deviation of all kernels
    dropout: tuple[float, ...] = ()  # rates in the order of the layers
    slope: float = 0.01  # of PReLU at the start
    example: tuple[int, int] = (4, 5)  # whose count the builder's documentation states

    def __call__(self, *, width: float = 0.1, seed: int = 0, **options) -> nn.Module:
        torch.manual_seed(seed)
        return getattr(models, self.name)(width=width, **options)


HALF = (0.5, 0.5)  # inputs of the second hidden layer and of the classifier
NETWORKS = [
    Network("shallow", {(4, 5): 615_575, (5, 2): 619_172}, 17, init="normal"),
    Network("shallow_plus", {(4, 5): 615_735, (5, 2): 619_332}, 17),
    Network("deep", {(4, 5): 311_935, (5, 2): 312_592}, 17, init="normal"),
    Network("deep_plus", {(4, 5): 312_255, (5, 2): 312_912}, 17),
    Network("big_deep_plus", {(4, 5): 1_278_755, (5, 2): 1_279_922}, 17, dropout=HALF),
    Network("deepmedic", {(4, 5): 663_155, (5, 2): 664_322, (2, 5): 659_915}, 51, dropout=HALF),
    Network("dm2d_patch", {(4, 5): 248_435, (5, 2): 248_522}, 51, dropout=HALF),
    Network("dm2d_seg", {(4, 5): 248_435, (5, 2): 248_522}, 51, dropout=HALF),
    Network("wider2d_seg", {(4, 5): 911_165, (5, 2): 911_642}, 51, dropout=HALF),
    Network("deeper2d_seg", {(4, 5): 486_065, (5, 2): 486_152}, 99, dropout=HALF),
    Network("large2d_seg", {(4, 5): 875_043, (5, 2): 875_250}, 75, dropout=HALF),
]
DEEPMEDIC = list(NETWORKS)
TWO_SCALES = [n for n in DEEPMEDIC if n.field > 17]
FLAT = {"init": 0.005 / 3**0.5, "dropout": (0.5,)}  # U(-.005, .005); inputs of the output layer
CASCADES = [  # what is trained: the second network
    Network("input_cascade_cnn", {(4, 5): 1_111_397, (2, 5): 990_693}, 65, **FLAT),
    Network("local_cascade_cnn", {(4, 5): 815_397, (2, 5): 694_693}, 56, **FLAT),
    Network("mf_cascade_cnn", {(4, 5): 820_662, (2, 5): 699_958}, 53, **FLAT),
]
HAVAEI = [
    Network("two_path_cnn", {(4, 5): 809_637, (2, 5): 688_933}, 33, **FLAT),
    Network("local_path_cnn", {(4, 5): 240_197, (2, 5): 227_653}, 33, **FLAT),
    Network("global_path_cnn", {(4, 5): 569_445, (2, 5): 461_285}, 33, **FLAT),
    *CASCADES,
]
VALID = NETWORKS + HAVAEI  # networks of valid convolutions: dense output is that of the patches around each voxel
KAYALIBAY = [Network("kayalibay_unet3d", {(4, 5): 410_072, (1, 5): 409_424, (4, 2): 409_736}, 73, init="normal", slope=0.25)]
DROZDZAL = [
    Network("fcn_preprocessor", {(1, 1): 1_832_145}, 220, example=(1, 1)),
    Network("fc_resnet", {(1, 1): 11_042_273, (1, 2): 11_042_306}, 1152, example=(1, 1)),
    Network("fcn_fc_resnet", {(1, 1): 12_874_418}, 1371, example=(1, 1)),
    Network("unet2d", {(1, 2): 31_030_658}, 220, example=(1, 2)),
    Network("fcn8", {(3, 2): 134_271_430}, 468, dropout=HALF, example=(3, 2)),
]
MLYNARSKI = [
    Network("mlynarski_2d", {(4, 4): 31_277_800}, 266, example=(4, 4)),
    Network("mlynarski_3d", {(4, 4): 1_330_372}, 46, example=(4, 4)),
]
NETWORKS = VALID + KAYALIBAY + DROZDZAL + MLYNARSKI


def by_name(networks):
    return pytest.mark.parametrize("network", networks, ids=lambda n: n.name)


every_network = by_name(NETWORKS)


def patch(model: nn.Module, *, batch: int = 1, out: int | None = None, seed: int = 0) -> torch.Tensor:
    """Noise that the model turns into `out` voxels along each axis, by default the fewest it makes densely."""
    side = (model.multiple if out is None else out) + 2 * model.margin
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.in_channels, *(side,) * model.spatial_dims, generator=generator)


# ------------------------------------------------------------------------------------------------------ the battery


def test_the_table_is_complete():
    assert (
        {n.name for n in NETWORKS}
        == set(models.NETWORKS)
        == set(models.__all__)
        - {"DEEPMEDIC", "DROZDZAL", "HAVAEI", "KAYALIBAY", "MLYNARSKI", "NETWORKS", "load", "removable", "save", "without"}
    )
    for paper in ("DEEPMEDIC", "HAVAEI", "KAYALIBAY", "DROZDZAL", "MLYNARSKI"):
        assert {n.name for n in globals()[paper]} == set(getattr(models, paper))


@every_network
def test_parameter_count(network):
    for (channels, classes), expected in network.parameters.items():
        model = network(width=1, in_channels=channels, classes=classes)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert f"{network.parameters[network.example]:,} parameters" in getattr(models, network.name).__doc__


@every_network
def test_forward_and_backward(network):
    model = network(in_channels=3, classes=4).train()
    y = model(patch(model, batch=2))
    assert y.shape == (2, 4, *(model.multiple,) * model.spatial_dims)
    target = torch.randint(4, (2, *y.shape[2:]))
    nn.functional.cross_entropy(y, target).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("first.", "auxiliary.")):  # a cascade's first network; heads that only training uses
            assert parameter.grad is None
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} does not take part"


@every_network
def test_batch_of_one(network):
    model = network().train()
    assert model(patch(model, out=2 * model.multiple)).isfinite().all()
    model.eval()
    x = patch(model, batch=3)
    torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(3)]), model(x), rtol=1e-4, atol=1e-4)


@by_name(VALID)
def test_receptive_field_measured(network):
    model = network()
    field = measured_receptive_field(model)
    assert field.side == (network.field,) * model.spatial_dims
    odd = network.field % 2  # an even field has one voxel fewer on one side
    assert all(-a == network.field // 2 == b + 1 - odd for a, b in zip(field.first, field.last))
    assert model.margin <= network.field // 2  # no context is missing and at most a voxel of it is unused
    assert model.margin >= network.field // 2 - model.multiple // 2


@by_name(DEEPMEDIC)
def test_receptive_field_computed(network):
    model = network()
    kernels = [c.kernel_size[0] for c in convolutions(model.normal)]
    local = receptive_field_recursion(kernels)[-1]
    assert local == 2 * model.reach + 1 == measured_receptive_field(model, layer="normal").side[0]
    assert network.field == (3 * local if model.low_resolution else local)


@by_name([*VALID, MLYNARSKI[1]])
def test_margin_and_multiple(network):
    model = network(in_channels=1).eval()
    for n in (1, 2, 3):
        out = n * model.multiple
        assert model(patch(model, out=out)).shape[2:] == (out,) * model.spatial_dims
    shape = [2 * model.margin + model.multiple * n for n in (3, 1, 2)[: model.spatial_dims]]
    assert model(torch.zeros(1, 1, *shape)).shape[2:] == tuple(n - 2 * model.margin for n in shape)
    with pytest.raises(ValueError, match=f"loses {model.margin} on each side and needs more than {2 * model.margin}"):
        model(patch(model, out=0))


@by_name(TWO_SCALES)
def test_sizes_that_do_not_fit_the_low_resolution_grid(network):
    model = network()
    rim = 2 * model.margin
    with pytest.raises(ValueError, match=f"{rim + 5} voxels in give 5 out; .* multiples of 3 .* feed {rim + 3} voxels"):
        model(patch(model, out=5))


@by_name(VALID)
def test_one_voxel(network):
    """A patch as large as one prediction needs: 49 to 1 for DeepMedic, whose context is then centred exactly."""
    model = network().eval()
    assert model(patch(model, out=1)).shape[2:] == (1,) * model.spatial_dims
    field = measured_receptive_field(model, voxel=0, size=1 + 2 * model.margin)
    last = model.margin - (network.name == "local_cascade_cnn")  # whose field is even
    assert field.first == (-model.margin,) * model.spatial_dims and field.last == (last,) * model.spatial_dims


@by_name([*VALID, MLYNARSKI[1]])
def test_every_prediction_sees_only_its_own_field(network):
    """Dense output equals the outputs of the patches around each group of voxels."""
    model = network().eval()
    m, g = model.margin, model.multiple
    x = patch(model, out=2 * g)
    dense = model(x)
    corner = (..., *(slice(g, None),) * model.spatial_dims)
    torch.testing.assert_close(model(x[corner]), dense[corner], rtol=1e-4, atol=1e-4)
    assert x[corner].shape[-1] == g + 2 * m


@every_network
def test_determinism_by_seed(network):
    first, same, other = network(seed=1), network(seed=1), network(seed=2)
    x = patch(first, batch=2)
    for model in (first, same, other):
        model.train()
        torch.manual_seed(3)
        model.result = model(x)
    assert torch.equal(first.result, same.result)
    assert not torch.equal(first.result, other.result)


@every_network
def test_save_and_load(network, tmp_path, stir):
    model = stir(network(in_channels=2, classes=3))
    card = {"channels": ["flair", "t1c"], "test_dice": 0.5}
    path = models.save(tmp_path / "net.safetensors", model, card)
    again = models.load(path)
    x = patch(model)
    assert torch.equal(model(x), again(x))
    assert not again.training and again.card == card and again.config == model.config
    norms = (RollingBatchNorm, nn.modules.batchnorm._BatchNorm)
    assert sum("running_var" in n for n, _ in again.named_buffers()) == sum(isinstance(m, norms) for m in model.modules())
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


@every_network
def test_export(network, stir):
    model = stir(network(in_channels=1, classes=2))
    x = patch(model)
    exported = torch.export.export(model, (x,))
    other = patch(model, seed=1)
    torch.testing.assert_close(exported.module()(other), model(other), rtol=1e-4, atol=1e-4)


@every_network
def test_half_precision(network, stir):
    model = stir(network(in_channels=1, classes=2))
    x = patch(model)
    exact = model(x).detach()
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    assert (half.float() - exact).norm() < 0.1 * exact.norm()


@every_network
def test_half_precision_training(network):
    model = network(in_channels=1, classes=2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(patch(model, batch=2))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    trained = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("auxiliary.")]
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trained)


@by_name(DEEPMEDIC)
@pytest.mark.parametrize("width", [0.1, 1.0])
def test_for_inference(network, width, stir):
    model = stir(network(width=width, in_channels=2, classes=3))
    fast = model.for_inference()
    for out in (1, model.multiple, 2 * model.multiple) if width < 1 else (1, model.multiple):
        x = patch(model, batch=2, out=out)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@every_network
def test_initial_weights(network):
    model = network(width=1)
    for conv in convolutions(model):
        if isinstance(conv, nn.ConvTranspose2d):  # starts as interpolation
            continue
        weight = conv.weight.detach()
        expected = {"normal": 0.01, "he": (2 / weight[0].numel()) ** 0.5}.get(network.init, network.init)
        error = (2 * weight.numel()) ** -0.5  # standard error of a standard deviation, relative
        assert abs(float(weight.std()) / expected - 1) < 5 * error
        assert abs(float(weight.mean())) < 5 * expected / weight.numel() ** 0.5
        assert conv.bias is None or not conv.bias.any()
    assert all((m.weight == network.slope).all() for m in model.modules() if isinstance(m, nn.PReLU))


@every_network
def test_dropout_only_where_it_should_be(network):
    model = network()
    trained = getattr(model, "second", model)
    assert tuple(m.p for m in trained.modules() if isinstance(m, nn.Dropout) and m.p) == network.dropout
    x = patch(model, batch=2)
    model.train()
    assert torch.equal(model(x), model(x)) is not bool(network.dropout)
    model.eval()
    assert torch.equal(model(x), model(x))


@by_name(DEEPMEDIC)
def test_dropout_of_the_convolutions(network):
    model = network(conv_dropout=0.02)
    paths = [model.normal, *([model.low] if model.low_resolution else [])]
    assert all(block.drop.p == 0.02 for path in paths for block in path)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    assert rates == [0.02] * sum(map(len, paths)) + list(network.dropout)


@pytest.mark.parametrize("options", [{"in_channels": 0}, {"classes": 1}])
@pytest.mark.parametrize(
    "build", [models.deepmedic, models.two_path_cnn, models.kayalibay_unet3d, models.mlynarski_2d, models.mlynarski_3d]
)
def test_impossible_channels_and_classes(build, options):
    with pytest.raises(ValueError, match="at least 1 channel and 2 classes"):
        build(**options)


# ----------------------------------------------------------------------------------------------- what papers differ in


@pytest.mark.parametrize(
    "name, expected",
    [
        ("deeper2d_seg", [30, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43, 45, 46, 47, 49, 50]),
        ("large2d_seg", [45, 48, 51, 55, 58, 61, 64, 67, 70, 74, 77, 80]),
        ("wider2d_seg", [60, 60, 80, 80, 80, 80, 100, 100]),
        ("deepmedic", [30, 30, 40, 40, 40, 40, 50, 50]),
    ],
)
def test_feature_maps(name, expected):
    model = getattr(models, name)()
    assert [c.out_channels for c in convolutions(model.normal)] == expected
    assert [c.out_channels for c in convolutions(model.low)] == expected


def test_scaled_keeps_at_least_one_map():
    assert [scaled(30, w) for w in (1, 0.5, 0.1, 0.001)] == [30, 15, 3, 1]


def cut_indices(out: int, *, centered: bool, spatial_dims: int = 3) -> tuple[list[int], list[int]]:
    """Patch indices that each pathway gets, along one axis."""
    model = models.deepmedic(in_channels=1, width=0.1, centered=centered)
    ramp = torch.arange(out + 48).expand(out + 48, out + 48, -1)
    normal, low = model.cut(ramp)
    assert len(set(normal.shape)) == len(set(low.shape)) == 1
    return normal[0, 0].tolist(), low[0, 0].tolist()


def test_cut_of_a_training_segment():
    normal, low = cut_indices(9, centered=True)
    assert normal == list(range(16, 41))  # 25 voxels
    assert low == list(range(normal[0] - 15, normal[0] - 15 + 57, 3)) and len(low) == 19
    # The 17 samples behind the first group of predictions (patch voxels 24, 25, 26) lie around its middle one.
    assert low[8] == 25

    normal, low = cut_indices(9, centered=False)
    assert normal == list(range(16, 41))
    assert low == list(range(normal[0] + 1 - 17, normal[0] + 1 - 17 + 57, 3)) and len(low) == 19
    assert low[8] == 24  # the group's first voxel, one off its middle


@pytest.mark.parametrize("segment, low", [(25, 19), (35, 23), (45, 26), (17, 17)])
def test_sizes_of_the_original_segments(segment, low):
    normal, context = cut_indices(segment - 16, centered=False)
    assert (len(normal), len(context)) == (segment, low)
    if (segment - 16) % 3 == 0 or segment == 17:
        normal, context = cut_indices(segment - 16, centered=True)
        assert (len(normal), len(context)) == (segment, low)


def test_cut_of_one_voxel_is_centred_either_way():
    for centered in (True, False):
        assert cut_indices(1, centered=centered) == (list(range(16, 33)), list(range(0, 49, 3)))


def test_any_size_without_centring():
    model = models.dm2d_seg(width=0.1, centered=False).eval()
    for out in (2, 4, 19):
        assert model(patch(model, out=out)).shape[2:] == (out, out)


def test_cut_parts_are_views_and_give_the_same_result():
    model = models.deepmedic(in_channels=1, width=0.1).eval()
    x = patch(model, out=6)
    parts = model.cut(x)
    assert all(p.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for p in parts)
    assert torch.equal(model(parts), model(x))
    for ours, numpys in zip(parts, model.cut(x.numpy())):
        assert np.array_equal(ours.numpy(), numpys)


def test_context_is_repeated_three_times():
    """With a network that passes on the low-resolution centre voxel, three neighbours show the same sample."""
    model = models.dm2d_seg(in_channels=1, classes=2, width=0.1, batch_norm=False).eval()
    init_normal(model, std=0)
    with torch.no_grad():
        for block in model.low:
            block.conv.weight[0, 0, 1, 1] = 1
        features = model.normal[-1].conv.out_channels
        model.hidden[0].conv.weight[0, features] = 1
        model.hidden[1].conv.weight[0, 0] = 1
        model.classifier.weight[1, 0] = 1
        ramp = torch.arange(57.0).expand(1, 1, 57, -1)
        assert model(ramp)[0, 1, 0].tolist() == [25, 25, 25, 28, 28, 28, 31, 31, 31]


# ------------------------------------------------------------------------------------------- two pathways and cascades


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
        with pytest.raises(ValueError, match=f"first is .* {network.name} needs .*'builder': 'two_path_cnn'.*'width': 0.1"):
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


# ------------------------------------------------------------------------------------ the pre-processor and FC-ResNet


def test_convolutions_of_the_pipeline():
    assert len(convolutions(models.fcn_preprocessor())) == 23
    model = models.fc_resnet(width=0.1)
    on_the_path = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and not n.startswith("skips")]
    assert sum(not name.endswith("project") for name in on_the_path) == 140
    assert len(convolutions(model)) == 154  # and 14 that make numbers of feature maps equal where maps are added


def test_without_a_block_its_shortcut_is_left(stir):
    """As a copy of the network whose block's last convolution is zero."""
    model = stir(models.fc_resnet(width=0.1)).double().eval()
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    blocks = attribution.removable(model)
    assert len(blocks) == 3 + 2 * (3 + 8 + 10) + 2 + 1 and blocks[-1] == "last"  # and the convolution before the head
    for name in (
        "down.0",
        "down.1.0",
        "down.2.3",
        "across.2",
        "up.1.7",
        "up.3",
    ):  # all kinds: projected, halved, doubled, plain
        with attribution.without(model, name) as shorter:
            assert shorter is model
            found = model(x)
        assert not torch.allclose(found, model(x))  # put back
        copy_ = copy.deepcopy(model)
        block = copy_.get_submodule(name)
        final = block.conv if hasattr(block, "conv") else block.expand
        nn.init.zeros_(final.weight), nn.init.zeros_(final.bias)
        torch.testing.assert_close(found, copy_(x))
    assert isinstance(model.get_submodule("down.2.3").project, nn.Identity)


def test_without_several_layers(stir):
    model = stir(models.unet2d(width=0.05)).eval()
    x = torch.randn(1, 1, 32, 32)
    assert attribution.removable(model) == [f"{part}.{n}.2" for part, count in (("down", 5), ("up", 4)) for n in range(count)]
    copy_ = copy.deepcopy(model)
    for name in ("down.1.2", "up.0.2"):
        nn.init.dirac_(copy_.get_submodule(name).weight), nn.init.zeros_(copy_.get_submodule(name).bias)
    with attribution.without(model, ["down.1.2", "up.0.2"]):
        torch.testing.assert_close(model(x), copy_(x))
    whole = model(x)
    with pytest.raises(RuntimeError, match="channels"), attribution.without(model, "up.0.2"):
        model(torch.cat([x, x], dim=1))
    torch.testing.assert_close(model(x), whole)  # put back after an error too
    with pytest.raises(
        ValueError, match=r"down\.0\.0 cannot be taken out of this network; expected some of down\.0\.2, down\.1\.2"
    ):
        attribution.without(model, "down.0.0").__enter__()


def test_resolutions_and_widths_of_fc_resnet(stir):
    """Table II: feature maps and size after every stage, for an image of 512 x 512."""
    model = stir(models.fc_resnet(in_channels=1, classes=1))
    shapes = []
    hooks = [
        m.register_forward_hook(lambda _, __, y: shapes.append((y.shape[1], 512 // (64 // y.shape[2]))))
        for m in (model.stem, *model.down, model.across, *model.up, model.last)
    ]
    model(torch.zeros(1, 1, 64, 64))
    for hook in hooks:
        hook.remove()
    going_down = [(32, 512), (32, 256), (128, 128), (256, 64), (512, 32)]
    assert shapes == [*going_down, (1024, 32), (512, 64), (256, 128), (128, 256), (32, 512), (32, 512)]


@pytest.mark.parametrize("name", ["fcn_preprocessor", "unet2d", "fcn_fc_resnet"])
def test_sizes_that_cannot_be_halved(name):
    model = getattr(models, name)(width=0.1)
    with pytest.raises(ValueError, match=rf"40×50 pixels; .* multiples of {model.multiple}"):
        model(torch.zeros(1, 1, 40, 50))


def test_a_bottleneck_by_hand(stir):
    block = stir(Bottleneck(6, 4, scale=0.5))
    x = torch.randn(1, 6, 8, 8)

    def normed(norm, y):
        return F.relu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias))

    y = F.conv2d(normed(block.norms[0], x), block.reduce.weight, block.reduce.bias)[:, :, ::2, ::2]
    y = F.conv2d(F.pad(normed(block.norms[1], y), (1,) * 4), block.filter.weight, block.filter.bias)
    y = F.conv2d(normed(block.norms[2], y), block.expand.weight, block.expand.bias)
    shortcut = F.conv2d(x[:, :, ::2, ::2], block.project.weight, block.project.bias)
    torch.testing.assert_close(block(x), shortcut + y, rtol=1e-4, atol=1e-5)
    assert resample(x, 2)[0, 0, :4, :2].tolist() == x[0, 0, :2, :1].repeat_interleave(2, 0).repeat(1, 2).tolist()


def test_fcn8_enlarges_like_interpolation():
    layer = models.fcn8(classes=2, width=0.02).enlarge8
    x = torch.randn(1, 2, 6, 5)
    expected = F.interpolate(x, scale_factor=8, mode="bilinear", align_corners=False)
    inner = (..., slice(8, -8), slice(8, -8))
    torch.testing.assert_close(layer(x)[inner], expected[inner], rtol=1e-4, atol=1e-5)


@by_name([n for n in [*DROZDZAL, MLYNARSKI[0]] if n.name != "fcn_fc_resnet"])  # whose halo is the sum of its parts'
def test_nothing_beyond_the_halo_matters(network):
    model = network(width=0.01).eval()
    with torch.no_grad():
        for conv in convolutions(model):
            conv.weight.abs_()  # so that no ReLU is shut
    side = 2 * (model.halo + 2 * model.multiple)
    widest = 0
    for phase in (0, model.multiple // 2 - 1, model.multiple - 1):  # where in a block of the coarsest scale
        middle = side // 2 + phase
        x = torch.rand(1, model.in_channels, side, side, requires_grad=True)
        model(x)[..., middle, middle].sum().backward()
        seen = x.grad.abs().sum((0, 1)).nonzero() - middle
        assert seen.abs().max() <= model.halo
        widest = max(widest, int(seen.max() - seen.min()) + 1)
    assert 0.9 * network.field < widest <= network.field  # the widest over all phases


def test_the_pre_processor_for_volumes():
    model = models.fcn_preprocessor(width=0.1, dims=3)
    assert model(torch.zeros(1, 1, 16, 32, 16)).shape == (1, 1, 16, 32, 16)


def test_a_pipeline_of_volumes(noise_case, stir):
    parts = models.fcn_preprocessor(width=0.05, dims=3), models.kayalibay_unet3d(in_channels=1, classes=2, width=0.1)
    model = stir(Pipeline(*parts))
    assert (model.spatial_dims, model.multiple, model.halo) == (3, 16, parts[0].halo + parts[1].halo)
    case = noise_case((20, 18, 5), channels=("t2",))
    logits = inference.predict(model, case, output="logits", progress=False)
    filled = padded_region(case.image, (0, 0, 0), (32, 32, 16))
    with torch.no_grad():
        expected = parts[1](parts[0](torch.from_numpy(filled)[None]))[0, :, :20, :18, :5].numpy()
    scale = expected.std()  # so small a network gives small numbers
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-3)
    with pytest.raises(ValueError, match=r"20×18×16 pixels; .* multiples of 16"):
        model(torch.zeros(1, 1, 20, 18, 16))


@pytest.mark.parametrize("name", models.DROZDZAL)
def test_impossible_sizes(name):
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        getattr(models, name)(in_channels=0)


# ----------------------------------------------------------------------------- subnetworks, and 2D features for 3D networks


@pytest.mark.parametrize(
    "variant, features, parameters",
    [("standard", 0, 1_330_372), ("a", 12, 1_340_740), ("b", 12, 1_340_740), ("c", 12, 2_673_060)],
)
def test_variants_of_the_3d_network(variant, features, parameters, stir):
    model = models.mlynarski_3d(variant=variant)
    assert sum(p.numel() for p in model.parameters()) == parameters and model.in_channels == 4 + features
    model = stir(models.mlynarski_3d(variant=variant, width=0.25))
    x = torch.randn(1, model.in_channels, 46, 50, 46)
    y = model(x)
    assert y.shape == (1, 4, 4, 8, 4)
    for channel in range(model.in_channels):  # everything that is given is used
        other = x.clone()
        other[:, channel] += 1
        assert not torch.allclose(model(other), y)


def test_features_of_variant_b_lie_where_the_image_does():
    """An impulse in a feature changes the predictions around its own place, whose field is 5 voxels wide."""
    model = models.mlynarski_3d(variant="b", features=1, in_channels=1, width=0.1).eval()
    with torch.no_grad():
        for conv in convolutions(model):
            conv.weight.abs_()
    x = torch.zeros(1, 2, 58, 58, 58)
    x[0, 1, 21 + 8, 21 + 6, 21 + 9] = 1
    changed = (model(x) != model(torch.zeros_like(x))).any(1)[0].nonzero()
    assert changed.amin(0).tolist() == [6, 4, 7] and changed.amax(0).tolist() == [10, 8, 11]


def test_the_paper_s_patch():
    model = models.mlynarski_3d(width=0.1)
    assert model(torch.zeros(1, 4, 70, 70, 70)).shape == (1, 4, 28, 28, 28)
    with pytest.raises(ValueError, match="needs 42 and a multiple of 4 along every axis"):
        model(torch.zeros(1, 4, 69, 70, 70))
    for options in ({"variant": "d"}, {"variant": "a", "features": 0}, {"variant": "standard", "features": 3}):
        with pytest.raises(ValueError, match="variant="):
            models.mlynarski_3d(**options)


@pytest.mark.parametrize("subnets, parameters, of_subnetworks", [(1, 31_277_800, 141_072), (2, 31_173_400, 36_672)])
def test_subnetworks(subnets, parameters, of_subnetworks, stir):
    model = models.mlynarski_2d(subnets=subnets)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.subnetworks.parameters()) == of_subnetworks
    assert sum(p.numel() for p in model.auxiliary.parameters()) == 660
    model = stir(models.mlynarski_2d(subnets=subnets, width=0.25))
    x = torch.randn(2, 4, 32, 48)
    logits, auxiliary = model.with_auxiliary(x)
    assert torch.equal(logits, model(x)) and len(auxiliary) == 5
    for k, found in enumerate(auxiliary):
        alone = model.subnetwork(k)
        assert torch.equal(alone(x if k == 4 else x[:, k : k + 1]), found)
        assert alone.in_channels == (4 if k == 4 else 1)
    assert torch.equal(model.subnetwork(-1)(x), auxiliary[4])
    with pytest.raises(ValueError, match="no subnetwork 5"):
        model.subnetwork(5)
    with pytest.raises(ValueError, match=r"expected 1 .* or 2"):
        models.mlynarski_2d(subnets=3)
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.zeros(1, 4, 40, 32))


def test_training_a_subnetwork_trains_the_whole():
    model = models.mlynarski_2d(width=0.1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    alone = model.subnetwork(2)
    optimiser = torch.optim.SGD(alone.parameters(), lr=0.1)
    alone(torch.randn(2, 1, 16, 16)).square().sum().backward()
    optimiser.step()
    changed = {n.split(".")[0] + "." + n.split(".")[1] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"subnetworks.2", "auxiliary.2"}


def test_auxiliary_classifiers_are_not_run_at_inference():
    model = models.mlynarski_2d(width=0.1).eval()
    for head in model.auxiliary:
        head.register_forward_hook(lambda *_: pytest.fail("an auxiliary classifier was run"))
    model(torch.zeros(1, 4, 16, 16))


# --------------------------------------------------------------------------------------------------------- the blocks


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_rolling_batch_norm(shape):
    rng = np.random.default_rng(0)
    norm = RollingBatchNorm(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    channel = (slice(None), *(None,) * (len(shape) - 2))
    gamma, beta = (p.detach().numpy()[channel] for p in (norm.weight, norm.bias))
    axes = (0, *range(2, len(shape)))
    means, variances = [], []
    for n in range(70):
        x = rng.normal(n, 1 + n / 10, shape)
        y = norm.train()(torch.tensor(x, dtype=torch.float32)).detach().numpy()
        mean, biased = x.mean(axes), x.var(axes)
        np.testing.assert_allclose(y, gamma * (x - mean[channel]) / np.sqrt(biased + 1e-5)[channel] + beta, atol=1e-3)
        means.append(mean)
        variances.append(x.var(axes, ddof=1))
        if n + 1 in (1, 5, 60, 61, 70):
            average, spread = np.mean(means[-60:], 0), np.mean(variances[-60:], 0)
            np.testing.assert_allclose(norm.running_mean, average, rtol=1e-5)
            np.testing.assert_allclose(norm.running_var, spread, rtol=1e-4)
            z = rng.normal(size=shape)
            expected = gamma * (z - average[channel]) / np.sqrt(spread + 1e-5)[channel] + beta
            y = norm.eval()(torch.tensor(z, dtype=torch.float32)).detach().numpy()
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_rolling_batch_norm_before_any_training():
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(RollingBatchNorm(3).eval()(x), x, rtol=1e-4, atol=1e-5)


def test_rolling_batch_norm_needs_more_than_one_value():
    with pytest.raises(ValueError, match="single value per channel"):
        RollingBatchNorm(3).train()(torch.zeros(1, 3, 1, 1))
    assert RollingBatchNorm(3).eval()(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_rolling_batch_norm_resumes_in_the_middle_of_its_window():
    torch.manual_seed(0)
    whole, first = RollingBatchNorm(2, window=4), RollingBatchNorm(2, window=4)
    batches = torch.randn(7, 5, 2)
    for x in batches:
        whole(x)
    for x in batches[:3]:
        first(x)
    second = RollingBatchNorm(2, window=4)
    second.load_state_dict(first.state_dict())
    for x in batches[3:]:
        second(x)
    assert torch.equal(whole.running_mean, second.running_mean) and torch.equal(whole.running_var, second.running_var)


def test_conv_block():
    plain, normed = ConvBlock(2, 3, 3, batch_norm=False), ConvBlock(2, 3, 3, dropout=0.1)
    assert [n for n, _ in plain.named_children()] == ["conv", "act"] and plain.conv.bias is not None
    assert [n for n, _ in normed.named_children()] == ["drop", "conv", "norm", "act"] and normed.conv.bias is None
    assert normed.act.weight.shape == (3,) and plain(torch.zeros(1, 2, 5, 6, 7)).shape == (1, 3, 3, 4, 5)


# --------------------------------------------------------------------------------------------------- files of networks


def test_inference_statistics_are_kept_and_training_goes_on(tmp_path):
    torch.manual_seed(0)
    model = models.shallow_plus(in_channels=1, classes=2, width=0.1).train()
    for _ in range(3):
        model(2 + 3 * torch.randn(2, 1, 19, 19, 19))
    again = models.load(models.save(tmp_path / "net.safetensors", model, {}))
    for before, after in zip(model.modules(), again.modules()):
        if isinstance(before, RollingBatchNorm):
            assert before.running_mean.any()
            assert torch.equal(before.running_mean, after.running_mean)
            assert torch.equal(before.running_var, after.running_var)
    again.train()(torch.randn(2, 1, 19, 19, 19))


def test_options_survive_the_file(tmp_path):
    options = {"width": 0.1, "centered": False, "dropout": 0.2, "widths": [3, 4], "hidden": [5]}
    model = models.deepmedic(in_channels=1, classes=2, **options).eval()
    again = models.load(models.save(tmp_path / "net.safetensors", model, {}))
    x = patch(model)
    assert again.margin == 6 and again.centered is False and torch.equal(again(x), model(x))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    model = models.dm2d_seg(width=0.1).eval()
    models.save(path, model, {"n": 1})

    def broken(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("medseg_lite.models.checkpoint.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        models.save(path, model, {"n": 2})
    assert models.load(path).card == {"n": 1} and list(tmp_path.iterdir()) == [path]


def test_save_needs_a_network_of_the_package(tmp_path):
    with pytest.raises(ValueError, match="Linear was not made by a builder"):
        models.save(tmp_path / "net.safetensors", nn.Linear(1, 1), {})


def test_load_rejects(tmp_path):
    def file(name: str, config=None, tensors=None):
        metadata = {} if config is None else {"config": json.dumps(config)}
        save_file(tensors or {"a": torch.zeros(1)}, tmp_path / name, metadata=metadata)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors does not exist"):
        models.load(tmp_path / "absent.safetensors")
    (tmp_path / "page.safetensors").write_text("<!doctype html>" * 20)
    with pytest.raises(ValueError, match=r"page\.safetensors is not a safetensors file"):
        models.load(tmp_path / "page.safetensors")
    with pytest.raises(ValueError, match="holds no network description"):
        models.load(file("bare.safetensors"))
    for name in ("resnet", "load", "save", "checkpoint", "__class__", None):
        with pytest.raises(ValueError, match=f"asks for network {name!r}"):
            models.load(file("odd.safetensors", {"builder": name}))
    config = {"builder": "dm2d_seg", "width": 0.1}
    with pytest.raises(ValueError, match=r"does not fit dm2d_seg: .* missing, unknown or of another shape"):
        models.load(file("other.safetensors", config))
    five = models.save(tmp_path / "five.safetensors", models.dm2d_seg(width=0.1), {})
    with pytest.raises(ValueError, match=r"does not fit dm2d_seg: 2 tensors .*\(classifier.bias, classifier.weight"):
        models.load(file("four.safetensors", config | {"classes": 4}, load_file(five)))
    with pytest.raises(ValueError, match=r"asks for options that dm2d_seg does not have .*depth"):
        models.load(file("new.safetensors", config | {"depth": 3}))
    whole = models.save(tmp_path / "net.safetensors", models.dm2d_seg(width=0.1), {})
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        models.load(whole)


def test_half_the_bytes(tmp_path, stir):
    model = stir(models.fcn_fc_resnet(width=0.1)).eval()
    model.segmenter.head[0].running_var.fill_(1e6)  # more than float16 holds
    full, half = (models.save(tmp_path / f"{half}.safetensors", model, {}, half=half) for half in (False, True))
    assert half.stat().st_size < 0.75 * full.stat().st_size
    again = models.load(half)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    x = torch.randn(1, 1, 32, 32)
    expected = model(x)
    assert 0 < (again(x) - expected).norm() < 1e-2 * expected.norm()
    assert again.segmenter.head[0].running_var.max() == 1e6


# ---------------------------------------------------------------------------------------------------------- kayalibay


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(merge="concat", maps=3), 409_424),
        (dict(merge="concat", maps=1), 408_944),
        (dict(merge="sum", maps=3), 336_848),
        (dict(merge="none", maps=3), 336_848),
        (dict(merge="sum", maps=1), 336_368),
        (dict(merge="none", maps=1), 336_368),
    ],
    ids=str,
)
def test_parameters_of_every_unet(options, expected, channels):
    model = models.kayalibay_unet3d(in_channels=channels, **options)
    assert sum(p.numel() for p in model.parameters()) == expected + (channels - 1) * 27 * 8
    assert model.config["merge"] == options["merge"]


def test_feature_maps_of_the_unet():
    """Table 7, layer by layer; the 1³ convolutions that it leaves out lie between."""
    model = models.kayalibay_unet3d(in_channels=1)
    path = [c for c in convolutions(model) if c.kernel_size == (3, 3, 3)]
    assert [c.out_channels for c in path] == [8, 8, 16, 32, 32, 64, 64, 32, 64, 16, 32, 8, 16]
    assert [c.stride[0] for c in path] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1]
    assert [c.in_channels for c in path[7:]] == [32, 64, 32, 32, 16, 16]
    assert [(c.in_channels, c.out_channels) for c in convolutions(model) if c.kernel_size == (1, 1, 1)] == [
        (64, 32),
        (64, 32),
        (32, 16),
        (64, 5),
        (32, 5),
        (16, 5),
    ]
    deeper = models.kayalibay_unet3d(in_channels=1, blocks=4)
    assert deeper.multiple == 16 and deeper.contracting[-1].conv.out_channels == 128
    assert deeper.expanding[0].conv[0].in_channels == 128 and len(deeper.heads) == 3


@pytest.mark.parametrize("short_skips", [True, False])
@pytest.mark.parametrize("merge", ["concat", "sum", "none"])
def test_the_unet_written_out(merge, short_skips, stir):
    """The whole network once more as plain function calls."""
    torch.manual_seed(0)
    m = stir(models.kayalibay_unet3d(in_channels=2, classes=3, width=0.25, merge=merge, short_skips=short_skips))
    x = torch.randn(1, 2, 16, 8, 24)

    def bn_prelu(y, block):
        norm, act = block
        y = (y - norm.running_mean[:, None, None, None]) / (norm.running_var[:, None, None, None] + 1e-5).sqrt()
        y = y * norm.weight[:, None, None, None] + norm.bias[:, None, None, None]
        return y.clamp(min=0) + act.weight[:, None, None, None] * y.clamp(max=0)

    def conv(y, layer):
        return F.conv3d(F.pad(y, (layer.kernel_size[0] // 2,) * 6), layer.weight)

    skips, y = [], bn_prelu(conv(x, m.stem[0]), m.stem[1])
    for block in m.contracting:
        skips.append(y)
        down = conv(y, block.down)[..., ::2, ::2, ::2]  # every second voxel of a plain convolution
        y = conv(bn_prelu(down, block.norm1), block.conv)
        if short_skips:
            y = torch.cat([y[:, : down.shape[1]] + down, y[:, down.shape[1] :]], dim=1)
        y = bn_prelu(y, block.norm2)
    scores = []
    for block, head in zip(m.expanding, m.heads):
        y = bn_prelu(conv(y, block.reduce[0]), block.reduce[1])
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
        y, skip = bn_prelu(conv(y, block.deconv[1]), block.deconv[2]), skips.pop()
        y = {"concat": lambda: torch.cat([y, skip], 1), "sum": lambda: y + skip, "none": lambda: y}[merge]()  # noqa: B023
        y = bn_prelu(conv(y, block.conv[0]), block.conv[1])
        scores.append(conv(y, head))
    big = nn.Upsample(scale_factor=2, mode="trilinear")
    expected = big(big(scores[0]) + scores[1]) + scores[2]
    assert [tuple(s.shape) for s in scores] == [tuple(s.shape) for s in m.segmentation_maps(x)]
    torch.testing.assert_close(m(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_halo_covers_what_a_prediction_sees(blocks):
    model = models.kayalibay_unet3d(in_channels=1, classes=2, width=0.125, blocks=blocks, maps=blocks)
    size = [2 * model.halo + 4 * model.multiple] + [model.multiple] * 2
    field = measured_receptive_field(model, size=size, axis=0)
    reach = 1 + 6 * (model.multiple - 1)
    assert max(-field.first[0], field.last[0]) == reach <= model.halo < reach + model.multiple
    assert model.halo % model.multiple == 0


def test_sizes_of_the_unet():
    model = models.kayalibay_unet3d(in_channels=1, classes=2, width=0.125).eval()
    assert model(torch.zeros(2, 1, 8, 24, 16)).shape == (2, 2, 8, 24, 16)
    for shape in [(8, 8, 12), (0, 8, 8), (8, 8)]:
        with pytest.raises(ValueError, match=r"halves it 3 times and needs a multiple of 8 .*predict pads"):
            model(torch.zeros(1, 1, *shape))


def test_xavier_start():
    torch.manual_seed(0)
    for c in convolutions(models.kayalibay_unet3d(init="xavier")):
        voxels = c.weight[0, 0].numel()
        expected = (2 / (voxels * (c.in_channels + c.out_channels))) ** 0.5
        assert abs(float(c.weight.detach().std()) / expected - 1) < 5 * (2 * c.weight.numel()) ** -0.5


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(merge="add"), "merge='add'; expected one of concat, sum, none"),
        (dict(maps=4), "maps=4; expected 1 to 3"),
        (dict(maps=0), "maps=0"),
        (dict(blocks=0), "blocks=0; expected 1 to 6"),
        (dict(init="he"), "init='he'; expected normal or xavier"),
    ],
)
def test_unets_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        models.kayalibay_unet3d(**options)
