"""The feature maps of a network's layers. The functions for receptive fields are in `receptive_field` and can be called from here too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .engine.geometry import Axis
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


def find_context(network: Network, layers: Iterable[LayerInfo], shape: Sequence[int]) -> list[tuple[int, int]] | None:
    """Find the voxels before and behind a tile that layers of a network that pads see, along each axis that the network sees.

    Args:
        network: network of the layers.
        layers: layers that are to be computed without a trace of the tile's border.
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
    """The layers that are asked for, in the order of computation, and the patch that they were traced in."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    modules = dict(model.named_modules())
    # Of layers that are called by their names the trace needs no others.
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
    """One layer for each convolution: the block around it, or itself."""
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
    """Whether a module holds one convolution and, besides it, only what belongs to it: normalisation, activation, pooling."""
    return not isinstance(module, nn.modules.conv._ConvNd) and len(convolutions(module)) == 1


def _describe(layer: Layer) -> LayerInfo:
    stride = field = None
    if layer.axes is not None:
        stride = tuple(float(a.stride) for a in layer.axes)
        first, last = zip(*(_reach(a) for a in layer.axes))
        field = ReceptiveField(tuple(b - a + 1 for a, b in zip(first, last)), first, last)
    return LayerInfo(layer.name, type(layer.module).__name__, layer.shape[0], layer.parameters, stride, field)


def _reach(axis: Axis) -> tuple[int, int]:
    """Offsets of the first and last input voxel from a voxel's centre: the union over the middle third of the layer, whose
    voxels may see differently."""
    n = len(axis.first)
    middle = slice(n // 3, max(n - n // 3, n // 3 + 1))
    centre = axis.offset + axis.stride * np.arange(n)[middle]
    return math.floor((axis.first[middle] - centre).min() + 1e-6), math.ceil((axis.last[middle] - centre).max() - 1e-6)


@dataclass(eq=False)
class FeatureMaps:
    """The feature maps of one layer over (a region of) one case, and where they lie on it.

    Voxel (i, j, k) of the maps is centred on voxel `offset + stride * (i, j, k)` of the case.

    Attributes:
        name: of the layer.
        data: `(C, D', H', W')` float16. Numbers beyond ±65504 are cut off there.
        offset: input coordinates (d, h, w) of the middle of the first voxel, fractions included.
        stride: input voxels from one voxel to the next, along (D, H, W).
        every: of the layer's voxels, every how many-th was kept along each axis (already part of `stride`).
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
        """The voxel of the maps that lies nearest to voxel `position` (d, h, w) of the case."""
        return tuple(int(self._along(axis, position[axis])) for axis in range(3))

    def _along(self, axis: int, places: float | np.ndarray) -> np.ndarray:
        nearest = np.floor((np.asarray(places) - self.offset[axis]) / self.stride[axis] + 0.5).astype(int)
        return nearest.clip(0, self.data.shape[axis + 1] - 1)

    def position(self, index: Sequence[int]) -> tuple[float, float, float]:
        """Input coordinates (d, h, w) of the middle of a voxel of the maps."""
        return tuple(o + s * i for o, s, i in zip(self.offset, self.stride, index))

    def laid_over(self, shape: Sequence[int], channel: int | None = None) -> np.ndarray:
        """One map `(D, H, W)`, or all `(C, D, H, W)`, on the grid of the case; voxels outside the region repeat its border."""
        grid = np.ix_(*(self._along(axis, np.arange(n)) for axis, n in enumerate(shape)))
        return self.data[channel][grid] if channel is not None else self.data[(slice(None), *grid)]

    def sampled(self, volume: np.ndarray) -> np.ndarray:
        """A volume `(D, H, W)` of the case (label, mask, tissue) at the maps' voxels, `(D', H', W')`."""
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
    places = _place(model, network, found, traced, tiles[0])
    stores = {name: _Store(infos[name].channels, place, tiles, start, stop, largest) for name, place in places.items()}
    _check_memory(stores, memory, case)

    with evaluating(model):
        for tile in tqdm(tiles, desc=f"features of {case.name}", disable=not progress or len(tiles) == 1, dynamic_ncols=True):

            def keep(name: str, module: nn.Module, output: Tensor, tile: Tile = tile) -> None:
                stores[name].take(output.permute(1, 2, 3, 0) if network.spatial_dims == 2 else output[0], tile)

            with watched(model, network.spatial_dims, keep, stores):
                model(load_patch(case.image, tile, network, device))
    return {name: store.maps(infos[name]) for name, store in stores.items()}


class _Place(NamedTuple):
    """The voxels of a layer along one axis of a patch: `count` of them, voxel i centred on the patch's voxel `offset + stride * i`."""

    offset: float
    stride: float
    count: int


def _place(
    model: nn.Module, network: Network, layers: dict[str, Layer], traced: Sequence[int], tile: Tile
) -> dict[str, list[_Place]]:
    """The places of every layer's voxels on the patch of a tile, along three axes.

    The layers are known from a patch of `traced` voxels. A patch that is larger by the network's `multiple` has as many voxels more
    in each layer as that is strides, at the same offset and stride. Only layers without such strides (that pool over the whole
    patch, or enlarge to a given size) are traced again.
    """
    patch = [b - a for a, b in zip(tile.first, tile.last)]
    dims = network.spatial_dims
    other = [name for name, layer in layers.items() if not _is_regular(layer, network.multiple)]
    again = trace(model, patch[:dims], other) if other else {}
    places = {}
    for name, layer in layers.items():
        if name not in again:
            counts = [len(a.first) + round((n - t) / a.stride) for a, n, t in zip(layer.axes, patch, traced)]
            place = [_Place(a.offset, a.stride, count) for a, count in zip(layer.axes, counts)]
        elif again[name].axes is not None:
            place = [_Place(a.offset, a.stride, len(a.first)) for a in again[name].axes]
        else:  # not followed: the layer is taken to cover the patch evenly
            place = [_Place((n / m - 1) / 2, n / m, m) for n, m in zip(patch, again[name].shape[1:])]
        places[name] = [*place, *(_Place(0.0, 1.0, n) for n in patch[dims:])]
    return places


def _is_regular(layer: Layer, multiple: int) -> bool:
    return layer.axes is not None and all(abs(multiple / a.stride - round(multiple / a.stride)) < 1e-6 for a in layer.axes)


@dataclass
class _Lattice:
    """The voxels of a layer that reach into the region, along one axis. Voxel i is centred on input coordinate `zero + stride * i`.

    Attributes:
        zero: input coordinate of the first of these voxels.
        stride: input voxels from one voxel to the next.
        shift: input voxels from the first voxel of a patch to the centre of the layer's first voxel in it.
        size: number of voxels that reach into the region.
        every: only every `every`-th voxel is kept.
    """

    zero: float
    stride: float
    shift: float
    size: int
    every: int = 1

    @property
    def phase(self) -> int:
        """The first voxel that is kept."""
        return (min(self.every, self.size) - 1) // 2

    @property
    def kept(self) -> int:
        """The number of voxels that are kept."""
        return -(-(self.size - self.phase) // self.every)

    def match(self, first: int, start: int, stop: int, count: int) -> tuple[slice, slice] | None:
        """Find the voxels of a patch that are kept, and their places among those kept; None where there are none.

        Args:
            first: first voxel of the patch.
            start, stop: first voxel of its tile, and one more than the last. Voxels around the tile may have seen the patch's border.
            count: number of the layer's voxels in the patch.
        """
        centre = first + self.shift  # of the patch's voxel 0
        place = round((centre - self.zero) / self.stride)  # of the same voxel, counted from `zero`
        least = min(max(self.phase - place, _first_reaching(start, centre, self.stride), 0), count - 1)
        most = max(least + 1, min(count, math.ceil((stop - 0.5 - centre) / self.stride + 0.5)))
        least += (self.phase - place - least) % self.every
        index = (place + least - self.phase) // self.every
        length = min(-(-(most - least) // self.every), self.kept - index)
        if length <= 0:
            return None
        return slice(least, least + (length - 1) * self.every + 1, self.every), slice(index, index + length)


def _first_reaching(start: float, centre: float, stride: float) -> int:
    """The first voxel whose extent reaches beyond the beginning of voxel `start`, where voxel 0 is centred on `centre`."""
    return math.floor((start - 0.5 - centre) / stride - 0.5) + 1


def _lattice(place: _Place, first: int, last: int, end: int, start: int, stop: int) -> _Lattice:
    """The lattice of a layer along one axis of a region from `start` to `stop`.

    Its first patch reaches from `first` to `last`, and its last one to `end`.
    """
    offset, stride, count = place
    low = _first_reaching(start, first + offset, stride)
    # Behind the last voxel of a coarse layer nothing follows: it stands for what is left of the volume.
    low = min(low, math.floor((end - last) / stride + count - 1 + 1e-6))
    zero = first + offset + stride * low
    size = max(1, math.ceil((stop - 0.5 - zero) / stride + 0.5))
    return _Lattice(float(zero), float(stride), float(offset), size)


def _thin_out(lattices: Sequence[_Lattice], most: float) -> None:
    """Keep fewer voxels along the longest axis, again and again, until at most so many are left."""
    kept = [a.size for a in lattices]
    while math.prod(kept) > most and max(kept) > 1:
        axis = kept.index(max(kept))
        lattices[axis].every += 1
        kept[axis] = -(-lattices[axis].size // lattices[axis].every)


class _Store:
    """Puts the maps of one layer together, tile by tile."""

    def __init__(
        self,
        channels: int,
        places: Sequence[_Place],
        tiles: Sequence[Tile],
        start: Sequence[int],
        stop: Sequence[int],
        largest: int | None,
    ):
        end = [max(ends) for ends in zip(*(tile.last for tile in tiles))]
        self.lattices = [_lattice(*along) for along in zip(places, tiles[0].first, tiles[0].last, end, start, stop)]
        if largest is not None:
            _thin_out(self.lattices, largest / channels)
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
