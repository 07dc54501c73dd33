"""The gradients of one update, also in half precision, compiled, shared by several processes, or in parts that fit the memory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import losses
from ..devices import is_out_of_memory, release_memory, send
from ..models.layers import convolutions
from ..paths import say
from . import distributed
from .precision import TrainingPrecision
from .random_state import random_state, set_random_state


@dataclass(frozen=True)
class Engine:
    """The use of the machine during a training. None of it changes which samples the network sees.

    `torch.backends.cudnn.benchmark` stays as it is, which is off by default. It tries algorithms by the clock, so a resumed run could
    compute with others than the run it goes on from, and the fastest may need gigabytes of memory to work in. To try it, set it
    before the training.

    Attributes:
        precision: number type of the network's computations; weights, their updates and the loss are float32. "float32", "bfloat16",
            "float16" (CUDA only), or "auto": bfloat16 on GPUs that compute in it, else float32. Where numbers of the network exceed
            65504, the largest of float16, the training says so and goes on in float32.
        compiled: run the network through `torch.compile`, or as it is where that fails.
        channels_last: keep the channels of a voxel side by side in memory, which some GPUs and CPUs convolve faster.
        workers: number of threads that prepare batches ahead. Batches do not depend on it.
        tensorboard: also write losses and scores to `folder/tensorboard`, where that package is installed.
    """

    precision: str = "auto"
    compiled: bool = False
    channels_last: bool = False
    workers: int = 1
    tensorboard: bool = False


class Gradients:
    """Adds up the gradients of a network's loss over the batches of an update.

    Of several processes (see `distributed`) each works on some of the batches where there are at least as many as processes,
    and otherwise on some samples of every batch. Either way the gradients are those of one process, dropout apart.

    A batch that does not fit the memory is halved and tried again, with the same result: the loss is that of all predictions
    together, whatever loss it is. Batch normalisation has to see a batch at once and cannot be halved.

    Args:
        model, loss, forward, accumulate, l1, l2, seed: as in `training.fit`.
        engine: use of the machine.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable,
        *,
        forward: Callable | None = None,
        accumulate: int = 1,
        l1: float = 0.0,
        l2: float = 0.0,
        seed: int = 0,
        engine: Engine | None = None,
    ):
        engine = engine or Engine()
        self.model, self.loss, self.l1, self.l2, self.seed = model, loss, float(l1), float(l2), seed
        self.accumulate, self.parts = accumulate, 1
        self.device, self.finite = next(model.parameters()).device, False
        dims = max((kernel.weight.ndim - 2 for kernel in convolutions(model)), default=2)
        self.precision = TrainingPrecision(engine.precision, self.device, spatial_dims=dims)
        self.format = None
        if engine.channels_last:
            self.format = torch.channels_last_3d if dims == 3 else torch.channels_last
            model.to(memory_format=self.format)
        self.world_size, self.rank = distributed.world_size(), distributed.rank()
        self.own_batches = self.world_size > 1 and accumulate >= self.world_size
        network = _Forward(model, forward)
        if engine.compiled:
            network = compiled(network)
        if self.world_size > 1:
            network = DistributedDataParallel(network, find_unused_parameters=forward is not None, **_own_buffers())
        self.network = network

    def numbers(self, first: int, last: int) -> Iterator[int]:
        """Yield the numbers of the batches that this process needs for the updates `first + 1` to `last`."""
        for update in range(first, last):
            batches = range(update * self.accumulate, (update + 1) * self.accumulate)
            yield from batches[self.rank :: self.world_size] if self.own_batches else batches

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside this block, batch normalisation uses the statistics of all processes, as if there were one."""
        with distributed.shared_statistics(self.model, one_batch=not self.own_batches) as self.settle:
            yield

    def __call__(self, batches: Iterator, step: int) -> tuple[float, float]:
        """Give the parameters the gradients of update `step`.

        Returns:
            The mean loss without the penalties, and the Euclidean norm of all gradients together, 0 in float16, where updates that are
            not finite are skipped. Both come from the GPU at once. The CPU waits for it here and nowhere else in an update.
        """
        if self.world_size > 1:  # other numbers for dropout in every process, and the same again after an interruption
            torch.manual_seed(hash((self.seed, step, self.rank)) % 2**63)
        self._clear()
        kept: list = []
        state = random_state(self.device)
        # What batch normalisation has measured; an overflow would stay in it.
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()] if self.in_float16 else []
        while True:
            lacking = None
            try:
                loss, norm = self._read(self._add_up(batches, kept))
            except RuntimeError as error:  # of which torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
                lacking = str(error).split("\n")[0]
            if lacking is not None:  # out here, where the failed attempt's memory is no longer held
                self._halve(max((len(label) for _, label in kept), default=1), lacking)
            else:
                self.settle()
                if math.isfinite(loss) or not self.in_float16:
                    break
                self.precision.leave_float16(f"update {step}: numbers of the network exceed 65504, the largest of float16")
                for buffer, before in buffers:
                    buffer.copy_(before)
            self._clear()
            set_random_state(self.device, state)
        self.finite = math.isfinite(norm)
        return loss, 0.0 if self.in_float16 else norm

    @property
    def in_float16(self) -> bool:
        """True while the network computes in float16, whose overflow has to be looked for."""
        return self.precision.dtype == torch.float16

    def _read(self, values: list[Tensor]) -> tuple[float, float]:
        """Return the mean of the batches' losses, and the norm of the gradients, which is scaled in float16."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = values[0].new_zeros(())
        if gradients:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        *numbers, norm = torch.stack([*values, norm]).tolist()
        loss = sum(number / self.accumulate for number in numbers)
        return distributed.total(loss) if self.own_batches else loss, norm

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer change the weights by these gradients."""
        self.precision.step(optimizer, finite=self.finite)

    def _clear(self) -> None:
        for p in self.model.parameters():
            p.grad = None

    def _add_up(self, batches: Iterator, kept: list) -> list[Tensor]:
        """Add up the gradients of the batches of an update, and return the loss of each."""
        due = self.accumulate
        if self.own_batches:
            due = len(range(self.rank, self.accumulate, self.world_size))
        values = []
        for n in range(due):
            if n == len(kept):
                kept.append(next(batches))
            inputs, label = (self._here(part) for part in kept[n])
            # Several processes exchange their gradients with the last batch only.
            waiting = self.world_size > 1 and n + 1 < due
            with self.network.no_sync() if waiting else nullcontext():
                values.append(self._add(inputs, label).detach().to(self.device).reshape(()))
        return values

    def _add(self, inputs, label: Tensor) -> Tensor:
        """Add the gradients of one batch and return its loss."""
        if self.parts > 1:
            value = self._add_in_parts(inputs, label)
            if self.l1 or self.l2:
                self._backward(self._penalty())
            return value
        own = slice(None)
        if self.world_size > 1 and not self.own_batches:
            distributed.check_enough(len(label), self.accumulate)
            own = distributed.shares(len(label))[self.rank]
        with self.precision.autocast:
            outputs = self.network(_each(inputs, lambda t: t[own]))
        if self.precision.dtype != torch.float32:
            outputs = _each(outputs, _full)
        if own != slice(None):
            outputs = _each(outputs, lambda t: distributed.whole_batch(t, len(label)))
        value = self.loss(outputs, label)
        # DistributedDataParallel takes the mean over processes. Each has a part of the loss, and all have the penalties,
        # unless each has batches of its own, with the penalties of those.
        total = value * self.world_size
        if self.l1 or self.l2:
            total = total + self._penalty() * (self.world_size if self.own_batches else 1)
        self._backward(total)
        return value

    def _add_in_parts(self, inputs, label: Tensor) -> Tensor:
        """Do the same with one part of the batch in memory at a time.

        All predictions are made first, without what their gradients would need; the loss of them gives the gradient of each;
        then each part is predicted again, with the same dropout, and takes its gradient back through the network.
        """
        slices = [slice(len(label) * n // self.parts, len(label) * (n + 1) // self.parts) for n in range(self.parts)]
        states, outputs = [], []
        with torch.no_grad(), self.precision.autocast:
            for part in slices:
                states.append(random_state(self.device))
                outputs.append(self.network(_each(inputs, lambda t, part=part: t[part])))
        leaves = [torch.cat(pieces).requires_grad_() for pieces in zip(*map(_leaves, outputs))]
        value = self.loss(_rebuilt(outputs[0], map(_full, leaves)), label)
        self._backward(value)
        for part, state in zip(slices, states):
            set_random_state(self.device, state)
            with self.precision.autocast:
                again = self.network(_each(inputs, lambda t, part=part: t[part]))
            used = [(output, leaf.grad[part]) for output, leaf in zip(_leaves(again), leaves) if leaf.grad is not None]
            torch.autograd.backward(*zip(*used))
        return value

    def _backward(self, value: Tensor) -> None:
        self.precision.scaler.scale(value / self.accumulate if self.accumulate > 1 else value).backward()

    def _penalty(self) -> Tensor:
        return losses.weight_penalty(self.model, l1=self.l1, l2=self.l2)

    def _halve(self, largest: int, found: str) -> None:
        if self.world_size > 1:
            remedy = "start more processes, choose a smaller batch size, or train in half precision"
        elif distributed.normalisations(self.model):
            remedy = (
                "this network normalises by whole batches, which cannot be halved: choose a smaller batch size or crop, "
                "train in half precision, or share the batch between several GPUs (torchrun)"
            )
        elif self.parts >= largest:
            remedy = "a single sample is too large: choose a smaller crop or block, or train in half precision"
        else:
            self.parts = min(2 * self.parts, largest)
            release_memory(self.device)
            say(
                f"out of memory with {-(-largest * 2 // self.parts)} samples at a time: going on with at most "
                f"{-(-largest // self.parts)}, at the same result and some more time"
            )
            return
        raise MemoryError(f"out of memory on {self.device} ({found}); {remedy}")

    def _here(self, part):
        def moved(t: Tensor) -> Tensor:
            t = send(t, self.device)
            return t.contiguous(memory_format=self.format) if self.format and t.is_floating_point() else t

        return _each(part, moved)


class _Forward(nn.Module):
    """A network and the way through it that the loss wants, in one module, for the compiler and for several processes."""

    def __init__(self, model: nn.Module, forward: Callable | None):
        super().__init__()
        self.model, self.way = model, forward

    def forward(self, x):
        return (self.way or self.model)(x)


class _Compiled(nn.Module):
    """A network that runs through `torch.compile`, or as it is where that fails."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.works = network, None
        self.run = [torch.compile(network)]  # in a list, so that the parameters are counted once

    def forward(self, x):
        if self.works is None:
            try:
                result = self.run[0](x)
                self.works = True
                return result
            except Exception as error:  # of many kinds: no compiler, an unknown operation, …
                if is_out_of_memory(error):
                    raise
                self.works = False
                reason = next((line for line in str(error).splitlines() if line.strip()), "").strip()
                say(f"torch.compile failed, so the network runs as it is ({type(error).__name__}: {reason})")
        return self.run[0](x) if self.works else self.network(x)


def compiled(network: nn.Module) -> nn.Module:
    """Return the network through `torch.compile`. Where compiling fails, it says so in one line and runs the network as it is."""
    return _Compiled(network)


def _own_buffers() -> dict[str, bool]:
    """Return the option by which DistributedDataParallel leaves buffers alone between updates. PyTorch 2.13 gave it a new name."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def _full(value: Tensor) -> Tensor:
    """Return a tensor in float32 where it is in half precision."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _each(value, function: Callable[[Tensor], Tensor]):
    """Apply a function to every tensor in nested tuples, lists and dictionaries. Lists become tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _each(part, function) for name, part in value.items()}
    return tuple(_each(part, function) for part in value) if isinstance(value, (list, tuple)) else value


def _leaves(value) -> list[Tensor]:
    leaves: list[Tensor] = []
    _each(value, leaves.append)
    return leaves


def _rebuilt(like, leaves: Iterator[Tensor]):
    return _each(like, lambda _: next(leaves))
