"""Gaussian filtering over the voxels of a grid: one axis after the other, as exact as float32 allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .compiled import loops_for, share_out, side_by_side

# Distance between samples in σ. By Poisson's summation formula the error is 2 exp(-π² / 2 SPACING²), about 5e-6.
SPACING = 0.62
# Distance in σ beyond which the Gaussian is left out: it is below 5e-6.
REACH = 4.95
# Samples near a voxel that count: the next one has less than a millionth of the nearest one's weight.
TAPS = 12


class GridGaussian:
    """A filter that sums over the voxels inside a mask, weighted with exp(-distance² / 2σ²); each axis has its own σ.

    The Gaussian is a product over the axes. Along an axis of n voxels its matrix is K ≈ A Aᵀ with A of shape (n, m), because a
    Gaussian is the convolution of two narrower ones, and m samples between them, h = .62 σ apart, are enough for an error of
    5e-6. (By Poisson's summation formula the error is 2 exp(-π² σ² / 2h²).) So every axis is first reduced to m values and
    then expanded again. Gradients flow to the signal and to the sigmas.

    PyTorch multiplies by these matrices. For large images on a CPU, compiled loops leave out the entries that are nearly 0, and go
    from the voxels to the samples plane by plane, so that the whole grid is never filled.

    Args:
        index: positions of the voxels in the flattened grid, `(N,)`, ascending.
        shape: size of the grid.
        sigma: standard deviation along each axis in voxels, `(dimensions,)`.
    """

    def __init__(self, index: Tensor, shape: Sequence[int], sigma: Tensor) -> None:
        self._loops = loops_for(len(index), sigma.dtype, index.device)
        if self._loops is not None and len(shape) <= 3 and not sigma.requires_grad:
            axes = 3 - len(shape)
            self._planes = _Planes(index.numpy(), (*[1] * axes, *shape), [1.0] * axes + sigma.tolist(), self._loops)
            return
        self._planes = None
        start, stop = _bounds(index, shape)
        self.shape = [b - a for a, b in zip(start, stop)]
        self.index = _flatten([p - a for p, a in zip(unflatten(index, shape), start)], self.shape)
        self.factors = [_factor(n, s) for n, s in zip(self.shape, sigma)]

    def filter(self, signal: Tensor) -> Tensor:
        """Filter a signal `(c, N)`, each channel separately; the result has the same shape."""
        if self._planes is not None:
            return _SymmetricFilter.apply(signal, self._planes)
        box = signal.new_zeros(len(signal), math.prod(self.shape)).index_copy_(1, self.index, signal)
        box = box.view(-1, *self.shape)
        for axis, (down, _) in enumerate(self.factors, 1):
            box = _multiply_axis(box, down, axis)
        for axis, (_, up) in reversed([*enumerate(self.factors, 1)]):
            box = box if up is None else _multiply_axis(box, up, axis)
        return box.flatten(1).index_select(1, self.index)


# ------------------------------------------------------------------------------------------------------------ PyTorch


def unflatten(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Return the coordinates of positions in a flattened grid, one tensor for each axis.

    `torch.unravel_index` does the same, but imports a computer algebra system at its first call, half a second's work. NumPy
    divides integers several times as fast as PyTorch, and short integers twice as fast as long ones.
    """
    on_cpu = index.device.type == "cpu"
    if on_cpu:
        index = index.numpy().astype(np.int32 if math.prod(shape) < 2**31 else np.int64)
    coordinates = []
    for n in reversed(shape):
        line = index // n
        coordinates.append(index - line * n)
        index = line
    return [torch.from_numpy(c) for c in coordinates[::-1]] if on_cpu else coordinates[::-1]


def _flatten(coordinates: list[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the positions in the flattened grid of voxels with these coordinates."""
    flat = torch.zeros_like(coordinates[0], dtype=torch.int64)
    for coordinate, n in zip(coordinates, shape):
        flat = flat * n + coordinate
    return flat


def _bounds(index: Tensor, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the first and last corner of the smallest box that holds the voxels."""
    coordinates = unflatten(index, shape)
    return [int(c.min()) for c in coordinates], [int(c.max()) + 1 for c in coordinates]


def _factor(n: int, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return two matrices whose product is the Gaussian's matrix `(n, n)`, or this matrix and None where it is no larger."""
    voxels = torch.arange(n, dtype=sigma.dtype, device=sigma.device)
    places = _place_samples(n, float(sigma.detach()))
    if places is None:
        return torch.exp(-(((voxels[:, None] - voxels) / sigma) ** 2) / 2), None
    step = places[1] - places[0]
    places = torch.from_numpy(places).to(sigma.dtype).to(sigma.device)
    height = torch.sqrt(step / sigma * math.sqrt(2 / math.pi))
    narrow = torch.exp(-(((voxels[:, None] - places) / sigma) ** 2)) * height
    return narrow.T.contiguous(), narrow


def _place_samples(n: int, sigma: float) -> np.ndarray | None:
    """Return the places of the samples along an axis of n voxels, or None where they would not be fewer than the voxels."""
    step = SPACING * sigma
    samples = math.ceil((n - 1 + 6 * sigma) / step) + 1  # 3 σ beyond both ends
    if samples >= n:
        return None
    return (np.arange(samples) - (samples - 1) / 2) * step + (n - 1) / 2


def _multiply_axis(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply every line of `x` along an axis by a matrix `(m, n)`."""
    m, n = matrix.shape
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if not after:
        y = x.reshape(-1, n) @ matrix.T
    else:
        x = x.reshape(math.prod(before), n, math.prod(after))
        y = torch.bmm(matrix.expand(len(x), m, n), x)
    return y.view(*before, m, *after)


# -------------------------------------------------------------------------------------------------------------- Loops


class _Taps(NamedTuple):
    """The samples that each of n voxels counts for: the first one `(n,)`, and the weights of this and the next `(n, taps)`."""

    near: np.ndarray
    weight: np.ndarray


class _Planes:
    """The filter of a 3-D grid through compiled loops: along planes and rows to the samples, along columns, and back."""

    def __init__(self, index: np.ndarray, shape: Sequence[int], sigma: Sequence[float], loops: ModuleType) -> None:
        planes, rows, columns = shape
        plane_of, row_of, column = (c.numpy() for c in unflatten(torch.from_numpy(index), shape))
        row = plane_of * rows + row_of
        start = np.searchsorted(row, np.arange(planes * rows + 1))
        start, stop = start[:-1].reshape(planes, rows), start[1:].reshape(planes, rows)
        # The smallest box that holds the voxels.
        used = stop > start
        box = tuple(slice(np.flatnonzero(any_)[0], np.flatnonzero(any_)[-1] + 1) for any_ in (used.any(1), used.any(0)))
        self._loops, self._start = loops, np.hstack([start[box], stop[box][:, -1:]]).astype(np.uint32)
        left = column.min()
        self._column = (column - left).astype(np.uint32)
        planes, rows, columns = len(self._start), self._start.shape[1] - 1, int(column.max() - left) + 1
        samples = []
        self._reduce, self._expand = (), ()  # for planes and rows
        for n, s in zip((planes, rows), sigma):
            count, reduce, expand = _plan_axis(n, s)
            samples.append(count)
            self._reduce, self._expand = (*self._reduce, reduce), (*self._expand, expand)
        # Voxels are read back from four samples at a time: behind the last one there are others that stay 0.
        self._samples = (samples[0] + 3, samples[1] + 3, columns)
        distance = np.arange(min(math.ceil(REACH * sigma[2]), columns - 1) + 1)
        self._along_row = np.exp(-((distance / sigma[2]) ** 2) / 2).astype(np.float32)

    def filter(self, signal: Tensor) -> Tensor:
        signal = signal.contiguous()
        result = torch.empty_like(signal)
        ranges = share_out(len(self._start), len(signal))
        # Every range of planes has samples of its own to write to, and these are added up.
        samples = np.empty((len(signal), len(ranges), *self._samples), np.float32)
        jobs = [(i, part, planes) for i in range(len(signal)) for part, planes in enumerate(ranges)]
        side_by_side(lambda job: self._reduce_planes(signal[job[0]].numpy(), job[2], samples[job[0], job[1]]), jobs)
        side_by_side(self._sum_and_blur, samples)
        side_by_side(lambda job: self._expand_planes(samples[job[0], 0], job[2], result[job[0]].numpy()), jobs)
        return result

    def _reduce_planes(self, signal: np.ndarray, planes: slice, samples: np.ndarray) -> None:
        along_planes, along_rows = self._reduce
        start, near, weight = self._start[planes], along_planes.near[planes], along_planes.weight[planes]
        self._loops.reduce_planes(signal, self._column, start, near, weight, *along_rows, samples)

    def _sum_and_blur(self, parts: np.ndarray) -> None:
        for other in parts[1:]:
            parts[0] += other
        self._loops.blur_rows(parts[0], self._along_row)

    def _expand_planes(self, samples: np.ndarray, planes: slice, result: np.ndarray) -> None:
        along_planes, along_rows = self._expand
        start, near, weight = self._start[planes], along_planes.near[planes], along_planes.weight[planes]
        self._loops.expand_planes(samples, self._column, start, near, weight, *along_rows, result)


def _plan_axis(n: int, sigma: float) -> tuple[int, _Taps, _Taps]:
    """Return the number of samples along an axis of n voxels, and the weights for the way there and the way back."""
    voxels, places = np.arange(n), _place_samples(n, sigma)
    if places is None:
        # As many samples as voxels: the Gaussian itself on the way there, and nothing to do on the way back.
        taps = min(2 * math.ceil(REACH * sigma) + 1, n)
        near = (voxels - taps // 2).clip(0, n - taps)
        distance = near[:, None] + np.arange(taps) - voxels[:, None]
        there = np.exp(-((distance / sigma) ** 2) / 2)
        return n, _taps(near, there), _in_fours(_taps(voxels, np.ones((n, 1))))
    step, taps = places[1] - places[0], min(TAPS, len(places))
    near = np.rint((voxels - places[0]) / step - (taps - 1) / 2).astype(int).clip(0, len(places) - taps)
    distance = places[near[:, None] + np.arange(taps)] - voxels[:, None]
    both = np.exp(-((distance / sigma) ** 2)) * math.sqrt(SPACING * math.sqrt(2 / math.pi))
    taps = _taps(near, both)
    return len(places), taps, _in_fours(taps)


def _taps(near: np.ndarray, weight: np.ndarray) -> _Taps:
    return _Taps(near.astype(np.uint32), np.ascontiguousarray(weight, np.float32))


def _in_fours(taps: _Taps) -> _Taps:
    """Add weights of 0, up to a multiple of four."""
    return _Taps(taps.near, np.pad(taps.weight, ((0, 0), (0, -taps.weight.shape[1] % 4))))


class _SymmetricFilter(torch.autograd.Function):
    """A symmetric filter as a differentiable operation: the gradient goes back through the same filter."""

    @staticmethod
    def forward(ctx, signal: Tensor, planes: _Planes) -> Tensor:
        ctx.planes = planes
        return planes.filter(signal.detach())

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.planes.filter(gradient), None
