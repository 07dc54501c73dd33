from __future__ import annotations

import math

import pytest
import torch
from torch import nn

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


def gradient(theta: float) -> float:
    return 2 * theta + 0.3 * math.cos(theta)


def reference(theta: float, steps: int, *, lr=1e-3, momentum=0.6, rho=0.9, eps=1e-4) -> list[float]:
    """The docstring's equations, one number at a time."""
    acc = velocity = 0.0
    path = []
    for _ in range(steps):
        g = gradient(theta)
        acc = rho * acc + (1 - rho) * g * g
        step = (1 - momentum) * lr * g / math.sqrt(acc + eps)
        velocity = momentum * velocity - step
        theta = theta + momentum * velocity - step
        path.append(theta)
    return path


def descend(optimizer_of, start: float, steps: int) -> list[float]:
    theta = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = optimizer_of([theta])
    path = []
    for _ in range(steps):
        theta.grad = torch.tensor([gradient(float(theta.detach()))], dtype=torch.float64)
        optimizer.step()
        path.append(float(theta.detach()))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 1e-2},
        {"lr": 0.05, "momentum": 0.0},
        {"lr": 0.02, "momentum": 0.9, "rho": 0.5, "eps": 1e-2},
        {"lr": 0.02, "rho": 0.0},
    ],
)
@pytest.mark.parametrize("start", [1.5, -0.7, 1e-3])
def test_against_the_scalar_reference(options, start):
    ours = descend(lambda p: RMSpropNesterov(p, **options), start, 12)
    assert ours == pytest.approx(reference(start, 12, **options), abs=1e-12)


def test_first_step_by_hand():
    """g = 2: acc = .4, step = .4 · .1 · 2 / √(.4 + 1e-4), and θ moves by 1.6 steps: one, and .6 of look-ahead."""
    theta = nn.Parameter(torch.tensor(1.0))
    theta.grad = torch.tensor(2.0)
    RMSpropNesterov([theta], lr=0.1).step()
    assert float(theta.detach()) == pytest.approx(1 - 1.6 * 0.08 / math.sqrt(0.4001), abs=1e-6)


def test_it_is_not_torchs_rmsprop():
    ours = descend(lambda p: RMSpropNesterov(p, lr=1e-2), 1.5, 10)
    torchs = descend(lambda p: torch.optim.RMSprop(p, lr=1e-2, alpha=0.9, eps=1e-4, momentum=0.6), 1.5, 10)
    assert abs(ours[-1] - torchs[-1]) > 0.05
    # Even at the same step length the look-ahead remains.
    scaled = descend(lambda p: torch.optim.RMSprop(p, lr=4e-3, alpha=0.9, eps=1e-2, momentum=0.6), 1.5, 10)
    assert abs(ours[-1] - scaled[-1]) > 1e-3


def test_several_parameters_groups_and_missing_gradients():
    torch.manual_seed(0)
    a, b, c = (nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (3, 2, 4))
    before = c.detach().clone()
    expected = {p: [reference(x, 5, lr=lr)[-1] for x in p.tolist()] for p, lr in ((a, 1e-2), (b, 1e-3))}
    optimizer = RMSpropNesterov([{"params": [a], "lr": 1e-2}, {"params": [b, c]}], lr=1e-3)
    for _ in range(5):
        for p in (a, b):
            p.grad = torch.tensor([gradient(x) for x in p.tolist()], dtype=torch.float64)
        optimizer.step()
    for p in (a, b):
        assert p.tolist() == pytest.approx(expected[p], abs=1e-12)
    assert torch.equal(c, before)


def test_state_round_trip():
    def start():
        theta = nn.Parameter(torch.tensor([1.0, -2.0]))
        return theta, RMSpropNesterov([theta], lr=1e-2)

    def go(theta, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            theta.pow(4).sum().backward()
            optimizer.step()

    whole, optimizer = start()
    go(whole, optimizer, 7)
    half, first = start()
    go(half, first, 3)
    rest, second = start()
    with torch.no_grad():
        rest.copy_(half)
    second.load_state_dict(first.state_dict())
    go(rest, second, 4)
    assert torch.equal(rest, whole)


def test_closure():
    theta = nn.Parameter(torch.tensor(1.0))
    optimizer = RMSpropNesterov([theta], lr=0.1)

    def closure():
        loss = theta.square()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 1 and float(theta.detach()) < 1


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"eps": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"rho": 1.0}])
def test_bad_settings(options):
    with pytest.raises(ValueError, match="expected lr >= 0"):
        RMSpropNesterov([nn.Parameter(torch.zeros(1))], **options)


# ---------------------------------------------------------------------------------------------------------- schedules


def rates(schedule, optimizer, scores) -> list[float]:
    found = []
    for score in scores:
        schedule.after({"step": len(found) + 1, "loss": 0.0, "learning_rate": 1.0, "seconds": 0.0, "dice": score})
        found.append(optimizer.param_groups[0]["lr"])
    return found


def adjustable(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def test_halve_on_plateau_of_a_score():
    optimizer = adjustable()
    schedule = HalveOnPlateau(optimizer, patience=2)
    scores = [0.5, 0.6, 0.6, 0.6005, 0.55, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    # .6 is best; two validations without improvement are sat through (.6005 is too small a gain), the third halves.
    assert rates(schedule, optimizer, scores) == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]


def test_halve_on_plateau_of_a_loss_down_to_a_minimum():
    """Mean losses of every two updates: 2, 1, 1.5, .5, .5, .5, .5; scores play no part."""
    optimizer = adjustable()
    schedule = HalveOnPlateau(optimizer, patience=0, window=2, minimum=0.3)
    found = []
    for mean in [2, 1, 1.5, 0.5, 0.5, 0.5, 0.5]:
        for loss in (mean - 0.4, mean + 0.4):
            schedule.after({"step": 1, "loss": loss, "dice": 0.9})
        found.append(optimizer.param_groups[0]["lr"])
    assert found == [1, 1, 0.5, 0.5, 0.3, 0.3, 0.3]
    with pytest.raises(ValueError, match="window=0"):
        HalveOnPlateau(optimizer, window=0)


def test_halve_on_plateau_resumes():
    scores = [0.5, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6]
    optimizer = adjustable()
    whole = rates(HalveOnPlateau(optimizer, patience=1), optimizer, scores)
    first = adjustable()
    schedule = HalveOnPlateau(first, patience=1)
    start = rates(schedule, first, scores[:2])
    second = adjustable()
    again = HalveOnPlateau(second, patience=1)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert start + rates(again, second, scores[2:]) == whole


def test_halve_at():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": 0.4}], lr=1.0)
    schedule = HalveAt(optimizer, steps=[2, 4, 5])
    found = []
    for step in range(1, 7):
        schedule.after({"step": step})
        found.append([g["lr"] for g in optimizer.param_groups])
    assert found == [[1, 0.4], [0.5, 0.2], [0.5, 0.2], [0.25, 0.1], [0.125, 0.05], [0.125, 0.05]]


# ---------------------------------------------------------------------------------------------- momentum and max-norm


def test_momentum_by_hand():
    """g = θ, m = .5, lr = .1 from 1: v = 1, θ = .9; v = .5 + .9, θ = .76; v = .7 + .76, θ = .614."""
    theta = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = MaxNormSGD([theta], lr=0.1, momentum=0.5)
    path = []
    for _ in range(3):
        theta.grad = theta.detach().clone()
        optimizer.step()
        path.append(float(theta.detach()))
    assert path == pytest.approx([0.9, 0.76, 0.614])


def test_long_kernels_are_scaled_back_and_biases_left_free():
    conv = nn.Conv2d(1, 3, 2)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[3.0, 0, 0, 4], [0.3, 0, 0.4, 0], [-1, 1, -1, 1]]).view(3, 1, 2, 2))
        conv.bias.fill_(7)
    for p in conv.parameters():
        p.grad = torch.zeros_like(p)
    MaxNormSGD(conv.parameters(), max_norm=1.5).step()
    expected = [[0.9, 0, 0, 1.2], [0.3, 0, 0.4, 0], [-0.75, 0.75, -0.75, 0.75]]
    torch.testing.assert_close(conv.weight.detach().view(3, 4), torch.tensor(expected))
    assert (conv.bias == 7).all()


def test_max_norm_holds_throughout_training():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3)
    optimizer = MaxNormSGD(conv.parameters(), lr=1.0, max_norm=0.5)
    reached = 0
    for _ in range(20):
        optimizer.zero_grad()
        conv(torch.randn(2, 2, 5, 5)).square().mean().neg().backward()
        optimizer.step()
        norms = conv.weight.detach().flatten(1).norm(dim=1)
        assert (norms <= 0.5 + 1e-6).all()
        reached += int((norms > 0.499).sum())
    assert reached > 40  # it would be longer if it could


def test_momentum_schedule():
    optimizer = MaxNormSGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = MomentumSchedule(optimizer, steps=8, epochs=4)
    rates, momenta = [], []
    for step in range(1, 9):
        schedule.after({"step": step})
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
    assert rates == pytest.approx([0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4, 1e-4])
    assert momenta == pytest.approx([0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9])


@pytest.mark.parametrize("options", [{"lr": -1}, {"momentum": 1}, {"max_norm": 0}])
def test_max_norm_sgd_rejects(options):
    with pytest.raises(ValueError, match="expected lr >= 0, momentum from 0 to below 1, max_norm > 0"):
        MaxNormSGD([nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5, "epochs": 0}, {"steps": 5, "momentum": (0.5, 1.0)}])
def test_momentum_schedule_rejects(options):
    optimizer = MaxNormSGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="expected at least 1 step and epoch, momenta from 0 to below 1"):
        MomentumSchedule(optimizer, **options)


# ------------------------------------------------------------------------------------------- normalised gradient descent


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def train(model, *, scale=1.0, steps=6, **options):
    optimizer = NormalizedSGD(model.parameters(), **options)
    x = torch.linspace(-1, 1, 12).view(4, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * model(x).square().sum()).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_normalized_sgd_by_hand():
    theta = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    other = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimizer = NormalizedSGD([theta, other], lr=0.5, momentum=0.8)
    velocity = torch.zeros(3, dtype=torch.float64)
    expected = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    for g in ([6.0, 2.0, 3.0], [0.0, 0.0, 1e-5]):  # the first has norm 7
        theta.grad, other.grad = torch.tensor(g[:2], dtype=torch.float64), torch.tensor(g[2:], dtype=torch.float64)
        optimizer.step()
        g = torch.tensor(g, dtype=torch.float64)
        velocity = 0.8 * velocity - 0.5 * g / g.norm()
        expected = expected + velocity
        torch.testing.assert_close(torch.cat([theta, other]).detach(), expected)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_normalized_sgd_does_not_mind_the_loss_s_scale(scale):
    torch.testing.assert_close(train(small_net(), scale=scale), train(small_net()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(train(small_net(), lr=0.1), train(small_net()))


def test_normalized_sgd_without_a_gradient():
    theta = nn.Parameter(torch.ones(2))
    optimizer = NormalizedSGD([theta], lr=0.1)
    optimizer.step()  # no .grad at all
    theta.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(theta.detach(), torch.ones(2))
    with pytest.raises(ValueError, match="momentum from 0 to below 1"):
        NormalizedSGD([theta], momentum=1)


def test_halve_on_slow_loss():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.25)
    schedule = HalveOnSlowLoss(optimizer, window=4, minimum=0.05)

    def observe(*values):
        for value in values:
            schedule.after({"loss": value})
        return optimizer.param_groups[0]["lr"], schedule.window

    assert observe(2, 2, 1, 1) == (0.25, 4)  # falls
    assert observe(1, 1, 0.97, 0.99) == (0.25, 4)  # just enough: .98
    assert observe(1, 1, 0.97, 1.0) == (0.125, 4)  # too slow
    assert observe(2, 2, 1, 1) == (0.125, 4)  # falls again, so the count starts anew
    assert observe(1, 1, 1, 1) == (0.0625, 4)
    assert observe(1, 1, 1, 1) == (0.05, 8)  # twice in a row, and never below the minimum
    assert observe(1, 1, 1, 1) == (0.05, 8)  # half a window
    again = HalveOnSlowLoss(optimizer, window=4, minimum=0.05)
    again.load_state_dict(schedule.state_dict())
    for s in (schedule, again):
        for value in (2, 2, 2, 2):
            s.after({"loss": value})
    assert again.state_dict() == schedule.state_dict() == {"halvings": 4, "window": 8, "losses": [], "slow": 1}
    with pytest.raises(ValueError, match="even window"):
        HalveOnSlowLoss(optimizer, window=3)


def test_inverse_time_decay():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
    schedule = InverseTimeDecay(optimizer, decay=0.01)
    for step, expected in ((1, (0.2 / 1.01, 0.1 / 1.01)), (100, (0.1, 0.05)), (300, (0.05, 0.025))):
        schedule.after({"step": step})
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(expected)
    with pytest.raises(ValueError, match="decay=-1"):
        InverseTimeDecay(optimizer, decay=-1)


def test_a_schedule_goes_on_by_its_own_plan():
    """A run of 10 updates is continued as one of 20: the rate is that of a run planned so."""
    short, long = adjustable(), adjustable()
    schedule = HalveAt(short, steps=[4, 8])
    for step in range(1, 11):
        schedule.after({"step": step})
    assert short.param_groups[0]["lr"] == 0.25
    again = HalveAt(long, steps=[8, 16])
    long.load_state_dict(short.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert long.param_groups[0]["lr"] == 0.5
    again.after({"step": 16})
    assert long.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    "make", [lambda o: HalveOnSlowLoss(o, window=2, minimum=0), lambda o: HalveOnPlateau(o, patience=0, window=1)]
)
def test_another_rate_is_honoured_by_a_resumed_schedule(make):
    first, second = adjustable(1.0), adjustable(0.1)
    schedule, again = make(first), make(second)
    for _ in range(4):
        schedule.after({"loss": 1.0})
    second.load_state_dict(first.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert first.param_groups[0]["lr"] < 1
    assert second.param_groups[0]["lr"] == pytest.approx(0.1 * first.param_groups[0]["lr"])


def test_a_scheduler_of_torch():
    ours, theirs = adjustable(), adjustable()
    schedule = FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(ours, 6))
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 6)
    for step in range(1, 6):
        ours.step(), theirs.step()
        schedule.after({"step": step})
        reference.step()
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] < 1
    again = FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(adjustable(), 6))
    again.load_state_dict(schedule.state_dict())
    assert again.state_dict() == schedule.state_dict()


def test_the_plain_schedule_changes_nothing():
    optimizer = adjustable(0.3)
    schedule = Schedule(optimizer)
    schedule.after({"step": 7, "loss": 1.0})
    assert optimizer.param_groups[0]["lr"] == 0.3 and schedule.state_dict() == {"step": 7}
