"""Where each layer of a network looks: every operation's share in the geometry, followed through one run without any numbers.

The network runs on PyTorch's "meta" device, where tensors have a shape but no content, so that even a large network and a
large patch take milliseconds. Along every spatial axis each tensor carries which input voxels its voxels depend on, and
every operation hands that on: a convolution takes the union over its taps, a slice a part, a concatenation the union of its parts.
That is the recursion φ_l = φ_{l-1} + (κ_l - 1) τ_l (Kamnitsas et al. 2017, eq. 1) on sets instead of sizes, so that padding,
strides, dilation, transposed convolutions, repetition and several pathways need no formulas of their own.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.layers import convolutions

EMPTY = np.iinfo(np.int64).max // 4  # "first" of a voxel that depends on padding alone; its "last" is the opposite
_KEY = "_medseg_axes"


class Axis(NamedTuple):
    """How the voxels of a layer lie over the input along one axis. Voxel i is centred on `offset + stride * i`.

    Attributes:
        offset: input index, possibly a fraction, of the middle of voxel 0.
        stride: input voxels from one voxel to the next.
        first: first input voxel that each voxel depends on; larger than `last` where it depends on none.
        last: last input voxel that each depends on.
    """

    offset: float
    stride: float
    first: np.ndarray
    last: np.ndarray


class Layer(NamedTuple):
    """One module's output in one run.

    Attributes:
        name: as in `model.named_modules()`, "" for the network itself; with "#2" for the second call of one module, and so on.
        kind: class of the module.
        shape: `(channels, *space)`.
        parameters: number of parameters, those of modules inside included.
        axes: one `Axis` for each spatial axis, or None where an operation before it could not be followed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    axes: tuple[Axis, ...] | None


def spatial_dims(model: nn.Module) -> int:
    """2 or 3: what the network says, else what its first convolution has."""
    if hasattr(model, "spatial_dims"):
        return model.spatial_dims
    return _first_convolution(model).weight.ndim - 2


def in_channels(model: nn.Module) -> int:
    """Image channels that the network takes: what it says, else what its first convolution has."""
    return model.in_channels if hasattr(model, "in_channels") else _first_convolution(model).in_channels


def _first_convolution(model: nn.Module) -> nn.Module:
    found = convolutions(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution; feature maps are those of convolutional networks")
    return found[0]


def trace(model: nn.Module, shape: Sequence[int]) -> dict[str, Layer]:
    """Every module's output for an input patch of `shape` voxels, in the order in which they are computed.

    Only outputs `(B, C, *space)` with as many spatial axes as the input are listed. The network itself is left as it is.
    Normalisation by a layer's own statistics (instance or group normalisation) counts as voxelwise, as batch normalisation does.

    Raises:
        ValueError: when the network does not accept this patch.
    """
    dims = spatial_dims(model)
    network = copy.deepcopy(model).to("meta").float().eval()
    x = torch.empty(1, in_channels(model), *shape, device="meta")
    start = tuple(Axis(0.0, 1.0, np.arange(n), np.arange(n)) for n in shape)
    layers: dict[str, Layer] = {}

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        count = sum(p.numel() for p in module.parameters())
        axes = getattr(output, _KEY, None)
        layers[name] = Layer(name, type(module).__name__, tuple(output.shape[1:]), count, axes)

    with torch.no_grad(), _Follow(shape), watched(network, dims, note):
        setattr(x, _KEY, start)
        try:
            network(x)
        except (RuntimeError, IndexError) as error:
            size = "×".join(map(str, shape))
            raise ValueError(f"{type(model).__name__} does not take a patch of {size} voxels: {error}") from error
    return layers


@contextmanager
def watched(model: nn.Module, dims: int, note: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Call `note(name, module, output)` for every module's output of `dims` spatial axes, within the block.

    Of several outputs the first that is such a tensor counts. The hooks are gone afterwards, whatever happened.
    """
    calls: Counter[str] = Counter()

    def hook(name: str) -> Callable:
        def call(module, inputs, output):
            outputs = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
            found = next((o for o in outputs if isinstance(o, Tensor) and o.ndim == dims + 2), None)
            calls[name] += 1
            if found is not None:
                note(name if calls[name] == 1 else f"{name}#{calls[name]}", module, found)

        return call

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Follow(TorchDispatchMode):
    """Hands the axes of each operation's inputs on to its outputs."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape, self.dims = tuple(shape), len(shape)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        inputs = [t for t in tensors if hasattr(t, _KEY)]
        if not inputs:
            return result
        name = function.overloadpacket.__name__
        rule = next((rule for start, rule in _RULES.items() if name.startswith(start)), _voxelwise)
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, Tensor) and output.ndim > self.dims:
                axes = rule(inputs, output, args, self.dims)
                if axes is not None and (name.startswith("upsample") or (rule is _convolution and args[6])):
                    axes = tuple(self._aligned(axis, n) for axis, n in zip(axes, self.shape))
                if axes is not None and tuple(len(a.first) for a in axes) == tuple(output.shape[-self.dims :]):
                    setattr(output, _KEY, axes)
        return result

    @staticmethod
    def _aligned(axis: Axis, n: int) -> Axis:
        """Enlarged maps that cover the patch evenly lie evenly on it, for that is how a network that pads is trained: its output
        voxel i stands for input voxel i, even where strided convolutions, centred on every other voxel, have moved what it sees."""
        covers = abs(axis.stride * len(axis.first) - n) < 1e-6
        return axis._replace(offset=(axis.stride - 1) / 2) if covers else axis


# --------------------------------------------------------------------------------- rules: (inputs, output, args, dims) -> axes


def _union(index: np.ndarray, valid: np.ndarray, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """First and last of all taps: `index` and `valid` are (taps, voxels), indices into the axis before."""
    index = np.where(valid, index, 0)
    first = np.where(valid, axis.first[index], EMPTY).min(0)
    last = np.where(valid, axis.last[index], -EMPTY).max(0)
    return first, last


def _window(axis: Axis, n: int, kernel: int, stride: int, pad: int, dilation: int) -> Axis:
    index = np.arange(n) * stride - pad + dilation * np.arange(kernel)[:, None]
    first, last = _union(index, (index >= 0) & (index < len(axis.first)), axis)
    return Axis(axis.offset + axis.stride * (dilation * (kernel - 1) / 2 - pad), axis.stride * stride, first, last)


def _transposed(axis: Axis, n: int, kernel: int, stride: int, pad: int, dilation: int) -> Axis:
    place = np.arange(n) + pad - dilation * np.arange(kernel)[:, None]
    index = place // stride
    first, last = _union(index, (place % stride == 0) & (index >= 0) & (index < len(axis.first)), axis)
    offset = axis.offset + axis.stride * (pad - dilation * (kernel - 1) / 2) / stride
    return Axis(offset, axis.stride / stride, first, last)


def _convolution(inputs, output, args, dims):
    x, weight, _, stride, pad, dilation, transposed = args[:7]
    if not hasattr(x, _KEY):
        return None
    along = _transposed if transposed else _window
    options = zip(
        getattr(x, _KEY), output.shape[-dims:], weight.shape[-dims:], *(_each(v, dims) for v in (stride, pad, dilation))
    )
    return tuple(along(axis, n, k, s, p, d) for axis, n, k, s, p, d in options)


def _pooling(inputs, output, args, dims):
    x, kernel, stride, pad, *rest = (*args, None, None)[: max(4, len(args))]
    # Only maxima have a dilation, which follows the padding.
    dilation = rest[0] if rest and not isinstance(rest[0], bool) and rest[0] else 1
    numbers = (_each(v, dims) for v in (kernel, stride or kernel, pad or 0, dilation))
    return tuple(_window(a, n, k, s, p, d) for a, n, k, s, p, d in zip(getattr(x, _KEY), output.shape[-dims:], *numbers))


def _resized(align_corners: bool, taps: int) -> Callable:
    def rule(inputs, output, args, dims):
        corners = align_corners and bool(args[2])
        axes = []
        for axis, n in zip(getattr(inputs[0], _KEY), output.shape[-dims:]):
            m = len(axis.first)
            step = (m - 1) / max(n - 1, 1) if corners else m / n
            begin = 0.0 if corners else (step - 1) / 2
            place = np.arange(n) * step + (0.0 if taps == 1 else begin)  # "nearest" rounds the left edge of a voxel
            index = np.floor(place + 1e-9).astype(int)  # 1e-9: thirds are not exact
            tap = np.arange(taps)[:, None] - (taps - 1) // 2
            valid = (np.abs(place - index) > 1e-9) | (tap == 0)  # on a voxel's very middle the others have no weight
            union = _union((index + tap).clip(0, m - 1), valid, axis)
            axes.append(Axis(axis.offset + axis.stride * begin, axis.stride * step, *union))
        return tuple(axes)

    return rule


def _adaptive(inputs, output, args, dims):
    axes = []
    for axis, n in zip(getattr(inputs[0], _KEY), output.shape[-dims:]):
        m = len(axis.first)
        start, stop = np.arange(n) * m // n, -(-(np.arange(n) + 1) * m // n)
        index = start + np.arange((stop - start).max())[:, None]
        first, last = _union(index, index < stop, axis)
        axes.append(Axis(axis.offset + axis.stride * (m / n - 1) / 2, axis.stride * m / n, first, last))
    return tuple(axes)


def _slice(inputs, output, args, dims):
    x, dim, start, _, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
    axes, place = list(getattr(x, _KEY)), dim % x.ndim - (x.ndim - dims)
    if place >= 0:
        axis = axes[place]
        begin = 0 if start is None else min(max(start + (x.shape[dim] if start < 0 else 0), 0), x.shape[dim])
        part = slice(begin, begin + output.shape[dim] * step, step)
        axes[place] = Axis(axis.offset + axis.stride * begin, axis.stride * step, axis.first[part], axis.last[part])
    return tuple(axes)


def _padding(mode: str | None) -> Callable:
    def rule(inputs, output, args, dims):
        x, pads = args[0], list(args[1])
        axes = list(getattr(x, _KEY))
        for n in range(min(len(pads) // 2, dims)):  # from the last axis backwards; what is beyond them pads channels
            (low, high), axis = pads[2 * n : 2 * n + 2], axes[dims - 1 - n]
            first, last = (a[max(-low, 0) : len(a) - max(-high, 0)] for a in (axis.first, axis.last))  # negative: cut off
            wide = (max(low, 0), max(high, 0))
            if mode is None:
                first, last = np.pad(first, wide, constant_values=EMPTY), np.pad(last, wide, constant_values=-EMPTY)
            else:
                first, last = np.pad(first, wide, mode=mode), np.pad(last, wide, mode=mode)
            axes[dims - 1 - n] = Axis(axis.offset - axis.stride * low, axis.stride, first, last)
        return tuple(axes)

    return rule


def _reduced(inputs, output, args, dims):
    """A mean, sum or maximum over whole axes that keeps them, one voxel long."""
    x = inputs[0]
    if output.ndim != x.ndim:
        return None
    axes = []
    for axis, before, after in zip(getattr(x, _KEY), x.shape[-dims:], output.shape[-dims:]):
        if after != before:
            middle = axis.offset + axis.stride * (before - 1) / 2
            axis = Axis(middle, axis.stride * before, axis.first.min(keepdims=True), axis.last.max(keepdims=True))
        axes.append(axis)
    return tuple(axes)


def _voxelwise(inputs, output, args, dims):
    """Sums, activations, normalisation, concatenation of channels: all inputs share one grid, or have one voxel for all."""
    axes = []
    for place, n in enumerate(output.shape[-dims:]):
        given = [getattr(x, _KEY)[place] for x in inputs]
        if any(len(axis.first) not in (n, 1) for axis in given):
            return None
        main = next((axis for axis in given if len(axis.first) == n), None)
        if main is None:
            return None
        first = np.min(np.broadcast_arrays(*(axis.first for axis in given)), axis=0)
        last = np.max(np.broadcast_arrays(*(axis.last for axis in given)), axis=0)
        axes.append(Axis(main.offset, main.stride, first, last))
    return tuple(axes)


def _moved(inputs, output, args, dims):
    """Permuted axes: followed only where the spatial ones stay the last."""
    x = inputs[0]
    if isinstance(args[1], int):
        moved = {args[1] % x.ndim, args[2] % x.ndim}
        return _voxelwise(inputs, output, args, dims) if max(moved) < x.ndim - dims else None
    order = [a % x.ndim for a in args[1]]
    return _voxelwise(inputs, output, args, dims) if order[-dims:] == list(range(x.ndim - dims, x.ndim)) else None


def _unknown(inputs, output, args, dims):
    return None


def _each(value, dims: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * dims if len(values) == 1 else values


# By the beginning of an ATen operation's name; whatever is not listed is voxelwise if the shapes allow it.
_RULES: dict[str, Callable] = {
    "convolution": _convolution,
    "max_pool": _pooling,
    "avg_pool": _pooling,
    "_adaptive_avg_pool": _adaptive,
    "adaptive_": _adaptive,
    "upsample_nearest": _resized(False, 1),
    "upsample_bicubic": _resized(True, 4),
    "upsample_": _resized(True, 2),
    "slice": _slice,
    "constant_pad": _padding(None),
    "reflection_pad": _padding("reflect"),
    "replication_pad": _padding("edge"),
    "mean": _reduced,
    "sum": _reduced,
    "amax": _reduced,
    "permute": _moved,
    "transpose": _moved,
    "_upsample": _unknown,
    "flip": _unknown,
    "roll": _unknown,
    "col2im": _unknown,
    "im2col": _unknown,
    "pixel_": _unknown,
    "grid_sampler": _unknown,
}
