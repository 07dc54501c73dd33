"""The rules by which operations hand on the geometry of their inputs, and a mode of PyTorch that applies them.

Every tensor lies on PyTorch's "meta" device, where tensors have a shape but no content. So even a large network takes milliseconds,
its weights are not read, and no memory is needed. Along every spatial axis each tensor carries the input voxels that its own voxels
depend on, and every operation hands that on: a convolution takes the union over its taps, a slice a part, a concatenation the union
of its parts. That is the recursion φ_l = φ_{l-1} + (κ_l - 1) τ_l (Kamnitsas et al. 2017, eq. 1) on sets instead of sizes, so that
padding, strides, dilation, transposed convolutions, repetition and several pathways need no formulas of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EMPTY = np.iinfo(np.int64).max // 4  # "first" of a voxel that depends on padding alone; its "last" is the opposite
_KEY = "_medseg_axes"


class Axis(NamedTuple):
    """The voxels of a layer along one axis of the input. Voxel i is centred on `offset + stride * i`.

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


class WithoutContent(TorchDispatchMode):
    """The base class of modes in which nothing but shapes is computed."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer PyTorch that its compiler needs no warning, for which it would import it: a second, and 70 MB."""
        return False


class Follow(WithoutContent):
    """A mode in which each operation hands the axes of its inputs on to its outputs, and nothing but shapes is computed.

    Args:
        x: input `(B, C, *space)` on the "meta" device. All axes begin here.
    """

    def __init__(self, x: Tensor):
        super().__init__()
        self.shape, self.dims = tuple(x.shape[2:]), x.ndim - 2
        along = {n: Axis(0.0, 1.0, np.arange(n), np.arange(n)) for n in set(self.shape)}
        setattr(x, _KEY, tuple(along[n] for n in self.shape))

    @staticmethod
    def axes(tensor: Tensor) -> tuple[Axis, ...] | None:
        """Return the axes of a tensor, or None where an operation before it could not be followed."""
        return getattr(tensor, _KEY, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        if not any(t.is_meta for t in tensors):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        result = shape_of_result(name, args)
        if result is None:
            result = function(*without_content(args), **without_content(kwargs))
        inputs = [t for t in tensors if hasattr(t, _KEY)]
        if not inputs:
            return result
        rule = next((rule for start, rule in _RULES.items() if name.startswith(start)), _voxelwise)
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, Tensor) and output.ndim > self.dims:
                axes = rule(inputs, output, args, self.dims)
                if axes is not None and (name.startswith("upsample") or (rule is _convolution and args[6])):
                    axes = _along(_aligned, axes, self.shape)
                if axes is not None and tuple(len(a.first) for a in axes) == tuple(output.shape[-self.dims :]):
                    setattr(output, _KEY, axes)
        return result


def without_content(value):
    """Return the arguments of an operation with every tensor on the "meta" device. The network's weights are elsewhere."""
    if isinstance(value, Tensor) and not value.is_meta:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(without_content(v) for v in value)
    if isinstance(value, dict):
        return {key: without_content(v) for key, v in value.items()}
    return value


def shape_of_result(name: str, args: tuple) -> Tensor | tuple[Tensor, ...] | None:
    """Return the result of an operation whose shape is plain, else None. PyTorch itself takes up to milliseconds to find it."""
    x = args[0]
    if name in _SAME_SHAPE:
        return x if name.endswith("_") else torch.empty(x.shape, dtype=x.dtype, device="meta")
    if name in _SAME_SHAPES and isinstance(args[1], Tensor) and args[1].shape == x.shape:
        dtype = torch.promote_types(x.dtype, args[1].dtype)
        return x if name.endswith("_") else torch.empty(x.shape, dtype=dtype, device="meta")
    if name.endswith("batch_norm"):
        return tuple(x.new_empty(shape) for shape in (x.shape, 0, 0))
    if name.startswith("upsample") and args[1] is not None:
        return x.new_empty((*x.shape[:2], *args[1]))
    return _SHAPES[name](*args) if name in _SHAPES else None


def _along(rule: Callable, *arguments: Sequence) -> tuple:
    """Apply a rule to the arguments of one axis after the other. Axes whose arguments are the same share one result."""
    found: dict[tuple, Axis | None] = {}
    result = []
    for own in zip(*arguments):
        key = tuple(id(value) if isinstance(value, Axis) else value for value in own)
        if key not in found:
            found[key] = rule(*own)
        result.append(found[key])
    return tuple(result)


def _aligned(axis: Axis, n: int) -> Axis:
    """Lay enlarged maps that cover the patch evenly on it, for that is how a network that pads is trained.

    Its output voxel i stands for input voxel i, even where strided convolutions, centred on every other voxel, have moved what it sees.
    """
    covers = abs(axis.stride * len(axis.first) - n) < 1e-6
    return axis._replace(offset=(axis.stride - 1) / 2) if covers else axis


# --------------------------------------------------------------------------------- rules: (inputs, output, args, dims) -> axes


def _union(index: np.ndarray, valid: np.ndarray, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last input voxel over all taps. `index` and `valid` are (taps, voxels), indices into the axis before."""
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
    numbers = (_each(v, dims) for v in (stride, pad, dilation))
    return _along(along, getattr(x, _KEY), output.shape[-dims:], weight.shape[-dims:], *numbers)


def _pooling(inputs, output, args, dims):
    x, kernel, stride, pad, *rest = (*args, None, None)[: max(4, len(args))]
    # Only maxima have a dilation, which follows the padding.
    dilation = rest[0] if rest and not isinstance(rest[0], bool) and rest[0] else 1
    numbers = (_each(v, dims) for v in (kernel, stride or kernel, pad or 0, dilation))
    return _along(_window, getattr(x, _KEY), output.shape[-dims:], *numbers)


def _resized(align_corners: bool, taps: int) -> Callable:
    def rule(inputs, output, args, dims):
        corners = align_corners and bool(args[2])
        return _along(lambda axis, n: enlarged(axis, n, corners), getattr(inputs[0], _KEY), output.shape[-dims:])

    def enlarged(axis: Axis, n: int, corners: bool) -> Axis:
        m = len(axis.first)
        step = (m - 1) / max(n - 1, 1) if corners else m / n
        begin = 0.0 if corners else (step - 1) / 2
        place = np.arange(n) * step + (0.0 if taps == 1 else begin)  # "nearest" rounds the left edge of a voxel
        index = np.floor(place + 1e-9).astype(int)  # 1e-9: thirds are not exact
        tap = np.arange(taps)[:, None] - (taps - 1) // 2
        valid = (np.abs(place - index) > 1e-9) | (tap == 0)  # on a voxel's very middle the others have no weight
        union = _union((index + tap).clip(0, m - 1), valid, axis)
        return Axis(axis.offset + axis.stride * begin, axis.stride * step, *union)

    return rule


def _adaptive(inputs, output, args, dims):
    def pooled(axis: Axis, n: int) -> Axis:
        m = len(axis.first)
        start, stop = np.arange(n) * m // n, -(-(np.arange(n) + 1) * m // n)
        index = start + np.arange((stop - start).max())[:, None]
        first, last = _union(index, index < stop, axis)
        return Axis(axis.offset + axis.stride * (m / n - 1) / 2, axis.stride * m / n, first, last)

    return _along(pooled, getattr(inputs[0], _KEY), output.shape[-dims:])


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
    """Follow a mean, sum or maximum over whole axes that keeps them, one voxel long."""
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
    """Follow sums, activations, normalisation, concatenation of channels: all inputs share one grid, or have one voxel for all."""
    axes = _along(_merged, output.shape[-dims:], *(getattr(x, _KEY) for x in inputs))
    return None if None in axes else axes


def _merged(n: int, *given: Axis) -> Axis | None:
    main = next((axis for axis in given if len(axis.first) == n), None)
    if main is None or any(len(axis.first) not in (n, 1) for axis in given):
        return None
    if all(axis is main for axis in given):
        return main
    first = np.min(np.broadcast_arrays(*(axis.first for axis in given)), axis=0)
    last = np.max(np.broadcast_arrays(*(axis.last for axis in given)), axis=0)
    return Axis(main.offset, main.stride, first, last)


def _moved(inputs, output, args, dims):
    """Follow permuted axes, only where the spatial ones stay the last."""
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


# ------------------------------------------ shapes of results: (arguments) -> result, or None for PyTorch to say what is wrong


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first, dim = tensors[0], dim % tensors[0].ndim
    others = {(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors}
    if len(others) > 1 or any(t.dtype != first.dtype or t.ndim != first.ndim for t in tensors):
        return None
    return first.new_empty((*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]))


def _convolved(x, weight, _, stride, pad, dilation, transposed, more, groups) -> Tensor | None:
    channels, taken = weight.shape[0], weight.shape[1] * groups
    if transposed:
        channels, taken = taken, channels
    if x.ndim != weight.ndim or x.shape[1] != taken or x.dtype != weight.dtype:
        return None
    along = zip(x.shape[2:], weight.shape[2:], *(_each(v, x.ndim - 2) for v in (stride, pad, dilation, more)))
    if transposed:
        size = [(n - 1) * s - 2 * p + d * (k - 1) + m + 1 for n, k, s, p, d, m in along]
    else:
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in along]
    return x.new_empty((x.shape[0], channels, *size)) if min(size) > 0 else None


def _pooled(x, kernel, stride=(), pad=0, dilation=1, ceil_mode=False) -> tuple[Tensor, Tensor] | None:
    kernel = _each(kernel, x.ndim - 2)
    along = zip(x.shape[2:], kernel, *(_each(v, x.ndim - 2) for v in (stride or kernel, pad, dilation)))
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in along]
    if ceil_mode or min(size) < 1:
        return None
    return x.new_empty((*x.shape[:2], *size)), x.new_empty((*x.shape[:2], *size), dtype=torch.int64)


def _multiplied(a: Tensor, b: Tensor) -> Tensor | None:
    return torch.empty((len(a), b.shape[1]), dtype=a.dtype, device="meta") if a.shape[1] == len(b) else None


def _added(x: Tensor, a: Tensor, b: Tensor, **_) -> Tensor | None:
    return x if a.shape[1] == len(b) and x.shape == (len(a), b.shape[1]) else None


_SHAPES = {
    "addmm_": _added,
    "cat": _joined,
    "mm": _multiplied,
    "convolution": _convolved,
    "max_pool2d_with_indices": _pooled,
    "max_pool3d_with_indices": _pooled,
}

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

# Operations whose result has the shape of their first argument: always, or where two arguments have one shape.
_SAME_SHAPE = {
    *("_prelu_kernel", "relu", "relu_", "leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "silu", "silu_"),
    *("sigmoid", "sigmoid_", "tanh", "hardtanh", "hardtanh_", "_softmax", "_log_softmax"),
}
_SAME_SHAPES = {"add", "add_", "sub", "mul", "mul_", "div", "maximum", "minimum"}
