"""The training loop: resumable, watched, and stopped with a clear message when something goes wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from . import inference, losses, metrics
from .engine import distributed
from .engine.gradients import Engine, Gradients
from .engine.random_state import own_random_numbers
from .engine.run import BEST, STATE, Interruptible, Reports, Run, made_ahead
from .models import Network
from .optimizers import Schedule
from .paths import say_once
from .sampling import Sampler, check_label, describe_sampler
from .volume import Case

__all__ = ["BEST", "STATE", "Engine", "fit", "running_average", "validate_on"]


def fit(
    model: nn.Module,
    sampler,
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy,
    forward: Callable[[Tensor], Tensor] | None = None,
    accumulate: int = 1,
    l1: float = 0.0,
    l2: float = 0.0,
    schedule: Schedule | None = None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    on_update: Callable[[dict[str, float]], None] | None = None,
    facts: Mapping[str, object] | None = None,
    engine: Mapping[str, object] | None = None,
) -> pd.DataFrame:
    """Train a network on the device that it lies on.

    In several processes (`torchrun`, see `engine.distributed`) each takes its share of every batch, or of the `accumulate` batches of
    an update, with the same result but for the random numbers of dropout, and a part of the cases of `validate_on`. The first process
    makes any other validation, and writes; `folder` must be on a disk that all of them see.

    Args:
        model: the network, changed in place.
        sampler: any object with `batch(step) -> (inputs, label)` that depends on the step alone.
        steps: number of updates in all, those of an interrupted run included. For a quick look, the environment variable MEDSEG_STEPS
            sets a number that no training exceeds.
        optimizer: optimizer of `model.parameters()`.
        loss: function `loss(logits, label)` that returns a scalar.
        forward: function that turns inputs into the loss's first argument, if it is not the model itself: `model.with_auxiliary`, say.
        accumulate: number of batches for each update; their gradients are averaged. The sampler then counts batches, not updates.
        l1, l2: weight penalties on the kernels, see `losses.weight_penalty`.
        schedule: schedule of the learning rate (see `optimizers.Schedule`), or None for a constant rate.
        validate: function `validate(model) -> {"dice_whole": .83, ...}`, see `validate_on`.
        validate_every: number of updates between validations, and between saved states.
        patience: number of validations without a rise of the first score, after which the training stops and goes back to the weights
            that had the highest. None trains to the end and keeps the last weights.
        folder: folder where the state is kept (`last.pt`, `history.csv`, and the network with the highest first validation score in
            `best.safetensors`). A run found there is continued: it gives the same network as one never interrupted. A run of another
            network, optimiser, loss, seed, or of other cases is refused. The number of updates, the learning rate and the schedule may
            change; they are those of this call. None keeps nothing.
        seed: seed of dropout. Batches have the sampler's seed, and the weights were drawn when the model was built.
        progress: whether to show a bar with loss, rate, last validation score and time left.
        on_update: function called with the row of each update, its validation scores included, in evaluation mode:
            `widgets.TrainingMonitor`, say.
        facts: further facts that make this run what it is. A run in the same folder with other facts is refused.
        engine: options of `Engine`, the use of the machine: `{"precision": "bfloat16", "workers": 4}`.

    Returns:
        One row per update: step, loss (without penalties), learning_rate it was made with, seconds since the start, and the
        validation scores where there was a validation.

    Raises:
        FloatingPointError: the loss, a gradient or a weight is not finite. The last saved state is still there.
        ValueError: `folder` holds another run, or a setting is out of range.
        MemoryError: a batch does not fit the memory even in parts, or the sampler cannot make it there.
        ConnectionError: another process of the run has ended.
    """
    engine = Engine(**(engine or {}))
    _check_settings(
        patience, validate, steps=steps, validate_every=validate_every, accumulate=accumulate, workers=engine.workers
    )
    steps, validate_every, accumulate, seed = (int(number) for number in (_limited(steps), validate_every, accumulate, seed))
    schedule = schedule or Schedule(optimizer)
    gradients = Gradients(model, loss, forward=forward, accumulate=accumulate, l1=l1, l2=l2, seed=seed, engine=engine)
    identity = {"loss": loss, "forward": forward, "accumulate": accumulate, "l1": l1, "l2": l2, "seed": seed, **(facts or {})}
    # The codes of all cases are worth their time only where a state is kept.
    identity["sampler"] = describe_sampler(sampler) if folder else None
    run = Run(model, optimizer, schedule, gradients.precision, folder, identity=identity, validate_every=validate_every)
    sampler = _with_checked_labels(model, sampler, loss)
    with own_random_numbers(run.device):
        torch.manual_seed(seed)
        done = run.resume(steps)
        model.train()
        reports = Reports(run, steps, progress=progress, tensorboard=engine.tensorboard, on_update=on_update)
        with reports, distributed.companions(run.how_to_go_on), gradients.together(), Interruptible() as interruption:
            batches = made_ahead(sampler, gradients.numbers(done, steps), engine.workers)
            for step in range(done + 1, steps + 1):
                if run.patience_lost(patience, step - 1):
                    break
                row = run.note(step, *gradients(batches, step))  # forward and backward
                gradients.update(optimizer)
                due = step % validate_every == 0 or step == steps
                if due and validate is not None:
                    row |= run.validate(validate, step)
                schedule.after(row)
                if due:
                    run.save(step)
                reports.show(row)
                if distributed.total(interruption.asked):
                    run.stop(step)
    if patience is not None:
        run.go_back_to_best()
    run.check_weights(step=len(run.history))
    model.eval()
    distributed.barrier()  # for what the first process has written
    return pd.DataFrame(run.history)


def _limited(steps: int) -> int:
    """Return the number of updates that the environment variable MEDSEG_STEPS leaves."""
    given = os.environ.get("MEDSEG_STEPS")
    if not given:
        return steps
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"MEDSEG_STEPS={given!r}; expected the largest number of updates of a training, or no such variable")
    if int(given) < steps and distributed.rank() == 0:
        say_once(f"MEDSEG_STEPS={given}: no training makes more updates than that")
    return min(steps, int(given))


def _with_checked_labels(model: nn.Module, sampler, loss: Callable):
    """Return a sampler without labels beyond the classes, which our losses would fail on in some batch.

    Our samplers know their highest label beforehand. Batches of others are looked at before they go to the GPU, where a class number
    that does not exist ends not only the training but the process.

    Raises:
        ValueError: a case of our samplers has such a label.
    """
    while isinstance(loss, partial):
        loss = loss.func
    if not isinstance(model, Network) or model.classes < 2 or loss.__module__ != losses.__name__:
        return sampler
    if isinstance(sampler, Sampler):
        check_label(sampler.labelled_highest, sampler.highest_label, model.classes)
        return sampler
    return _LookedAt(sampler, model.classes)


class _LookedAt:
    """A sampler whose labels are compared with the number of classes, as far as they are made on the CPU."""

    def __init__(self, sampler, classes: int):
        self.sampler, self.classes = sampler, classes

    def batch(self, step: int):
        inputs, label = self.sampler.batch(step)
        if label.device.type == "cpu" and label.numel() and not label.is_floating_point():
            least, most = (int(value) for value in label.long().aminmax())
            if least < 0 or most >= self.classes:
                raise ValueError(
                    f"batch {step} has labels from {least} to {most}; with classes={self.classes} labels are 0 to {self.classes - 1}: "
                    "renumber them, or leave voxels out with the mask of losses.cross_entropy"
                )
        return inputs, label


def _check_settings(patience: int | None, validate: Callable | None, **counts: int) -> None:
    if patience is not None and (validate is None or patience < 1):
        raise ValueError(f"patience={patience} needs validations and must be at least 1; give validate=…")
    if min(counts.values()) < 1:
        raise ValueError(", ".join(f"{name}={count}" for name, count in counts.items()) + "; all must be at least 1")


def validate_on(cases: Sequence[Case], *, regions: str = "brats2015", **options) -> Callable[[nn.Module], dict[str, float]]:
    """Return a validation for `fit`, which segments `cases` and returns the mean Dice of each region, `{"dice_whole": ...}`.

    Several processes share the cases, with the result of one.

    Args:
        cases: labelled cases, normalised like the training cases.
        regions: as in `metrics.evaluate`.
        options: options of `inference.predict`.
    """

    @distributed.Shared
    def validate(model: nn.Module) -> dict[str, float]:
        def score(case: Case) -> pd.DataFrame:
            prediction = inference.predict(model, case, progress=False, **options)
            return metrics.evaluate_cohort([prediction], [case], regions=regions, metrics=["dice"])

        table = pd.concat(distributed.deal_out(score, cases))
        means = table.groupby("region", sort=False)["dice"].mean()
        return {f"dice_{region}": float(value) for region, value in means.items()}

    return validate


@torch.no_grad()
def perturb_weights(model: nn.Module, *, share: float = 1e-6, seed: int = 0) -> None:
    """Multiply every weight by 1 + `share` times a normal random number: a change that should not matter.

    Train a baseline from several such starts. If their scores differ as much as two methods do, the training is unstable and the
    comparison shows nothing yet (`statistics.noise_floor`).

    Args:
        model: network, changed in place. Its buffers stay.
        share: standard deviation of the relative change.
        seed: seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.mul_(1 + share * noise.to(weight.device, weight.dtype))


def running_average(values: Sequence[float], *, alpha: float = 0.5, start: float | None = None) -> np.ndarray:
    """Compute running averages μ*_(i+1) = α μ*_i + (1 − α) μ_i, one after each value: a smooth curve of a noisy loss.

    Args:
        values: μ_0, μ_1, …
        alpha: weight of the old average, 0 to less than 1. The paper's batch normalisation has 0.5.
        start: μ*_0; by default the first value.

    Source: Kayalibay et al. 2017, eq. 6.
    Taught in notebooks 08 and 16.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha}; expected 0 (no smoothing) to less than 1")
    values = np.asarray(values, float)
    averages = np.empty_like(values)
    average = start if start is not None else values[0] if len(values) else 0.0
    for i, value in enumerate(values):
        averages[i] = average = alpha * average + (1 - alpha) * value
    return averages
