from __future__ import annotations

import numpy as np
import pytest
import torch
from network_table import DEEPMEDIC, TWO_SCALES, by_name, patch
from torch import nn

from medseg_lite import models
from medseg_lite.features import measured_receptive_field, receptive_field_recursion
from medseg_lite.models.layers import convolutions, init_normal


@by_name(DEEPMEDIC)
def test_receptive_field_computed(network):
    model = network()
    kernels = [c.kernel_size[0] for c in convolutions(model.normal)]
    local = receptive_field_recursion(kernels)[-1]
    assert local == 2 * model.reach + 1 == measured_receptive_field(model, layer="normal").side[0]
    assert network.field == (3 * local if model.low_resolution else local)


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


@by_name(DEEPMEDIC)
@pytest.mark.parametrize("width", [0.1, 1.0])
def test_for_inference(network, width, stir):
    model = stir(network(width=width, in_channels=2, classes=3))
    fast = model.for_inference()
    for out in (1, model.multiple, 2 * model.multiple) if width < 1 else (1, model.multiple):
        x = patch(model, batch=2, out=out)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@by_name(DEEPMEDIC)
def test_dropout_of_the_convolutions(network):
    model = network(conv_dropout=0.02)
    paths = [model.normal, *([model.low] if model.low_resolution else [])]
    assert all(block.drop.p == 0.02 for path in paths for block in path)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    assert rates == [0.02] * sum(map(len, paths)) + list(network.dropout)


@by_name(TWO_SCALES)
def test_sizes_that_do_not_fit_the_low_resolution_grid(network):
    model = network()
    rim = 2 * model.margin
    with pytest.raises(ValueError, match=f"{rim + 5} voxels in give 5 out; .* multiples of 3 .* feed {rim + 3} voxels"):
        model(patch(model, out=5))


# ------------------------------------------------------------------------------------------- inputs of the two pathways


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
