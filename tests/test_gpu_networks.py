"""Every network on a GPU, real or fake: the CPU's numbers in float32, close ones in half precision, and no waiting."""

from __future__ import annotations

import copy
from functools import cache
from typing import NamedTuple

import fake_device
import pytest
import torch
from network_table import DEEPMEDIC, DROZDZAL, HAVAEI, KAYALIBAY, MLYNARSKI, NETWORKS, by_name, patch
from safetensors import safe_open
from torch import Tensor, nn

from medseg_lite import losses, models

HALF = {
    torch.float16: (0.05, 1.5),
    torch.bfloat16: (0.25, 3.0),
}  # error of the logits; factor between the norms of the gradients
EVERY_KIND = [DEEPMEDIC[5], HAVAEI[0], HAVAEI[3], *KAYALIBAY, DROZDZAL[2], DROZDZAL[4], *MLYNARSKI]


class Learned(NamedTuple):
    """An update's results on the CPU: logits and their type, gradients, and all weights and statistics after it."""

    logits: Tensor
    dtype: torch.dtype
    gradients: Tensor
    state: Tensor


def example(network) -> tuple[models.Network, Tensor]:
    """Return a network and a batch of four. Networks that pad get a second row of voxels at their lowest resolution."""
    model = network()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # whose random numbers differ between devices
    out = None if model.margin else max(16 if model.spatial_dims == 2 else 1, 2 * model.multiple)
    return model, patch(model, batch=4, out=out)


def loss(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (len(logits), *logits.shape[2:])
    target = torch.randint(max(2, logits.shape[1]), shape, generator=generator).to(logits.device)
    return losses.dice_loss(logits, target) if logits.shape[1] == 1 else losses.cross_entropy(logits.float(), target)


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten().float().cpu() for t in tensors])


def learn(network, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[models.Network, Learned]:
    """Make one update, scaled in float16, and return the network and the results."""
    model, x = example(network)
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=dtype == torch.float16)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(x.to(device))
        value = loss(logits)
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    gradients = flat(p.grad for p in model.parameters() if p.grad is not None)
    scaler.step(optimizer)
    scaler.update()
    assert not scaler.is_enabled() or scaler.get_scale() == 1024, "the update was skipped"
    return model, Learned(logits.detach().float().cpu(), logits.dtype, gradients, flat(model.state_dict().values()))


@cache
def on_the_cpu(network_name: str) -> Learned:
    network = next(n for n in NETWORKS if n.name == network_name)
    before = flat(network().state_dict().values())
    learned = learn(network, torch.device("cpu"))[1]
    assert not torch.equal(learned.state, before)
    return learned


def error(found: Tensor, expected: Tensor) -> float:
    """Return the length of the difference in parts of the expected length, which counts as at least 1e-3 for a number."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-3 * expected.numel() ** 0.5))


def assert_equal(found: Learned, expected: Learned, gpu) -> None:
    # A real GPU adds up in another order, and networks of few voxels amplify that. On a CPU too, kernels that are chosen by the layout
    # of memory differ in the last digit, and then a maxout unit with two nearly equal pieces takes the other one.
    limit = 5e-4 if gpu.counted else 2e-2
    for name in ("logits", "gradients", "state"):
        assert error(getattr(found, name), getattr(expected, name)) < limit, name


@by_name(NETWORKS)
def test_float32_gives_the_cpu_s_numbers(gpu, network):
    model, found = learn(network, torch.device("cuda"))
    assert found.dtype == torch.float32
    assert_equal(found, on_the_cpu(network.name), gpu)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    if gpu.counted:
        assert not gpu.launches["half"] and not gpu.launches["float64"]


@by_name(NETWORKS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gpu", ["A100"], indirect=True)
def test_half_precision_is_close(gpu, network, dtype):
    model, found = learn(network, torch.device("cuda"), dtype)
    expected, (limit, factor) = on_the_cpu(network.name), HALF[dtype]
    assert found.dtype in (dtype, torch.float32)
    assert error(found.logits, expected.logits) < limit
    assert 1 / factor < found.gradients.norm() / expected.gradients.norm() < factor
    assert found.state.isfinite().all() and all(p.dtype == torch.float32 for p in model.parameters())
    if gpu.counted:
        assert gpu.flops["half"] and not gpu.flops["float32"]


@by_name(NETWORKS)
def test_an_update_does_not_wait_for_the_gpu(gpu, network):
    if not gpu.counted:
        pytest.skip("a real GPU counts nothing")
    model, x = example(network)
    model.cuda().train()(x.cuda()).float().square().mean().backward()
    assert not gpu.syncs


@by_name(NETWORKS)
def test_segmenting_gives_the_cpu_s_numbers(gpu, network, stir):
    model, x = example(network)
    stir(model)
    with torch.no_grad():
        expected = model(x)
        there = copy.deepcopy(model).cuda()
        fast = there.for_inference().eval()
        for way in (there, fast, model.for_inference().cuda()):
            y = way(x.cuda())
            assert y.is_cuda and error(y.cpu(), expected) < (1e-4 if gpu.counted else 1e-2)
        inputs = tuple(t.cuda() for t in model.cut(x))
        assert error(fast(inputs if len(inputs) > 1 else inputs[0]).cpu(), expected) < 1e-2


@by_name(NETWORKS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("gpu", ["A100"], indirect=True)
def test_segmenting_in_bfloat16_is_close(gpu, network, stir, device):
    model, x = example(network)
    stir(model).to(device)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        fast, slow = (net(x.to(device)).float().cpu() for net in (model.for_inference(), model))
    assert error(fast, slow) < 0.05


def facts(path) -> tuple[dict, dict]:
    """Return what a checkpoint holds: its metadata, and the bytes of each tensor."""
    with safe_open(path, framework="np") as file:
        return file.metadata(), {name: (file.get_tensor(name).dtype, file.get_tensor(name).tobytes()) for name in file.keys()}


@by_name(NETWORKS)
def test_a_checkpoint_does_not_know_the_device(gpu, network, stir, tmp_path):
    model = stir(network())
    expected = model.state_dict()
    here = models.save(tmp_path / "here.safetensors", model, {"steps": 1})
    there = models.save(tmp_path / "there.safetensors", copy.deepcopy(model).cuda(), {"steps": 1})
    assert facts(here) == facts(there)
    state = tmp_path / "last.pt"
    torch.save(copy.deepcopy(model).cuda().state_dict(), state)
    for location in ("cpu", "cuda"):
        again = models.load(there).to(location)
        assert {t.device.type for t in again.state_dict().values()} == {location}
        again.load_state_dict(torch.load(state, map_location=location, weights_only=True))
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor.cpu(), expected[name]), name


@by_name([n for n in NETWORKS if n.dropout])
def test_dropout_draws_from_the_gpu(gpu, network):
    model = network().cuda().train()
    x = patch(model, batch=2).cuda()
    state, cpu = torch.cuda.get_rng_state(), torch.get_rng_state()
    first, other = model(x), model(x)
    torch.cuda.set_rng_state(state)
    assert torch.equal(model(x), first) and not torch.equal(other, first)
    assert torch.equal(torch.get_rng_state(), cpu)


@by_name(EVERY_KIND)
def test_apple_s_gpu(network):
    expected = on_the_cpu(network.name)
    with fake_device.mps() as gpu:
        model, found = learn(network, torch.device("mps"))
        assert_equal(found, expected, gpu)
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"mps"}
        fast = model.eval().for_inference()
        assert fast(example(network)[1].to("mps")).is_mps
