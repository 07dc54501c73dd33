"""The contract between a network and the modules that train it, run it, store it or look into it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from ..plain import make_plain

BUILDERS: dict[str, Callable[..., Network]] = {}


class Network(nn.Module):
    """The base class of every network: the attributes that training, inference, checkpoints and feature maps rely on.

    A network maps a patch `(B, C, *(n + 2 margin))` to logits `(B, K, *n)`. Its convolutions are of one of two kinds:

    * Valid convolutions lose `margin` voxels on each side. Inference gives every tile that much context.
    * Padded convolutions lose nothing, so `margin` is 0. Inference gives every tile `halo` voxels of context. At the border of the
      volume the context ends, and the network pads as it did in training.

    A subclass sets the attributes that differ from the defaults, on the class or in `__init__`:

        class Small(Network):
            margin = 1

            def __init__(self, in_channels, classes):
                super().__init__(in_channels, classes)
                self.conv = nn.Conv3d(in_channels, classes, 3)

            def forward(self, x):
                return self.conv(x)

    Args:
        in_channels, classes: values of the attributes below. Leave them out where the class sets them.
        fewest_classes: smallest number of classes that is accepted; 2 for a network that is trained with a softmax only.

    Attributes:
        in_channels: channels C of the image.
        classes: output channels K. A network with K = 1 has a single output for a sigmoid.
        spatial_dims: 3, or 2 for a network of axial slices.
        margin: voxels lost on each side.
        multiple: n must be a multiple of this along every spatial axis.
        halo: distance in voxels beyond which nothing influences a prediction, for a network that pads. It is None for a network
            that does not pad.
        reach: distance in voxels from a tile to the border of its full-resolution feature maps; by default `margin`. It is smaller
            in a network that sees the rest of its margin sub-sampled.
        config: the call that builds this network again, `{"builder": name, **options}`. A builder sets it (see `builder`). It is
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

    def __init__(self, in_channels: int | None = None, classes: int | None = None, *, fewest_classes: int = 1):
        super().__init__()
        self.card: dict = {}
        if in_channels is None and classes is None:
            return
        if in_channels < 1 or classes < fewest_classes:
            needed = f"{fewest_classes} class{'es' if fewest_classes > 1 else ''}"
            raise ValueError(f"in_channels={in_channels}, classes={classes}; expected at least 1 channel and {needed}")
        self.in_channels, self.classes = int(in_channels), int(classes)

    @functools.cached_property  # so that a subclass can set it like the other attributes
    def reach(self) -> int:
        return self.margin

    def cut(self, patch: Tensor | np.ndarray) -> tuple:
        """Cut the network's inputs out of a patch `(..., *(n + 2 margin))`. Most networks take the patch as it is.

        `forward` accepts the patch as well as these inputs.
        """
        return (patch,)

    def for_inference(self) -> Network:
        """Return a network with the same results, rearranged for speed on a CPU. Most networks return themselves."""
        return self

    def copy_contract(self, network: Network) -> None:
        """Take the attributes above from another network, for one that works on the same patches. `config` stays as it is."""
        self.in_channels, self.classes, self.spatial_dims = network.in_channels, network.classes, network.spatial_dims
        self.margin, self.multiple, self.halo, self.reach = network.margin, network.multiple, network.halo, network.reach
        self.card = network.card

    def check_size(self, patch: Tensor | np.ndarray, *, multiple: int | None = None) -> None:
        """Raise ValueError where a patch `(..., *space)` does not fit `margin` and `multiple`.

        Args:
            patch: input of the network.
            multiple: number to check instead of `self.multiple`; 1 in a network that has a rule of its own.
        """
        multiple = multiple or self.multiple
        sides, lost = patch.shape[-self.spatial_dims :], 2 * self.margin
        if any(n <= lost for n in sides) and self.margin:
            needs = f"loses {self.margin} on each side and needs more than {lost} along every axis"
        elif any(n < 1 or (n - lost) % multiple for n in sides):
            rest = f"{lost} and " if lost else ""
            needs = f"also works at 1/{multiple} of the resolution and needs {rest}a multiple of {multiple} along every axis"
        else:
            return
        raise ValueError(
            f"the patch is {'×'.join(map(str, sides))} {'pixels' if self.spatial_dims == 2 else 'voxels'}; this network {needs}. "
            "medseg_lite.inference.predict pads a whole volume for you"
        )


class Adapter(Network):
    """A network made of any module, such as one of another library.

        model = models.Adapter(monai_unet, in_channels=4, classes=5, multiple=16, halo=96)
        inference.predict(model, case)

    Args:
        module: any module from `(B, C, *(n + 2 margin))` to logits `(B, K, *n)`.
        in_channels, classes, spatial_dims, margin, multiple: attributes of `Network`.
        halo: the same. Give it for a module that pads; otherwise tiles get no context, and their seams show.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        in_channels: int,
        classes: int,
        spatial_dims: int = 3,
        margin: int = 0,
        multiple: int = 1,
        halo: int | None = None,
    ):
        super().__init__(in_channels, classes)
        self.module = module
        self.spatial_dims, self.margin, self.multiple, self.halo = spatial_dims, margin, multiple, halo

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *(n + 2 margin)) -> (B, K, *n)` logits."""
        return self.module(x)


def builder(function: Callable[..., Network]) -> Callable[..., Network]:
    """Register a function that builds a named network, and note on each network how to build it again.

    The function takes keyword arguments only. The options of the call, defaults included, become `network.config`, so they must
    be JSON values. The option `first`, the trained network that a cascade starts from, is left out: its weights are stored with
    the others.
    """
    name, parameters = function.__name__, inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @functools.wraps(function)
    def build(**options) -> Network:
        network = function(**options)
        noted = {option: _plain(value, option) for option, value in (defaults | options).items() if option != "first"}
        network.config = {"builder": name, **noted}
        return network

    BUILDERS[name] = build
    return build


def _plain(value: object, option: str) -> object:
    """Return an option as a checkpoint holds it; as it is, if none can hold it, so that `save` may say so."""
    try:
        return make_plain(value, option)
    except TypeError:
        return value
