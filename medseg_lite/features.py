"""The feature maps of a network's layers. The functions of `receptive_field` can be called from here too."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .arrays import as_array
from .engine.geometry import Axis
from .engine.lattice import Place, find_places, lay, thin_out
from .engine.tiles import Tile, check_fits, find_region, load_patch, plan
from .engine.tracing import Layer, contract, evaluating, trace, watched
from .models.layers import convolutions
from .models.network import Network
from .receptive_field import (
    ReceptiveField,
    check_names,
    measured_receptive_field,
    output_size,
    receptive_field,
    receptive_field_recursion,
    trace_unclipped,
)
from .volume import Case

__all__ = [
    "FeatureMaps",
    "LayerInfo",
    "ReceptiveField",
    "capture",
    "list_layers",
    "measured_receptive_field",
    "output_size",
    "receptive_field",
    "receptive_field_recursion",
]

HALF_MAX = 65504.0  # the largest number of half precision


class LayerInfo(NamedTuple):
    """The facts about a layer that are known before any image has gone through it.

    Attributes:
        name: as in `model.named_modules()`; a module that is called again has "#2" behind its name for the second call.
        kind: class of the module.
        channels: number of feature maps.
        parameters: number of parameters.
        stride: input voxels from one voxel of the layer to the next, along each spatial axis; None where this is not known.
        field: receptive field, with offsets counted from the middle of a voxel (rounded outwards); None where not known.
    """

    name: str
    kind: str
    channels: int
    parameters: int
    stride: tuple[float, ...] | None
    field: ReceptiveField | None


def list_layers(model: nn.Module, patterns: str | Sequence[str] | None = None) -> dict[str, LayerInfo]:
    """List the layers of a network, by name, in the order in which they are computed.

    Args:
        model: any convolutional network.
        patterns: names, or patterns such as "normal.*". "*" is every module. By default one layer for each convolution: the block
            around it (with its normalisation and activation) where there is one, else the convolution itself.

    Raises:
        ValueError: when a pattern fits no layer.
    """
    layers, _ = _find_layers(model, contract(model), patterns)
    return {name: _describe(layer) for name, layer in layers.items()}


def find_context(network: Network, layers: Collection[LayerInfo], shape: Sequence[int]) -> list[tuple[int, int]] | None:
    """Find the number of voxels before and behind a tile that some layers of a network that pads see, along each of its axes.

    Args:
        network: network of the layers.
        layers: layers that are to be computed as if there were no tiles.
        shape: size of the volume. It counts where the receptive field of a layer is not known.

    Returns:
        Multiples of `network.multiple`; None for a network of valid convolutions, which sees its margin.
    """
    if network.margin:
        return None
    context = []
    for axis, n in zip(range(network.spatial_dims), shape):
        # One voxel of the layer more, for those that only reach into the tile.
        seen = [
            (i.stride[axis] - i.field.first[axis], i.stride[axis] + i.field.last[axis]) if i.field else (n, n) for i in layers
        ]
        context.append(tuple(math.ceil(max(side) / network.multiple) * network.multiple for side in zip(*seen)))
    return context


def _find_layers(
    model: nn.Module, network: Network, patterns: str | Sequence[str] | None
) -> tuple[dict[str, Layer], list[int]]:
    """Trace the layers that are asked for. Return them in the order of computation, and the sides of the patch."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    modules = dict(model.named_modules())
    # Layers that are called by their names can be traced without the others.
    exact = patterns if patterns and all(p.split("#")[0] in modules for p in patterns) else None

    def choose(traced: dict[str, Layer]) -> list[str]:
        return _default_layers(modules, traced) if patterns is None else _matching_layers(patterns, model, traced)

    if network.margin:
        # Twice the margin and some more: the middle voxels of every layer see no border.
        shape = [2 * network.margin + 4 * network.multiple] * network.spatial_dims
        traced = trace(model, shape, exact)
        return {name: traced[name] for name in choose(traced)}, shape
    return trace_unclipped(model, network, choose, exact)


def _default_layers(modules: dict[str, nn.Module], traced: dict[str, Layer]) -> list[str]:
    """Choose one layer for each convolution: the block around it, or itself."""
    blocks = {name for name, module in modules.items() if _is_block(module)}
    chosen = []
    for name in traced:
        own = name.split("#")[0]
        parts = own.split(".")
        inside = any(".".join(parts[:n]) in blocks for n in range(1, len(parts)))
        if name and not inside and (own in blocks or isinstance(modules[own], nn.modules.conv._ConvNd)):
            chosen.append(name)
    return chosen


def _matching_layers(patterns: Sequence[str], model: nn.Module, traced: dict[str, Layer]) -> list[str]:
    chosen = set()
    for pattern in patterns:
        found = [name for name in traced if name == pattern] or [n for n in traced if n and fnmatchcase(n, pattern)]
        if not found:
            check_names([pattern], model, traced)
        chosen.update(found)
    return [name for name in traced if name in chosen]


def _is_block(module: nn.Module) -> bool:
    """Return whether a module holds one convolution and only what belongs to it: normalisation, activation, pooling."""
    return not isinstance(module, nn.modules.conv._ConvNd) and len(convolutions(module)) == 1


def _describe(layer: Layer) -> LayerInfo:
    stride = field = None
    if layer.axes is not None:
        stride = tuple(float(a.stride) for a in layer.axes)
        first, last = zip(*(_reach(a) for a in layer.axes))
        field = ReceptiveField(tuple(b - a + 1 for a, b in zip(first, last)), first, last)
    return LayerInfo(layer.name, type(layer.module).__name__, layer.shape[0], layer.parameters, stride, field)


def _reach(axis: Axis) -> tuple[int, int]:
    """Return the offsets of the first and last input voxel from a voxel's centre.

    Voxels may see differently, so this is the union over the middle third of the layer.
    """
    n = len(axis.first)
    middle = slice(n // 3, max(n - n // 3, n // 3 + 1))
    centre = axis.offset + axis.stride * np.arange(n)[middle]
    return math.floor((axis.first[middle] - centre).min() + 1e-6), math.ceil((axis.last[middle] - centre).max() - 1e-6)


@dataclass(eq=False)
class FeatureMaps:
    """The feature maps of one layer over (a region of) one case, and their place on it.

    Voxel (i, j, k) of the maps is centred on voxel `offset + stride * (i, j, k)` of the case.

    Attributes:
        name: name of the layer.
        data: `(C, D', H', W')` float16. Numbers beyond ±65504 are cut off there.
        offset: input coordinates (d, h, w) of the middle of the first voxel, fractions included.
        stride: input voxels from one voxel to the next, along (D, H, W).
        every: step along (D, H, W) at which voxels of the layer were kept; 1 for all. It is part of `stride` already.
        field: receptive field in input voxels, its offsets counted from a voxel's centre; None where it is not known.
    """

    name: str
    data: np.ndarray
    offset: tuple[float, float, float]
    stride: tuple[float, float, float]
    every: tuple[int, int, int] = (1, 1, 1)
    field: ReceptiveField | None = None

    def __repr__(self) -> str:
        size = "×".join(map(str, self.data.shape[1:]))
        return f"FeatureMaps({self.name!r}, {len(self.data)} maps of {size} voxels, offset {self.offset}, stride {self.stride})"

    def index(self, position: Sequence[float]) -> tuple[int, int, int]:
        """Return the voxel of the maps that lies nearest to voxel `position` (d, h, w) of the case."""
        return tuple(int(self._along(axis, position[axis])) for axis in range(3))

    def _along(self, axis: int, places: float | np.ndarray) -> np.ndarray:
        nearest = np.floor((np.asarray(places) - self.offset[axis]) / self.stride[axis] + 0.5).astype(int)
        return nearest.clip(0, self.data.shape[axis + 1] - 1)

    def position(self, index: Sequence[int]) -> tuple[float, float, float]:
        """Return the input coordinates (d, h, w) of the middle of a voxel of the maps."""
        return tuple(o + s * i for o, s, i in zip(self.offset, self.stride, index))

    def laid_over(self, shape: Sequence[int], channel: int | None = None) -> np.ndarray:
        """Return one map `(D, H, W)`, or all `(C, D, H, W)`, on the grid of the case. Voxels outside the region repeat its border."""
        grid = np.ix_(*(self._along(axis, np.arange(n)) for axis, n in enumerate(shape)))
        return self.data[channel][grid] if channel is not None else self.data[(slice(None), *grid)]

    def sampled(self, volume: np.ndarray) -> np.ndarray:
        """Return a volume `(D, H, W)` of the case (label, mask, tissue) at the maps' voxels, `(D', H', W')`."""
        volume = as_array(volume, "the volume")
        places = (
            np.floor(o + s * np.arange(n) + 0.5).astype(int).clip(0, size - 1)
            for o, s, n, size in zip(self.offset, self.stride, self.data.shape[1:], volume.shape)
        )
        return volume[np.ix_(*places)]


@torch.no_grad()
def capture(
    model: nn.Module,
    case: Case,
    layers: str | Sequence[str] | None = None,
    *,
    region: Sequence[slice | int] | None = None,
    largest: int | None = None,
    memory: float = 1e9,
    progress: bool = True,
) -> dict[str, FeatureMaps]:
    """Compute the feature maps of a network's layers over a case, in half precision.

        maps = capture(model, case, ["normal.0", "low.7"], region=np.s_[:, :, 30:33])
        maps["low.7"].data, maps["low.7"].offset, maps["low.7"].stride

    Large regions are computed in tiles, as `inference.predict` does, each with the context that the network sees; the volume is
    mirrored beyond its border. A network that pads its convolutions (`margin` 0) gets each tile with the voxels that the layers see
    around it, up to the border. Computation ends with the last layer asked for. The network is used in evaluation mode and left as
    it was; no hook stays behind.

    Args:
        model: any convolutional network, 2-D (slice by slice) or 3-D, on any device.
        case: case that is normalised as for `predict`.
        layers: names or patterns as in `list_layers`; by default one layer for each convolution.
        region: slices or whole numbers along (D, H, W), `np.s_[:, :, 32]` for one axial slice; the whole case by default.
            Voxels of a coarse layer that reach into the region belong to it.
        largest: number of values to keep of each layer. One with more keeps every second, third, … voxel along its longest axes.
            None keeps all.
        memory: bytes that all maps together may take.
        progress: whether to show a bar.

    Returns:
        `{name: FeatureMaps}` in the order of computation.

    Raises:
        ValueError: when a layer is unknown, the region is empty, the case does not fit, or the maps need more than `memory`.
    """
    network, device = contract(model), next(model.parameters()).device
    check_fits(network, case)
    start, stop = find_region(region, case)
    found, traced = _find_layers(model, network, layers)
    infos = {name: _describe(layer) for name, layer in found.items()}
    context = find_context(network, infos.values(), case.shape)
    tiles = plan(network, start, stop, case.shape, device, context=context).tiles()
    places = find_places(model, network, found, traced, tiles[0])
    stores = {name: _Store(infos[name].channels, place, tiles, start, stop, largest) for name, place in places.items()}
    _check_memory(stores, memory, case)

    with evaluating(model):
        for tile in tqdm(tiles, desc=f"features of {case.name}", disable=not progress or len(tiles) == 1, dynamic_ncols=True):

            def keep(name: str, module: nn.Module, output: Tensor, tile: Tile = tile) -> None:
                stores[name].take(output.permute(1, 2, 3, 0) if network.spatial_dims == 2 else output[0], tile)

            with watched(model, network.spatial_dims, keep, stores):
                model(load_patch(case.image, tile, network, device))
    return {name: store.maps(infos[name]) for name, store in stores.items()}


class _Store:
    """The maps of one layer, put together tile by tile."""

    def __init__(
        self,
        channels: int,
        places: Sequence[Place],
        tiles: Sequence[Tile],
        start: Sequence[int],
        stop: Sequence[int],
        largest: int | None,
    ):
        end = [max(ends) for ends in zip(*(tile.last for tile in tiles))]
        self.lattices = [lay(*along) for along in zip(places, tiles[0].first, tiles[0].last, end, start, stop)]
        if largest is not None:
            thin_out(self.lattices, largest / channels)
        self.shape = (channels, *(a.kept for a in self.lattices))
        self.data: np.ndarray | None = None
        self.seen = [np.zeros(n, bool) for n in self.shape[1:]]

    @property
    def bytes(self) -> int:
        return 2 * math.prod(self.shape)

    def take(self, maps: Tensor, tile: Tile) -> None:
        """Keep the part of one patch's maps `(C, *n)` that belongs to its tile."""
        if self.data is None:
            self.data = np.zeros(self.shape, np.float16)
        along = zip(self.lattices, tile.first, tile.start, tile.stop, maps.shape[1:])
        pairs = [lattice.match(*where) for lattice, *where in along]
        if None in pairs:
            return
        source, target = zip(*pairs)
        for seen, part in zip(self.seen, target):
            seen[part] = True
        part = maps[(slice(None), *source)].float().clamp(-HALF_MAX, HALF_MAX)
        self.data[(slice(None), *target)] = part.half().cpu().numpy()

    def maps(self, info: LayerInfo) -> FeatureMaps:
        box = [slice(int(np.flatnonzero(s)[0]), int(np.flatnonzero(s)[-1]) + 1) for s in self.seen]
        every = tuple(a.every for a in self.lattices)
        stride = tuple(a.stride * a.every for a in self.lattices)
        offset = tuple(a.zero + a.stride * a.phase + s * b.start for a, s, b in zip(self.lattices, stride, box))
        return FeatureMaps(info.name, self.data[(slice(None), *box)], offset, stride, every, info.field)


def _check_memory(stores: dict[str, _Store], memory: float, case: Case) -> None:
    needed = sum(store.bytes for store in stores.values())
    if needed > memory:
        raise ValueError(
            f"the maps of {len(stores)} layers over {case.name} take {needed / 1e6:.0f} MB, more than memory={memory / 1e6:.0f} MB: "
            "name fewer layers, choose a region, keep fewer values (largest=...), or allow more memory"
        )
