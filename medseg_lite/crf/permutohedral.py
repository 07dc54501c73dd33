"""The permutohedral lattice: Gaussian filtering in many dimensions, in time linear in the number of points.

Three steps filter a signal. Splat spreads the points onto the vertices of a lattice of simplices. Blur filters the vertices
along the lattice's directions with (1/2, 1, 1/2). Slice reads the values back at the points. A. Adams, J. Baek, M. A. Davis:
Fast high-dimensional filtering using the permutohedral lattice, Computer Graphics Forum 29, 2010; used for dense CRFs by
P. Krähenbühl and V. Koltun, NIPS 2011.

Seen in the right coordinates the lattice is simple. `shear` maps features to R^d so that the lattice's vertices are the
integer points Z^d. The simplex around a point t starts at floor(t) and walks along the axes in the order of t's fractional
parts, largest first. A vertex's neighbours are one step along each axis, and one along all axes at once: d + 1 directions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

# Length of the pieces in which arrays are computed: they fit the cache, and PyTorch uses threads of its own from 2^15 on.
CHUNK = 2**15 - 1


def shear(dimensions: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the lower-triangular matrix `(d, d)` that turns features of unit standard deviation into lattice coordinates.

    Its scale is that of the original paper. Where no vertex is missing, it gives splat, blur and slice together a variance of 1
    along every feature: 3/4 from the blur, 1/8 each from splat and slice.
    """
    d = dimensions
    gram = torch.eye(d, dtype=torch.float64) + 1
    return (math.sqrt(2 / 3) * torch.linalg.cholesky(gram)).to(dtype)


class Permutohedral:
    """The lattice of one set of points. It is built once and can then filter any number of signals.

    Args:
        features: features of the points `(d, N)`, each row divided by its standard deviation; float32 or float64, on any device.

    Attributes:
        points, dimensions, vertices: N, d and the number M of lattice vertices in use.
        vertex: the vertices of each point's simplex, `(N, d + 1)` int32.
        weight: the barycentric coordinates of each point in its simplex, `(N, d + 1)`.
        neighbours: for each direction two lists of vertices, int32. The vertices of the second list are one step away from those
            of the first.

    Raises:
        ValueError: if the features span too many cells to be numbered in 64 bits.
    """

    def __init__(self, features: Tensor) -> None:
        self.dimensions, self.points = features.shape
        keys, self.weight, steps, cells = _embed(features)
        self.vertex, self.neighbours, self.vertices = _connect(keys, steps, cells)
        # The d + 1 directions sum to zero, so a value blurred along all of them comes back to its own vertex: 1 + 2 (1/2)^(d+1).
        self.scale = 1 / (1 + 2.0**-self.dimensions)

    def filter(self, signal: Tensor, *, transpose: bool = False) -> Tensor:
        """Return the Gaussian-weighted sum `(c, N)` of a signal `(c, N)`, each channel separately.

        Where vertices are missing, blurs along different directions do not quite commute, so the operator is only roughly
        symmetric. `transpose=True` applies its exact transpose, which gradients need.
        """
        return self._slice(self._blur(self._splat(signal), transpose))

    def _splat(self, signal: Tensor) -> Tensor:
        if signal.is_cuda:
            vertices = signal.new_zeros(len(signal), self.vertices)
            return vertices.index_add_(1, self.vertex.flatten(), (signal[:, :, None] * self.weight).flatten(1))
        spread = torch.from_numpy(self._spread @ signal.T.contiguous().numpy())
        return signal.new_empty(len(signal), self.vertices).copy_(spread.T)

    @functools.cached_property
    def _spread(self) -> scipy.sparse.csc_array:
        """The splat as a matrix `(M, N)`, because SciPy adds into scattered places several times faster than PyTorch."""
        kind = np.int32 if self.vertex.numel() < 2**31 else np.int64
        ends = np.arange(self.points + 1, dtype=kind) * (self.dimensions + 1)
        parts = self.weight.numpy().reshape(-1), self.vertex.numpy().reshape(-1), ends
        return scipy.sparse.csc_array(parts, shape=(self.vertices, self.points))

    def _blur(self, vertices: Tensor, transpose: bool) -> Tensor:
        old, threads = torch.empty_like(vertices), _threads(vertices)

        def add(channel: int, to: Tensor, source: Tensor, spans: list[slice]) -> None:
            for span in spans:
                values = torch.index_select(old[channel], 0, source[span])
                vertices[channel].index_add_(0, to[span], values, alpha=0.5)

        for here, there in reversed(self.neighbours) if transpose else self.neighbours:
            old.copy_(vertices)
            spans = _spans(len(here), vertices)
            for to, source in ((here, there), (there, here)):  # in turn, so that no two threads add to one vertex
                jobs = [(c, to, source, spans[i::threads]) for c in range(len(vertices)) for i in range(threads)]
                _run(add, jobs, vertices)
        return vertices

    def _slice(self, vertices: Tensor) -> Tensor:
        rows = torch.mul(vertices.T, self.scale, out=vertices.new_empty(vertices.shape[::-1]))
        read = nn.functional.embedding_bag(self.vertex, rows, per_sample_weights=self.weight, mode="sum")
        return read.T.contiguous()


def _embed(features: Tensor) -> tuple[Tensor, Tensor, list[int], int]:
    """Find the simplex of each point.

    Returns:
        The keys of its vertices `(N, d + 1)` in range(cells), its barycentric weights `(N, d + 1)`, the step of a key in each
        direction, and the number of cells.
    """
    d, n = features.shape
    device, double = features.device, features.dtype == torch.float64
    matrix = shear(d, dtype=features.dtype).to(device)
    spans = _spans(n, features)

    extremes = torch.stack([torch.stack(torch.aminmax(matrix @ features[:, s], dim=1)) for s in spans])
    low, high = extremes[:, 0].amin(0).floor(), extremes[:, 1].amax(0).floor()
    # An integer vector becomes one integer, its key, so that a neighbour's key is the key plus a constant. Each axis has room for
    # the simplex (+1), and for neighbours on both sides that do not exist, so that their keys differ from those of vertices.
    extents = (high - low).tolist()
    total = math.prod(extent + 4 for extent in extents)  # a float, which may be infinite
    if not total < 2**62:
        raise ValueError(
            f"the features span {total:.1e} lattice cells, more than the 2^62 that can be numbered: the standard deviations "
            "are too small for the range of positions and intensities; enlarge them, or clip outlying intensities"
        )
    strides, total = [], 1
    for extent in extents:
        strides.append(total)
        total *= int(extent) + 4
    kind = torch.int32 if total < 2**31 else torch.int64
    stride = torch.tensor(strides, dtype=kind, device=device)

    keys = torch.empty(n, d + 1, dtype=kind, device=device).T
    weights = torch.empty(n, d + 1, dtype=features.dtype, device=device).T
    # A fractional part and its axis are packed into one integer, with the axis in the low bits. Sorting the integers sorts both.
    bits = (d - 1).bit_length()
    packed_kind, unit = (torch.int64, 2.0 ** (52 - bits)) if double else (torch.int32, 2.0 ** (30 - bits))
    axis = torch.arange(d, dtype=packed_kind, device=device)[:, None]

    for span in spans:
        t = matrix @ features[:, span]
        floor = t.floor()
        packed = _sort_descending((((t - floor) * unit).to(packed_kind) << bits) | axis)
        fraction = (packed >> bits).to(features.dtype).mul_(1 / unit)
        torch.sub(1, fraction[0], out=weights[0, span])
        torch.sub(fraction[:-1], fraction[1:], out=weights[1:-1, span])
        weights[-1, span] = fraction[-1]
        key = ((floor - low[:, None] + 1).to(kind) * stride[:, None]).sum(0, dtype=kind)
        keys[0, span] = key
        walk = torch.index_select(stride, 0, (packed & ((1 << bits) - 1)).flatten().int()).view_as(packed)
        for row, step in zip(keys[1:, span], walk):
            row.copy_(key.add_(step))
    return keys.T, weights.T, [*strides, sum(strides)], total


def _sort_descending(rows: Tensor) -> Tensor:
    """Sort each column of `(d, n)`. Comparing neighbouring rows d times is the fastest way for few rows with many columns."""
    rows = list(rows)
    for turn in range(len(rows)):
        for i in range(turn % 2, len(rows) - 1, 2):
            rows[i], rows[i + 1] = torch.maximum(rows[i], rows[i + 1]), torch.minimum(rows[i], rows[i + 1])
    return torch.stack(rows)


def _connect(keys: Tensor, steps: list[int], cells: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]], int]:
    """Number the different keys; return the `vertex` of every key, the pairs of `neighbours`, and the number of vertices."""
    flat, device = keys.flatten(), keys.device
    # For few cells a table with one entry per cell is fastest. For many, the keys are sorted, and a search finds them.
    if cells <= 24 * len(keys) + 2**20:
        used = torch.zeros(cells, dtype=torch.bool, device=device)
        _run(lambda span: used.index_fill_(0, flat[span].long(), True), [(s,) for s in _spans(len(flat), keys)], keys)
        unique = used.nonzero()[:, 0]
        del used
        count = unique.numel()
        number = torch.full((cells,), -1, dtype=torch.int32, device=device)
        number.scatter_(0, unique, torch.arange(count, dtype=torch.int32, device=device))
        unique = unique.to(keys.dtype)
        # The keys are not needed any more, so `vertex` may overwrite them.
        vertex = flat if flat.dtype == torch.int32 else flat.new_empty(len(flat), dtype=torch.int32)

        def look_up(span: slice) -> None:
            vertex[span] = torch.index_select(number, 0, flat[span])

        _run(look_up, [(s,) for s in _spans(len(flat), keys)], keys)

        def find(wanted: Tensor) -> Tensor:
            return torch.index_select(number, 0, wanted)
    else:
        unique, vertex = torch.unique(flat, return_inverse=True)
        vertex, count = vertex.int(), unique.numel()

        def find(wanted: Tensor) -> Tensor:
            first, last = _search(unique, wanted[[0, -1]]).tolist()
            window = unique[first : last + 1]
            if not window.numel():
                return torch.full_like(wanted, -1, dtype=torch.int32)
            place = _search(window, wanted).clamp_(max=window.numel() - 1)
            return torch.where(torch.index_select(window, 0, place) == wanted, (place + first).int(), -1)

    neighbours = [None] * len(steps)

    def pair(direction: int) -> None:
        here, there = [], []
        for span in _spans(count, keys):
            found = find(unique[span] + steps[direction])
            exists = (found >= 0).nonzero()[:, 0]
            here.append((exists + span.start).int())
            there.append(torch.index_select(found, 0, exists))
        neighbours[direction] = torch.cat(here), torch.cat(there)

    _run(pair, [(j,) for j in range(len(steps))], keys)
    return vertex.view(keys.shape), neighbours, count


def _search(values: Tensor, wanted: Tensor) -> Tensor:
    """Return the places of the wanted values among sorted ones; NumPy is faster if the wanted values are sorted too."""
    if values.is_cuda:
        return torch.searchsorted(values, wanted)
    return torch.from_numpy(np.searchsorted(values.numpy(), wanted.numpy()))


def _threads(tensor: Tensor) -> int:
    return 1 if tensor.is_cuda else torch.get_num_threads()


def _spans(length: int, tensor: Tensor) -> list[slice]:
    """Return slices that cover `range(length)`: short ones on a CPU, a single one on a GPU."""
    size = max(length, 1) if tensor.is_cuda else CHUNK
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _run(function: Callable, jobs: list[tuple], tensor: Tensor) -> None:
    """Call the function with the arguments of each job; on a CPU in threads, as PyTorch works outside Python's lock."""
    if _threads(tensor) == 1 or len(jobs) == 1:
        for job in jobs:
            function(*job)
    else:
        list(_pool(_threads(tensor)).map(lambda job: function(*job), jobs))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
