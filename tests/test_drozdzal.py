from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg_lite import attribution, inference, models
from medseg_lite.models.drozdzal import Bottleneck, Pipeline, resample
from medseg_lite.models.layers import convolutions
from medseg_lite.volume import padded_region


def test_convolutions_of_the_pipeline():
    assert len(convolutions(models.fcn_preprocessor())) == 23
    model = models.fc_resnet(width=0.1)
    on_the_path = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and not n.startswith("skips")]
    assert sum(not name.endswith("project") for name in on_the_path) == 140
    assert len(convolutions(model)) == 154  # and 14 that make numbers of feature maps equal where maps are added


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


def test_depth_is_a_share_of_the_bottlenecks(tmp_path):
    def bottlenecks(model):
        return sum(isinstance(module, Bottleneck) for module in model.modules())

    with torch.random.fork_rng(devices=[]):  # later tests draw what they drew before
        counts = {depth: bottlenecks(models.fc_resnet(width=0.1, depth=depth)) for depth in (1.0, 0.5, 0.1)}
        assert counts == {1.0: 45, 0.5: 24, 0.1: 14}  # 2 (3 + 8 + 10) + 3; 2 (2 + 4 + 5) + 2; two in each of seven stages
        model = models.fcn_fc_resnet(classes=1, width=0.1, depth=0.5)
        assert bottlenecks(model) == 24 and model(torch.zeros(1, 1, 32, 64)).shape == (1, 1, 32, 64)
        assert bottlenecks(models.load(models.save(tmp_path / "half.safetensors", model, {}))) == 24


@pytest.mark.parametrize("name", ["fcn_preprocessor", "unet2d", "fcn_fc_resnet"])
def test_sizes_that_cannot_be_halved(name):
    model = getattr(models, name)(width=0.1)
    with pytest.raises(ValueError, match=rf"40×50 pixels; .* a multiple of {model.multiple}"):
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
    with pytest.raises(ValueError, match=r"20×18×16 voxels; .* a multiple of 16"):
        model(torch.zeros(1, 1, 20, 18, 16))


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
