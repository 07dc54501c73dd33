from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg_lite import models
from medseg_lite.features import measured_receptive_field
from medseg_lite.models.layers import convolutions


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
        with pytest.raises(ValueError, match=r"works at 1/8 of the resolution and needs a multiple of 8 .*predict pads"):
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
