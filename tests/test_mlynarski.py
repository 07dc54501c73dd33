from __future__ import annotations

import pytest
import torch

from medseg_lite import features, models
from medseg_lite.models.layers import convolutions


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


@pytest.mark.parametrize("scales", [2, 3])
def test_features_of_variant_b_lie_where_the_image_does(scales):
    """An impulse in a feature changes the predictions around its own place, whose field is 5 voxels wide."""
    model = models.mlynarski_3d(variant="b", features=1, in_channels=1, width=0.1, scales=scales).eval()
    with torch.no_grad():
        for conv in convolutions(model):
            conv.weight.abs_()
    side, margin = 16 + 2 * model.margin, model.margin
    x = torch.zeros(1, 2, side, side, side)
    x[0, 1, margin + 8, margin + 6, margin + 9] = 1
    changed = (model(x) != model(torch.zeros_like(x))).any(1)[0].nonzero()
    assert changed.amin(0).tolist() == [6, 4, 7] and changed.amax(0).tolist() == [10, 8, 11]


@pytest.mark.parametrize("variant", ["standard", "a", "b", "c"])
def test_two_scales(variant, stir):
    """Without the coarsest scale the network sees 24 or 26 voxels, around the voxel that it predicts."""
    model = stir(models.mlynarski_3d(variant=variant, width=0.1, scales=2))
    assert (model.margin, model.multiple) == (12, 2)
    assert model(torch.randn(1, model.in_channels, 28, 30, 28)).shape == (1, 4, 4, 6, 4)
    for k, side in ((0, 26), (1, 24)):
        field = features.receptive_field(models.mlynarski_3d(width=0.1, scales=2), voxel=k, size=28)
        assert field.side == (side,) * 3 and abs(field.first[0] + field.last[0]) <= 1  # centred
    with pytest.raises(ValueError, match=r"scales=4; expected 3 .* or 2"):
        models.mlynarski_3d(scales=4)


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
    with pytest.raises(ValueError, match="a multiple of 16"):
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
