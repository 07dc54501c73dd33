"""One battery for all networks. A new network is one more row of the table in `network_table.py`."""

from __future__ import annotations

import pytest
import torch
from network_table import DEEPMEDIC, DROZDZAL, HAVAEI, KAYALIBAY, MLYNARSKI, NETWORKS, VALID, by_name, patch
from torch import nn

from medseg_lite import models
from medseg_lite.features import measured_receptive_field
from medseg_lite.models.havaei import CascadeCNN
from medseg_lite.models.layers import RollingBatchNorm, convolutions

every_network = by_name(NETWORKS)


def test_the_table_is_complete():
    papers = {"DEEPMEDIC": DEEPMEDIC, "HAVAEI": HAVAEI, "KAYALIBAY": KAYALIBAY, "DROZDZAL": DROZDZAL, "MLYNARSKI": MLYNARSKI}
    for paper, rows in papers.items():
        assert {n.name for n in rows} == set(getattr(models, paper))
    assert {n.name for n in NETWORKS} == set(models.NETWORKS) <= set(models.__all__)
    assert len(models.NETWORKS) == sum(map(len, papers.values()))
    assert all(getattr(models, name) is models.BUILDERS[name] for name in models.NETWORKS)


@every_network
def test_parameter_count(network):
    for (channels, classes), expected in network.parameters.items():
        model = network(width=1, in_channels=channels, classes=classes)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert f"{network.parameters[network.example]:,} parameters" in models.BUILDERS[network.name].__doc__


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
    scale = dense.std()  # an untrained network's logits are small
    torch.testing.assert_close(model(x[corner]) / scale, dense[corner] / scale, rtol=1e-4, atol=1e-3)
    assert x[corner].shape[-1] == g + 2 * m


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
    trained = model.second if isinstance(model, CascadeCNN) else model
    assert tuple(m.p for m in trained.modules() if isinstance(m, nn.Dropout) and m.p) == network.dropout
    x = patch(model, batch=2)
    model.train()
    assert torch.equal(model(x), model(x)) is not bool(network.dropout)
    model.eval()
    assert torch.equal(model(x), model(x))


@every_network
def test_impossible_channels_and_classes(network):
    fewest = 1 if network in DROZDZAL else 2
    for options in ({"in_channels": 0}, {"classes": fewest - 1}):
        with pytest.raises(ValueError, match=f"expected at least 1 channel and {fewest} class"):
            network(**options)
