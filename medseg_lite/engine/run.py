"""The surroundings of a training: the state that outlives an interruption, batches made ahead, logs, Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ..devices import is_out_of_memory
from ..models import save as save_network
from ..optimizers import Schedule
from ..paths import atomic_write, say
from ..plain import make_plain
from ..schedules import NO_SCORES
from . import distributed
from .identity import describe, find_differences
from .precision import TrainingPrecision
from .random_state import own_random_numbers, random_state, set_random_state

STATE, BEST = "last.pt", "best.safetensors"
MAY_CHANGE = ("lr", "foreach", "fused", "capturable", "differentiable")


class Run:
    """A training run: its history, its best weights, and its state on disk.

    Args:
        model, optimizer, schedule: the parts whose state is kept.
        precision: number type of the training, whose state is kept too.
        folder: folder of the run, or None to keep nothing.
        identity: description of all that makes the run, see `identity.describe`. A state with another one is refused.
        validate_every: number of updates between validations.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        precision: TrainingPrecision,
        folder: str | Path | None,
        *,
        identity: Mapping[str, object],
        validate_every: int,
    ):
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.parts = {"model": model, "optimizer": optimizer, "scaler": precision, "schedule": schedule}
        self.device = next(model.parameters()).device
        # The learning rate may change, and how PyTorch computes; other settings would be replaced by those of the state.
        settings = {name: value for name, value in optimizer.defaults.items() if name not in MAY_CHANGE}
        self.identity = describe(
            {
                "network": model.config or type(model).__name__,
                "optimizer": {"name": type(optimizer).__name__, **settings},
                **identity,
            }
        )
        self.plan = {"learning_rate": describe(schedule.rates), "schedule": describe(schedule.describe())}
        self.path = Path(folder) / STATE if folder else None
        if self.path is not None:
            self._plain_parts()  # what cannot be stored is said now, and not after the first hour
        self.validate_every = validate_every
        self.history: list[dict[str, float]] = []
        self.saved = 0
        self.best: dict | None = None  # weights, score and step of the highest first validation score
        self.score = ""  # the last validation score, for the progress bar
        self.start = time.perf_counter()

    def resume(self, steps: int) -> int:
        """Restore the state if there is one, and return the number of updates made so far.

        The learning rate and the schedule are those of this call, as if the whole run had been planned so. A line says what differs
        from the state.

        Raises:
            ValueError: the folder holds another run, a damaged state, or more updates than `steps`.
        """
        self.plan["steps"] = int(steps)
        state = self._read()
        if state is not None:
            same_schedule = state["plan"]["schedule"]["name"] == self.plan["schedule"]["name"]
            for name, part in self.parts.items():
                if name != "schedule" or same_schedule:
                    part.load_state_dict(state[name])
            set_random_state(self.device, state["rng"])
            self.history, self.best = state["history"], state.get("best")
            self.saved = len(self.history)
            self.start -= self.history[-1]["seconds"]
            if not same_schedule:
                self.schedule.begin_at(self.saved)
            changes = find_differences(state["plan"], self.plan)
            if changes and self.saved < steps and distributed.rank() == 0:
                say(f"{self.path}: going on from update {self.saved}; {'; '.join(changes)}")
        if self.saved > steps:
            raise ValueError(
                f"{self.path} has {self.saved} updates already, more than the {steps} asked for; use another folder"
            )
        return self.saved

    def _read(self) -> dict | None:
        if self.path is None:
            return None
        found = distributed.all_gather(self.path.exists())
        if any(found) != all(found):
            raise ValueError(
                f"some processes see {self.path} and others do not; the folder must be on a disk that all machines share"
            )
        if distributed.rank() == 0:
            for leftover in self.path.parent.glob(".partial-*"):  # of a process that was killed while it wrote
                leftover.unlink(missing_ok=True)
        if not all(found):
            return None
        try:
            # To the CPU first: Adam's counters stay there, and would be waited for on a GPU. Each part puts the rest in its place.
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            identity, _, _ = state["identity"], state["rng"], state["plan"]["schedule"]["name"]
        except Exception:  # whatever is wrong with it; PyTorch's own message would advise to load it unsafely
            raise ValueError(
                f"{self.path} is not a training state: it is damaged or was not written by fit; remove it or choose another folder"
            ) from None
        differences = find_differences(identity, self.identity)
        if differences:
            more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise ValueError(f"{self.path} is of another run: {'; '.join(differences[:5])}{more}; choose another folder")
        return state

    def note(self, step: int, loss: float, gradient: float) -> dict[str, float]:
        """Add the row of an update to the history and return it.

        Args:
            step: number of the update, from 1.
            loss: its loss.
            gradient: norm of its gradients, which the weights have not been changed by yet.

        Raises:
            FloatingPointError: the loss or a gradient is not finite.
        """
        rate = float(self.optimizer.param_groups[0]["lr"])
        for name, value in (("loss", loss), ("gradient", gradient)):
            if not math.isfinite(value):
                self._stop_for(f"the {name} became {value} at update {step} (learning rate {rate:g})")
        row = {"step": step, "loss": loss, "learning_rate": rate, "seconds": time.perf_counter() - self.start}
        self.history.append(row)
        return row

    def check_weights(self, step: int) -> None:
        """Raise FloatingPointError where a weight, or a statistic of batch normalisation, is not finite."""
        values = {name: value for name, value in self.model.state_dict().items() if value.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()  # read from the GPU at once
        for name, is_finite in zip(values, finite):
            if not is_finite:
                self._stop_for(f"{name} is not finite after update {step}")

    def _stop_for(self, reason: str) -> None:
        kept = f". The state of update {self.saved} is kept in {self.path}" if self.saved else ""
        raise FloatingPointError(
            f"{reason}; lower the learning rate, check the images for extreme values, or train in float32{kept}"
        )

    def validate(self, validation: Callable[[nn.Module], dict[str, float]], step: int) -> dict[str, float]:
        """Return the scores of a validation and keep the weights if the first score is the highest.

        Several processes make a `distributed.Shared` validation together, and the first process makes any other.
        """
        self.check_weights(step)
        scores, shared = None, isinstance(validation, distributed.Shared)
        if shared or distributed.rank() == 0:
            with aside(self.model), nullcontext() if shared else distributed.alone():
                scores = {name: float(value) for name, value in validation(self.model).items()}
        scores = distributed.broadcast(scores)
        if taken := [name for name in scores if name in NO_SCORES]:
            raise ValueError(f"a score of the validation is called {taken[0]!r}, as a column of the history; rename it")
        name, score = next(iter(scores.items()))
        self.score = f", {name.replace('_', ' ')} {score:.3f}"
        if self.best is None or score > self.best["score"]:
            weights = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
            self.best = {"score": score, "step": step, "weights": weights}
            if self.path is not None and distributed.rank() == 0 and self.model.config:
                save_network(self.path.with_name(BEST), self.model, {"step": step, name: score})
        return scores

    def patience_lost(self, patience: int | None, done: int) -> bool:
        """Return whether the first score has not risen for `patience` validations."""
        if patience is None or self.best is None:
            return False
        return done - self.best["step"] >= patience * self.validate_every

    def go_back_to_best(self) -> None:
        """Give the network the weights that had the highest first score."""
        if self.best is not None:
            self.model.load_state_dict(self.best["weights"])

    def how_to_go_on(self) -> str:
        """Return the end of an error message: how to go on from the last saved state."""
        return f"; the same command goes on from update {self.saved}, in {self.path}" if self.saved else ""

    def save(self, step: int) -> None:
        """Write the state and the history, each to a temporary name first."""
        if self.path is None:
            return
        self.check_weights(step)
        for row in self.history[max(self.saved - 1, 0) :]:  # the reader's function of an update may have changed it
            row.update(make_plain(row, "history"))
        self.saved = step
        if distributed.rank() > 0:
            return
        state = self._plain_parts()
        if self.best is not None:
            state["best"] = self.best
        state |= {"identity": self.identity, "plan": self.plan, "rng": random_state(self.device), "history": self.history}
        with atomic_write(self.path) as temporary:
            torch.save(state, temporary)
        with atomic_write(self.path.with_name("history.csv")) as temporary:
            pd.DataFrame(self.history).to_csv(temporary, index=False)

    def _plain_parts(self) -> dict[str, object]:
        return {name: make_plain(part.state_dict(), name, tensors=True) for name, part in self.parts.items()}

    def stop(self, step: int) -> None:
        """Save the state and stop, as the reader asked with Ctrl-C."""
        self.save(step)
        raise KeyboardInterrupt(
            f"stopped after update {step}" + (f"; the same call goes on from {self.path}" if self.path else "")
        )


class Interruptible:
    """A guard that notes the first Ctrl-C (or the notebook's stop button) within its block instead of raising it, so that the update
    under way is finished and saved. A second one stops at once.

    A process under `torchrun` hears of one Ctrl-C twice, from the terminal and from `torchrun`. There a second one counts only after
    some seconds.
    """

    asked, since = False, 0.0

    def __enter__(self) -> Interruptible:
        self.previous = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        if self.asked and (distributed.world_size() == 1 or now - self.since > 5):
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.since = True, now

    def __exit__(self, *_) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


class Reports:
    """Show every update: in a progress bar, in TensorBoard where it is asked for and installed, and to a function of the reader's.

    Args:
        run: run to report on.
        steps: number of updates of the whole run.
        progress: whether to show a bar.
        tensorboard: whether to write to `folder/tensorboard`.
        on_update: function of the row of an update, or None.
    """

    def __init__(self, run: Run, steps: int, *, progress: bool, tensorboard: bool, on_update: Callable | None):
        self.run, self.first = run, distributed.rank() == 0
        self.on_update = on_update if self.first else None
        hidden = not (progress and self.first)
        self.bar = tqdm(total=steps, initial=run.saved, desc="training", disable=hidden, dynamic_ncols=True)
        self.writer = self._open_writer() if tensorboard and run.path and self.first else None

    def _open_writer(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("tensorboard is not installed (pip install tensorboard); the history goes to history.csv alone")
            return None
        return SummaryWriter(str(self.run.path.parent / "tensorboard"), purge_step=self.run.saved + 1)

    def show(self, row: dict[str, float]) -> None:
        """Show the row of an update."""
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])
        if self.on_update is not None:
            with aside(self.run.model):
                self.on_update(row)
        self.bar.update()
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, rate {row['learning_rate']:.1e}{self.run.score}")

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def made_ahead(sampler, numbers: Iterable[int], workers: int) -> Iterator:
    """Yield the batches of these numbers, made by threads while the network works on those before.

    Raises:
        MemoryError: the sampler ran out of memory. Halving the batches, which helps the network, does not help it.
    """
    numbers = iter(numbers)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting = deque(pool.submit(sampler.batch, n) for n in islice(numbers, workers))
        while waiting:
            try:
                batch = waiting.popleft().result()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise MemoryError(
                    f"the sampler ran out of memory while it made a batch ({str(error).splitlines()[0]}); give it the device 'cpu', or "
                    "choose a smaller batch size or crop"
                ) from error
            waiting.extend(pool.submit(sampler.batch, n) for n in islice(numbers, 1))
            yield batch


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients. Afterwards the training goes on with the random numbers it would have had."""
    model.eval()
    try:
        with own_random_numbers(next(model.parameters()).device), torch.no_grad():
            yield
    finally:
        model.train()
