"""The training loop: resumable, watched, and stopped clearly when something goes wrong."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import inference, losses, metrics, models
from .engine import distributed
from .engine.gradients import Gradients
from .paths import atomic_write
from .volume import Case

STATE, BEST = "last.pt", "best.safetensors"


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
    compiled: bool = False,
    channels_last: bool = False,
    workers: int = 1,
    tensorboard: bool = False,
    seed: int = 0,
    progress: bool = True,
    on_validation: Callable[[int, dict[str, float]], None] | None = None,
    on_update: Callable[[dict[str, float]], None] | None = None,
) -> pd.DataFrame:
    """Train a network on the device that it lies on.

    In several processes (`torchrun`, see `distributed`) each takes its share of every batch, or of the `accumulate` batches of
    an update, with the same result but for the random numbers of dropout. The first process validates and writes; `folder` must
    be on a disk that all of them see.

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
        folder: where the state is kept (`last.pt`, `history.csv`, and the network with the highest first validation score in
            `best.safetensors`). A run found there is continued: it gives the same network as one never interrupted. None
            keeps nothing.
        precision: "float32", "bfloat16", "float16", or "auto" (bfloat16 on CUDA where it is supported, else float32).
        compiled: run the network through `torch.compile`, or as it is where that fails.
        channels_last: keep the channels of a voxel side by side in memory, which some GPUs and CPUs convolve faster.
        workers: threads that prepare batches ahead. Batches do not depend on how many there are.
        tensorboard: also write losses and scores to `folder/tensorboard`, where that package is installed.
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
        MemoryError: when a batch does not fit the memory even in parts.
        ConnectionError: when another process of the run has ended.
    """
    if patience is not None and (validate is None or patience < 1):
        raise ValueError(f"patience={patience} needs validations and must be at least 1; give validate=…")
    if steps < 1 or validate_every < 1 or accumulate < 1 or workers < 1:
        raise ValueError(
            f"steps={steps}, validate_every={validate_every}, accumulate={accumulate}, workers={workers}; all must be at least 1"
        )
    first = distributed.number() == 0
    device = next(model.parameters()).device
    gradients = Gradients(
        model,
        loss,
        forward=forward,
        accumulate=accumulate,
        l1=l1,
        l2=l2,
        precision=precision,
        compiled=compiled,
        channels_last=channels_last,
        seed=seed,
    )
    run = _Run(model, optimizer, schedule, gradients.scaler, Path(folder) if folder else None, seed, accumulate, validate_every)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        done = run.resume()
        if done > steps:
            raise ValueError(f"{run.path} has {done} updates already, more than the {steps} asked for; use another folder")
        log = _Log(run.path.parent if tensorboard and run.path and first else None, done)
        bar = tqdm(total=steps, initial=done, desc="training", disable=not (progress and first), dynamic_ncols=True)
        score = ""
        model.train()
        clock = time.perf_counter() - (run.history[-1]["seconds"] if run.history else 0)
        with bar, log, distributed.companions(run.how_to_go_on), gradients.together(), _Interruptible() as interruption:
            batches = _ahead(sampler, gradients.numbers(done, steps), workers)
            for step in range(done + 1, steps + 1):
                if run.patience_lost(patience, step - 1):
                    break
                optimizer.zero_grad(set_to_none=True)
                number = gradients(batches, step)
                if not math.isfinite(number):
                    raise FloatingPointError(
                        f"the loss became {number} at update {step} (learning rate {_rate(optimizer):g}); lower the learning "
                        "rate, check the images for extreme values, or train in float32"
                        + (f". The state of update {run.saved} is kept in {run.path}" if run.saved else "")
                    )
                gradients.update(optimizer)
                row = {"step": step, "loss": number, "learning_rate": _rate(optimizer), "seconds": time.perf_counter() - clock}
                run.history.append(row)
                if hasattr(schedule, "observe"):
                    schedule.observe(number)
                if hasattr(schedule, "after"):
                    schedule.after(step)
                if step % validate_every == 0 or step == steps:
                    if validate is not None:
                        scores = None
                        if first:
                            with _aside(model):
                                scores = {k: float(v) for k, v in validate(model).items()}
                        scores = distributed.from_first(scores)
                        row.update(scores)
                        name, best = next(iter(scores.items()))
                        run.keep_if_best(name, best, step)
                        score = f", {name.replace('_', ' ')} {best:.3f}"
                        if on_validation is not None and first:
                            with _aside(model):
                                on_validation(step, scores)
                    if hasattr(schedule, "step"):
                        recent = np.mean([r["loss"] for r in run.history[-validate_every:]])
                        schedule.step(best if validate is not None else recent)
                    run.save(step)
                log.write(row)
                if on_update is not None and first:
                    with _aside(model):
                        on_update(row)
                bar.update()
                bar.set_postfix_str(f"loss {number:.3f}, rate {_rate(optimizer):.1e}{score}")
                if distributed.total(interruption.asked):
                    run.save(step)
                    again = f"; the same call goes on from {run.path}" if run.path else ""
                    raise KeyboardInterrupt(f"stopped after update {step}{again}")
    if patience is not None:
        run.go_back_to_best()
    model.eval()
    distributed.wait()  # for what the first process has written
    return pd.DataFrame(run.history)


def validate_on(cases: Sequence[Case], *, regions: str = "brats2015", **options) -> Callable[[nn.Module], dict[str, float]]:
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
            "network": getattr(model, "config", None) or type(model).__name__,
            "optimizer": type(optimizer).__name__,
            "schedule": type(schedule).__name__,
            "seed": seed,
        }
        if accumulate > 1:
            self.config["accumulate"] = accumulate
        self.path = folder / STATE if folder else None
        self.history: list[dict[str, float]] = []
        self.saved = 0
        self.best: dict | None = None  # weights, score and step of the highest first validation score
        self.validate_every = validate_every

    def resume(self) -> int:
        """Restore a state if there is one; the number of updates it has."""
        if self.path is None:
            return 0
        found = distributed.from_all(self.path.exists())
        if any(found) != all(found):
            raise ValueError(
                f"some processes see {self.path} and others do not; the folder must be on a disk that all machines share"
            )
        if distributed.number() == 0:
            for leftover in self.path.parent.glob(".partial-*"):  # of a process that was killed while it wrote
                leftover.unlink(missing_ok=True)
        if not all(found):
            return 0
        try:
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            config, rng = state["config"], state["rng"]
        except Exception:  # whatever is wrong with it; PyTorch's own message would advise to load it unsafely
            raise ValueError(
                f"{self.path} is not a training state: it is damaged or was not written by fit; remove it or choose another folder"
            ) from None
        if config != self.config:
            raise ValueError(f"{self.path} is of another run, {config}; this one is {self.config}: choose another folder")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(rng["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)
        self.history, self.best = state["history"], state.get("best")
        self.saved = len(self.history)
        return self.saved

    def keep_if_best(self, name: str, score: float, step: int) -> None:
        if self.best is not None and score <= self.best["score"]:
            return
        model = self.parts["model"]
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.best = {"score": score, "step": step, "weights": weights}
        if self.path is not None and distributed.number() == 0 and getattr(model, "config", None):
            models.save(self.path.with_name(BEST), model, {"step": step, name: score})

    def patience_lost(self, patience: int | None, done: int) -> bool:
        if patience is None or self.best is None:
            return False
        return done - self.best["step"] >= patience * self.validate_every

    def go_back_to_best(self) -> None:
        if self.best is not None:
            self.parts["model"].load_state_dict(self.best["weights"])

    def how_to_go_on(self) -> str:
        return f"; the same command goes on from update {self.saved}, in {self.path}" if self.saved else ""

    def save(self, step: int) -> None:
        if self.path is None:
            return
        self.saved = step
        if distributed.number() > 0:
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


class _Interruptible:
    """Within the block, the first Ctrl-C (or the notebook's stop button) is noted instead of raised, so that the update
    under way is finished and saved; a second one stops at once.

    A process under `torchrun` hears of one Ctrl-C twice, from the terminal and from `torchrun`, so there a second one counts after
    some seconds only."""

    asked, since = False, 0.0

    def __enter__(self) -> _Interruptible:
        self.previous = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        if self.asked and (distributed.count() == 1 or now - self.since > 5):
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.since = True, now

    def __exit__(self, *_) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


class _Log:
    """Rows of the history for TensorBoard, where it is wanted and installed."""

    def __init__(self, folder: Path | None, done: int):
        self.writer = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed (pip install tensorboard); the history goes to history.csv alone")
            return
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, row: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_) -> None:
        if self.writer is not None:
            self.writer.close()


def _ahead(sampler, numbers: Iterable[int], workers: int) -> Iterator:
    """The batches of these numbers, made by threads while the network works on those before."""
    numbers = iter(numbers)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting = deque(pool.submit(sampler.batch, n) for n in islice(numbers, workers))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(sampler.batch, n) for n in islice(numbers, 1))
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


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
