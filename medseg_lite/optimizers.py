"""Optimisers and schedules that the papers use and PyTorch does not have."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau


class RMSpropNesterov(torch.optim.Optimizer):
    """RMSProp with Nesterov momentum, as DeepMedic trains.

        acc  ← ρ acc + (1 − ρ) g²
        step = (1 − m) · lr · g / √(acc + ε)
        v    ← m v − step
        θ    ← θ + m v − step

    `torch.optim.RMSprop` differs in three points: it has no Nesterov look-ahead, does not scale the step by 1 − m, and
    adds ε outside the root.

    Args:
        parameters: what to train.
        lr: learning rate (1e-3 in the paper; 1e-4 for Shallow).
        momentum: m (0.6).
        rho: decay of the squared-gradient average (0.9).
        eps: ε, inside the root (1e-4).

    Source: Kamnitsas et al. 2017, appendix B, and its code for ρ, ε and the (1 − m) factor.
    """

    def __init__(self, parameters: Iterable, *, lr: float = 1e-3, momentum: float = 0.6, rho: float = 0.9, eps: float = 1e-4):
        if lr < 0 or eps <= 0 or not 0 <= momentum < 1 or not 0 <= rho < 1:
            raise ValueError(
                f"lr={lr}, momentum={momentum}, rho={rho}, eps={eps}; expected lr >= 0, eps > 0, "
                "momentum and rho from 0 to below 1"
            )
        # Plain numbers: a saved state with NumPy scalars could not be read back without pickle.
        settings = {"lr": lr, "momentum": momentum, "rho": rho, "eps": eps}
        super().__init__(parameters, {name: float(value) for name, value in settings.items()})

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients in `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["acc"] = torch.zeros_like(p)
                    self.state[p]["velocity"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            acc = [self.state[p]["acc"] for p in params]
            velocity = [self.state[p]["velocity"] for p in params]
            momentum = group["momentum"]

            torch._foreach_mul_(acc, group["rho"])
            torch._foreach_addcmul_(acc, grads, grads, 1 - group["rho"])
            root = torch._foreach_sqrt(torch._foreach_add(acc, group["eps"]))
            steps = torch._foreach_div(grads, root)
            torch._foreach_mul_(steps, (1 - momentum) * group["lr"])
            torch._foreach_mul_(velocity, momentum)
            torch._foreach_sub_(velocity, steps)
            torch._foreach_add_(params, velocity, alpha=momentum)
            torch._foreach_sub_(params, steps)
        return loss


class MaxNormSGD(torch.optim.SGD):
    """Gradient descent with momentum that keeps every kernel short.

        v ← m v + g
        θ ← θ − lr · v,  then every kernel longer than `max_norm` (Euclidean norm) is scaled back to it

    A kernel is what makes one output map: `weight[o]` of a convolution, one piece of a maxout unit. Biases are left free.

    Args:
        parameters: what to train.
        lr: learning rate (.005 in the paper).
        momentum: m at the start (.5); `MomentumSchedule` raises it.
        max_norm: longest kernel. The paper bounds the kernels but gives no number.

    Source: Havaei et al. 2017, section 3.3.
    """

    def __init__(self, parameters: Iterable, *, lr: float = 0.005, momentum: float = 0.5, max_norm: float = 2.0):
        if lr < 0 or not 0 <= momentum < 1 or not max_norm > 0:
            raise ValueError(
                f"lr={lr}, momentum={momentum}, max_norm={max_norm}; expected lr >= 0, momentum from 0 to below 1, max_norm > 0"
            )
        super().__init__(parameters, lr=float(lr), momentum=float(momentum))
        self.max_norm = float(max_norm)

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients in `.grad`."""
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1 and p.grad is not None:
                    p.renorm_(p=2, dim=0, maxnorm=self.max_norm)
        return loss


class MomentumSchedule:
    """Raise the momentum evenly over a run, and cut the learning rate after each of its epochs.

    Args:
        optimizer: whose momentum and rate to change.
        steps: updates of the whole run.
        epochs: equal parts of the run; the rate is multiplied by `decay` after each.
        decay: .1 in the paper.
        momentum: at the start and at the end of the run (.5 and .9).

    Source: Havaei et al. 2017, section 3.3.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        epochs: int = 3,
        decay: float = 0.1,
        momentum: tuple[float, float] = (0.5, 0.9),
    ):
        if steps < 1 or epochs < 1 or not all(0 <= m < 1 for m in momentum):
            raise ValueError(
                f"steps={steps}, epochs={epochs}, momentum={momentum}; expected at least 1 step and epoch, momenta from 0 to below 1"
            )
        self.optimizer, self.steps, self.epochs, self.decay, self.momentum = optimizer, steps, epochs, decay, momentum
        self.rate = optimizer.param_groups[0]["lr"]

    def after(self, step: int) -> None:
        """Called after every update with the number of updates made."""
        first, last = self.momentum
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.decay ** min(self.epochs * step // self.steps, self.epochs - 1)
            group["momentum"] = first + (last - first) * step / self.steps


class NormalizedSGD(torch.optim.Optimizer):
    """Gradient descent whose steps are as long as the learning rate says, whatever the gradient's length.

        v ← m v − lr · g / ‖g‖
        θ ← θ + v

    ‖g‖ is the Euclidean norm over all parameters together. A loss multiplied by a constant gives the same steps. Where the
    gradient is zero, only momentum moves.

    Args:
        parameters: what to train.
        lr: length of a step without momentum (.25 in the paper, at the start).
        momentum: m. The paper has momentum but gives no number; .9 is the author's in later code.

    Source: Mlynarski et al. 2019, eq. 4. The gradient is that of several batches: `training.fit(accumulate=...)`.
    """

    def __init__(self, parameters: Iterable, *, lr: float = 0.25, momentum: float = 0.9):
        if lr < 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr={lr}, momentum={momentum}; expected lr >= 0 and momentum from 0 to below 1")
        super().__init__(parameters, {"lr": float(lr), "momentum": float(momentum)})

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients in `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return loss
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for _, p in moved])))
        for group, p in moved:
            if not self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(p)
            velocity = self.state[p]["velocity"].mul_(group["momentum"])
            velocity.sub_(torch.where(norm > 0, p.grad * (group["lr"] / norm), 0.0))
            p.add_(velocity)
        return loss


class HalveOnSlowLoss:
    """Halve the learning rate when the training loss no longer falls fast enough.

    After every `window` updates the mean loss of the window's second half is compared with that of its first half. If it is
    above `ratio` times that, the rate is halved; if that happens twice in a row, the window is doubled, for the changes
    have become too small to be seen in a short one.

    Args:
        optimizer: whose rate to change.
        window: updates F between comparisons, 200 in the paper.
        ratio: d_loss, .98 in the paper.
        minimum: the rate is never set below this, .001 in the paper.

    Source: Mlynarski et al. 2019, section 2.4.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, window: int = 200, ratio: float = 0.98, minimum: float = 0.001):
        if window < 2 or window % 2 or ratio <= 0 or minimum < 0:
            raise ValueError(f"window={window}, ratio={ratio}, minimum={minimum}; expected an even window and positive numbers")
        self.optimizer, self.window, self.ratio, self.minimum = optimizer, window, ratio, minimum
        self.losses: list[float] = []
        self.slow = 0

    def observe(self, loss: float) -> None:
        """Called after every update with its training loss."""
        self.losses.append(float(loss))
        if len(self.losses) < self.window:
            return
        half = self.window // 2
        before, now = sum(self.losses[:half]) / half, sum(self.losses[half:]) / half
        self.losses = []
        if now <= self.ratio * before:
            self.slow = 0
            return
        for group in self.optimizer.param_groups:
            group["lr"] = max(group["lr"] / 2, self.minimum)
        self.slow += 1
        if self.slow == 2:
            self.window, self.slow = 2 * self.window, 0

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"window": self.window, "losses": self.losses, "slow": self.slow}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken."""
        self.window, self.losses, self.slow = state["window"], list(state["losses"]), state["slow"]


class HalveOnPlateau(ReduceLROnPlateau):
    """Halve the learning rate when a score has not improved for `patience` validations.

    Args:
        optimizer: whose rate to change.
        patience: validations without improvement to sit through.
        mode: "max" for a score such as Dice, "min" for a loss.
        threshold: smallest absolute change that counts as an improvement.
        minimum: the rate is never set below this.

    Source: Kamnitsas et al. 2017, appendix B (halved whenever convergence plateaus).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        patience: int = 3,
        mode: str = "max",
        threshold: float = 1e-3,
        minimum: float = 0.0,
    ):
        super().__init__(
            optimizer, mode=mode, factor=0.5, patience=patience, threshold=threshold, threshold_mode="abs", min_lr=minimum
        )


class InverseTimeDecay:
    """Learning rate lr / (1 + decay · t) after t updates.

    Args:
        optimizer: whose rate to change.
        decay: .001 in the paper.

    Source: Drozdzal et al. 2018, section 4 ("learning rate decay", which is this in the library that they used).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, decay: float = 0.001):
        if decay < 0:
            raise ValueError(f"decay={decay}; expected 0 or more")
        self.optimizer, self.decay = optimizer, decay
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def after(self, step: int) -> None:
        """Called after every update with the number of updates made."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate / (1 + self.decay * step)


class HalveAt:
    """Halve the learning rate at given steps, the fixed schedule of DeepMedic's published configuration.

    Args:
        optimizer: whose rate to change.
        steps: update counts after which the rate is halved.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, steps: Iterable[int]):
        self.optimizer, self.steps = optimizer, frozenset(steps)

    def after(self, step: int) -> None:
        """Called after every update with the number of updates made."""
        if step in self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] /= 2
