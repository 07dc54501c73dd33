"""The parts of a volume that a network computes at a time, and the context that each part needs.

A network of valid convolutions gets its margin around every tile, mirrored beyond the border of the volume. A network that pads
gets the voxels that it sees around a tile, but no more than the volume, so that it pads where it padded in training.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import as_tensor
from ..devices import free_memory
from ..models.layers import convolutions
from ..models.network import Network
from ..volume import Case, padded_region
from .memory import Need, measure
from .tracing import contract

# Bytes that a patch may take on a CPU. With more, most networks compute little less, and the memory is missing elsewhere.
CPU_WORKSPACE = 320e6
# The most that they become where tiles would compute too much. A brain of 240×240×155 voxels goes through Kayalibay's network whole.
PADDED_WORKSPACE = 4e9
# Times the least work that is too much, for networks that pad or work on slices, and for others.
PADDED_WORK, VALID_WORK = 1.05, 2.0
LARGEST_MAP = 2**31 - 1  # values in a tensor: many kernels count in 32 bits
SLICES = 8  # slices that are measured at a time; more take as much each
KERNELS = 1.25  # what kernels need for a moment, besides the feature maps


class Tile(NamedTuple):
    """The part of a region from `start` to `stop`, and the patch of the volume from `first` to `last` that is computed for it."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]

    def inside(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Return the place of the tile in a volume of this shape, cut off at its border."""
        return tuple(slice(a, min(b, n)) for a, b, n in zip(self.start, self.stop, shape))


class Tiling(NamedTuple):
    """A region of a volume, to be cut into tiles.

    Attributes:
        start: first voxel of the region along (D, H, W), on the network's grid.
        stop: one more than its last voxel, on the grid too.
        grid: the network's `multiple` along the axes that it sees, 1 along others.
        context: voxels of context before and behind a tile, along each axis.
        border: size of the volume, rounded up to the grid, for a network that pads: context ends there. None for one that does not.
        size: voxels of a tile along each axis.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]
    grid: tuple[int, ...]
    context: tuple[tuple[int, int], ...]
    border: tuple[int, ...] | None
    size: tuple[int, ...] = ()

    def tiles(self) -> list[Tile]:
        """Return the tiles in the order of their place."""
        along = (self._cut(axis, size) for axis, size in enumerate(self.size))
        return [Tile(*zip(*parts)) for parts in itertools.product(*along)]

    @property
    def patch(self) -> tuple[int, ...]:
        """The sides of the largest patch."""
        return tuple(max(last - first for *_, first, last in self._cut(axis, size)) for axis, size in enumerate(self.size))

    @property
    def work(self) -> int:
        """The number of voxels of all patches together."""
        sides = ([last - first for *_, first, last in self._cut(axis, size)] for axis, size in enumerate(self.size))
        return math.prod(map(sum, sides))

    def smaller(self) -> Tiling | None:
        """Return the tiling of the least work in which one side of the tiles is halved, or None where tiles cannot be smaller."""
        options = (self._halved(axis) for axis in range(3))
        return min((tiling for tiling in options if tiling), key=lambda tiling: tiling.work, default=None)

    def _halved(self, axis: int) -> Tiling | None:
        """Halve one side of the tiles, and again until the patches are shorter: their context may cover the volume."""
        size, grid = list(self.size), self.grid[axis]
        while size[axis] > grid:
            size[axis] = math.ceil(size[axis] / 2 / grid) * grid
            halved = self._replace(size=tuple(size))
            if halved.patch[axis] < self.patch[axis]:
                return halved
        return None

    def fitted(self, voxels: float) -> Tiling:
        """Return the tiling of the least work: the fewest voxels of all patches together, where no patch has more than `voxels`.

        Where every patch has more, the smallest patch counts. Tiles do not become much smaller than that, for then nearly all of a
        patch is context.
        """
        options = [self._sizes(axis) for axis in range(3)]
        longest, lengths = [], []  # of the patches along each axis: the longest one, and all together
        for axis, sizes in enumerate(options):
            sides = [[last - first for *_, first, last in self._cut(axis, size)] for size in sizes]
            longest.append([max(side) for side in sides])
            lengths.append([sum(side) for side in sides])
        largest = functools.reduce(np.multiply, np.ix_(*longest))
        total = functools.reduce(np.multiply, np.ix_(*lengths))
        fits = largest <= voxels
        # The second number decides between tilings of the same first number.
        costs = (np.where(fits, total, np.inf), -largest) if fits.any() else (largest, total)
        best = np.lexsort([cost.ravel() for cost in reversed(costs)])[0]
        index = np.unravel_index(best, total.shape)
        return self._replace(size=tuple(sizes[i] for sizes, i in zip(options, index)))

    def _sizes(self, axis: int) -> list[int]:
        """Return the sides that cut the region into equal parts, the largest first."""
        length, grid = self.stop[axis] - self.start[axis], self.grid[axis]
        least = grid * (4 if any(self.context[axis]) else 1)
        parts = range(1, math.ceil(length / least) + 1)
        return list(dict.fromkeys(math.ceil(math.ceil(length / n) / grid) * grid for n in parts))

    def _cut(self, axis: int, size: int) -> list[tuple[int, int, int, int]]:
        """Return start, stop, first and last of every tile along one axis."""
        stop, (before, behind) = self.stop[axis], self.context[axis]
        cuts = [(a, min(a + size, stop)) for a in range(self.start[axis], stop, size)]
        if self.border is None:
            return [(a, b, a - before, b + behind) for a, b in cuts]
        return [(a, b, max(a - before, 0), min(b + behind, self.border[axis])) for a, b in cuts]


def plan(
    network: Network,
    start: Sequence[int],
    stop: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
    *,
    tile: int | Sequence[int] | None = None,
    context: Sequence[tuple[int, int]] | None = None,
    runs: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    gradients: bool = False,
) -> Tiling:
    """Cut a region of a volume into tiles that fit the memory at hand.

    2-D networks get their slices in several parts first, because this costs nothing. Within slices, and in 3-D, neighbouring tiles
    compute their context twice.

    Args:
        network: network that computes the tiles.
        start: first voxel of the region along (D, H, W).
        stop: one more than its last voxel.
        shape: size of the volume.
        device: device that the network lies on.
        tile: side of a tile, or one for each axis. By default the tiling computes as few voxels as possible in the memory at hand.
        context: voxels before and behind a tile that a network that pads sees, along each axis; by default its `halo`.
        runs: module that is run instead of the network, such as a faster form of it.
        dtype: number type that it computes in.
        gradients: whether feature maps are kept for gradients.
    """
    flat = 3 - network.spatial_dims  # axes along which each slice is computed on its own
    grid = (*[network.multiple] * network.spatial_dims, *[1] * flat)
    pads = context is not None or network.halo is not None
    if context is None:
        around = math.ceil(network.halo / network.multiple) * network.multiple if pads else network.margin
        context = [(around, around)] * network.spatial_dims
    tiling = Tiling(
        start=tuple(a // g * g for a, g in zip(start, grid)),
        stop=tuple(math.ceil(b / g) * g for b, g in zip(stop, grid)),
        grid=grid,
        context=(*context, *[(0, 0)] * flat),
        border=tuple(math.ceil(n / g) * g for n, g in zip(shape, grid)) if pads else None,
    )
    if tile is not None:
        wanted = [int(n) for n in ([tile] * 3 if np.ndim(tile) == 0 else tile)]
        if len(wanted) != 3 or min(wanted) < 1:
            raise ValueError(f"tile={tile}; expected a positive number of voxels, or three of them")
        size = (min(max(w // g, 1) * g, b - a) for w, g, a, b in zip(wanted, grid, tiling.start, tiling.stop))
        return tiling._replace(size=tuple(size))
    whole = tiling._replace(size=tuple(b - a for a, b in zip(tiling.start, tiling.stop)))
    if not pads:
        # Full-resolution feature maps begin `reach` voxels outside the tile; what lies further out is only seen sub-sampled.
        seen = (*[(network.reach, network.reach)] * network.spatial_dims, *[(0, 0)] * flat)
        whole = whole._replace(context=seen)
    if _is_small(network, tiling._replace(size=whole.size).patch, workspace(device, CPU_WORKSPACE)):
        return tiling._replace(size=whole.size)
    measured = functools.cache(functools.partial(measure, runs or network, dtype=dtype, gradients=gradients))

    def need(size: tuple[int, ...]) -> Need:
        return _need(network, tiling._replace(size=size).patch, measured)

    # A network of slices, or one that pads, needs no context where whole slices, or the whole volume, fit.
    enough = whole.work * (PADDED_WORK if pads or flat else VALID_WORK)
    most = CPU_WORKSPACE
    while (best := _fitted(whole, need, workspace(device, most))).work > enough and most < PADDED_WORKSPACE:
        most = min(2 * most, PADDED_WORKSPACE)
    return tiling._replace(size=best.size)


def _is_small(network: Network, patch: Sequence[int], room: float) -> bool:
    """Return whether a patch fits even if all layers have full resolution and stay. This takes no time to find."""
    return 8 * KERNELS * math.prod(patch) * sum(_maps(network)) < room


def _fitted(whole: Tiling, need: Callable[[tuple[int, ...]], Need], room: float) -> Tiling:
    """Return the tiling of the least work that needs no more than `room` bytes. Where none is so small, return the smallest."""

    def share(tiling: Tiling) -> float:
        found = need(tiling.size)
        return max(KERNELS * found.bytes / room, found.largest / LARGEST_MAP)

    tiling = whole
    while (taken := share(tiling)) > 1:
        smaller = tiling.fitted(math.prod(tiling.patch) / taken)
        if math.prod(smaller.patch) >= math.prod(tiling.patch):
            return tiling
        tiling = smaller
    # A small patch may need less for each voxel than the whole, so that there is room left.
    fuller = tiling.fitted(math.prod(tiling.patch) / taken)
    return fuller if fuller.work < tiling.work and share(fuller) <= 1 else tiling


def _need(network: Network, patch: Sequence[int], measured: Callable[[tuple[int, ...]], Need | None]) -> Need:
    """Return the memory that a network takes for a patch."""
    slices = min(patch[2], SLICES) if network.spatial_dims == 2 else 1
    found = measured((slices, network.in_channels, *patch[: network.spatial_dims]))
    if found is None:  # not to be measured: its widest layer stands for it
        values = math.prod(patch) * max(_maps(network), default=2)
        return Need(6 * values, values)
    return Need(*(n * patch[2] // slices for n in found)) if network.spatial_dims == 2 else found


def _maps(network: Network) -> list[int]:
    """Return the feature maps before and behind each convolution."""
    return [c.in_channels + c.out_channels for c in convolutions(network)]


def workspace(device: torch.device, most: float) -> float:
    """Return the bytes that a patch may take: on a CPU half the free memory, and `most` at most; else most of the free memory.

    An accelerator that runs out of memory says so, and smaller tiles are tried. A computer may end the process.
    """
    free = free_memory(device)
    if free is None:
        return most
    return min(most, 0.5 * free) if device.type == "cpu" else 0.8 * free


def load_patch(image: np.ndarray, tile: Tile, network: Network, device: torch.device) -> Tensor:
    """Return the patch of a tile as a batch; axial slices are the batch of a 2-D network."""
    patch = padded_region(image, tile.first, tile.last)
    x = as_tensor(np.ascontiguousarray(patch, np.float32)).to(device)
    return x.permute(3, 0, 1, 2).contiguous() if network.spatial_dims == 2 else x[None]


def cut_output(output: Tensor, tile: Tile, network: Network, shape: Sequence[int]) -> Tensor:
    """Return the logits `(K, *n)` of a tile out of the network's output of its patch, cut off at the border of the volume."""
    output = output.permute(1, 2, 3, 0) if network.spatial_dims == 2 else output[0]
    # The output of a network that pads covers the tile's context too.
    skip = [0, 0, 0] if network.margin else [a - f for a, f in zip(tile.start, tile.first)]
    return output[(slice(None), *(slice(s, s + p.stop - p.start) for s, p in zip(skip, tile.inside(shape))))]


def check_fits(model: nn.Module, case: Case) -> None:
    """Raise ValueError where a case does not have the channels that a network takes."""
    network = contract(model)
    if network.in_channels != len(case.channels):
        raise ValueError(
            f"{case.name} has {len(case.channels)} channels ({', '.join(case.channels)}) but the network expects {network.in_channels}; "
            "choose channels with case.select([...])"
        )
    trained = network.card.get("channels")
    if trained and tuple(trained) != case.channels:
        raise ValueError(
            f"{case.name} has channels {', '.join(case.channels)} but the network was trained on {', '.join(trained)}; "
            f"use case.select({list(trained)})"
        )


def find_region(region: Sequence[slice | int] | None, case: Case) -> tuple[list[int], list[int]]:
    """Return the first voxel of a region along (D, H, W), and one more than its last.

    Args:
        region: slices or whole numbers along (D, H, W), as `np.s_[:, :, 32]` makes them; None for the whole case.
        case: case that the region is a part of.

    Raises:
        ValueError: when the region is empty, leaves voxels out, or lies outside the case.
    """
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
