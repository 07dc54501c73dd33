"""Train one network in several processes, on as many GPUs or machines, with the same result as one process.

    torchrun --nproc-per-node 8 -m medseg_lite train deepmedic --data … --out runs/eight

or, in a script that `torchrun` starts:

    with distributed.joined() as device:
        recipes.deepmedic(cases, folder="runs/eight", device=device)

`torchrun` starts the processes and tells each its number. PyTorch's DistributedDataParallel averages their gradients. This module
makes the average equal to the gradient of the whole batch: batch normalisation measures the whole batch, and a loss that is no mean
over its samples, such as Dice, is given all of them.

When a process dies, those that exchange by Gloo (on the CPU) notice it at once and say so (`companions`). Those that exchange by NCCL
(on GPUs) may wait for it instead, until `torchrun` ends them.
"""

from __future__ import annotations

import gc
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ..devices import find_device, module_of
from ..models.layers import RollingBatchNorm

# The others wait while the first process stores a cohort or makes a validation of the reader's, which may take long.
PATIENCE = timedelta(hours=6)
# Names of what exchanges tensors of each kind of device; the first that this PyTorch has is taken.
BACKENDS = {"cpu": ("gloo",), "cuda": ("nccl",), "xpu": ("xccl", "ccl")}
_ALONE: list[bool] = []  # an entry for each block of `alone` that this process is in
_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "socket", "peer", "nccl", "gloo")


def rank() -> int:
    """Return the number of this process, from 0. It is 0 where there is only one."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    return not _ALONE and dist.is_available() and dist.is_initialized()


@contextmanager
def alone() -> Iterator[None]:
    """Let this process act as the only one within the block, for work that the others do not take part in."""
    _ALONE.append(True)
    try:
        yield
    finally:
        _ALONE.pop()


@contextmanager
def joined(device: str = "auto") -> Iterator[str]:
    """Let the processes that `torchrun` started work together within the block. Yields the device of this process.

    Without `torchrun` nothing happens. The device "auto" is a CUDA GPU where there is one.

    Args:
        device: name, as for `devices.find_device`. Each of several processes takes the accelerator of its own number.

    Raises:
        ValueError: the device is not there, it cannot compute, there are fewer of its kind than processes on this machine, or this
            PyTorch cannot exchange tensors between several of them.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1 or _joined():
        yield str(find_device(device))
        return
    own = _own_device(device)
    dist.init_process_group(_find_backend(own.type), timeout=PATIENCE)
    try:
        yield str(own)
    finally:
        gc.collect()  # what still holds the group, such as a network that exchanges its gradients, goes before it
        dist.destroy_process_group()


def _own_device(device: str) -> torch.device:
    """Return the device of this one of several processes. Accelerators with other numbers are not touched."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, mine = device.split(":")[0], int(os.environ["LOCAL_RANK"])
    if kind == "cpu" or kind not in BACKENDS:
        return find_device(device)
    module = module_of(torch.device(kind))
    if 0 < module.device_count() <= mine:
        here = f"{module.device_count()} GPU{'s' if module.device_count() > 1 else ''}"
        raise ValueError(f"this machine has {here}; start at most as many processes, --nproc-per-node {module.device_count()}")
    own = find_device(f"{kind}:{mine}")
    module.set_device(own)
    return own


def _find_backend(kind: str) -> str:
    """Return the name of what exchanges tensors on a kind of device. Python objects go by way of the CPU."""
    found = [name for name in BACKENDS.get(kind, ()) if dist.is_backend_available(name)]
    if not found:
        wanted = f" (it has no {' or '.join(BACKENDS[kind])})" if kind in BACKENDS else ""
        raise ValueError(
            f"PyTorch {torch.__version__} cannot exchange tensors between processes on {kind}{wanted}; start one process, or give "
            "--device cpu"
        )
    return found[0] if kind == "cpu" else f"cpu:gloo,{kind}:{found[0]}"


@contextmanager
def companions(hint: Callable[[], str] = str) -> Iterator[None]:
    """Say clearly that another process died, where PyTorch would speak of sockets.

    Args:
        hint: function that returns the end of the message, such as how to go on.

    Raises:
        ConnectionError: another process of this run has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if world_size() == 1 or not (isinstance(error, dist.DistError) or any(word in text for word in _LOST)):
            raise
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise ConnectionError(
            f"another process of this run has ended or cannot be reached, so process {rank()} stops{hint()} ({reason})"
        ) from error


def total(value: float) -> float:
    """Return the sum of a number over all processes."""
    if world_size() == 1:
        return value
    box = torch.tensor([float(value)], dtype=torch.float64)
    dist.all_reduce(box)
    return float(box)


def broadcast(value):
    """Return the first process's value in every process. It is a small Python object."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value) -> list:
    """Return the values of all processes, in their order. They are small Python objects."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def deal_out(function: Callable, items: Sequence) -> list:
    """Return a function's result for every item, in their order, in every process. Each process computes a part of them.

    Args:
        function: function of an item. Its results are small Python objects.
        items: the same items in every process. A process takes only its own out of the sequence.
    """
    own = [function(items[n]) for n in range(rank(), len(items), world_size())]
    parts = all_gather(own)
    return [parts[n % world_size()][n // world_size()] for n in range(len(items))]


class Shared:
    """A function that all processes are to call together, such as a validation that deals out its cases (`deal_out`).

    Any other validation is called by the first process only.

    Args:
        function: function that gives every process the same result.
    """

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


def barrier() -> None:
    """Wait until every process has reached this line."""
    all_gather(None)


def shares(samples: int) -> list[slice]:
    """Return the samples of a batch that each process takes. Their numbers differ by at most one."""
    sizes = [(samples + world_size() - 1 - n) // world_size() for n in range(world_size())]
    return [slice(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(world_size())]


def check_enough(batch: int, accumulate: int) -> None:
    """Raise ValueError where an update has neither samples in a batch nor batches for all processes."""
    most = max(batch, accumulate)
    if world_size() > most:
        raise ValueError(
            f"a batch of {batch} and accumulate={accumulate} leave nothing to do for some of the {world_size()} processes; start at "
            f"most {most}, give one of the two at least {world_size()} (which is another training than the paper's), or let each "
            "GPU train another fold: without torchrun, train --folds-on-gpus"
        )


def whole_batch(own: Tensor, samples: int) -> Tensor:
    """Return the predictions `(samples, ...)` of all processes, in the order of the batch.

    Gradients flow back only into this process's own predictions. If the loss of all predictions is multiplied by the number of
    processes, the mean of its gradients over the processes is the gradient of one process with the whole batch.
    """
    own = own if own.dtype == torch.float64 else own.float()
    parts = shares(samples)
    largest = parts[0].stop  # equal sizes are what a gathering needs
    filled = torch.cat([own.detach(), own.new_zeros(largest - len(own), *own.shape[1:])]).contiguous()
    places = [torch.empty_like(filled) for _ in parts]
    dist.all_gather(places, filled)
    pieces = [place[: part.stop - part.start] for place, part in zip(places, parts)]
    pieces[rank()] = own
    return torch.cat(pieces)


# ------------------------------------------------------------------------------------------------- batch normalisation


def normalisations(model: nn.Module) -> list[nn.Module]:
    """Return the layers that measure a batch in training."""
    return [m for m in model.modules() if isinstance(m, RollingBatchNorm | nn.modules.batchnorm._BatchNorm)]


@contextmanager
def shared_statistics(model: nn.Module, *, one_batch: bool) -> Iterator[Callable[[], None]]:
    """Make batch normalisation do within the block what it does in one process.

    Args:
        model: network with layers of batch normalisation, which are changed for the while. Nothing happens in one process.
        one_batch: True where each process has a share of one batch: mean and variance are then those of the whole batch. False
            where each has batches of its own: those are normalised by themselves, and their statistics exchanged afterwards.

    Yields:
        A function to be called after all batches of an update, in every process: with batches of its own, it brings the
        statistics for inference up to date, in the order of the batches.
    """
    layers = normalisations(model) if world_size() > 1 else []
    measured: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def settle() -> None:
        if one_batch or not layers:
            return
        rows = [torch.cat([seen.flatten() for seen in batch]) for batch in zip(*measured.values())]
        width = sum(2 * layer.weight.numel() for layer in layers)
        most = max(all_gather(len(rows)))
        filled = torch.full((most, width), torch.nan, device=layers[0].weight.device)
        if rows:
            filled[: len(rows)] = torch.stack(rows)
        places = [torch.empty_like(filled) for _ in range(world_size())]
        dist.all_gather(places, filled)
        for row in torch.stack(places, dim=1).flatten(0, 1):  # batch 0 of every process, then batch 1, …
            if not row.isnan().all():
                parts = row.split([2 * layer.weight.numel() for layer in layers])
                for layer, (mean, var) in zip(layers, (p.view(2, -1) for p in parts)):
                    _remember(layer, mean, var)
        for seen in measured.values():
            seen.clear()

    def forward_of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        @torch.compiler.disable
        def forward(x: Tensor) -> Tensor:
            if not layer.training:
                return type(layer).forward(layer, x)
            if one_batch:
                y, mean, var = _Normalise.apply(x, layer.weight, layer.bias, layer.eps)
                _remember(layer, mean, var)
                return y
            mean, var = torch.zeros_like(layer.running_mean), torch.zeros_like(layer.running_var)
            y = F.batch_norm(x, mean, var, layer.weight, layer.bias, training=True, momentum=1.0, eps=layer.eps)
            measured[layer].append(torch.stack([mean, var]))
            return y

        return forward

    for layer in layers:
        layer.forward = forward_of(layer)  # hides the method of the class
    try:
        yield settle
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def _remember(layer: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Add the statistics of one batch to those for inference, as the layer itself would; the variance is unbiased."""
    if isinstance(layer, RollingBatchNorm):
        layer.remember(mean, var)
        return
    layer.num_batches_tracked += 1
    weight = layer.momentum if layer.momentum is not None else 1 / float(layer.num_batches_tracked)
    layer.running_mean.lerp_(mean, weight)
    layer.running_var.lerp_(var, weight)


class _Normalise(torch.autograd.Function):
    """Batch normalisation by the mean and variance of the batch that all processes have together.

    As `torch.nn.SyncBatchNorm`, which is for CUDA only. Returns the result, the mean and the unbiased variance.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        values = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(values, _all_but_channels(x), correction=0)
        own = torch.cat([mean, var, mean.new_tensor([x.numel() / x.shape[1]])])
        places = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(places, own)
        means, variances, sizes = torch.stack(places).split([len(mean), len(mean), 1], dim=1)
        total = sizes.sum()
        mean = (sizes * means).sum(0) / total
        var = (sizes * (variances + (means - mean).square())).sum(0) / total
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), total)
        unbiased = var * total / (total - 1)
        ctx.mark_non_differentiable(mean, unbiased)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, unbiased

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        x, weight, mean, scale, total = ctx.saved_tensors
        shape = (-1, *(1,) * (x.ndim - 2))
        grad, normal = grad.to(mean.dtype), (x - mean.view(shape)) * scale.view(shape)
        axes = _all_but_channels(x)
        own = torch.stack([grad.sum(axes), (grad * normal).sum(axes)])
        sums = own.clone()
        dist.all_reduce(sums)
        through_mean, through_var = (s.view(shape) / total for s in sums)
        dx = (grad - through_mean - normal * through_var) * (scale * weight).view(shape)
        return dx.to(x.dtype), own[1], own[0], None


def _all_but_channels(x: Tensor) -> Sequence[int]:
    return [0, *range(2, x.ndim)]
