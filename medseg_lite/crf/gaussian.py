"""Gaussian filtering over the voxels of a grid: a small matrix product for each axis, as exact as float32 allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class GridGaussian:
    """A filter that sums over the voxels inside a mask, weighted with exp(-distance² / 2σ²); each axis has its own σ.

    The Gaussian is a product over the axes. Along an axis of n voxels its matrix is K ≈ A Aᵀ with A of shape (n, m), because a
    Gaussian is the convolution of two narrower ones, and m samples between them, h = .62 σ apart, are enough for an error of
    5e-6. (By Poisson's summation formula the error is 2 exp(-π² σ² / 2h²).) So every axis is first reduced to m values and
    then expanded again. Gradients flow to the signal and to the sigmas.

    Args:
        index: positions of the voxels in the flattened grid, `(N,)`.
        shape: size of the grid.
        sigma: standard deviation along each axis in voxels, `(dimensions,)`.
    """

    def __init__(self, index: Tensor, shape: Sequence[int], sigma: Tensor) -> None:
        start, stop = _bounds(index, shape)
        self.shape = [b - a for a, b in zip(start, stop)]
        self.index = _flatten([p - a for p, a in zip(unflatten(index, shape), start)], self.shape)
        self.factors = [_factor(n, s) for n, s in zip(self.shape, sigma)]

    def filter(self, signal: Tensor) -> Tensor:
        """Filter a signal `(c, N)`, each channel separately; the result has the same shape."""
        return torch.stack([self._filter(channel) for channel in signal])

    def _filter(self, values: Tensor) -> Tensor:
        box = values.new_zeros(math.prod(self.shape)).index_copy_(0, self.index, values).view(self.shape)
        for axis, (down, _) in enumerate(self.factors):
            box = _multiply_axis(box, down, axis)
        for axis in reversed(range(len(self.shape))):
            up = self.factors[axis][1]
            box = box if up is None else _multiply_axis(box, up, axis)
        return torch.index_select(box.reshape(-1), 0, self.index)


def unflatten(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Return the coordinates of positions in a flattened grid, one tensor for each axis.

    `torch.unravel_index` does the same, but imports a computer algebra system at its first call, half a second's work.
    """
    coordinates = []
    for n in reversed(shape):
        coordinates.append(index % n)
        index = index // n
    return coordinates[::-1]


def _flatten(coordinates: list[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the positions in the flattened grid of voxels with these coordinates."""
    flat = torch.zeros_like(coordinates[0])
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
    step = 0.62 * float(sigma.detach())
    samples = math.ceil((n - 1 + 6 * float(sigma.detach())) / step) + 1  # 3 σ beyond both ends
    if samples >= n:
        return torch.exp(-(((voxels[:, None] - voxels) / sigma) ** 2) / 2), None
    places = (torch.arange(samples, dtype=sigma.dtype, device=sigma.device) - (samples - 1) / 2) * step + (n - 1) / 2
    height = torch.sqrt(step / sigma * math.sqrt(2 / math.pi))
    narrow = torch.exp(-(((voxels[:, None] - places) / sigma) ** 2)) * height
    return narrow.T.contiguous(), narrow


def _multiply_axis(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply every line of `x` along an axis by a matrix `(m, n)`."""
    m, n = matrix.shape
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if not after:
        y = x.reshape(-1, n) @ matrix.T
    elif not before:
        y = matrix @ x.reshape(n, -1)
    else:
        x = x.reshape(math.prod(before), n, math.prod(after))
        y = torch.bmm(matrix.expand(len(x), m, n), x)
    return y.view(*before, m, *after)
