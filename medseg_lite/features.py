"""What a network sees: its receptive field, computed from its layers and measured on the network itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


def receptive_field_recursion(kernels: Sequence[int], strides: Sequence[int] | None = None) -> list[int]:
    """Receptive field of every layer of a chain of convolutions or poolings, along one axis, in input voxels.

    φ_l = φ_{l-1} + (κ_l - 1) τ_l with φ_0 = 1, where κ_l is the kernel's side and τ_l the product of the strides of the
    layers before l.

    Args:
        kernels: κ_1 … κ_L, from the input to the output.
        strides: stride of each layer; all 1 when left out.

    Returns:
        φ_1 … φ_L. The last one is the receptive field of the network.

    Source: Kamnitsas et al. 2017, eq. 1.
    """
    return [field for field, _ in _layers(kernels, strides)]


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


def _layers(kernels: Sequence[int], strides: Sequence[int] | None) -> list[tuple[int, int]]:
    """Receptive field of each layer, and the product of the strides up to and with it."""
    strides = [1] * len(kernels) if strides is None else strides
    if len(strides) != len(kernels):
        raise ValueError(f"{len(kernels)} kernels but {len(strides)} strides; give one stride for every kernel")
    if any(n < 1 for n in (*kernels, *strides)):
        raise ValueError(f"kernels={list(kernels)}, strides={list(strides)}; all must be at least 1")
    layers, field, step = [], 1, 1
    for kernel, stride in zip(kernels, strides):
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


def measured_receptive_field(
    model: nn.Module,
    *,
    voxel: int | Sequence[int] | None = None,
    layer: str | None = None,
    size: int | Sequence[int] | None = None,
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
        if not model.margin and any(a == 0 or b == n - 1 for a, b, n in zip(low, high, shape)):
            raise ValueError(f"the receptive field reaches the border of a patch of {shape} voxels; give a larger size")
        origin = [(n - m) // 2 + i for n, m, i in zip(shape, out, index)]
        first.append([a - o for a, o in zip(low, origin)])
        last.append([b - o for b, o in zip(high, origin)])
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
