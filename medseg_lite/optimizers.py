"""The optimisers that the papers use and PyTorch does not have. Schedules are in `schedules`, whose names stand here too."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .schedules import FromTorch, HalveAt, HalveOnPlateau, HalveOnSlowLoss, InverseTimeDecay, MomentumSchedule, Schedule

__all__ = [
    "FromTorch",
    "HalveAt",
    "HalveOnPlateau",
    "HalveOnSlowLoss",
    "InverseTimeDecay",
    "MaxNormSGD",
    "MomentumSchedule",
    "NormalizedSGD",
    "RMSpropNesterov",
    "Schedule",
]


class RMSpropNesterov(torch.optim.Optimizer):
    """RMSProp with Nesterov momentum, the optimiser of DeepMedic.

        acc  ← ρ acc + (1 − ρ) g²
        step = (1 − m) · lr · g / √(acc + ε)
        v    ← m v − step
        θ    ← θ + m v − step

    `torch.optim.RMSprop` differs in three points: it has no Nesterov look-ahead, does not scale the step by 1 − m, and
    adds ε outside the root.

    Args:
        parameters: parameters to train.
        lr: learning rate (1e-3 in the paper; 1e-4 for Shallow).
        momentum: factor m of the momentum (0.6).
        rho: decay ρ of the average of squared gradients (0.9).
        eps: constant ε inside the root (1e-4).

    Source: Kamnitsas et al. 2017, appendix B, and its code for ρ, ε and the (1 − m) factor.
    Taught in notebook 05.
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
        """Make one update from the gradients in `.grad`."""
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
        parameters: parameters to train.
        lr: learning rate (.005 in the paper).
        momentum: factor m of the momentum at the start (.5); `MomentumSchedule` raises it.
        max_norm: longest kernel. The paper bounds the kernels but gives no number.

    Source: Havaei et al. 2017, section 3.3.
    Taught in notebook 02.
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
        """Make one update from the gradients in `.grad`."""
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1 and p.grad is not None:
                    p.renorm_(p=2, dim=0, maxnorm=self.max_norm)
        return loss


class NormalizedSGD(torch.optim.Optimizer):
    """Gradient descent whose steps are as long as the learning rate says, whatever the gradient's length.

        v ← m v − lr · g / ‖g‖
        θ ← θ + v

    ‖g‖ is the Euclidean norm over all parameters together. A loss multiplied by a constant gives the same steps. Where the
    gradient is zero, only momentum moves.

    Args:
        parameters: parameters to train.
        lr: length of a step without momentum (.25 in the paper, at the start).
        momentum: factor m of the momentum. The paper gives no number; .9 is the author's in later code.

    Source: Mlynarski et al. 2019, eq. 4. The gradient is that of several batches: `training.fit(accumulate=...)`.
    Taught in notebook 13.
    """

    def __init__(self, parameters: Iterable, *, lr: float = 0.25, momentum: float = 0.9):
        if lr < 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr={lr}, momentum={momentum}; expected lr >= 0 and momentum from 0 to below 1")
        super().__init__(parameters, {"lr": float(lr), "momentum": float(momentum)})

    @torch.no_grad()
    def step(self, closure=None):
        """Make one update from the gradients in `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        grads = [p.grad for _, params in groups for p in params]
        if not grads:
            return loss
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        for group, params in groups:
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocity = [self.state[p]["velocity"] for p in params]
            factor = torch.where(norm > 0, group["lr"] / norm, 0.0)
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_sub_(velocity, torch._foreach_mul([p.grad for p in params], factor))
            torch._foreach_add_(params, velocity)
        return loss
