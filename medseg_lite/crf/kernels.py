"""The two kernels of the dense CRF for the voxels of one image."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .compiled import loops_for
from .gaussian import GridGaussian, unflatten
from .permutohedral import Permutohedral


@dataclass(eq=False)
class Voxels:
    """The voxels of an image that take part: what both kernels need, whatever their standard deviations are.

    Attributes:
        index: positions of the voxels in the flattened grid, `(N,)`, ascending.
        shape: size of the grid.
        intensities: values of the channels at these voxels, `(C, N)`; everything is computed in their type.
    """

    index: Tensor
    shape: tuple[int, ...]
    intensities: Tensor

    @property
    def loops(self) -> ModuleType | None:
        """The compiled loops if they are to filter these voxels, else None."""
        return loops_for(len(self.index), self.intensities.dtype, self.intensities.device)

    @functools.cached_property
    def positions(self) -> Tensor:
        """The coordinates of the voxels in the grid, `(dimensions, N)`, of the intensities' type."""
        positions = self.intensities.new_empty(len(self.shape), len(self.index))
        for row, coordinate in zip(positions, unflatten(self.index, self.shape)):
            row.copy_(coordinate)
        return positions


def take_voxels(image: Tensor, mask: Tensor | None = None) -> Voxels:
    """Return the voxels of an image `(C, *space)` inside a mask `(*space)`, by default all.

    Raises:
        ValueError: the mask is on another grid, or intensities inside it are not finite.
    """
    kind = torch.float64 if image.dtype == torch.float64 else torch.float32
    image = image.detach().to(kind)  # no gradient flows to it
    shape = tuple(image.shape[1:])
    inside = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    if tuple(inside.shape) != shape:
        raise ValueError(f"mask has shape {tuple(inside.shape)}; expected {shape}, as the image")
    index = inside.flatten().nonzero()[:, 0].to(image.device)
    intensities = torch.index_select(image.flatten(1), 1, index)
    check_finite("image", intensities)
    return Voxels(index, shape, intensities)


@dataclass(eq=False)
class Prepared:
    """Both kernels of one image; each is built when it is first needed.

    Attributes:
        voxels: the voxels that take part.
        smoothness_sigma, appearance_sigma: standard deviations in voxels, one for each axis.
        intensity_sigma: standard deviations of the intensities, one for each channel.
        normalization: as in `DenseCRF`.
    """

    voxels: Voxels
    smoothness_sigma: Tensor
    appearance_sigma: Tensor
    intensity_sigma: Tensor
    normalization: str

    def take_kernels(self, other: Prepared) -> None:
        """Use the kernels that have been built for the same voxels and the same standard deviations."""
        built = vars(other)
        if "smoothness" in built and torch.equal(self.smoothness_sigma, other.smoothness_sigma):
            self.smoothness = other.smoothness
        same = torch.equal(self.appearance_sigma, other.appearance_sigma)
        if "appearance" in built and same and torch.equal(self.intensity_sigma, other.intensity_sigma):
            self.appearance = other.appearance

    @property
    def ones(self) -> Tensor:
        """The signal that is 1 everywhere, `(1, N)`."""
        return self.voxels.intensities.new_ones(1, len(self.voxels.index))

    @functools.cached_property
    def smoothness(self) -> Kernel:
        """The smoothness kernel k₁; calling it filters `(c, N)`."""
        grid = GridGaussian(self.voxels.index, self.voxels.shape, self.smoothness_sigma)
        return Kernel(grid.filter, self.ones, self.normalization)

    @functools.cached_property
    def appearance(self) -> Kernel:
        """The appearance kernel k₂; calling it filters `(c, N)`."""
        sigmas = torch.cat([self.appearance_sigma, self.intensity_sigma])
        values = (*self.voxels.positions, *self.voxels.intensities)
        features = self.voxels.intensities.new_empty(len(sigmas), len(self.voxels.index))
        for row, sigma, value in zip(features, sigmas.detach(), values):
            torch.div(value, sigma, out=row)
        lattice = Permutohedral(features)
        # The same features as a function of the sigmas, for gradients.
        features = features * (sigmas.detach() / sigmas)[:, None] if sigmas.requires_grad else None
        return Kernel(lambda signal: _LatticeFilter.apply(signal, features, lattice), self.ones, self.normalization)


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError where values are NaN or infinite."""
    values = values.detach()
    if not math.isfinite(float(values.sum())) and not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name}: {bad} of {values.numel()} values are NaN or infinite; repair or mask them before the CRF")


class Kernel:
    """A filter K with its normalisation."""

    def __init__(self, filter: Callable[[Tensor], Tensor], ones: Tensor, normalization: str) -> None:
        self._filter, self._ones, self._before, self._after = filter, ones, None, None
        if normalization == "symmetric":
            self._before = self._after = (filter(ones) + 1e-20).rsqrt()
        elif normalization == "before":
            self._before = 1 / (filter(ones) + 1e-20)
        elif normalization == "after":
            self._after = 1 / (filter(ones) + 1e-20)

    @functools.cached_property
    def filtered_ones(self) -> Tensor:
        """The filtered constant 1, `(1, N)`."""
        return self(self._ones)

    def __call__(self, signal: Tensor) -> Tensor:
        return self.weighted(self._ones.new_ones(()))(self._ones.new_zeros(()), signal)

    def weighted(self, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that adds `weight` K `signal` to a total, in few passes over memory."""
        after = weight if self._after is None else weight * self._after

        def add(total: Tensor, signal: Tensor) -> Tensor:
            return torch.addcmul(total, self._filter(signal if self._before is None else signal * self._before), after)

        return add


class _LatticeFilter(torch.autograd.Function):
    """The lattice as a differentiable operation on the signal `(c, N)` and, if there are any, on the features `(d, N)`."""

    @staticmethod
    def forward(ctx, signal: Tensor, features: Tensor | None, lattice: Permutohedral) -> Tensor:
        result = lattice.filter(signal.detach())
        ctx.lattice = lattice
        ctx.save_for_backward(*((signal, features, result) if features is not None else ()))
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor):
        lattice = ctx.lattice
        back = lattice.filter(gradient.contiguous(), transpose=True)
        if not ctx.needs_input_grad[1]:
            return back, None, None
        # The lattice is piecewise linear in the features, so its own slope says little. The Gaussian that it approximates has
        # ∂k(f_i, f_j)/∂f_i = -k (f_i - f_j), and the sums of that over j are filters again.
        signal, features, result = ctx.saved_tensors
        slope = torch.empty_like(features)
        for out, f in zip(slope, features - features.mean(1, keepdim=True)):
            out.copy_((gradient * (lattice.filter(f * signal) - f * result)).sum(0))
            out.add_((signal * (lattice.filter(f * gradient, transpose=True) - f * back)).sum(0))
        return back, slope, None
