"""The contract of a network: its defaults, the adapter for other modules, and the registry of builders."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from network_table import NETWORKS, by_name, patch
from torch import nn

from medseg_lite import features, inference, models
from medseg_lite.models import Adapter, Network, builder


class Small(Network):
    """A network that loses a voxel on each side and sets nothing else."""

    margin = 1

    def __init__(self, in_channels: int = 2, classes: int = 2):
        super().__init__(in_channels, classes)
        self.conv = nn.Conv3d(in_channels, classes, 3)

    def forward(self, x):
        return self.conv(x)


class Halving(nn.Module):
    """A module of nobody's contract: it pads, and works at half the resolution too."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv3d(2, 3, 3, padding=1), nn.Conv3d(2, 3, 3, padding=1, stride=2)

    def forward(self, x):
        return self.fine(x) + nn.functional.interpolate(self.coarse(x), scale_factor=2)


@pytest.fixture
def registry(monkeypatch):
    """The registered builders as a copy, so that a test's own are gone after it."""
    monkeypatch.setattr("medseg_lite.models.network.BUILDERS", builders := dict(models.BUILDERS))
    monkeypatch.setattr("medseg_lite.models.checkpoint.BUILDERS", builders)
    return builders


def test_defaults():
    model = Small(in_channels=4, classes=5)
    assert (model.in_channels, model.classes, model.spatial_dims) == (4, 5, 3)
    assert (model.margin, model.multiple, model.halo, model.reach) == (1, 1, None, 1)
    assert model.config is None and model.card == {} and model.card is not Small().card
    x = torch.zeros(1, 4, 5, 5, 5)
    assert len(model.cut(x)) == 1 and model.cut(x)[0] is x
    assert model.for_inference() is model


def test_attributes_may_be_set_on_the_class_or_on_the_network():
    class Fixed(Network):
        in_channels, classes, spatial_dims, reach = 1, 2, 2, 7

    assert (Fixed().in_channels, Fixed().classes, Fixed().spatial_dims, Fixed().reach) == (1, 2, 2, 7)
    model = Fixed()
    model.margin, model.reach = 9, 3
    assert (model.margin, model.reach, Fixed().margin) == (9, 3, 0)


@pytest.mark.parametrize("channels, classes, fewest", [(0, 2, 1), (1, 0, 1), (1, 1, 2)])
def test_impossible_channels_and_classes(channels, classes, fewest):
    with pytest.raises(ValueError, match=f"in_channels={channels}, classes={classes}; expected .* {fewest} class"):
        Network(channels, classes, fewest_classes=fewest)


def test_numbers_of_numpy_become_python_s():
    model = Network(np.int64(3), np.uint8(2))
    assert type(model.in_channels) is type(model.classes) is int


@by_name(NETWORKS)
def test_every_network_keeps_the_contract(network):
    model = network()
    assert isinstance(model, Network) and model.card == {}
    assert (model.halo is None) == bool(model.margin)
    assert 0 <= model.reach <= model.margin
    assert models.BUILDERS[network.name](**{k: v for k, v in model.config.items() if k != "builder"}).config == model.config
    x = patch(model.eval())
    assert torch.equal(model(model.cut(x) if len(model.cut(x)) > 1 else x), model(x))
    fast = model.for_inference()
    assert isinstance(fast, Network)
    for name in ("in_channels", "classes", "spatial_dims", "margin", "multiple", "halo", "reach"):
        assert getattr(fast, name) == getattr(model, name)


def test_sizes():
    model = Small()
    model.check_size(torch.zeros(1, 2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"3×4×2 voxels; .* loses 1 on each side and needs more than 2 along .*predict pads"):
        model.check_size(np.zeros((2, 3, 4, 2)))
    model.multiple = 4
    model.check_size(torch.zeros(6, 10, 14))
    with pytest.raises(ValueError, match=r"6×10×12 voxels; .* at 1/4 of the resolution and needs 2 and a multiple of 4 along"):
        model.check_size(torch.zeros(6, 10, 12))
    model.check_size(torch.zeros(6, 10, 12), multiple=1)
    model.margin, model.spatial_dims = 0, 2
    with pytest.raises(ValueError, match=r"4×6 pixels; .* needs a multiple of 4 along every axis"):
        model.check_size(torch.zeros(1, 2, 4, 6))


# -------------------------------------------------------------------------------------------------- other people's modules


def test_an_adapter_gives_any_module_the_contract(noise_case):
    torch.manual_seed(0)
    module, case = Halving(), noise_case((13, 10, 7))
    model = Adapter(module, in_channels=2, classes=3, multiple=2, halo=4)
    assert (model.spatial_dims, model.margin, model.multiple, model.halo, model.reach) == (3, 0, 2, 4, 0)
    whole = inference.predict(model, case, output="logits", progress=False)
    padded = np.pad(case.image, [(0, 0), (0, 1), (0, 0), (0, 1)], mode="reflect")
    with torch.no_grad():
        expected = module(torch.from_numpy(padded)[None])[0, :, :13, :10, :7]
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    tiled = inference.predict(model, case, output="logits", tile=4, progress=False)
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
    with pytest.raises(ValueError, match="network expects 2"):
        inference.predict(model, case.select(["flair"]), progress=False)
    assert features.list_layers(model)["module.coarse"].stride == (2, 2, 2)


def test_an_adapter_of_slices(noise_case):
    torch.manual_seed(0)
    module, case = nn.Conv2d(2, 3, 3), noise_case((9, 8, 2))
    model = Adapter(module, in_channels=2, classes=3, spatial_dims=2, margin=1)
    logits = inference.predict(model, case, output="logits", progress=False)
    with torch.no_grad():
        expected = module(torch.from_numpy(case.image).permute(3, 0, 1, 2)).permute(1, 2, 3, 0)
    np.testing.assert_allclose(logits[:, 1:-1, 1:-1], expected, atol=1e-5)


def test_an_adapter_takes_known_attributes_only():
    with pytest.raises(TypeError, match="stride"):
        Adapter(nn.Conv3d(1, 2, 3), in_channels=1, classes=2, stride=1)
    with pytest.raises(ValueError, match="at least 1 channel"):
        Adapter(nn.Conv3d(1, 2, 3), in_channels=0, classes=2)


def test_a_network_may_copy_the_contract_of_another():
    model, other = Small(), models.dm2d_seg(width=0.1)
    other.card = {"channels": ["flair"]}
    model.copy_contract(other)
    assert (model.in_channels, model.classes, model.spatial_dims) == (4, 5, 2)
    assert (model.margin, model.multiple, model.halo, model.reach) == (24, 3, None, 8)
    assert model.card == other.card and model.config is None


# ----------------------------------------------------------------------------------------------------------- the registry


def test_a_builder_is_registered_and_its_networks_can_be_saved(registry, tmp_path):
    @builder
    def small(*, in_channels: int = 2, classes: int = 2, bias: float = 0.0, first=None) -> Small:
        """Build a small network."""
        model = Small(in_channels, classes)
        nn.init.constant_(model.conv.bias, bias)
        return model

    assert registry["small"] is small and small.__doc__ == "Build a small network."
    model = small(classes=np.int64(3), bias=torch.tensor(0.5), first=Small()).eval()
    assert model.config == {"builder": "small", "in_channels": 2, "classes": 3, "bias": 0.5}
    assert all(type(value) in (str, int, float) for value in model.config.values())
    again = models.load(models.save(tmp_path / "small.safetensors", model, {"seed": 1}))
    assert isinstance(again, Small) and again.config == model.config and again.card == {"seed": 1}
    x = patch(model)
    assert torch.equal(again(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    del registry["small"]
    with pytest.raises(ValueError, match=r"asks for network 'small'.* import its module"):
        models.load(tmp_path / "small.safetensors")
    with pytest.raises(TypeError, match="positional"):
        small(2)


def test_options_in_the_configuration_are_plain():
    model = models.deepmedic(in_channels=1, classes=2, widths=(np.int64(3), 4), hidden=[np.int64(5)], dropout=np.float32(0.5))
    given = {"in_channels": 1, "classes": 2, "width": 1.0, "widths": [3, 4], "hidden": [5], "dropout": 0.5}
    assert model.config == {"builder": "deepmedic", **given}
    assert all(type(n) is int for n in model.config["widths"] + model.config["hidden"])
