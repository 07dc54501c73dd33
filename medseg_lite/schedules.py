"""The schedules of the learning rate that the papers use, and PyTorch's own."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LRScheduler

# Entries of a row of the history. What else stands there is a validation score.
NO_SCORES = ("step", "loss", "learning_rate", "seconds")


class Schedule:
    """The base class of every schedule. A schedule changes the learning rate during a run; this one keeps it constant.

    A subclass either says in `factor` what the rate is multiplied by after a number of updates, or decides in `after` by what
    happened so far.

    Args:
        optimizer: the optimizer whose rate changes.
    """

    changing: tuple[str, ...] = ("step",)  # attributes that change during a run

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.step = 0

    def factor(self, step: int) -> float:
        """Return the learning rate after `step` updates, as a multiple of the rate at the start."""
        return 1.0

    def describe(self) -> dict:
        """Return the name and the settings of the schedule, as plain values."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, (int, float, str, tuple))}
        return {"name": type(self).__name__, **{name: value for name, value in plain.items() if name not in self.changing}}

    def begin_at(self, step: int) -> None:
        """Take over from another schedule after `step` updates."""
        self.apply(step)

    def apply(self, step: int) -> None:
        """Give the optimizer the learning rate that is due after `step` updates."""
        self.step = step
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * self.factor(step)

    def after(self, row: dict[str, float]) -> None:
        """Take note of an update that was made.

        Args:
            row: row of the history: step, loss, learning_rate, seconds, and validation scores where there was a validation.
        """
        self.apply(row["step"])

    def state_dict(self) -> dict:
        """Return what a resumed run needs."""
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken, by this schedule's own plan."""
        self.apply(state["step"])


class HalveAt(Schedule):
    """Halve the learning rate at given steps: the fixed schedule of DeepMedic's published configuration.

    Args:
        optimizer: the optimizer whose rate changes.
        steps: numbers of updates after which the rate is halved.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, steps: Iterable[int]):
        super().__init__(optimizer)
        self.steps = tuple(sorted({int(step) for step in steps}))

    def factor(self, step: int) -> float:
        return 0.5 ** sum(0 < halving <= step for halving in self.steps)


class InverseTimeDecay(Schedule):
    """Set the learning rate to lr / (1 + decay · t) after t updates.

    Args:
        optimizer: the optimizer whose rate changes.
        decay: strength of the decay, .001 in the paper.

    Source: Drozdzal et al. 2018, section 4 ("learning rate decay", which means this in the library that they used).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, decay: float = 0.001):
        if decay < 0:
            raise ValueError(f"decay={decay}; expected 0 or more")
        super().__init__(optimizer)
        self.decay = decay

    def factor(self, step: int) -> float:
        return 1 / (1 + self.decay * step)


class MomentumSchedule(Schedule):
    """Raise the momentum evenly over a run, and cut the learning rate after each of its epochs.

    Args:
        optimizer: the optimizer whose momentum and rate change.
        steps: number of updates of the whole run.
        epochs: number of equal parts of the run. The rate is multiplied by `decay` after each.
        decay: factor of the rate, .1 in the paper.
        momentum: momentum at the start and at the end of the run (.5 and .9).

    Source: Havaei et al. 2017, section 3.3.
    Taught in notebook 02.
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
        super().__init__(optimizer)
        self.steps, self.epochs, self.decay, self.momentum = steps, epochs, decay, momentum

    def factor(self, step: int) -> float:
        return self.decay ** min(self.epochs * step // self.steps, self.epochs - 1)

    def apply(self, step: int) -> None:
        super().apply(step)
        first, last = self.momentum
        for group in self.optimizer.param_groups:
            group["momentum"] = first + (last - first) * step / self.steps


class Halving(Schedule):
    """The base class of schedules that halve the rate when something happens, down to a minimum.

    Args:
        optimizer: the optimizer whose rate changes.
        minimum: lowest rate.
    """

    changing = ("halvings",)

    def __init__(self, optimizer: torch.optim.Optimizer, *, minimum: float):
        super().__init__(optimizer)
        self.minimum, self.halvings = minimum, 0

    def halve(self) -> None:
        """Halve the rate once more."""
        self.halvings += 1
        self.set_rate()

    def set_rate(self) -> None:
        """Give the optimizer the rate that is due, by the rate that this schedule began with."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = max(rate * 0.5**self.halvings, min(self.minimum, rate))

    def state_dict(self) -> dict:
        return {name: vars(self)[name] for name in self.changing}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update({name: state[name] for name in self.changing})
        self.set_rate()

    def begin_at(self, step: int) -> None:
        self.set_rate()


class HalveOnSlowLoss(Halving):
    """Halve the learning rate when the training loss no longer falls fast enough.

    After every `window` updates the mean loss of the window's second half is compared with that of its first half. If it is above
    `ratio` times that, the rate is halved. If that happens twice in a row, the window is doubled, because the changes have become too
    small to be seen in a short one.

    Args:
        optimizer: the optimizer whose rate changes.
        window: number of updates F between comparisons, 200 in the paper.
        ratio: d_loss, .98 in the paper.
        minimum: lowest rate, .001 in the paper.

    Source: Mlynarski et al. 2019, section 2.4.
    Taught in notebook 13.
    """

    changing = ("halvings", "window", "losses", "slow")

    def __init__(self, optimizer: torch.optim.Optimizer, *, window: int = 200, ratio: float = 0.98, minimum: float = 0.001):
        if window < 2 or window % 2 or ratio <= 0 or minimum < 0:
            raise ValueError(f"window={window}, ratio={ratio}, minimum={minimum}; expected an even window and positive numbers")
        super().__init__(optimizer, minimum=minimum)
        self.window, self.ratio = window, ratio
        self.losses: list[float] = []
        self.slow = 0

    def after(self, row: dict[str, float]) -> None:
        self.losses = [*self.losses, float(row["loss"])]
        if len(self.losses) < self.window:
            return
        half = self.window // 2
        before, now = sum(self.losses[:half]) / half, sum(self.losses[half:]) / half
        self.losses = []
        if now <= self.ratio * before:
            self.slow = 0
            return
        self.halve()
        self.slow += 1
        if self.slow == 2:
            self.window, self.slow = 2 * self.window, 0


class HalveOnPlateau(Halving):
    """Halve the learning rate when the first validation score, or the training loss, has not improved for a while.

    Args:
        optimizer: the optimizer whose rate changes.
        patience: number of validations (or windows) without improvement to wait.
        threshold: smallest absolute change that counts as an improvement.
        minimum: lowest rate.
        window: None to watch the first score of each validation, which should rise; a number of updates to watch the mean training
            loss over each of them, which should fall.

    Source: Kamnitsas et al. 2017, appendix B (halved whenever convergence plateaus).
    Taught in notebook 16.
    """

    changing = ("halvings", "losses", "best", "waited")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        patience: int = 3,
        threshold: float = 1e-3,
        minimum: float = 0.0,
        window: int | None = None,
    ):
        if window is not None and window < 1:
            raise ValueError(f"window={window}; expected at least 1 update, or None to watch the validation score")
        super().__init__(optimizer, minimum=minimum)
        self.patience, self.threshold, self.window = patience, threshold, window
        self.losses: list[float] = []
        self.best, self.waited = -math.inf, 0

    def after(self, row: dict[str, float]) -> None:
        if self.window is None:
            value = next((value for name, value in row.items() if name not in NO_SCORES), None)
        else:
            self.losses = [*self.losses, float(row["loss"])]
            value = -sum(self.losses) / self.window if len(self.losses) == self.window else None
        if value is None:
            return
        self.losses = []
        if value > self.best + self.threshold:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited > self.patience:
            self.waited = 0
            self.halve()


class FromTorch(Schedule):
    """Use one of PyTorch's schedulers, such as `torch.optim.lr_scheduler.CosineAnnealingLR`, as a schedule.

    Args:
        scheduler: a scheduler that steps once an update.
    """

    def __init__(self, scheduler: LRScheduler):
        super().__init__(scheduler.optimizer)
        self.scheduler, self.scheduler_name = scheduler, type(scheduler).__name__
        self.start = copy.deepcopy(scheduler.state_dict())
        self.groups = [{name: group[name] for name in ("lr", "initial_lr")} for group in self.optimizer.param_groups]

    def after(self, row: dict[str, float]) -> None:
        self.step += 1
        self.scheduler.step()

    def apply(self, step: int) -> None:
        for group, first in zip(self.optimizer.param_groups, self.groups):
            group.update(first)
        self.scheduler.load_state_dict(copy.deepcopy(self.start))
        self.step = step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns where no update comes before a step of the scheduler
            for _ in range(step):
                self.scheduler.step()
