"""Losses, optimisers and schedules on a GPU, real or fake: the numbers of the CPU, also under autocast, and no waiting."""

from __future__ import annotations

import io
from functools import partial

import fake_device
import pytest
import torch
from torch import Tensor, nn

from medseg_lite import losses, models
from medseg_lite.optimizers import (
    FromTorch,
    HalveAt,
    HalveOnPlateau,
    HalveOnSlowLoss,
    InverseTimeDecay,
    MaxNormSGD,
    MomentumSchedule,
    NormalizedSGD,
    RMSpropNesterov,
    Schedule,
)

SHARES = (0.7, 0.1, 0.1, 0.1)


def masked(logits: Tensor, target: Tensor, **options) -> Tensor:
    return losses.cross_entropy(logits, target, mask=target != 2, **options)


def supervised(logits: Tensor, target: Tensor, **options) -> Tensor:
    return losses.deep_supervision((logits, [logits * 0.5, logits + 1]), target, **options)


LOSSES = {
    "cross_entropy": losses.cross_entropy,
    "cross_entropy, weighted": partial(losses.cross_entropy, class_weights=(1.0, 20.0, 3.0, 4.0)),
    "cross_entropy, weighted for a rare class": partial(losses.cross_entropy, class_weights=(1.0, 1e5, 3.0, 4.0)),
    "cross_entropy, masked": masked,
    "cross_entropy, masked and weighted": partial(masked, class_weights=(1.0, 20.0, 3.0, 4.0)),
    "balanced_cross_entropy": partial(losses.balanced_cross_entropy, target_weights=SHARES),
    "deep_supervision": supervised,
    "deep_supervision, balanced": partial(supervised, loss=partial(losses.balanced_cross_entropy, target_weights=SHARES)),
    "jaccard_distance": losses.jaccard_distance,
    "dice_loss": losses.dice_loss,
    "dice_loss of one output": lambda logits, target: losses.dice_loss(logits[:, :1], target),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def example(dtype: torch.dtype = torch.float32, space: tuple[int, ...] = (12, 12, 12)) -> tuple[Tensor, Tensor]:
    """Return logits `(2, 4, *space)` and a label in which class 1 is rare."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 4, *space, generator=generator)).to(dtype)
    target = torch.randint(4, (2, *space), generator=generator)
    return logits, target.where((target != 1) | (torch.rand(target.shape, generator=generator) < 0.02), 0)


def value_and_gradient(name: str, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = LOSSES[name](logits, target)
    value.backward()
    return value.detach(), logits.grad


@every_loss
@pytest.mark.parametrize("kind", [torch.int64, torch.uint8], ids=str)
def test_losses_in_float32(gpu, name, kind):
    logits, target = example()
    expected, gradient = value_and_gradient(name, logits, target)
    value, there = value_and_gradient(name, logits.cuda(), target.to(kind).cuda())
    assert value.is_cuda and there.is_cuda and value.dtype == torch.float32
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(there.cpu(), gradient, rtol=1e-4, atol=1e-7)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gpu", ["A100"], indirect=True)
def test_losses_under_autocast(gpu, name, dtype):
    """What a network returns in half precision costs what the same numbers cost in float64."""
    logits, target = example(dtype, (40, 48, 48))  # more voxels than float16 can count
    expected, gradient = value_and_gradient(name, logits.double(), target)
    with torch.autocast("cuda", dtype=dtype):
        value, there = value_and_gradient(name, logits.cuda(), target.cuda())
    assert value.dtype == torch.float32 and there.dtype == dtype
    torch.testing.assert_close(value.cpu().double(), expected.double(), rtol=1e-3, atol=1e-5)
    rounding = torch.finfo(dtype).eps * gradient.abs().max() + torch.finfo(torch.float16).tiny
    assert (there.cpu().double() - gradient).abs().max() < 4 * rounding


@every_loss
def test_losses_do_not_wait(gpu, name):
    if not gpu.counted:
        pytest.skip("a real GPU counts nothing")
    logits, target = example()
    value_and_gradient(name, logits.cuda(), target.cuda())
    assert not gpu.syncs


def test_minmax_jaccard(gpu):
    prediction, target = example()[1], example()[1].flip(1)
    value = losses.minmax_jaccard(prediction.cuda(), target.cuda())
    torch.testing.assert_close(value.cpu(), losses.minmax_jaccard(prediction, target))


def test_weight_penalty(gpu):
    model = models.deepmedic(width=0.1)
    expected = losses.weight_penalty(model, l1=1e-6, l2=1e-4).item()
    penalty = losses.weight_penalty(model.cuda(), l1=1e-6, l2=1e-4)
    penalty.backward()
    assert model.normal[0].conv.weight.grad.is_cuda and penalty.item() == pytest.approx(expected, rel=1e-5)


def test_labels_on_the_cpu_are_noticed(gpu):
    logits, target = example()
    for loss in LOSSES.values():
        with pytest.raises(RuntimeError, match=r"two devices|same device|on cpu"):
            loss(logits.cuda(), target)


@pytest.mark.parametrize("name", ["cross_entropy, masked", "balanced_cross_entropy", "jaccard_distance", "dice_loss"])
def test_losses_on_apple_s_gpu(name):
    logits, target = example()
    expected, gradient = value_and_gradient(name, logits, target)
    with fake_device.mps():
        value, there = value_and_gradient(name, logits.to("mps"), target.to("mps"))
        torch.testing.assert_close((value.cpu(), there.cpu()), (expected, gradient))


def test_minmax_jaccard_on_apple_s_gpu():
    target = example()[1]
    with fake_device.mps():
        assert losses.minmax_jaccard(target.to("mps"), target.to("mps")).item() == 1


# --------------------------------------------------------------------------------------------------------- optimisers

OPTIMISERS = {
    "RMSpropNesterov": partial(RMSpropNesterov, lr=0.01),
    "MaxNormSGD": partial(MaxNormSGD, lr=0.1, max_norm=0.5),
    "NormalizedSGD": NormalizedSGD,
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
SCHEDULES = {
    "Schedule": Schedule,
    "HalveAt": partial(HalveAt, steps=[2, 4]),
    "InverseTimeDecay": partial(InverseTimeDecay, decay=0.5),
    "HalveOnPlateau": partial(HalveOnPlateau, patience=1),
    "HalveOnSlowLoss": partial(HalveOnSlowLoss, window=2, ratio=0.5),
    "FromTorch": lambda optimizer: FromTorch(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)),
}
every_optimiser = pytest.mark.parametrize("name", OPTIMISERS)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.PReLU(6), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 4, 1, bias=False))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(3, 2, 8, 8, generator=generator), torch.randint(4, (3, 4, 4), generator=generator)


def learn(model: nn.Module, optimizer, steps: range, schedule: Schedule | None = None) -> None:
    """Make updates; the last but one has no gradient for the last layer."""
    device = next(model.parameters()).device
    for step in steps:
        optimizer.zero_grad()
        x, target = (t.to(device) for t in batch(step))
        losses.cross_entropy(model(x), target).backward()
        if step == 4:
            model[3].weight.grad = None
        optimizer.step()
        if schedule is not None:
            schedule.after({"step": step + 1, "loss": 1.0, "seconds": 0.1, "score": 0.5})


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    for (name, there), here in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=1e-4, atol=1e-6, msg=name)


def state_of(optimizer) -> dict:
    """Return the optimiser's state after a way through a file, on the CPU."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def resume(name: str, gpu, device: str) -> None:
    """Make six updates, the last three after a way through a file, and compare with six in one go on the CPU."""
    here, there = network(), network().to(device)
    learn(here, OPTIMISERS[name](here.parameters()), range(6))
    optimizer = OPTIMISERS[name](there.parameters())
    learn(there, optimizer, range(3))
    again = OPTIMISERS[name](there.parameters())
    again.load_state_dict(state_of(optimizer))
    tensors = [t for state in again.state.values() for key, t in state.items() if isinstance(t, Tensor) and key != "step"]
    assert {t.device.type for t in tensors} == {device}
    if gpu.counted:
        gpu.syncs.clear()
    learn(there, again, range(3, 6))
    assert not gpu.counted or not gpu.syncs
    assert_same(there, here)


@every_optimiser
def test_optimisers(gpu, name):
    resume(name, gpu, "cuda")


@every_optimiser
def test_optimisers_on_apple_s_gpu(name):
    with fake_device.mps() as gpu:
        resume(name, gpu, "mps")


@every_optimiser
def test_optimisers_under_a_scaler(gpu, name):
    """Losses in float16 give almost the CPU's weights, and an update whose gradients overflow changes nothing."""
    here, there = network(), network().cuda()
    ours, theirs = OPTIMISERS[name](here.parameters()), OPTIMISERS[name](there.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    for step in range(3):
        before = [p.detach().cpu().clone() for p in there.parameters()]
        theirs.zero_grad()
        x, target = (t.cuda() for t in batch(step))
        with torch.autocast("cuda", dtype=torch.float16):
            loss = losses.cross_entropy(there(x), target)
        scaler.scale(loss * (1e6 if step == 1 else 1)).backward()
        scaler.step(theirs)
        scaler.update()
        if step == 1:
            assert scaler.get_scale() == 128
            assert all(torch.equal(p.detach().cpu(), b) for p, b in zip(there.parameters(), before))
        else:
            learn(here, ours, range(step, step + 1))
            assert not all(torch.equal(p.detach().cpu(), b) for p, b in zip(there.parameters(), before))
    start, found, expected = (torch.cat([p.detach().cpu().flatten() for p in m.parameters()]) for m in (network(), there, here))
    assert (found - expected).norm() < 0.1 * (expected - start).norm()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(gpu, name):
    here, there = network(), network().cuda()
    rates = []
    for model in (here, there):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        learn(model, optimizer, range(6), SCHEDULES[name](optimizer))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] and (rates[0] < 0.1) == (name != "Schedule")
    assert not gpu.counted or not gpu.syncs
    assert_same(there, here)


def test_the_momentum_schedule(gpu):
    here, there = network(), network().cuda()
    for model in (here, there):
        optimizer = MaxNormSGD(model.parameters(), lr=0.1)
        learn(model, optimizer, range(6), MomentumSchedule(optimizer, steps=6))
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.9)
    assert_same(there, here)


@pytest.mark.parametrize("kind", [RMSpropNesterov, NormalizedSGD])
def test_updates_of_many_parameters_take_few_kernels(gpu, kind):
    """The optimisers work on lists, so the number of kernels does not depend on the number of parameters."""
    if not gpu.counted:
        pytest.skip("a real GPU counts nothing")
    launches = []
    for count in (3, 30):
        parameters = [nn.Parameter(torch.ones(2, device="cuda")) for _ in range(count)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer = kind(parameters)
        optimizer.step()
        gpu.launches.clear()
        optimizer.step()
        launches.append(gpu.launches.total())
    assert launches[0] == launches[1] < 15
