"""Receptive fields: the input voxels that an output depends on, by formula, by the layers of a network, and measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .engine.geometry import Axis
from .engine.tracing import Layer, contract, trace
from .models.network import Network

LARGEST_FIELD = 2048  # voxels; a layer that sees more counts as seeing everything


def receptive_field_recursion(
    kernels: Sequence[int], strides: Sequence[int] | None = None, *, upsampling: Sequence[int] | None = None
) -> list[int]:
    """Return the receptive field of every layer of a chain of convolutions or poolings, along one axis, in input voxels.

    φ_l = φ_{l-1} + (κ_l - 1) τ_l with φ_0 = 1, where κ_l is the kernel's side and τ_l the product of the strides of the
    layers before l.

    A layer that repeats every voxel of its input u_l times before its kernel (a "deconvolution") divides τ by u_l, for
    itself and for what follows. With u = 2 and strides of 2 that is Kayalibay's 2^(η - τ), η strided and τ upsampling
    layers. Repeated voxels do not all see equally much, so there the answer is the middle of what they see; see
    `measured_receptive_field`.

    Args:
        kernels: sides κ_1 … κ_L of the kernels, from the input to the output.
        strides: stride of each layer; all 1 when left out.
        upsampling: number of times that each layer repeats its input along the axis first; all 1 when left out.

    Returns:
        φ_1 … φ_L. The last one is the receptive field of the network.

    Source: Kamnitsas et al. 2017, eq. 1; Kayalibay et al. 2017, eq. 7.
    Taught in notebooks 01, 04, 08, 12 and 14.
    """
    return [field for field, _ in _layers(kernels, strides, upsampling)]


def output_size(n_in: int, kernels: Sequence[int], strides: Sequence[int] | None = None) -> int:
    """Return the number of voxels that come out along one axis when `n_in` go into a chain of valid (unpadded) layers.

    δ_L = ⌊(δ_in - φ_L) / τ + 1⌋. Here τ is the product of all L strides, which is the distance of two neighbouring outputs in the
    input. It is the paper's τ_L wherever the last stride is 1.

    Raises:
        ValueError: when the input is smaller than the receptive field.

    Source: Kamnitsas et al. 2017, eq. 2.
    Taught in notebooks 01 and 04.
    """
    field, step = [(1, 1), *_layers(kernels, strides)][-1]
    if n_in < field:
        raise ValueError(f"n_in={n_in} voxels are fewer than the receptive field of {field}; give at least {field}")
    return (n_in - field) // step + 1


def _layers(
    kernels: Sequence[int], strides: Sequence[int] | None, upsampling: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Return the receptive field of each layer, and the distance of two of its neighbouring outputs in input voxels."""
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

    The answer is that of `measured_receptive_field`, in the same terms, unless weights are zero. It works for any network of
    convolutions, poolings, slices, sums, concatenations, repetition and padding, in milliseconds.

    Args:
        model: any convolutional network.
        layer: name of a module as in `model.named_modules()`; the network's output by default.
        voxel: index of one output voxel, to look at that voxel alone. By default the answer is the union over `model.multiple`
            neighbouring predictions, or that of the middle voxel of a layer.
        size: side of the input patch; by default large enough to show the whole field.

    Raises:
        ValueError: when there is no such layer or voxel, or when an operation before it cannot be followed.
    """
    network, name = contract(model), layer or ""
    if size is None and not network.margin:
        layers, shape = trace_unclipped(model, network, list, [name])
    else:
        shape = _per_axis(_smallest_patch(network) if size is None else size, network.spatial_dims, "size")
        layers = trace(model, shape, [name])
    axes = _axes(layers, name, model)
    out = [len(axis.first) for axis in axes]
    first, last = [], []
    for index in _voxels(voxel, out, 1 if layer else network.multiple):
        origin = _origin(index, shape, out)
        first.append([int(axis.first[i]) - o for axis, i, o in zip(axes, index, origin)])
        last.append([int(axis.last[i]) - o for axis, i, o in zip(axes, index, origin)])
    return _union(first, last)


def measured_receptive_field(
    model: nn.Module,
    *,
    voxel: int | Sequence[int] | None = None,
    layer: str | None = None,
    size: int | Sequence[int] | None = None,
    axis: int | None = None,
) -> ReceptiveField:
    """Find the input voxels that influence an output, by back-propagating from that output to a random input.

    A voxel counts when the gradient of a random mixture of all classes (or feature maps) with respect to it is not zero.
    Gradients are taken in double precision and in evaluation mode, where batch normalisation ties no voxels together, on
    a copy of the network. Absolute values are added up over several inputs, so that a voxel hidden by one input
    (behind a maximum, or a zero slope) shows with another. The global random state is left alone.

    A network that sub-samples its input does not see the same from every voxel. In DeepMedic three neighbours share one
    low-resolution context: each of them sees 49 voxels, and the three together offsets of -25 to 25, which are the
    paper's 51. Without `voxel` the answer is this union over `model.multiple` neighbouring predictions along each axis.

    Args:
        model: any convolutional network.
        voxel: index of one output voxel (one number for all axes, or one for each), to look at that voxel alone.
        layer: name of a module as in `model.named_modules()`, to look at its output instead of the prediction: at its
            middle voxel unless `voxel` says otherwise. Offsets count from the input voxel in the same place; in a layer of
            a coarser grid that holds for its middle voxel.
        size: side of the input patch; by default the smallest that predicts `model.multiple` voxels.
        axis: number of the only axis to look along; the answer then has one number. The patch may be thin along the others (`size`
            has one number for each), which saves nearly all the time for a network that sees far.

    Raises:
        ValueError: when there is no such layer or voxel, when the output depends on no input voxel, or when the patch is too
            small to show the whole field of a network that pads.
    """
    facts = contract(model)
    dims = facts.spatial_dims
    if size is None and not facts.margin:
        raise ValueError("this network pads its input; say how large a patch to look at: size=... voxels")
    shape = _per_axis(_smallest_patch(facts) if size is None else size, dims, "size")
    if axis is not None and axis not in range(dims):
        raise ValueError(f"axis={axis}; expected 0 to {dims - 1}, or None for all")
    axes = range(dims) if axis is None else [axis]
    network = copy.deepcopy(model).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, facts.in_channels, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    y = _output(network, x, layer)
    if not isinstance(y, torch.Tensor) or y.ndim != dims + 2:
        raise ValueError(f"layer {layer!r} does not put out one map of {dims} spatial dimensions; choose a convolution")
    out = y.shape[2:]
    mixture = torch.randn(y.shape[:2], generator=generator, dtype=torch.float64)
    first, last = [], []
    for index in _voxels(voxel, out, facts.multiple if layer is None else 1):
        (gradient,) = torch.autograd.grad((y[(..., *index)] * mixture).sum(), x, retain_graph=True)
        seen = gradient.abs().sum(dim=(0, 1)).nonzero()
        if not len(seen):
            raise ValueError("no input voxel influences this output; are all weights of a layer zero?")
        low, high = seen.amin(0).tolist(), seen.amax(0).tolist()
        if not facts.margin and any(low[k] == 0 or high[k] == shape[k] - 1 for k in axes):
            raise ValueError(f"the receptive field reaches the border of a patch of {shape} voxels; give a larger size")
        origin = _origin(index, shape, out)
        first.append([low[k] - origin[k] for k in axes])
        last.append([high[k] - origin[k] for k in axes])
    return _union(first, last)


def _smallest_patch(network: Network) -> int:
    """Return the side of the patch of which a network of valid convolutions makes `multiple` predictions along each axis."""
    return 2 * network.margin + network.multiple


def _voxels(voxel: int | Sequence[int] | None, out: Sequence[int], count: int) -> Iterator[list[int]]:
    """Yield the voxel that is asked for, or else `count` neighbours in the middle of an output of `out` voxels."""
    if voxel is None:
        # Axes do not interact: the diagonal of the cube of neighbours has every phase of every axis.
        voxels = [[n // 2 - count // 2 + k for n in out] for k in range(count)]
    else:
        voxels = [_per_axis(voxel, len(out), "voxel")]
    for index in voxels:
        if any(not 0 <= i < n for i, n in zip(index, out)):
            raise ValueError(f"voxel {tuple(index)} is outside the output of {tuple(out)} voxels")
        yield index


def _origin(index: Sequence[int], shape: Sequence[int], out: Sequence[int]) -> list[int]:
    """Return the input voxel in the place of an output voxel: both lie equally far from the middle."""
    return [(n - m) // 2 + i for n, m, i in zip(shape, out, index)]


def _union(first: Sequence[Sequence[int]], last: Sequence[Sequence[int]]) -> ReceptiveField:
    """Return the box around several boxes."""
    low, high = tuple(map(min, zip(*first))), tuple(map(max, zip(*last)))
    return ReceptiveField(tuple(b - a + 1 for a, b in zip(low, high)), low, high)


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


def _axes(layers: dict[str, Layer], name: str, model: nn.Module) -> tuple[Axis, ...]:
    if name not in layers:
        check_names([name], model, layers)
    if layers[name].axes is None:
        raise ValueError(
            f"an operation before {name or 'the output'!r} of {type(model).__name__} cannot be followed voxel by voxel; "
            "use measured_receptive_field"
        )
    return layers[name].axes


def check_names(names: Sequence[str], model: nn.Module, layers: Collection[str]) -> None:
    """Raise ValueError where a name is none of a network's layers; the message says why.

    Args:
        names: names to check.
        model: network of the layers.
        layers: names of the layers that have feature maps.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name in layers:
            continue
        if name.split("#")[0] not in modules:
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"this network has no layer {name!r}; its parts are {parts}, see model.named_modules()")
        raise ValueError(
            f"layer {name!r} has no feature maps of its own: it takes no part in the forward pass, or puts out no map of "
            f"{contract(model).spatial_dims} spatial dimensions; choose a convolution"
        )


def trace_unclipped(
    model: nn.Module,
    network: Network,
    choose: Callable[[dict[str, Layer]], Iterable[str]],
    names: Collection[str] | None = None,
) -> tuple[dict[str, Layer], list[int]]:
    """Trace a network that pads in a patch so large that the middle voxels of its layers see no border.

    Args:
        model: network to trace.
        network: its contract, see `engine.tracing.contract`.
        choose: function that chooses the names of the layers that matter, out of all.
        names: the only layers to trace, if they are known already.

    Returns:
        The chosen layers in the order of computation, and the sides of the patch.
    """
    side = math.ceil(64 / network.multiple) * network.multiple
    while True:
        shape = [side] * network.spatial_dims
        traced = trace(model, shape, names)
        layers = {name: traced[name] for name in choose(traced)}
        if side >= LARGEST_FIELD or not any(_touches_border(layer, side) for layer in layers.values()):
            return layers, shape
        # The second patch shows the whole field of a network that says how far it sees.
        side = 2 * max(side, math.ceil((network.halo or 0) / network.multiple + 1) * network.multiple)


def _touches_border(layer: Layer, side: int) -> bool:
    """Return whether the middle voxel of a layer sees the border of a patch."""
    middles = [(axis.first[len(axis.first) // 2], axis.last[len(axis.first) // 2]) for axis in layer.axes or ()]
    return any(first <= 0 or last >= side - 1 for first, last in middles)
