from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medseg_lite import models
from medseg_lite.features import measured_receptive_field, output_size, receptive_field, receptive_field_recursion

CHAINS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4)


def test_recursion_of_the_papers_pathways():
    assert receptive_field_recursion([5] * 4) == [5, 9, 13, 17]
    assert receptive_field_recursion([3] * 8) == [3, 5, 7, 9, 11, 13, 15, 17]
    assert receptive_field_recursion([3] * 8 + [1] * 3)[-1] == 17


def test_recursion_with_strides():
    # Contracting path of Kayalibay's network, table 7: a strided layer counts with the stride before it.
    assert receptive_field_recursion([3] * 7, [1, 2, 1, 2, 1, 2, 1]) == [3, 5, 9, 13, 21, 29, 45]


def test_table_7_of_kayalibays_network():
    """All thirteen rows: seven convolutions of the contracting path, then deconvolutions and convolutions in turn."""
    strides = [1, 2, 1, 2, 1, 2, 1] + [1] * 6
    upsampling = [1] * 7 + [2, 1, 2, 1, 2, 1]
    expected = [3, 5, 9, 13, 21, 29, 45, 53, 61, 65, 69, 71, 73]
    assert receptive_field_recursion([3] * 13, strides, upsampling=upsampling) == expected
    eta, tau, field = 0, 0, 1  # equation 7 as it stands
    for stride, up, row in zip(strides, upsampling, expected):
        tau += up == 2
        field += 2 ** (eta - tau) * (3 - 1)
        eta += stride == 2
        assert field == row


def test_the_recursion_is_the_middle_of_what_repeated_voxels_see():
    model = models.kayalibay_unet3d(in_channels=1, classes=2, width=0.125)
    fields = [measured_receptive_field(model, size=(128, 8, 8), voxel=(56 + n, 4, 4), axis=0) for n in range(8)]
    sides = [field.side[0] for field in fields]
    assert sides == [69, 69, 77, 77, 77, 77, 69, 69] and sum(sides) / 8 == 73
    together = measured_receptive_field(model, size=(128, 8, 8), axis=0)
    assert (together.first, together.last) == ((-43,), (36,))
    expected = {"stem.0": 3, "contracting.0.down": 5, "contracting.0.conv": 9, "contracting.2.conv": 45}
    for layer, side in expected.items():
        assert measured_receptive_field(model, size=(128, 8, 8), layer=layer, axis=0).side == (side,)


@given(CHAINS, st.integers(0, 20))
def test_recursion_and_size_agree_with_convolutions(chain, extra):
    kernels, strides = zip(*chain)
    field = receptive_field_recursion(kernels, strides)[-1]
    x = torch.ones(1, 1, field + extra, requires_grad=True)
    y = x
    for kernel, stride in chain:
        y = nn.functional.conv1d(y, torch.ones(1, 1, kernel), stride=stride)
    assert output_size(field + extra, kernels, strides) == y.shape[-1]
    y[..., 0].sum().backward()
    assert x.grad.nonzero()[-1, -1] + 1 == field


def test_output_size():
    assert output_size(25, [3] * 8) == 9
    assert output_size(17, [5] * 4) == 1
    assert output_size(7, []) == 7
    with pytest.raises(ValueError, match="n_in=16 voxels are fewer than the receptive field of 17"):
        output_size(16, [3] * 8)


@pytest.mark.parametrize(
    "kernels, strides, message",
    [([3, 3], [1], "2 kernels but 1 strides"), ([3, 0], None, "at least 1"), ([3, 3], [1, 0], "at least 1")],
)
def test_recursion_rejects(kernels, strides, message):
    with pytest.raises(ValueError, match=message):
        receptive_field_recursion(kernels, strides)


def test_one_voxel_of_deepmedic_sees_49_and_three_neighbours_51():
    model = models.deepmedic(in_channels=1, classes=2, width=0.1)
    fields = [measured_receptive_field(model, voxel=v) for v in range(3)]
    assert [(f.first[0], f.last[0]) for f in fields] == [(-23, 25), (-24, 24), (-25, 23)]
    together = measured_receptive_field(model)
    assert together.side == (51, 51, 51) and together.first == (-25,) * 3 and together.last == (25,) * 3


def test_the_original_low_resolution_context_is_one_voxel_off():
    field = measured_receptive_field(models.dm2d_seg(in_channels=1, width=0.1, centered=False))
    assert field == ((51, 51), (-26, -26), (24, 24))


def test_layers():
    model = models.deepmedic(in_channels=1, classes=2, width=0.1)
    assert measured_receptive_field(model, layer="normal") == ((17,) * 3, (-8,) * 3, (8,) * 3)
    assert measured_receptive_field(model, layer="low") == ((49,) * 3, (-24,) * 3, (24,) * 3)
    assert [measured_receptive_field(model, layer=f"normal.{n}").side[0] for n in range(8)] == list(range(3, 18, 2))


def test_voxel_may_differ_by_axis_and_padding_is_seen():
    class Padded(nn.Module):
        in_channels, margin, multiple, spatial_dims = 1, 0, 1, 2

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, (3, 5), padding=(1, 2))

        def forward(self, x):
            return self.conv(x)

    model = Padded()
    assert measured_receptive_field(model, size=12, voxel=(4, 5)) == ((3, 5), (-1, -2), (1, 2))
    with pytest.raises(ValueError, match="reaches the border"):
        measured_receptive_field(model, size=12, voxel=(0, 5))
    with pytest.raises(ValueError, match="pads its input"):
        measured_receptive_field(model)
    with pytest.raises(ValueError, match=r"\(12, 5\) is outside the output of \(12, 12\)"):
        measured_receptive_field(model, size=12, voxel=(12, 5))
    with pytest.raises(ValueError, match="one for each of 2 axes"):
        measured_receptive_field(model, size=(12, 12, 12))
    nn.init.zeros_(model.conv.weight)
    with pytest.raises(ValueError, match="no input voxel influences"):
        measured_receptive_field(model, size=12)


def test_unknown_layer():
    with pytest.raises(ValueError, match="no layer 'middle'; its parts are normal, low, hidden"):
        measured_receptive_field(models.dm2d_seg(width=0.1), layer="middle")


def test_measuring_changes_nothing():
    model = models.dm2d_seg(width=0.1).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    measured_receptive_field(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


def test_recursion_rejects_upsampling_beyond_the_input():
    with pytest.raises(ValueError, match="layer 2 repeats voxels 2 times, but they lie 1 input voxels apart"):
        receptive_field_recursion([3, 3], upsampling=[1, 2])
    with pytest.raises(ValueError, match="2 kernels but 1 upsampling factors"):
        receptive_field_recursion([3, 3], [2, 1], upsampling=[1])


def test_along_one_axis():
    model = models.kayalibay_unet3d(in_channels=1, classes=2, width=0.125, blocks=1, maps=1)
    whole = measured_receptive_field(model, size=20)
    for axis in range(3):
        size = [2, 2, 2]
        size[axis] = 20
        along = measured_receptive_field(model, size=size, axis=axis)
        assert along == tuple((numbers[axis],) for numbers in whole)
    with pytest.raises(ValueError, match="axis=3; expected 0 to 2"):
        measured_receptive_field(model, size=20, axis=3)
    with pytest.raises(ValueError, match="reaches the border"):
        measured_receptive_field(model, size=(20, 2, 2))


def test_modules_that_are_no_networks():
    """What is inferred of them is used by the formula and by the measurement alike."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3, padding=1))
    assert receptive_field(model) == measured_receptive_field(model, size=32)
