"""The geometry of a network's layers: which input voxels each voxel of a layer sees, found in one run without any numbers.

Every tensor of the run lies on PyTorch's "meta" device, where tensors have a shape but no content. So even a large network takes
milliseconds, and neither its weights are read nor any memory is needed. Along every spatial axis each tensor carries the input voxels that
its own voxels depend on, and every operation hands that on: a convolution takes the union over its taps, a slice a part, a
concatenation the union of its parts. That is the recursion φ_l = φ_{l-1} + (κ_l - 1) τ_l (Kamnitsas et al. 2017, eq. 1) on sets
instead of sizes, so that padding, strides, dilation, transposed convolutions, repetition and several pathways need no formulas
of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.layers import convolutions
from ..models.network import Adapter, Network

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


class Layer(NamedTuple):
    """The output of one module in one run.

    Attributes:
        name: as in `model.named_modules()`, "" for the network itself; with "#2" for the second call of one module, and so on.
        module: the module.
        shape: `(channels, *space)`.
        axes: one `Axis` for each spatial axis, or None where an operation before it could not be followed.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    axes: tuple[Axis, ...] | None

    @property
    def parameters(self) -> int:
        """The number of parameters, those of modules inside included."""
        return sum(p.numel() for p in self.module.parameters())


def contract(model: nn.Module) -> Network:
    """Return what feature maps need to know of a network: the network itself if it is a `Network`, else an `Adapter` around it.

    The image channels and the number of axes of any other module are those of its first convolution. Its `multiple` is found by trial.
    """
    if isinstance(model, Network):
        return model
    first = _first_convolution(model)
    dims = first.weight.ndim - 2
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        try:
            layers = list(trace(model, [multiple * (64 // multiple + 1)] * dims).values())
        except ValueError:
            continue
        # Patches that begin at multiples of every stride share one lattice.
        strides = [round(axis.stride) for layer in layers for axis in layer.axes or () if len(axis.first) > 1]
        multiple = math.lcm(multiple, *(max(1, stride) for stride in strides))
        return Adapter(
            model, in_channels=first.in_channels, classes=layers[-1].shape[0], spatial_dims=dims, multiple=multiple
        )
    raise ValueError(
        f"{type(model).__name__} takes none of the patches that were tried; wrap it in models.Adapter(..., multiple=...), a number "
        "whose multiples it takes"
    )


def _first_convolution(model: nn.Module) -> nn.Module:
    found = convolutions(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution; feature maps are those of convolutional networks")
    return found[0]


def trace(model: nn.Module, shape: Sequence[int], names: Collection[str] | None = None) -> dict[str, Layer]:
    """Return every module's output for an input patch of `shape` voxels, in the order in which they are computed.

    Only outputs `(B, C, *space)` with as many spatial axes as the input are listed. The network itself is left as it is.
    Normalisation by a layer's own statistics (instance or group normalisation) counts as voxelwise, as batch normalisation does.

    Args:
        model: any convolutional network.
        shape: voxels of the patch, along one axis after the other.
        names: the only layers that are wanted. The run ends when all of them have been computed.

    Raises:
        ValueError: when the network does not accept this patch.
    """
    first = _first_convolution(model)
    channels = model.in_channels if isinstance(model, Network) else first.in_channels
    x = torch.empty(1, channels, *shape, dtype=first.weight.dtype, device="meta")
    along = {n: Axis(0.0, 1.0, np.arange(n), np.arange(n)) for n in set(shape)}
    setattr(x, _KEY, tuple(along[n] for n in shape))
    layers: dict[str, Layer] = {}

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        layers[name] = Layer(name, module, tuple(output.shape[1:]), getattr(output, _KEY, None))

    with torch.no_grad(), evaluating(model), _Follow(shape), watched(model, len(shape), note, names):
        try:
            model(x)
        except (RuntimeError, IndexError) as error:
            size = "×".join(map(str, shape))
            raise ValueError(f"{type(model).__name__} does not take a patch of {size} voxels: {error}") from error
    return layers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a network to evaluation mode within the block; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Enough(Exception):
    """Every layer that is wanted has been computed: the rest of the network is not needed."""


@contextmanager
def watched(
    model: nn.Module, dims: int, note: Callable[[str, nn.Module, Tensor], None], names: Collection[str] | None = None
) -> Iterator[None]:
    """Call `note(name, module, output)` for every module's output of `dims` spatial axes, within the block.

    Of several outputs the first that is such a tensor counts. With `names`, only these layers are noted, and the block ends with
    the last of them. The hooks are gone afterwards, whatever happened.
    """
    calls: Counter[str] = Counter()
    missing = None if names is None else set(names)

    def watch(own: str) -> Callable:
        def hook(module, inputs, output):
            found = next((o for o in _tensors(output) if o.ndim == dims + 2), None)
            calls[own] += 1
            name = own if calls[own] == 1 else f"{own}#{calls[own]}"
            if found is None or (missing is not None and name not in missing):
                return
            note(name, module, found)
            if missing is not None:
                missing.remove(name)
                if not missing:
                    raise _Enough

        return hook

    modules = dict(model.named_modules())
    wanted = modules if names is None else modules.keys() & {name.split("#")[0] for name in names}
    handles = []
    try:
        for name in wanted:
            handles.append(modules[name].register_forward_hook(watch(name)))
        yield
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output) -> list[Tensor]:
    """The tensors that a module puts out, whether it gives one, several or a dict of them."""
    if isinstance(output, dict):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        output = [output]
    return [o for o in output if isinstance(o, Tensor)]


class _Follow(TorchDispatchMode):
    """Hand the axes of each operation's inputs on to its outputs, and compute nothing but shapes."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape, self.dims = tuple(shape), len(shape)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        if not any(t.is_meta for t in tensors):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        result = _shape_of_result(name, args)
        if result is None:
            result = function(*_without_content(args), **_without_content(kwargs))
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


def _without_content(value):
    """The arguments of an operation with every tensor on the "meta" device: the network's weights are elsewhere."""
    if isinstance(value, Tensor) and not value.is_meta:
        return torch.empty_like(value, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_without_content(v) for v in value)
    if isinstance(value, dict):
        return {key: _without_content(v) for key, v in value.items()}
    return value


def _shape_of_result(name: str, args: tuple) -> Tensor | tuple[Tensor, ...] | None:
    """The result of an operation whose shape is plain, or None. PyTorch itself takes up to milliseconds to find it."""
    x = args[0]
    if name in _SAME_SHAPE or (name in _SAME_SHAPES and isinstance(args[1], Tensor) and args[1].shape == x.shape):
        return x if name.endswith("_") else torch.empty_like(x)
    if name.endswith("batch_norm"):
        return tuple(x.new_empty(shape) for shape in (x.shape, 0, 0))
    if name.startswith("upsample") and args[1] is not None:
        return x.new_empty((*x.shape[:2], *args[1]))
    return None


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

# Operations whose result has the shape of their first argument: always, or where two arguments have one shape.
_SAME_SHAPE = {
    *("_prelu_kernel", "relu", "relu_", "leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "silu", "silu_"),
    *("sigmoid", "sigmoid_", "tanh", "hardtanh", "hardtanh_"),
}
_SAME_SHAPES = {"add", "add_", "sub", "mul", "mul_", "div", "maximum", "minimum"}
