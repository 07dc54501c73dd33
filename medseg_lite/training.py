"""The training loop: resumable, watched, and stopped clearly when something goes wrong."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import inference, losses, metrics
from .paths import atomic_write
from .volume import Case

STATE = "last.pt"


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
    schedule=None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    folder: str | Path | None = None,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
    on_validation: Callable[[int, dict[str, float]], None] | None = None,
    on_update: Callable[[dict[str, float]], None] | None = None,
) -> pd.DataFrame:
    """Train a network on the device that it lies on.

    Args:
        model: the network, changed in place.
        sampler: anything with `batch(step) -> (inputs, label)` that depends on the step alone.
        steps: updates in all, those of an interrupted run included.
        optimizer: over `model.parameters()`.
        loss: `loss(logits, label)`, a scalar.
        forward: what turns inputs into the loss's first argument, if not the model itself: `model.with_auxiliary`, say.
        accumulate: batches for each update; their gradients are averaged. The sampler then counts batches, not updates.
        l1, l2: weight penalties on the kernels, see `losses.weight_penalty`.
        schedule: an object with `step(score)`, called with the first validation score (or the mean training loss since the
            last time when there is no validation), with `after(step)`, called after every update, or with `observe(loss)`,
            called with every update's training loss; or None.
        validate: `validate(model) -> {"dice_whole": .83, ...}`, see `validate_on`.
        validate_every: updates between validations, schedule steps and saved states.
        patience: stop when the first validation score has not risen for this many validations, and go back to the weights
            that had the highest; None trains to the end and keeps the last weights.
        folder: where the state is kept (`last.pt`, `history.csv`). A run found there is continued: it gives the
            same network as one never interrupted. None keeps nothing.
        precision: "float32", "bfloat16", "float16", or "auto" (bfloat16 on CUDA where it is supported, else float32).
        seed: of dropout. Batches have the sampler's seed, and the weights were drawn when the model was built.
        progress: whether to show a bar with loss, rate, last validation score and time left.
        on_validation: called with the step and the scores after each validation (live plots), in evaluation mode.
        on_update: called with the row of each update, its validation scores included, in evaluation mode:
            `widgets.TrainingMonitor`, say.

    Returns:
        One row per update: step, loss (without penalties), learning_rate it was made with, seconds since the start, and the
        validation scores where there was a validation.

    Raises:
        FloatingPointError: when the loss is not finite; the last saved state is still there.
        ValueError: when `folder` holds another run.
    """
    if patience is not None and (validate is None or patience < 1):
        raise ValueError(f"patience={patience} needs validations and must be at least 1; give validate=…")
    if steps < 1 or validate_every < 1 or accumulate < 1:
        raise ValueError(
            f"steps={steps}, validate_every={validate_every}, accumulate={accumulate}; all must be at least 1"
        )
    device = next(model.parameters()).device
    autocast, scaler = _precision(precision, device)
    run = _Run(model, optimizer, schedule, scaler, Path(folder) if folder else None, seed, accumulate, validate_every)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        done = run.resume()
        if done > steps:
            raise ValueError(
                f"{run.path} has {done} updates already, more than the {steps} asked for; use another folder"
            )
        bar = tqdm(total=steps, initial=done, desc="training", disable=not progress, dynamic_ncols=True)
        score = ""
        model.train()
        clock = time.perf_counter() - (run.history[-1]["seconds"] if run.history else 0)
        with bar, _Interruptible() as interruption:
            batches = _ahead(sampler, done * accumulate, steps * accumulate)
            for step in range(done + 1, steps + 1):
                if run.patience_lost(patience, step - 1):
                    break
                optimizer.zero_grad(set_to_none=True)
                number = 0.0
                for _ in range(accumulate):
                    batch = next(batches)
                    inputs, label = _to(batch[0], device), _to(batch[1], device)
                    with autocast:
                        value = loss((forward or model)(inputs), label)
                        total = value + losses.weight_penalty(model, l1=l1, l2=l2) if l1 or l2 else value
                    scaler.scale(total / accumulate if accumulate > 1 else total).backward()
                    number += float(value.detach()) / accumulate
                if not math.isfinite(number):
                    raise FloatingPointError(
                        f"the loss became {number} at update {step} (learning rate {_rate(optimizer):g}); lower the learning "
                        "rate, check the images for extreme values, or train in float32"
                        + (f". The state of update {run.saved} is kept in {run.path}" if run.saved else "")
                    )
                scaler.step(optimizer)
                scaler.update()
                row = {
                    "step": step,
                    "loss": number,
                    "learning_rate": _rate(optimizer),
                    "seconds": time.perf_counter() - clock,
                }
                run.history.append(row)
                if hasattr(schedule, "observe"):
                    schedule.observe(number)
                if hasattr(schedule, "after"):
                    schedule.after(step)
                if step % validate_every == 0 or step == steps:
                    if validate is not None:
                        with _aside(model):
                            scores = {k: float(v) for k, v in validate(model).items()}
                            row.update(scores)
                            name, best = next(iter(scores.items()))
                            run.keep_if_best(best, step, patience)
                            score = f", {name.replace('_', ' ')} {best:.3f}"
                            if on_validation is not None:
                                on_validation(step, scores)
                    if hasattr(schedule, "step"):
                        recent = np.mean([r["loss"] for r in run.history[-validate_every:]])
                        schedule.step(best if validate is not None else recent)
                    run.save(step)
                if on_update is not None:
                    with _aside(model):
                        on_update(row)
                bar.update()
                bar.set_postfix_str(f"loss {number:.3f}, rate {_rate(optimizer):.1e}{score}")
                if interruption.asked:
                    run.save(step)
                    again = f"; the same call goes on from {run.path}" if run.path else ""
                    raise KeyboardInterrupt(f"stopped after update {step}{again}")
    run.go_back_to_best()
    model.eval()
    return pd.DataFrame(run.history)


def validate_on(
    cases: Sequence[Case], *, regions: str = "brats2015", **options
) -> Callable[[nn.Module], dict[str, float]]:
    """A validation for `fit`: segment `cases` and return the mean Dice of each region, `{"dice_whole": ...}`.

    Args:
        cases: labelled cases, normalised like the training cases.
        regions: as in `metrics.evaluate`.
        options: passed on to `inference.predict`.
    """

    def validate(model: nn.Module) -> dict[str, float]:
        predictions = (inference.predict(model, case, progress=False, **options) for case in cases)
        table = metrics.evaluate_cohort(predictions, cases, regions=regions, metrics=["dice"])
        means = table.groupby("region", sort=False)["dice"].mean()
        return {f"dice_{region}": float(value) for region, value in means.items()}

    return validate


def running_average(values: Sequence[float], *, alpha: float = 0.5, start: float | None = None) -> np.ndarray:
    """Running averages μ*_(i+1) = α μ*_i + (1 − α) μ_i, one after each value: a smooth curve of a noisy loss.

    Args:
        values: μ_0, μ_1, …
        alpha: weight of the old average, 0 to less than 1. The paper's batch normalisation has 0.5.
        start: μ*_0; by default the first value.

    Source: Kayalibay et al. 2017, eq. 6.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha}; expected 0 (no smoothing) to less than 1")
    values = np.asarray(values, float)
    averages = np.empty_like(values)
    average = start if start is not None else values[0] if len(values) else 0.0
    for i, value in enumerate(values):
        averages[i] = average = alpha * average + (1 - alpha) * value
    return averages


class _Run:
    """The state that outlives an interruption."""

    def __init__(
        self, model, optimizer, schedule, scaler, folder: Path | None, seed: int, accumulate: int, validate_every: int
    ):
        self.parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        if hasattr(schedule, "state_dict"):
            self.parts["schedule"] = schedule
        self.device = next(model.parameters()).device
        self.config = {
            "network": getattr(model, "config", type(model).__name__),
            "optimizer": type(optimizer).__name__,
            "schedule": type(schedule).__name__,
            "seed": seed,
        }
        if accumulate > 1:
            self.config["accumulate"] = accumulate
        self.path = folder / STATE if folder else None
        self.history: list[dict[str, float]] = []
        self.saved = 0
        self.best: dict | None = None  # weights, score and step; only where a patience asks for them
        self.validate_every = validate_every

    def resume(self) -> int:
        """Restore a state if there is one; the number of updates it has."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            config, rng = state["config"], state["rng"]
        except Exception:  # whatever is wrong with it; PyTorch's own message would advise to load it unsafely
            raise ValueError(
                f"{self.path} is not a training state: it is damaged or was not written by fit; remove it or choose another folder"
            ) from None
        if config != self.config:
            raise ValueError(
                f"{self.path} is of another run, {config}; this one is {self.config}: choose another folder"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(rng["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)
        self.history, self.best = state["history"], state.get("best")
        self.saved = len(self.history)
        return self.saved

    def keep_if_best(self, score: float, step: int, patience: int | None) -> None:
        if patience is not None and (self.best is None or score > self.best["score"]):
            weights = {name: value.detach().clone() for name, value in self.parts["model"].state_dict().items()}
            self.best = {"score": score, "step": step, "weights": weights}

    def patience_lost(self, patience: int | None, done: int) -> bool:
        if patience is None or self.best is None:
            return False
        return done - self.best["step"] >= patience * self.validate_every

    def go_back_to_best(self) -> None:
        if self.best is not None:
            self.parts["model"].load_state_dict(self.best["weights"])

    def save(self, step: int) -> None:
        if self.path is None:
            return
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if self.best is not None:
            state["best"] = self.best
        with atomic_write(self.path) as temporary:
            torch.save({"config": self.config, "rng": rng, "history": self.history, **state}, temporary)
        with atomic_write(self.path.with_name("history.csv")) as temporary:
            pd.DataFrame(self.history).to_csv(temporary, index=False)
        self.saved = step


class _Interruptible:
    """Within the block, the first Ctrl-C (or the notebook's stop button) is noted instead of raised, so that the update
    under way is finished and saved; a second one stops at once."""

    asked = False

    def __enter__(self) -> _Interruptible:
        self.previous = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


def _ahead(sampler, done: int, steps: int) -> Iterator:
    """The batches done … steps − 1, each made by a thread while the network works on the one before."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(sampler.batch, done)
        for step in range(done, steps):
            batch = following.result()
            if step + 1 < steps:
                following = pool.submit(sampler.batch, step + 1)
            yield batch


@contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the training goes on with the random numbers it would have had."""
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        model.train()


def _precision(precision: str, device: torch.device) -> tuple[torch.autocast, torch.amp.GradScaler]:
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if fast else "float32"
    if precision not in types:
        raise ValueError(f"precision={precision!r}; expected auto, {', '.join(types)}")
    dtype = types[precision]
    if device.type == "cpu" and dtype == torch.float16:
        raise ValueError("float16 training needs a CUDA device; use precision='float32' on the CPU")
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def _to(batch, device: torch.device):
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return tuple(part.to(device, non_blocking=True) for part in batch)


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
