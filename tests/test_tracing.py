"""Layers followed without numbers, against the gradients of the same layers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from medseg_lite import models
from medseg_lite.engine.geometry import EMPTY, Follow
from medseg_lite.engine.tracing import contract, trace, watched


class Joined(nn.Module):
    """Two pathways of different resolution, a skip, a cut and a channel that sees everything."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(1, 2, 3, padding=1)
        self.coarse = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.gate = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        coarse = nn.functional.interpolate(self.coarse(x), scale_factor=2, mode="nearest")
        joined = torch.cat([self.fine(x), coarse], dim=1)
        return (joined * torch.sigmoid(self.gate(joined[:, :, 4:9]).mean(dim=(2, 3), keepdim=True)))[..., 1:-2, ::2]


CASES = {
    "chain": nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 2), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 2, dilation=2)),
    "padded": nn.Sequential(nn.Conv2d(1, 2, 5, stride=2, padding=2), nn.AvgPool2d(3, stride=2, padding=1)),
    "transposed": nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1)),
    "transposed 2": nn.Sequential(
        nn.MaxPool2d(2), nn.ConvTranspose2d(1, 2, 2, stride=2), nn.ConvTranspose2d(2, 1, 3, stride=2)
    ),
    "nearest": nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=3), nn.Conv2d(2, 1, 3)),
    "bilinear": nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(1, 1, 3)),
    "corners": nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.AvgPool2d(2), nn.Upsample(size=(17, 12), mode="bilinear", align_corners=True)
    ),
    "bicubic": nn.Sequential(nn.Conv2d(1, 1, 1), nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bicubic")),
    "pads": nn.Sequential(
        nn.ReflectionPad2d(2), nn.Conv2d(1, 1, 3), nn.ReplicationPad2d(1), nn.ZeroPad2d((1, 0, 2, -1)), nn.Conv2d(1, 2, 2)
    ),
    "adaptive": nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d((5, 4)), nn.AdaptiveMaxPool2d(3)),
    "joined": Joined(),
}


@pytest.mark.parametrize("name", CASES)
def test_first_and_last_agree_with_gradients(name):
    model = CASES[name].double().eval()
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        nn.init.uniform_(parameter, 0.1, 1, generator=generator)
    shape = (20, 16)
    axes = trace(model, shape)[""].axes
    x = torch.rand(64, 1, *shape, dtype=torch.float64, requires_grad=True)  # many: a maximum hides all but one voxel
    y = model(x)
    assert [len(a.first) for a in axes] == list(y.shape[2:])
    for along, axis in enumerate(axes):
        for i in range(len(axis.first)):
            (gradient,) = torch.autograd.grad(y.select(2 + along, i).sum(), x, retain_graph=True)
            seen = gradient.abs().sum(dim=(0, 1, 3 - along)).nonzero().flatten().tolist()
            if not seen:
                assert axis.first[i] == EMPTY and axis.last[i] == -EMPTY
            else:
                assert (axis.first[i], axis.last[i]) == (seen[0], seen[-1]), (along, i)


@pytest.mark.parametrize("name", ["padded", "nearest", "corners", "pads"])
def test_centres_are_where_a_linear_ramp_comes_out(name):
    """Averages of a ramp are the ramp at their centre, so smoothing weights tell where each voxel lies."""
    model = CASES[name].double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.constant_(module.bias, 0)
            scale = module.kernel_size[0] ** 2 * module.in_channels
            if isinstance(module, nn.ConvTranspose2d):
                scale = module.kernel_size[0] ** 2 * module.in_channels / module.stride[0] ** 2
            nn.init.constant_(module.weight, 1 / scale)
    ramp = torch.arange(40, dtype=torch.float64)[None, None, :, None].expand(1, 1, 40, 40)
    axis = trace(model, (40, 40))[""].axes[0]
    n = len(axis.first)
    inner = slice(n // 3, n - n // 3)
    with torch.no_grad():
        found = model(ramp)[0, 0, inner, n // 2].numpy()
    centre = axis.offset + axis.stride * np.arange(n)[inner]
    if name == "nearest":  # three neighbours share a value: right in their mean
        found, centre = found[:3].mean(), centre[:3].mean()
    np.testing.assert_allclose(found, centre, atol=0.05)


@pytest.mark.parametrize("merge", ["concat", "none"])
def test_networks_that_pad_end_where_they_began(merge):
    model = models.kayalibay_unet3d(in_channels=1, classes=2, width=0.2, merge=merge)
    layers = trace(model, (24, 16, 16))
    assert [(a.offset, a.stride) for a in layers[""].axes] == [(0, 1)] * 3
    assert [(a.offset, a.stride) for a in layers["expanding.1.conv"].axes] == [(0.5, 2)] * 3
    assert layers["contracting.2.conv"].axes[0].offset == 0 and layers["contracting.2.conv"].axes[0].stride == 8
    assert trace(CASES["transposed"], (20, 16))[""].axes[1].offset == 0


def test_layers_and_what_cannot_be_followed():
    layers = trace(CASES["joined"], (20, 16))
    assert list(layers) == ["coarse", "fine", "gate", ""]
    assert layers["coarse"].shape == (2, 10, 8) and layers["coarse"].parameters == 20
    assert layers["coarse"].axes[0].stride == 2
    turned = nn.Sequential(nn.Conv2d(1, 1, 3), nn.PixelShuffle(1))
    assert trace(turned, (9, 9))["0"].axes is not None and trace(turned, (9, 9))["1"].axes is None
    with pytest.raises(ValueError, match="Sequential does not take a patch of 2×2 voxels"):
        trace(turned, (2, 2))
    with pytest.raises(ValueError, match="Linear has no convolution"):
        trace(nn.Linear(2, 2), (2, 2))


def test_a_module_called_twice_has_two_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return self.conv(self.conv(x))

    layers = trace(Twice(), (9, 9))
    assert [layers[name].shape[1] for name in ("conv", "conv#2", "")] == [7, 5, 5]


def test_hooks_are_removed_after_an_exception():
    model = CASES["chain"]
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), watched(model, 2, lambda *_: None):
            raise error
    assert not any(m._forward_hooks for m in model.modules())


def test_tracing_changes_nothing():
    model = CASES["joined"].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, (20, 16))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_run_ends_with_the_layers_that_are_wanted():
    model = models.deepmedic(in_channels=2, classes=2, width=0.1)
    model.classifier.register_forward_pre_hook(lambda *_: pytest.fail("not needed"))
    found = trace(model, (57, 57, 57), ["low.3", "normal.1"])
    assert list(found) == ["normal.1", "low.3"] and found["low.3"].axes[0].stride == 3


@pytest.mark.parametrize("name", ["padded", "joined"])
def test_a_module_without_a_contract_is_given_one(name):
    """A layer that sees everything has no stride that patches could be multiples of."""
    found = contract(CASES[name])
    assert (found.in_channels, found.classes, found.spatial_dims, found.margin, found.halo) == (
        1,
        4 if name == "joined" else 2,
        2,
        0,
        None,
    )
    assert found.multiple == {"padded": 4, "joined": 2}[name]
    model = models.deepmedic(width=0.1)
    assert contract(model) is model


OPERATIONS = {
    "convolution": lambda x, w: torch.conv2d(x, w[:6], stride=(1, 2), padding=1, dilation=(2, 1), groups=2),
    "transposed": lambda x, w: torch.conv_transpose2d(x, w[:4], stride=3, padding=1, output_padding=2, groups=2, dilation=2),
    "volume": lambda x, w: torch.conv3d(x[:, None], w[:2, :1, None], padding=(2, 0, 1)),
    "maximum": lambda x, w: nn.functional.max_pool2d(x, 3, 2, 1),
    "rounded up": lambda x, w: nn.functional.max_pool2d(x, 2, ceil_mode=True),
    "dilated": lambda x, w: nn.functional.max_pool2d(x, (2, 3), stride=1, dilation=2),
    "joined": lambda x, w: torch.cat([x, x[..., :2], x[..., 3:]], dim=-1),
    "mixed": lambda x, w: torch.cat([x, x.double()], dim=1),
    "sum": lambda x, w: x + x.double(),
    "product": lambda x, w: x[0, 0] @ x[1, 1].T,
    "softmax": lambda x, w: x.softmax(1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_without_content_are_those_of_real_tensors(name):
    x, w = torch.zeros(3, 4, 13, 11), torch.zeros(8, 2, 3, 2)
    real, found = OPERATIONS[name](x, w), torch.empty(3, 4, 13, 11, device="meta")
    with Follow(found):
        found = OPERATIONS[name](found, w)
    assert found.is_meta and found.shape == real.shape and found.dtype == real.dtype


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: torch.conv2d(x, torch.zeros(2, 3, 3, 3)),
        lambda x: torch.conv2d(x, torch.zeros(2, 4, 15, 3)),
        lambda x: nn.functional.max_pool2d(x, 20),
        lambda x: torch.cat([x, x[:, :, 1:]], dim=1),
        lambda x: x[0, 0] @ x[0, 0],
    ],
    ids=["channels", "kernel", "pool", "cat", "product"],
)
def test_what_does_not_fit_is_refused(wrong):
    x = torch.empty(3, 4, 13, 11, device="meta")
    with Follow(x), pytest.raises(RuntimeError):
        wrong(x)


def test_pytorchs_compiler_is_not_loaded():
    """It takes a second and 70 MB, which a first look at feature maps, or a first prediction, need not cost."""
    code = """
import sys, torch
from medseg_lite import models
from medseg_lite.engine.memory import measure
from medseg_lite.engine.tracing import trace
for name in models.NETWORKS:
    model = getattr(models, name)(width=0.1).eval()
    side = [2 * model.margin + 3 * model.multiple] * model.spatial_dims
    trace(model, side)
    for network in {model, model.for_inference()}:
        assert measure(network, (1, model.in_channels, *side))
    assert measure(model, (1, model.in_channels, *side), torch.float16)
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_no_patch_fits():
    class Picky(nn.Conv2d):
        def forward(self, x):
            raise ValueError("never")

    with pytest.raises(ValueError, match=r"Picky takes none of the patches .*models\.Adapter\("):
        contract(Picky(1, 1, 3))
