"""The contract between a network and everything that trains it, runs it or looks into it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

BUILDERS: dict[str, Callable[..., Network]] = {}


class Network(nn.Module):
    """Base class of every network: what training, inference, checkpoints and feature maps may rely on.

    A network maps a patch `(B, C, *(n + 2 margin))` to logits `(B, K, *n)`. It has either a `margin` or a `halo`:

    * Valid convolutions lose `margin` voxels on each side. Inference gives every tile that much context.
    * Padded convolutions lose nothing (`margin` is 0). Inference gives every tile `halo` voxels of context, cut at the border of
      the volume, where the network pads as it did in training.

    A subclass sets the attributes that differ from the defaults, on the class or in `__init__`.

    Attributes:
        in_channels: channels C of the image.
        classes: output channels K. A network with K = 1 has a single output for a sigmoid.
        spatial_dims: 3, or 2 for a network of axial slices.
        margin: voxels lost on each side.
        multiple: n must be a multiple of this along every spatial axis.
        halo: distance in voxels beyond which nothing influences a prediction, for a network that pads; None for one that does not.
        reach: how far outside a tile its full-resolution feature maps begin, in voxels; by default `margin`. It is smaller in a
            network that sees the rest of its margin sub-sampled.
        config: the call that builds this network again, `{"builder": name, **options}`. A builder sets it (see `builder`); it is
            None for a network without a builder, which cannot be saved.
        card: facts about a trained network: channels, cases, steps, seed, scores. JSON values.
    """

    in_channels: int
    classes: int
    spatial_dims: int = 3
    margin: int = 0
    multiple: int = 1
    halo: int | None = None
    config: dict | None = None

    def __init__(self):
        super().__init__()
        self.card: dict = {}

    @property
    def reach(self) -> int:
        return self.margin

    def cut(self, patch: Tensor | np.ndarray) -> tuple:
        """Cut the network's inputs out of a patch `(..., *(n + 2 margin))`; most networks take the patch as it is.

        `forward` accepts the patch as well as these inputs.
        """
        return (patch,)

    def for_inference(self) -> nn.Module:
        """Return a module with the same results, rearranged for speed on a CPU; most networks return themselves."""
        return self


class Adapter(Network):
    """Gives any module the contract of a `Network`.

        model = models.Adapter(monai_unet, in_channels=4, classes=5, multiple=16, halo=96)
        inference.predict(model, case)

    Args:
        module: any module from `(B, C, *space)` to logits `(B, K, *space)`.
        in_channels, classes: channels that go in and come out.
        contract: other attributes of `Network`: spatial_dims, margin, multiple, halo.
    """

    def __init__(self, module: nn.Module, *, in_channels: int, classes: int, **contract):
        super().__init__()
        unknown = sorted(contract.keys() - {"spatial_dims", "margin", "multiple", "halo"})
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: no attribute of a network; expected spatial_dims, margin, multiple or halo"
            )
        self.module, self.in_channels, self.classes = module, in_channels, classes
        for name, value in contract.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *space) -> (B, K, *space)` logits."""
        return self.module(x)


def builder(function: Callable[..., Network]) -> Callable[..., Network]:
    """Register the builder of a named network, and note on each network it builds how to build that again.

    The options of the call, defaults included, become `network.config`. Options that are networks themselves (the first network of
    a cascade) are left out, since their weights are stored with the others.
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @functools.wraps(function)
    def build(**options) -> Network:
        model = function(**options)
        given = {name: _plain(value) for name, value in (defaults | options).items() if name != "first"}
        model.config = {"builder": function.__name__, **given}
        return model

    BUILDERS[function.__name__] = build
    return build


def _plain(value):
    """The value with NumPy's and PyTorch's numbers as Python's: it is stored with weights and training states."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return value
