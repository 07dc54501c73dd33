"""Receptive fields: which input voxels an output depends on, by formula, by the layers of a network, and measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .engine.tracing import Axis, Layer, spatial_dims, trace

LARGEST_FIELD = 2048  # voxels; a layer that sees more counts as seeing everything


def receptive_field_recursion(
    kernels: Sequence[int], strides: Sequence[int] | None = None, *, upsampling: Sequence[int] | None = None
) -> list[int]:
    """Receptive field of every layer of a chain of convolutions or poolings, along one axis, in input voxels.

    φ_l = φ_{l-1} + (κ_l - 1) τ_l with φ_0 = 1, where κ_l is the kernel's side and τ_l the product of the strides of the
    layers before l.

    A layer that repeats every voxel of its input u_l times before its kernel (a "deconvolution") divides τ by u_l, for
    itself and for what follows. With u = 2 and strides of 2 that is Kayalibay's 2^(η - τ), η strided and τ upsampling
    layers. Repeated voxels do not all see equally much, so there the answer is the middle of what they see; see
    `measured_receptive_field`.

    Args:
        kernels: κ_1 … κ_L, from the input to the output.
        strides: stride of each layer; all 1 when left out.
        upsampling: how often each layer repeats its input along the axis first; all 1 when left out.

    Returns:
        φ_1 … φ_L. The last one is the receptive field of the network.

    Source: Kamnitsas et al. 2017, eq. 1; Kayalibay et al. 2017, eq. 7.
    """
    return [field for field, _ in _layers(kernels, strides, upsampling)]


def output_size(n_in: int, kernels: Sequence[int], strides: Sequence[int] | None = None) -> int:
    """Voxels that come out along one axis when `n_in` go into a chain of valid (unpadded) layers.

    δ_L = ⌊(δ_in - φ_L) / τ + 1⌋. Here τ is the product of all L strides, for that is how far apart in the input two
    neighbouring outputs lie; it is the paper's τ_L wherever the last stride is 1.

    Raises ValueError where the input is smaller than the receptive field.

    Source: Kamnitsas et al. 2017, eq. 2.
    """
    field, step = [(1, 1), *_layers(kernels, strides)][-1]
    if n_in < field:
        raise ValueError(f"n_in={n_in} voxels are fewer than the receptive field of {field}; give at least {field}")
    return (n_in - field) // step + 1


def _layers(
    kernels: Sequence[int], strides: Sequence[int] | None, upsampling: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Receptive field of each layer, and how many input voxels lie between two of its neighbouring outputs."""
    strides = [1] * len(kernels) if strides is None else strides
    upsampling = [1] * len(kernels) if upsampling is None else upsampling
    for name, numbers in (("strides", strides), ("upsampling factors", upsampling)):
        if len(numbers) != len(kernels):
            raise ValueError(f"{len(kernels)} kernels but {len(numbers)} {name}; give one for every kernel")
    if any(n < 1 for n in (*kernels, *strides, *upsampling)):
        raise ValueError(
            f"kernels={list(kernels)}, strides={list(strides)}, upsampling={list(upsampling)}; all must be at least 1"
        )
    layers, field, step = [], 1, 1
    for number, (kernel, stride, repeats) in enumerate(zip(kernels, strides, upsampling), 1):
        if step % repeats:
            raise ValueError(
                f"layer {number} repeats voxels {repeats} times, but they lie {step} input voxels apart; that is finer than the input"
            )
        step //= repeats
        field += (kernel - 1) * step
        step *= stride
        layers.append((field, step))
    return layers


class ReceptiveField(NamedTuple):
    """The box of input voxels that can change a prediction, one number for each spatial axis.

    Attributes:
        side: `last - first + 1`.
        first: offset of the box's first voxel from the predicted voxel: -8 for a symmetric field of 17.
        last: offset of its last voxel: 8.
    """

    side: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]


def receptive_field(
    model: nn.Module,
    layer: str | None = None,
    *,
    voxel: int | Sequence[int] | None = None,
    size: int | Sequence[int] | None = None,
) -> ReceptiveField:
    """Compute the input voxels that can influence an output, from the network's layers alone; its weights play no part.

    Answers what `measured_receptive_field` answers, in the same terms, and finds the same unless weights are zero. It works for
    any network of convolutions, poolings, slices, sums, concatenations, repetition and padding, in milliseconds.

    Args:
        model: any convolutional network.
        layer: name of a module as in `model.named_modules()`; the network's output by default.
        voxel: index of one output voxel, to look at that voxel alone; by default the union over `model.multiple` neighbouring
            predictions, or the middle voxel of a layer.
        size: side of the input patch; by default the smallest that shows the whole field.

    Raises:
        ValueError: when there is no such layer or voxel, or when an operation before it cannot be followed.
    """
    dims = spatial_dims(model)
    if size is None and not getattr(model, "margin", 0):
        axes, shape = _unclipped(model, layer)
    else:
        shape = _per_axis(2 * model.margin + model.multiple if size is None else size, dims, "size")
        axes = _axes(trace(model, shape), layer, model)
    out = [len(axis.first) for axis in axes]
    if voxel is not None:
        voxels = [_per_axis(voxel, dims, "voxel")]
    else:
        count = getattr(model, "multiple", 1) if not layer else 1
        voxels = [[n // 2 - count // 2 + k for n in out] for k in range(count)]
    first, last = [], []
    for index in voxels:
        if any(not 0 <= i < n for i, n in zip(index, out)):
            raise ValueError(f"voxel {tuple(index)} is outside the output of {tuple(out)} voxels")
        origin = [(n - m) // 2 + i for n, m, i in zip(shape, out, index)]
        first.append([int(axis.first[i]) - o for axis, i, o in zip(axes, index, origin)])
        last.append([int(axis.last[i]) - o for axis, i, o in zip(axes, index, origin)])
    first, last = tuple(map(min, zip(*first))), tuple(map(max, zip(*last)))
    return ReceptiveField(tuple(b - a + 1 for a, b in zip(first, last)), first, last)


def measured_receptive_field(
    model: nn.Module,
    *,
    voxel: int | Sequence[int] | None = None,
    layer: str | None = None,
    size: int | Sequence[int] | None = None,
    axis: int | None = None,
) -> ReceptiveField:
    """Find the input voxels that influence an output by back-propagating from that output to a random input.

    A voxel counts when the gradient of a random mixture of all classes (or feature maps) with respect to it is not zero.
    Gradients are taken in double precision and in evaluation mode, where batch normalisation ties no voxels together, on
    a copy of the network; absolute values are added up over several inputs, so that a voxel hidden by one input
    (behind a maximum, or a zero slope) shows with another. The global random state is left alone.

    A network that sub-samples its input does not look the same from every voxel: in DeepMedic three neighbours share one
    low-resolution context, each of them sees 49 voxels and the three together offsets of -25 to 25, which are the
    paper's 51. Without `voxel` the answer is this union over `model.multiple` neighbouring predictions along each axis.

    Args:
        model: a network with `in_channels`, `margin`, `multiple` and `spatial_dims`, as all of this package have.
        voxel: index of one output voxel (one number for all axes, or one for each), to look at that voxel alone.
        layer: name of a module as in `model.named_modules()`, to look at its output instead of the prediction: at its
            middle voxel unless `voxel` says otherwise. Offsets count from the input voxel in the same place; in a layer of
            a coarser grid that holds for its middle voxel.
        size: side of the input patch; by default the smallest that predicts `model.multiple` voxels.
        axis: look along this axis only, and give one number; the patch may then be thin along the others (`size` has one
            number for each), which saves nearly all the time for a network that sees far.

    Raises:
        ValueError: when there is no such layer or voxel, when the output depends on no input voxel, or when the patch is too
            small to show the whole field of a network that pads.
    """
    dims = model.spatial_dims
    if size is None:
        if not model.margin:
            raise ValueError("this network pads its input; say how large a patch to look at: size=... voxels")
        size = 2 * model.margin + model.multiple
    shape = _per_axis(size, dims, "size")
    if axis is not None and axis not in range(dims):
        raise ValueError(f"axis={axis}; expected 0 to {dims - 1}, or None for all")
    axes = range(dims) if axis is None else [axis]
    network = copy.deepcopy(model).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, model.in_channels, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    y = _output(network, x, layer)
    if not isinstance(y, torch.Tensor) or y.ndim != dims + 2:
        raise ValueError(f"layer {layer!r} does not put out one map of {dims} spatial dimensions; choose a convolution")
    out = y.shape[2:]
    if voxel is not None:
        voxels = [_per_axis(voxel, dims, "voxel")]
    else:
        # Axes do not interact: the diagonal of the block of neighbours has every phase of every axis.
        count = model.multiple if layer is None else 1
        voxels = [[n // 2 - count // 2 + k for n in out] for k in range(count)]
    mixture = torch.randn(y.shape[:2], generator=generator, dtype=torch.float64)
    first, last = [], []
    for index in voxels:
        if any(not 0 <= i < n for i, n in zip(index, out)):
            raise ValueError(f"voxel {tuple(index)} is outside the output of {tuple(out)} voxels")
        (gradient,) = torch.autograd.grad((y[(..., *index)] * mixture).sum(), x, retain_graph=True)
        seen = gradient.abs().sum(dim=(0, 1)).nonzero()
        if not len(seen):
            raise ValueError("no input voxel influences this output; are all weights of a layer zero?")
        low, high = seen.amin(0).tolist(), seen.amax(0).tolist()
        if not model.margin and any(low[k] == 0 or high[k] == shape[k] - 1 for k in axes):
            raise ValueError(f"the receptive field reaches the border of a patch of {shape} voxels; give a larger size")
        origin = [(n - m) // 2 + i for n, m, i in zip(shape, out, index)]
        first.append([low[k] - origin[k] for k in axes])
        last.append([high[k] - origin[k] for k in axes])
    first, last = tuple(map(min, zip(*first))), tuple(map(max, zip(*last)))
    return ReceptiveField(tuple(b - a + 1 for a, b in zip(first, last)), first, last)


def _output(network: nn.Module, x: torch.Tensor, layer: str | None) -> torch.Tensor:
    if layer is None:
        return network(x)
    modules = dict(network.named_modules())
    if layer not in modules:
        names = ", ".join(name for name, _ in network.named_children())
        raise ValueError(f"this network has no layer {layer!r}; its parts are {names}, see model.named_modules()")
    caught = []
    modules[layer].register_forward_hook(lambda module, inputs, output: caught.append(output))
    network(x)
    if not caught:
        raise ValueError(f"layer {layer!r} takes no part in the forward pass")
    return caught[0]


def _per_axis(value: int | Sequence[int], dims: int, name: str) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [int(value)] * dims
    if len(values) != dims:
        raise ValueError(f"{name}={value!r} has {len(values)} numbers; expected one, or one for each of {dims} axes")
    return values


def _axes(layers: dict[str, Layer], layer: str | None, model: nn.Module) -> tuple[Axis, ...]:
    name = layer or ""
    if name not in layers:
        check_names([name], model, layers)
    if layers[name].axes is None:
        raise ValueError(
            f"an operation before {name or 'the output'!r} of {type(model).__name__} cannot be followed voxel by voxel; "
            "use measured_receptive_field"
        )
    return layers[name].axes


def check_names(names: Sequence[str], model: nn.Module, layers: dict[str, Layer]) -> None:
    modules = dict(model.named_modules())
    for name in names:
        if name in layers:
            continue
        if name.split("#")[0] not in modules:
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"this network has no layer {name!r}; its parts are {parts}, see model.named_modules()")
        raise ValueError(
            f"layer {name!r} has no feature maps of its own: it takes no part in the forward pass, or puts out no map of "
            f"{spatial_dims(model)} spatial dimensions; choose a convolution"
        )


def _unclipped(model: nn.Module, layer: str | None) -> tuple[tuple[Axis, ...], list[int]]:
    """Axes of a layer of a network that pads, in a patch large enough for the middle voxel to see no border."""
    dims, side = spatial_dims(model), 64
    while True:
        axes = _axes(trace(model, [side] * dims), layer, model)
        seen = [(axis.first[len(axis.first) // 2], axis.last[len(axis.first) // 2]) for axis in axes]
        if side >= LARGEST_FIELD or all(0 < a and b < side - 1 for a, b in seen):
            return axes, [side] * dims
        side *= 2
