"""The places of a layer's voxels: on the patch of a tile, and on a region that several tiles cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..models.network import Network
from .tiles import Tile
from .tracing import Layer, trace


class Place(NamedTuple):
    """The voxels of a layer along one axis of a patch. There are `count`, and voxel i is centred on the patch's `offset + stride * i`."""

    offset: float
    stride: float
    count: int


def find_places(
    model: nn.Module, network: Network, layers: dict[str, Layer], traced: Sequence[int], tile: Tile
) -> dict[str, list[Place]]:
    """Find the places of every layer's voxels on the patch of a tile, along three axes.

    The layers are known from a patch of `traced` voxels. A longer patch has the same offsets and strides, and one voxel more in a
    layer for every stride that it is longer. This holds where the network's `multiple` is a multiple of the stride. The other layers
    (those that pool over the whole patch, or enlarge to a given size) are traced again.

    Args:
        model: network of the layers.
        network: its contract, see `engine.tracing.contract`.
        layers: layers in a patch that differs from the tile's by multiples of `network.multiple`.
        traced: sides of that patch.
        tile: tile whose patch counts.

    Returns:
        The places along (D, H, W), for each layer's name.
    """
    patch = [b - a for a, b in zip(tile.first, tile.last)]
    dims = network.spatial_dims
    other = [name for name, layer in layers.items() if not _is_regular(layer, network.multiple)]
    again = trace(model, patch[:dims], other) if other else {}
    places = {}
    for name, layer in layers.items():
        if name not in again:
            counts = [len(a.first) + round((n - t) / a.stride) for a, n, t in zip(layer.axes, patch, traced)]
            place = [Place(a.offset, a.stride, count) for a, count in zip(layer.axes, counts)]
        elif again[name].axes is not None:
            place = [Place(a.offset, a.stride, len(a.first)) for a in again[name].axes]
        else:  # not followed: the layer is taken to cover the patch evenly
            place = [Place((n / m - 1) / 2, n / m, m) for n, m in zip(patch, again[name].shape[1:])]
        places[name] = [*place, *(Place(0.0, 1.0, n) for n in patch[dims:])]
    return places


def _is_regular(layer: Layer, multiple: int) -> bool:
    return layer.axes is not None and all(abs(multiple / a.stride - round(multiple / a.stride)) < 1e-6 for a in layer.axes)


@dataclass
class Lattice:
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
            start: first voxel of its tile. Voxels around the tile are left out, for they may have seen the patch's border.
            stop: one more than the last voxel of the tile.
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
    """Return the first voxel whose extent reaches into `start` or what follows, where voxel 0 is centred on `centre`."""
    return math.floor((start - 0.5 - centre) / stride - 0.5) + 1


def lay(place: Place, first: int, last: int, end: int, start: int, stop: int) -> Lattice:
    """Lay a layer's lattice over a region, along one axis.

    Args:
        place: place of the layer's voxels on the first patch.
        first: first voxel of that patch.
        last: one more than its last voxel.
        end: one more than the last voxel of the last patch.
        start: first voxel of the region.
        stop: one more than its last voxel.
    """
    offset, stride, count = place
    low = _first_reaching(start, first + offset, stride)
    # Behind the last voxel of a coarse layer nothing follows: it stands for what is left of the volume.
    low = min(low, math.floor((end - last) / stride + count - 1 + 1e-6))
    zero = first + offset + stride * low
    size = max(1, math.ceil((stop - 0.5 - zero) / stride + 0.5))
    return Lattice(float(zero), float(stride), float(offset), size)


def thin_out(lattices: Sequence[Lattice], most: float) -> None:
    """Keep fewer voxels of three lattices, along the longest axis first, until they cross in at most so many."""
    kept = [a.size for a in lattices]
    while math.prod(kept) > most and max(kept) > 1:
        axis = kept.index(max(kept))
        lattices[axis].every += 1
        kept[axis] = -(-lattices[axis].size // lattices[axis].every)
