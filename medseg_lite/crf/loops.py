"""The filters of the CRF as loops over points, vertices and rows of voxels. Numba compiles them for the processor.

They are the same algorithms as in `permutohedral` and `gaussian`, for float32 and large images. PyTorch works in whole arrays: each
step reads and writes all points once more. A loop takes a point through all steps while it is in the processor's cache, and can do
what arrays cannot: remember the vertices that it has seen lately, or walk along two sorted lists at once.

Three rules keep the loops fast. Points are visited in the order of their cells in the lattice, so that the vertices of one point are
still in the cache for the next. The innermost loops run over neighbours in memory, so that the compiler can take 8 or 16 numbers at
a time. And indices are unsigned, because Numba lets negative ones count from the end and would test for them each time.

All functions let go of Python's lock, so that threads can run them side by side. The module is compiled when it is imported, and
kept on the disk for the next time.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from ..paths import say

# Points that are worked on at a time. Their coordinates fit the fastest cache.
CHUNK = 256
# Vertices that are remembered while points are visited: a power of 2, so that the last bits of a key are a vertex's place.
SLOTS = 2**14


def compiled(signature: str) -> Callable:
    """Compile a function for these types, or load it from the disk where it was compiled before."""

    def decorate(function: Callable) -> Callable:
        options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nnan", "nsz"}}
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except RuntimeError:  # there is no folder to keep it in
            return numba.njit(signature, **options)(function)

    return decorate


# ----------------------------------------------------------------------------------------------- building the lattice


@compiled("void(f4[:,::1], f4[:,::1], u4)")
def shear(x, matrix, count):
    """Multiply the first columns of `(d, CHUNK)` features by the lower-triangular matrix, in place."""
    total = np.empty(CHUNK, np.float32)
    for row in range(len(x) - 1, -1, -1):  # from the last row up: a row needs those above it, still unchanged
        for i in range(count):
            total[i] = 0
        for other in range(row + 1):
            factor = matrix[row, other]
            for i in range(count):
                total[i] += factor * x[other, i]
        for i in range(count):
            x[row, i] = total[i]


if shear.stats.cache_misses:  # it was not on the disk, so the others are not either
    say("compiling the loops of the dense CRF; this takes seconds, once on each machine")


@compiled("void(f4[:,::1], i8, i8, f4[:,::1], f4[:,::1])")
def shear_chunk(features, start, count, matrix, x):
    """Write the lattice coordinates of `count` features, from number `start` on, to the first columns of `x`."""
    for row in range(len(x)):
        for i in range(count):
            x[row, i] = features[row, start + i]
    shear(x, matrix, count)


@compiled("void(f4[:,::1], i8, i8, f4[:,::1], f4[:,::1], f4[:,::1])")
def find_extremes(features, first, stop, matrix, low, high):
    """Lower `low` and raise `high` to the lattice coordinates of the features `(d, N)` from number `first` to `stop`.

    Both are `(d, CHUNK)`, one column for each place in a chunk, because the compiler takes several columns at a time.
    """
    d = len(features)
    t = np.empty((d, CHUNK), np.float32)
    for start in range(first, stop, CHUNK):
        count = min(CHUNK, stop - start)
        shear_chunk(features, start, count, matrix, t)
        for row in range(d):
            for i in range(count):
                low[row, i] = min(low[row, i], t[row, i])
                high[row, i] = max(high[row, i], t[row, i])


@compiled("void(f4[:,::1], i8, i8, f4[:,::1], f4[::1], i8[::1], i8[::1])")
def find_corners(features, first, stop, matrix, low, strides, keys):
    """Write the keys of the floors, the first vertices of their simplices, of the points from number `first` to `stop`."""
    d = len(features)
    t = np.empty((d, CHUNK), np.float32)
    for start in range(first, stop, CHUNK):
        count = min(CHUNK, stop - start)
        shear_chunk(features, start, count, matrix, t)
        for i in range(count):
            keys[start + i] = 0
        for row in range(d):
            for i in range(count):
                keys[start + i] += np.int64(np.floor(t[row, i]) - low[row]) * strides[row]


@compiled("i8(f4[:,::1], f4[:,::1], f4[::1], i8[::1], u4[::1], u4[:,::1], f4[:,::1], i8[::1])")
def embed(features, matrix, low, strides, order, vertex, weight, keys):
    """Find the simplex of each point in `order`, which holds numbers of all points or of some.

    Writes barycentric weights, and numbers of vertices as they come up. A vertex that was not seen lately gets a new number and
    leaves its key in `keys`, so most vertices get one number, and some get several.

    Returns:
        The number of keys written.
    """
    d, points = len(features), len(order)
    t, packed, corner = np.empty((d, CHUNK), np.float32), np.empty((d, CHUNK), np.int32), np.empty(CHUNK, np.int64)
    seen, number = np.full(SLOTS, -1, np.int64), np.empty(SLOTS, np.uint32)
    # A fractional part and its axis are packed into one integer, with the axis in the low bits. Sorting the integers sorts both.
    bits = 0
    while 1 << bits < d:
        bits += 1
    unit, axis_of = np.float32(2.0 ** (30 - bits)), (1 << bits) - 1
    back = 1 / unit
    written = 0
    for start in range(0, points, CHUNK):
        count = min(CHUNK, points - start)
        for row in range(d):
            for i in range(count):
                t[row, i] = features[row, order[start + i]]
        shear(t, matrix, count)
        for i in range(count):
            corner[i] = 0
        for row in range(d):
            for i in range(count):
                floor = np.floor(t[row, i])
                corner[i] += np.int64(floor - low[row]) * strides[row]
                packed[row, i] = np.int32((t[row, i] - floor) * unit) << bits | row
        # Largest first. Comparing neighbouring rows d times sorts all columns at once.
        for turn in range(d):
            for row in range(turn % 2, d - 1, 2):
                for i in range(count):
                    upper, lower = packed[row, i], packed[row + 1, i]
                    packed[row, i], packed[row + 1, i] = max(upper, lower), min(upper, lower)
        for i in range(count):
            key, before = corner[i], np.float32(1)
            for step in range(d + 1):
                if step > 0:
                    key += strides[packed[step - 1, i] & axis_of]
                after = np.float32(packed[step, i] >> bits) * back if step < d else np.float32(0)
                weight[start + i, step] = before - after
                before = after
                slot = key & (SLOTS - 1)
                if seen[slot] != key:
                    seen[slot], number[slot] = key, written
                    keys[written] = key
                    written += 1
                vertex[start + i, step] = number[slot]
    return written


@compiled("i8(i8[::1], u4[::1], u4[::1])")
def number_keys(keys, order, numbers):
    """Keep one of each of the sorted keys, moved to the front; write the number of each key's place in `order`; count them."""
    count = 0
    for i in range(keys.size):
        key = keys[i]
        if count == 0 or keys[count - 1] != key:
            keys[count] = key
            count += 1
        numbers[order[i]] = count - 1
    return count


@compiled("void(u4[::1], u4[::1])")
def renumber(vertex, numbers):
    """Replace every number of `vertex` by its entry in `numbers`."""
    for i in range(vertex.size):
        vertex[i] = numbers[vertex[i]]


@compiled("i8(i8[::1], i8, u4[::1], u4[::1])")
def find_pairs(keys, step, here, there):
    """Write the numbers of all keys that differ by `step`; return how many pairs there are.

    The sorted keys, and the same keys plus the step, are two sorted lists. Two fingers walk along them: the one on the smaller
    value moves on, and both where they are equal. There is no branch that the processor could guess wrongly.
    """
    i = j = count = 0
    while j < keys.size:
        wanted, key = keys[i] + step, keys[j]
        here[count], there[count] = i, j
        count += np.int64(wanted == key)
        i += np.int64(wanted <= key)
        j += np.int64(key <= wanted)
    return count


# -------------------------------------------------------------------------------------------------- splat, blur, slice


@compiled("void(f4[::1], u4[::1], u4[:,::1], f4[:,::1], f4[::1])")
def splat(signal, order, vertex, weight, values):
    """Add the signal of each point to the vertices of its simplex."""
    for i in range(values.size):
        values[i] = 0
    # The signals are fetched first: sums that also had to wait for these would hold each other up.
    ordered = np.empty(order.size, np.float32)
    for i in range(order.size):
        ordered[i] = signal[order[i]]
    for i in range(order.size):
        for k in range(vertex.shape[1]):
            values[vertex[i, k]] += weight[i, k] * ordered[i]


@compiled("void(f4[::1], u4[::1], u4[::1], f4[::1])")
def blur(old, here, there, new):
    """Give each vertex half of what its two neighbours along one direction have."""
    half = np.float32(0.5)
    for i in range(old.size):
        new[i] = old[i]
    for i in range(here.size):
        new[here[i]] += half * old[there[i]]
        new[there[i]] += half * old[here[i]]


@compiled("void(f4[::1], u4[::1], u4[:,::1], f4[:,::1], f4, f4[::1])")
def slice_(values, order, vertex, weight, scale, result):
    """Read the values back at the points, and put those into the places that they came from."""
    for i in range(len(vertex)):
        total = np.float32(0)
        for k in range(vertex.shape[1]):
            total += weight[i, k] * values[vertex[i, k]]
        result[order[i]] = scale * total


# ------------------------------------------------------------------------------------------- the Gaussian on the grid


@compiled("void(f4[::1], u4[::1], u4[:,::1], u4[::1], f4[:,::1], u4[::1], f4[:,::1], f4[:,:,::1])")
def reduce_planes(signal, column, start, near_plane, plane_weight, near_row, row_weight, samples):
    """Spread voxels onto samples along the first two axes.

    Args:
        signal: values of the voxels inside the mask, row by row, `(N,)`.
        column: place of each voxel in its row, `(N,)`.
        start: first voxel of each row `(planes, rows + 1)`.
        near_plane, near_row: first of the samples that a plane, and a row, counts for.
        plane_weight, row_weight: how much it counts for these, `(planes, taps)` and `(rows, taps)`.
        samples: the result, `(samples, samples, columns)`.
    """
    columns = samples.shape[2]
    row, plane = np.empty(columns, np.float32), np.empty((samples.shape[1], columns), np.float32)
    for i in range(samples.shape[0]):
        for j in range(samples.shape[1]):
            for k in range(columns):
                samples[i, j, k] = 0
    for p in range(near_plane.size):
        for j in range(plane.shape[0]):
            for k in range(columns):
                plane[j, k] = 0
        for r in range(near_row.size):
            first, stop = start[p, r], start[p, r + 1]
            if first < stop:
                left, right = column[first], column[stop - 1] + 1
                for k in range(left, right):
                    row[k] = 0
                for i in range(first, stop):
                    row[column[i]] = signal[i]
                for tap in range(row_weight.shape[1]):
                    sample, weight = near_row[r] + tap, row_weight[r, tap]
                    for k in range(left, right):
                        plane[sample, k] += weight * row[k]
        for tap in range(plane_weight.shape[1]):
            sample, weight = near_plane[p] + tap, plane_weight[p, tap]
            for j in range(plane.shape[0]):
                for k in range(columns):
                    samples[sample, j, k] += weight * plane[j, k]


@compiled("void(f4[:,:,::1], f4[::1])")
def blur_rows(samples, weight):
    """Filter along the last axis, in place; `weight` holds the Gaussian at distances 0, 1, 2, ..."""
    columns, reach = samples.shape[2], weight.size - 1
    row, total = np.zeros(columns + 2 * reach, np.float32), np.empty(columns, np.float32)  # zeros on both sides of the row
    for i in range(samples.shape[0]):
        for j in range(samples.shape[1]):
            for k in range(columns):
                row[reach + k] = samples[i, j, k]
                total[k] = weight[0] * samples[i, j, k]
            for distance in range(1, reach + 1):
                factor, left, right = weight[distance], row[reach - distance :], row[reach + distance :]
                for k in range(columns):
                    total[k] += factor * (left[k] + right[k])
            for k in range(columns):
                samples[i, j, k] = total[k]


@compiled("void(f4[:,:,::1], u4[::1], u4[:,::1], u4[::1], f4[:,::1], u4[::1], f4[:,::1], f4[::1])")
def expand_planes(samples, column, start, near_plane, plane_weight, near_row, row_weight, result):
    """Read the samples back at the voxels: the transpose of `reduce_planes`."""
    columns = samples.shape[2]
    row, plane = np.empty(columns, np.float32), np.empty((samples.shape[1], columns), np.float32)
    for p in range(near_plane.size):
        for j in range(plane.shape[0]):
            for k in range(columns):
                plane[j, k] = 0
        for tap in range(0, plane_weight.shape[1], 4):
            a, b, c, d = plane_weight[p, tap], plane_weight[p, tap + 1], plane_weight[p, tap + 2], plane_weight[p, tap + 3]
            s = near_plane[p] + tap
            for j in range(plane.shape[0]):
                for k in range(columns):
                    plane[j, k] += (
                        a * samples[s, j, k] + b * samples[s + 1, j, k] + c * samples[s + 2, j, k] + d * samples[s + 3, j, k]
                    )
        for r in range(near_row.size):
            first, stop = start[p, r], start[p, r + 1]
            if first < stop:
                left, right = column[first], column[stop - 1] + 1
                for k in range(left, right):
                    row[k] = 0
                for tap in range(0, row_weight.shape[1], 4):
                    a, b, c, d = row_weight[r, tap], row_weight[r, tap + 1], row_weight[r, tap + 2], row_weight[r, tap + 3]
                    s = near_row[r] + tap
                    for k in range(left, right):
                        row[k] += a * plane[s, k] + b * plane[s + 1, k] + c * plane[s + 2, k] + d * plane[s + 3, k]
                for i in range(first, stop):
                    result[i] = row[column[i]]
