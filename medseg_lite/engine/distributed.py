"""Train one network in several processes, on as many GPUs or machines, with the same result as one process.

    torchrun --nproc-per-node 8 -m medseg_lite train deepmedic --data … --out runs/eight

or, in a script that `torchrun` starts:

    with distributed.joined() as device:
        recipes.deepmedic(cases, folder="runs/eight", device=device)

`torchrun` starts the processes and tells each its number. PyTorch's DistributedDataParallel averages their gradients. This module
makes the average equal to the gradient of the whole batch: batch normalisation measures the whole batch, and a loss that is no mean
over its samples, such as Dice, is given all of them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ..devices import find_device
from ..models.layers import RollingBatchNorm

# The others wait while the first process validates, which may take long; a process that dies is noticed at once all the same.
PATIENCE = timedelta(hours=6)
_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "socket", "peer", "nccl", "gloo")


def rank() -> int:
    """Return the number of this process, from 0. It is 0 where there is only one."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined(device: str = "auto") -> Iterator[str]:
    """Let the processes that `torchrun` started work together within the block. Yields the device of this process.

    Without `torchrun` nothing happens. The device "auto" is a GPU where there is one.

    Args:
        device: "cpu", "cuda", "cuda:1" or "auto". Each of several processes takes the GPU of its own number.

    Raises:
        ValueError: a GPU is asked for, and PyTorch sees none, or fewer than there are processes on this machine.
    """
    device = str(find_device(device))
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1 or _joined():
        yield device
        return
    if device.startswith("cuda"):
        mine, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if mine >= here:
            raise ValueError(f"this machine has {here} GPUs; start at most as many processes, --nproc-per-node {here}")
        device = f"cuda:{mine}"
        torch.cuda.set_device(mine)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        gc.collect()  # what still holds the group, such as a network that exchanges its gradients, goes before it
        dist.destroy_process_group()


@contextmanager
def companions(hint: Callable[[], str] = str) -> Iterator[None]:
    """Say clearly that another process died, where PyTorch would speak of sockets.

    Args:
        hint: function that returns the end of the message, such as how to go on.

    Raises:
        ConnectionError: another process of this run has ended.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if world_size() == 1 or not (isinstance(error, dist.DistError) or any(word in text for word in _LOST)):
            raise
        raise ConnectionError(f"another process of this run has ended, so process {rank()} stops{hint()}") from error


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


def barrier() -> None:
    """Wait until every process has reached this line."""
    all_gather(None)


def shares(samples: int) -> list[slice]:
    """Return the samples of a batch that each process takes. Their numbers differ by at most one."""
    sizes = [(samples + world_size() - 1 - n) // world_size() for n in range(world_size())]
    return [slice(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(world_size())]


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
