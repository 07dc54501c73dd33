"""The feature maps of a network's layers. Their receptive fields are in `receptive_field`, whose names stand here too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .engine.tracing import Axis, Layer, spatial_dims, trace, watched
from .inference import PADDED_WORKSPACE, _check_fits, _tile_size, _workspace
from .models.layers import convolutions
from .receptive_field import (
    LARGEST_FIELD,
    ReceptiveField,
    check_names,
    measured_receptive_field,
    output_size,
    receptive_field,
    receptive_field_recursion,
)
from .volume import Case, padded_region

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
    """What is known about a layer before any image has gone through it.

    Attributes:
        name: as in `model.named_modules()`; a module that is called again has "#2" behind its name for the second call.
        kind: class of the module.
        channels: feature maps.
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
    """The layers of a network, by name, in the order in which they are computed.

    Args:
        model: any convolutional network.
        patterns: names, or patterns such as "normal.*"; by default one layer for each convolution: the block around it (with
            its normalisation and activation) where there is one, else the convolution itself. "*" is every module.

    Raises:
        ValueError: for a pattern that fits no layer.
    """
    margin, dims = getattr(model, "margin", 0), spatial_dims(model)
    if margin:
        # Twice the margin and some more: the middle voxels of every layer see no border.
        traced = trace(model, [2 * margin + 4 * model.multiple] * dims)
    else:
        side = 64
        while True:
            traced = trace(model, [side] * dims)
            names = _choose(model, traced, patterns)
            if side >= LARGEST_FIELD or not any(_touches(traced[name], side) for name in names):
                break
            side *= 2
    return {name: _info(traced[name]) for name in _choose(model, traced, patterns)}


def _touches(layer: Layer, side: int) -> bool:
    return layer.axes is not None and any(
        a.first[len(a.first) // 2] <= 0 or a.last[len(a.last) // 2] >= side - 1 for a in layer.axes
    )


def _info(layer: Layer) -> LayerInfo:
    stride = field = None
    if layer.axes is not None:
        stride = tuple(float(a.stride) for a in layer.axes)
        first, last = zip(*(_reach(a) for a in layer.axes))
        field = ReceptiveField(tuple(b - a + 1 for a, b in zip(first, last)), first, last)
    return LayerInfo(layer.name, layer.kind, layer.shape[0], layer.parameters, stride, field)


def _reach(axis: Axis) -> tuple[int, int]:
    """Offsets of the first and last input voxel from a voxel's centre: the union over the middle third of the layer, whose
    voxels may see differently."""
    n = len(axis.first)
    middle = slice(n // 3, max(n - n // 3, n // 3 + 1))
    centre = axis.offset + axis.stride * np.arange(n)[middle]
    return math.floor((axis.first[middle] - centre).min() + 1e-6), math.ceil((axis.last[middle] - centre).max() - 1e-6)


def _choose(model: nn.Module, traced: dict[str, Layer], patterns: str | Sequence[str] | None) -> list[str]:
    if patterns is None:
        modules, chosen = dict(model.named_modules()), []
        for name in traced:
            module = modules[name.split("#")[0]]
            inside = any(_is_block(modules[parent]) for parent in _parents(name) if parent)
            if not inside and name and (_is_block(module) or isinstance(module, nn.modules.conv._ConvNd)):
                chosen.append(name)
        return chosen
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen = []
    for pattern in patterns:
        found = [name for name in traced if name == pattern] or [n for n in traced if n and fnmatchcase(n, pattern)]
        if not found:
            check_names([pattern], model, traced)
        chosen += [name for name in found if name not in chosen]
    return sorted(chosen, key=list(traced).index)


def _is_block(module: nn.Module) -> bool:
    """Whether a module holds one convolution and, besides it, only what belongs to it: normalisation, activation, pooling."""
    return not isinstance(module, nn.modules.conv._ConvNd) and len(convolutions(module)) == 1


def _parents(name: str) -> list[str]:
    parts = name.split("#")[0].split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


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
    """The feature maps of a network's layers over a case, in half precision.

        maps = capture(model, case, ["normal.0", "low.7"], region=np.s_[:, :, 30:33])
        maps["low.7"].data, maps["low.7"].offset, maps["low.7"].stride

    Large regions are computed in tiles, as `inference.predict` does, each with the context that the network sees; the volume is
    mirrored beyond its border. A network that pads its convolutions (`margin` 0) gets each tile with what the layers see around
    it, up to the border. Computation ends with the last layer asked for. The network is used in evaluation mode and left as
    it was; no hook stays behind.

    Args:
        model: any convolutional network, 2-D (slice by slice) or 3-D, on any device.
        case: normalised as for `predict`.
        layers: names or patterns as in `list_layers`; by default one layer for each convolution.
        region: slices or whole numbers along (D, H, W), `np.s_[:, :, 32]` for one axial slice; the whole case by default.
            Voxels of a coarse layer that reach into the region belong to it.
        largest: values to keep of each layer; one with more keeps every second, third, … voxel along its longest axes. None
            keeps all.
        memory: bytes that the maps may take in all.
        progress: whether to show a bar.

    Returns:
        `{name: FeatureMaps}` in the order of computation.

    Raises:
        ValueError: for unknown layers, an empty region, a case that does not fit, or maps that need more than `memory`.
    """
    _check_fits(model, case)
    dims, device = spatial_dims(model), next(model.parameters()).device
    start, stop = _find_region(region, case)
    tiles = _plan(model, layers, start, stop, case.shape, device)
    origin, end = tiles[0].first, tiles[0].last
    traced = trace(model, [b - a for a, b in zip(origin, end)][:dims])
    names = _choose(model, traced, layers)
    fields = {name: info.field for name, info in list_layers(model, names).items()} if names else {}
    patch = [b - a for a, b in zip(origin, end)]
    reach = [max(ends) for ends in zip(*(tile.last for tile in tiles))]
    stores = {name: _Store(traced[name], patch, origin, reach, start, stop, largest, dims) for name in names}
    _check_memory(stores, memory, case)

    with _evaluating(model):
        for tile in tqdm(tiles, desc=f"features of {case.name}", disable=not progress or len(tiles) == 1, dynamic_ncols=True):
            x = _input(case, tile, dims, device)
            missing = set(names)

            def note(name, module, output, tile=tile, missing=missing):
                if name in missing:
                    maps = output.permute(1, 2, 3, 0) if dims == 2 else output[0]
                    stores[name].take(maps, tile)
                    missing.remove(name)
                    if not missing:
                        raise _Enough

            try:
                with watched(model, dims, note):
                    model(x)
            except _Enough:
                pass
    return {name: store.maps(name, fields[name]) for name, store in stores.items()}


class _Enough(Exception):
    """Every layer asked for has been computed: the rest of the network is not needed."""


class _Store:
    """Puts one layer's maps together, tile by tile."""

    def __init__(self, layer: Layer, patch, origin, reach, start, stop, largest, dims):
        axes = layer.axes
        if axes is None:  # not followed: the layer is taken to cover the patch evenly
            steps = [n / m for n, m in zip(patch, layer.shape[1:])]
            axes = [Axis((s - 1) / 2, s, np.empty(m), np.empty(m)) for s, m in zip(steps, layer.shape[1:])]
        axes = [*axes, *(Axis(0.0, 1.0, np.empty(n), np.empty(n)) for n in patch[dims:])]
        self.stride = [a.stride for a in axes]
        self.shift = [a.offset for a in axes]  # of the first voxel's centre from a patch's first voxel
        # Voxels are counted on one lattice, from the first one whose extent reaches into the region.
        low = [math.floor((a - 0.5 - o - s) / d - 0.5) + 1 for a, o, s, d in zip(start, origin, self.shift, self.stride)]
        # Behind the last voxel of a coarse layer nothing follows: it stands for what is left of the volume.
        final = [
            math.floor((e - n - o) / d + m - 1 + 1e-6)
            for e, n, o, d, m in zip(reach, patch, origin, self.stride, [len(a.first) for a in axes])
        ]
        low = [min(a, b) for a, b in zip(low, final)]
        self.zero = [o + s + d * i for o, s, d, i in zip(origin, self.shift, self.stride, low)]
        size = [max(1, math.ceil((b - 0.5 - z) / d + 0.5)) for b, z, d in zip(stop, self.zero, self.stride)]
        self.every = [1, 1, 1]
        kept = list(size)
        while largest is not None and layer.shape[0] * math.prod(kept) > largest and max(kept) > 1:
            axis = kept.index(max(kept))
            self.every[axis] += 1
            kept[axis] = -(-size[axis] // self.every[axis])
        self.phase = [(min(e, n) - 1) // 2 for e, n in zip(self.every, size)]
        self.shape = (layer.shape[0], *(-(-(n - p) // e) for n, p, e in zip(size, self.phase, self.every)))
        self.data = None
        self.seen = [np.zeros(n, bool) for n in self.shape[1:]]

    @property
    def bytes(self) -> int:
        return 2 * math.prod(self.shape)

    def take(self, maps: Tensor, tile: _Tile) -> None:
        """Keep what one patch's maps `(C, *n)` say about its tile."""
        if self.data is None:
            self.data = np.zeros(self.shape, np.float16)
        source, target = [], []
        for axis, n in enumerate(maps.shape[1:]):
            stride, every = self.stride[axis], self.every[axis]
            centre = tile.first[axis] + self.shift[axis]  # of the patch's voxel 0
            first = round((centre - self.zero[axis]) / stride)  # its place on the lattice
            # Voxels that reach into the tile; what lies around it may have seen the patch's own border.
            least = max(self.phase[axis] - first, math.floor((tile.start[axis] - 0.5 - centre) / stride - 0.5) + 1, 0)
            least = min(least, n - 1)
            most = max(least + 1, min(n, math.ceil((tile.stop[axis] - 0.5 - centre) / stride + 0.5)))
            skip = least + (self.phase[axis] - first - least) % every
            index = (first + skip - self.phase[axis]) // every
            count = min(-(-(most - skip) // every), len(self.seen[axis]) - index)
            if count <= 0:
                return
            source.append(slice(skip, skip + (count - 1) * every + 1, every))
            target.append(slice(index, index + count))
        for seen, part in zip(self.seen, target):
            seen[part] = True
        part = maps[(slice(None), *source)].float().clamp(-HALF_MAX, HALF_MAX)
        self.data[(slice(None), *target)] = part.half().cpu().numpy()

    def maps(self, name: str, field: ReceptiveField | None) -> FeatureMaps:
        box = [slice(np.flatnonzero(s)[0], np.flatnonzero(s)[-1] + 1) for s in self.seen]
        step = tuple(s * e for s, e in zip(self.stride, self.every))
        offset = tuple(z + d * p + s * b.start for z, d, p, s, b in zip(self.zero, self.stride, self.phase, step, box))
        return FeatureMaps(name, self.data[(slice(None), *box)], offset, step, tuple(self.every), field)


def _find_region(region: Sequence[slice | int] | None, case: Case) -> tuple[list[int], list[int]]:
    parts = (slice(None),) * 3 if region is None else tuple(region) if isinstance(region, Sequence) else (region,)
    if len(parts) != 3:
        raise ValueError(f"region={region!r}; expected three slices or numbers along (D, H, W), as in np.s_[:, :, 32]")
    start, stop = [], []
    for part, n in zip(parts, case.shape):
        if not isinstance(part, slice):
            if not -n <= part < n:
                raise ValueError(f"region={region!r} is outside {case.name} of {case.shape} voxels")
            part = slice(part % n, part % n + 1)
        a, b, step = part.indices(n)
        if step != 1 or b <= a:
            raise ValueError(f"region={region!r} holds no voxels of {case.name} of {case.shape} voxels, or leaves some out")
        start.append(a)
        stop.append(b)
    return start, stop


class _Tile(NamedTuple):
    """A part of the region from `start` to `stop`, and the patch of the volume from `first` to `last` that is computed for it."""

    start: list[int]
    stop: list[int]
    first: list[int]
    last: list[int]


def _plan(model, layers, start, stop, shape, device, side: int | None = None) -> list[_Tile]:
    """Tiles that cover a region, each with the context it needs, `side` voxels wide or as large as the memory at hand allows.

    A network of valid convolutions gets its margin. One that pads gets what its layers see around the tile, but no more than the
    volume, so that it pads where `inference.predict` has it pad.
    """
    dims, margin, multiple = spatial_dims(model), getattr(model, "margin", 0), _multiple(model)
    grid = [multiple] * dims + [1] * (3 - dims)
    begin = [a // g * g for a, g in zip(start, grid)]
    end = [a + math.ceil((b - a) / g) * g for a, b, g in zip(begin, stop, grid)]
    halo = [(margin, margin)] * dims + [(0, 0)] * (3 - dims)
    if not margin:
        infos = list_layers(model, layers).values()
        for axis in range(dims):
            # One voxel of the layer more, for those that only reach into the tile.
            reach = [
                (i.stride[axis] - i.field.first[axis], i.stride[axis] + i.field.last[axis]) if i.field else (n, n)
                for i in infos
                for n in shape[axis : axis + 1]
            ]
            halo[axis] = tuple(math.ceil(max(r) / multiple) * multiple for r in zip(*reach))
    around = [max(h) for h in halo]
    if side is not None:
        tile = [max(side // g, 1) * g for g in grid]
    elif margin:
        tile = _tile_size(model, begin, end, None, device)
    else:
        tile = [b - a for a, b in zip(begin, end)]
        widest = max(c.in_channels + c.out_channels for c in convolutions(model))
        voxels = _workspace(device, PADDED_WORKSPACE) / (6 * widest)
        order = [2, 0, 1] if dims == 2 else [0, 1, 2]
        while math.prod(min(t + 2 * h, b - a) for t, h, a, b in zip(tile, around, begin, end)) > voxels:
            axis = order[0] if dims == 2 and tile[2] > 1 else max(order, key=lambda i: tile[i] / grid[i])
            if tile[axis] <= 4 * grid[axis] and not (dims == 2 and axis == 2):
                break  # the halo is all that is left
            tile[axis] = -(-tile[axis] // (2 * grid[axis])) * grid[axis]
    tiles = []
    for corner in itertools.product(*(range(a, b, t) for a, b, t in zip(begin, end, tile))):
        last = [min(c + t, b) for c, t, b in zip(corner, tile, end)]
        first_seen = [c - h[0] for c, h in zip(corner, halo)]
        last_seen = [b + h[1] for b, h in zip(last, halo)]
        if not margin:
            whole = [math.ceil(n / g) * g for n, g in zip(shape, grid)]
            first_seen = [max(c, 0) for c in first_seen]
            last_seen = [min(b, n) for b, n in zip(last_seen, whole)]
        tiles.append(_Tile(list(corner), last, first_seen, last_seen))
    return tiles


def _input(case: Case, tile: _Tile, dims: int, device: torch.device) -> Tensor:
    """The patch of a tile as a batch; axial slices are the batch of a 2-D network."""
    patch = padded_region(case.image, tile.first, tile.last)
    x = torch.from_numpy(np.ascontiguousarray(patch, np.float32)).to(device)
    return x.permute(3, 0, 1, 2) if dims == 2 else x[None]


def _multiple(model: nn.Module) -> int:
    """Sizes that the network accepts are multiples of this, and patches that begin at multiples of it share one lattice."""
    if hasattr(model, "multiple"):
        return model.multiple
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        try:
            traced = trace(model, [multiple * (64 // multiple + 1)] * spatial_dims(model))
        except ValueError:
            continue
        return math.lcm(multiple, *(max(1, round(a.stride)) for layer in traced.values() for a in layer.axes or ()))
    raise ValueError(
        f"{type(model).__name__} takes none of the patches that were tried; set model.multiple to a number whose multiples it takes"
    )


def _check_memory(stores: dict[str, _Store], memory: float, case: Case) -> None:
    needed = sum(store.bytes for store in stores.values())
    if needed > memory:
        raise ValueError(
            f"the maps of {len(stores)} layers over {case.name} take {needed / 1e6:.0f} MB, more than memory={memory / 1e6:.0f} MB: "
            "name fewer layers, choose a region, keep fewer values (largest=...), or allow more memory"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
