"""The permutohedral lattice: Gaussian filtering in many dimensions, in time linear in the number of points.

Three steps filter a signal. Splat spreads the points onto the vertices of a lattice of simplices. Blur filters the vertices
along the lattice's directions with (1/2, 1, 1/2). Slice reads the values back at the points. A. Adams, J. Baek, M. A. Davis:
Fast high-dimensional filtering using the permutohedral lattice, Computer Graphics Forum 29, 2010; used for dense CRFs by
P. Krähenbühl and V. Koltun, NIPS 2011.

Seen in the right coordinates the lattice is simple. `shear` maps features to R^d so that the lattice's vertices are the
integer points Z^d. The simplex around a point t starts at floor(t) and walks along the axes in the order of t's fractional
parts, largest first. A vertex's neighbours are one step along each axis, and one along all axes at once: d + 1 directions.

An integer vector becomes one integer, its key, so that a step along a direction adds a constant to the key. Sorting the keys
numbers the vertices. The first axis counts most in a key. Where the first features are positions, neighbours in the image then
have numbers, and places in memory, that are near to each other.

This file says it all twice. `_build` and `Permutohedral._filter` are for PyTorch on any device. `_build_with_loops` and
`Permutohedral._filter_with_loops` are for large images on a CPU, through the compiled loops of `loops`, which take a third to a
seventh of the time there. Both give the same numbers, up to rounding.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .compiled import loops_for, share_out, side_by_side

Pair = tuple[Tensor, Tensor]


def shear(dimensions: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the lower-triangular matrix `(d, d)` that turns features of unit standard deviation into lattice coordinates.

    Its scale is that of the original paper. Where no vertex is missing, it gives splat, blur and slice together a variance of 1
    along every feature: 3/4 from the blur, 1/8 each from splat and slice.
    """
    d = dimensions
    gram = torch.eye(d, dtype=torch.float64) + 1
    return (math.sqrt(2 / 3) * torch.linalg.cholesky(gram)).to(dtype).contiguous()


class Permutohedral:
    """The lattice of one set of points. It is built once and can then filter any number of signals.

    Args:
        features: features of the points `(d, N)`, each row divided by its standard deviation; float32 or float64, on any device.

    Attributes:
        points, dimensions, vertices: N, d and the number M of lattice vertices in use.
        order: the order in which points are visited, `(N,)`, or None for the order that they came in.
        vertex: the vertices of each visited point's simplex, `(N, d + 1)`.
        weight: the barycentric coordinates of each visited point in its simplex, `(N, d + 1)`.
        neighbours: for each direction two lists of vertices. The vertices of the second list are one step away from those of the
            first.

    Raises:
        ValueError: if the features span too many cells to be numbered in 64 bits.
    """

    def __init__(self, features: Tensor) -> None:
        self.dimensions, self.points = features.shape
        self._loops = loops_for(self.points, features.dtype, features.device)
        if self._loops is None:
            # Autocast would round coordinates to half precision, in which neighbouring cells fall together.
            with torch.autocast(features.device.type, enabled=False):
                built = None, *_build(features)
        else:
            built = _build_with_loops(features.detach().contiguous().numpy(), self._loops)
        self.order, self.vertex, self.weight, self.neighbours, self.vertices = built
        # The d + 1 directions sum to zero, so a value blurred along all of them comes back to its own vertex: 1 + 2 (1/2)^(d+1).
        self.scale = 1 / (1 + 2.0**-self.dimensions)

    def filter(self, signal: Tensor, *, transpose: bool = False) -> Tensor:
        """Return the Gaussian-weighted sum `(c, N)` of a signal `(c, N)`, each channel separately.

        Where vertices are missing, blurs along different directions do not quite commute, so the operator is only roughly
        symmetric. `transpose=True` applies its exact transpose, which gradients need.
        """
        directions = self.neighbours[::-1] if transpose else self.neighbours
        if self._loops is None:
            return torch.stack([self._filter(channel, directions) for channel in signal])
        signal = signal.contiguous()
        result = torch.empty_like(signal)
        ranges = share_out(self.points, len(signal))
        side_by_side(lambda i: self._filter_with_loops(signal[i], directions, ranges, result[i].numpy()), range(len(signal)))
        return result

    def _filter(self, signal: Tensor, directions: list[Pair]) -> Tensor:
        spread = self.weight * signal[:, None]
        values = signal.new_zeros(self.vertices).index_add_(0, self.vertex.flatten(), spread.flatten())
        for here, there in directions:
            old = values.clone()
            values.index_add_(0, here, old.index_select(0, there), alpha=0.5)
            values.index_add_(0, there, old.index_select(0, here), alpha=0.5)
        read = values.index_select(0, self.vertex.flatten()).view_as(self.weight)
        return read.mul_(self.weight).sum(1).mul_(self.scale)

    def _filter_with_loops(self, signal: Tensor, directions: list[Pair], ranges: list[slice], result: np.ndarray) -> None:
        order, vertex, weight = _unsigned(self.order), _unsigned(self.vertex), self.weight.numpy()
        # Every range of points has values of its own to write to, and these are added up.
        parts = np.empty((len(ranges), self.vertices), np.float32)

        def splat(part: int) -> None:
            points = ranges[part]
            self._loops.splat(signal.numpy(), order[points], vertex[points], weight[points], parts[part])

        side_by_side(splat, range(len(ranges)))
        for other in parts[1:]:
            parts[0] += other
        # Blurring reads and writes two arrays by turns.
        values, other = parts[0], parts[1] if len(ranges) > 1 else np.empty(self.vertices, np.float32)
        for here, there in directions:
            self._loops.blur(values, _unsigned(here), _unsigned(there), other)
            values, other = other, values
        side_by_side(
            lambda points: self._loops.slice_(values, order[points], vertex[points], weight[points], self.scale, result), ranges
        )


# ---------------------------------------------------------------------------------------------------- keys of vertices


def _plan_keys(low: list[float], high: list[float]) -> tuple[list[float], list[int], int]:
    """Plan keys for simplices whose first vertices reach from `low` to `high`.

    Returns:
        The coordinates of key 0, what a step along each direction adds to a key, and the number of cells.
    """
    # Each axis has room for the simplex (+1), and on both sides for neighbours that do not exist, so that no neighbour's key is
    # that of another vertex.
    extents = [b - a + 4 for a, b in zip(low, high)]
    cells = math.prod(extents)  # a float, which may be infinite
    if not cells < 2**62:
        raise ValueError(
            f"the features span {cells:.1e} lattice cells, more than the 2^62 that can be numbered: the standard deviations "
            "are too small for the range of positions and intensities; enlarge them, or clip outlying intensities"
        )
    steps = [math.prod(int(extent) for extent in extents[axis + 1 :]) for axis in range(len(extents))]
    return [a - 1 for a in low], [*steps, sum(steps)], math.prod(map(int, extents))


# ------------------------------------------------------------------------------------------------------------ PyTorch


def _build(features: Tensor) -> tuple[Tensor, Tensor, list[Pair], int]:
    """Return `vertex`, `weight`, `neighbours` and the number of vertices."""
    t = shear(len(features), dtype=features.dtype).to(features.device) @ features
    corner = t.floor()
    origin, steps, _ = _plan_keys(corner.amin(1).tolist(), corner.amax(1).tolist())
    step = torch.tensor(steps, device=features.device)

    # Largest first. Of equal parts the last axis comes first: that does not matter, but the loops do it too.
    fraction, axis = (rows.flip(0) for rows in (t - corner).sort(dim=0, stable=True))
    nothing = torch.zeros_like(fraction[:1])
    # Weights are the gaps between 1, the fractional parts and 0.
    weight = torch.cat([nothing + 1, fraction]) - torch.cat([fraction, nothing])
    # Keys are the corner's, and then one step more for each axis.
    key = ((corner - corner.new_tensor(origin)[:, None]).long() * step[:-1, None]).sum(0, keepdim=True)
    keys = torch.cat([key, key + step[axis].cumsum(0)])

    unique, vertex = torch.unique(keys.T.contiguous(), return_inverse=True)
    return vertex, weight.T.contiguous(), [_find_pairs(unique, step) for step in steps], len(unique)


def _find_pairs(keys: Tensor, step: int) -> Pair:
    """Return the places, in two lists, of all sorted keys that differ by `step`."""
    place = torch.searchsorted(keys, keys + step).clamp_(max=len(keys) - 1)
    here = (keys[place] == keys + step).nonzero()[:, 0]
    return here, place[here]


# -------------------------------------------------------------------------------------------------------------- Loops


def _build_with_loops(features: np.ndarray, loops: ModuleType) -> tuple[Tensor, Tensor, Tensor, list[Pair], int]:
    """Return `order`, `vertex`, `weight`, `neighbours` and the number of vertices."""
    d, points = features.shape
    matrix, ranges = shear(d).numpy(), share_out(points)
    extremes = np.full((len(ranges), 2, d, loops.CHUNK), np.inf, np.float32)
    extremes[:, 1] = -np.inf
    side_by_side(lambda job: loops.find_extremes(features, job[0].start, job[0].stop, matrix, *job[1]), zip(ranges, extremes))
    low, high = extremes[:, 0].min((0, 2)), extremes[:, 1].max((0, 2))
    origin, steps, cells = _plan_keys(np.floor(low).tolist(), np.floor(high).tolist())
    origin, strides = np.array(origin, np.float32), np.array(steps[:-1])

    # Points in the order of their corners: points of one cell have their vertices in common.
    keys = np.empty(points, np.int64)
    side_by_side(lambda part: loops.find_corners(features, part.start, part.stop, matrix, origin, strides, keys), ranges)
    _, order = _sort(keys, cells)

    vertex, weight = np.empty((points, d + 1), np.uint32), np.empty((points, d + 1), np.float32)
    keys = np.empty((points, d + 1), np.int64)  # the system provides only the part that is written

    def embed(part: slice) -> np.ndarray:
        found = keys[part].reshape(-1)
        return found[: loops.embed(features, matrix, origin, strides, order[part], vertex[part], weight[part], found)]

    found = side_by_side(embed, ranges)

    # Vertices that got several numbers get one, and the numbers go with the keys.
    keys, places = _sort(np.concatenate(found) if len(found) > 1 else found[0], cells)
    numbers = np.empty(len(keys), np.uint32)
    keys = keys[: loops.number_keys(keys, places, numbers)]
    of_range = np.split(numbers, np.cumsum([len(part) for part in found])[:-1])
    side_by_side(lambda job: loops.renumber(vertex[job[0]].reshape(-1), job[1]), zip(ranges, of_range))
    del places, numbers, of_range, found

    def find_pairs(step: int) -> Pair:
        here, there = np.empty(len(keys), np.uint32), np.empty(len(keys), np.uint32)
        count = loops.find_pairs(keys, step, here, there)
        return _signed(here[:count].copy()), _signed(there[:count].copy())

    return _signed(order), _signed(vertex), torch.from_numpy(weight), side_by_side(find_pairs, steps), len(keys)


def _sort(keys: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort keys below `cells`, in place where possible; return them, and the place that each came from."""
    bits = len(keys).bit_length()
    if cells.bit_length() + bits > 63:
        order = np.argsort(keys)
        return keys[order], order.astype(np.uint32)
    # Key and place in one number: NumPy sorts plain numbers several times faster than it finds the order that would sort them.
    keys <<= bits
    keys |= np.arange(len(keys))
    keys.sort()
    order = (keys & ((1 << bits) - 1)).astype(np.uint32)
    keys >>= bits
    return keys, order


def _signed(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.view(np.int32))  # PyTorch has few operations for unsigned numbers


def _unsigned(numbers: Tensor) -> np.ndarray:
    return numbers.numpy().view(np.uint32)
