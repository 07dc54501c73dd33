"""The layers of a network, found in one run without any numbers: their shapes, and the input voxels that their voxels see."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.layers import convolutions
from ..models.network import Adapter, Network
from .geometry import Axis, Follow


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
    """Return a module as a `Network`: itself if it is one, else an `Adapter` around it, whose attributes are inferred.

    The channels and the number of axes are those of the first convolution. The `multiple` is found by trial.

    Raises:
        ValueError: when the module has no convolution, or takes none of the patches that are tried.
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
        return Adapter(model, in_channels=first.in_channels, classes=layers[-1].shape[0], spatial_dims=dims, multiple=multiple)
    raise ValueError(
        f"{type(model).__name__} takes none of the patches that were tried; wrap it, and give a number whose multiples it takes: "
        "models.Adapter(module, in_channels=..., classes=..., multiple=...)"
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
    follow = Follow(x)
    layers: dict[str, Layer] = {}

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        layers[name] = Layer(name, module, tuple(output.shape[1:]), follow.axes(output))

    with torch.no_grad(), evaluating(model), follow, watched(model, len(shape), note, names):
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
    """The signal that every layer that is wanted has been computed, so that the rest of the network is not needed."""


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
    """Return the tensors that a module puts out, whether it gives one, several or a dict of them."""
    if isinstance(output, dict):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        output = [output]
    return [o for o in output if isinstance(o, Tensor)]
