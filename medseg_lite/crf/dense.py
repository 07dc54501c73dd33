"""The fully connected conditional random field: every voxel talks to every other, through two Gaussian kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..volume import Case
from .gaussian import GridGaussian, unravel
from .permutohedral import Permutohedral

NORMALIZATIONS = ("symmetric", "before", "after", "none")
UNITS = ("voxels", "mm")


class DenseCRF(nn.Module):
    """Mean-field inference in a fully connected CRF with Gaussian edge potentials, as post-processing or as a layer.

    The energy of a labelling z is E(z) = Σ ψ_u(z_i) + Σ_{i<j} μ(z_i, z_j) [w₁ k₁(i, j) + w₂ k₂(i, j)], with the unary
    potential ψ_u = -log P(z_i | image), the smoothness kernel k₁ = exp(-Σ_d Δp_d² / 2σ_α,d²) over positions p, and the
    appearance kernel k₂ = exp(-Σ_d Δp_d² / 2σ_β,d² - Σ_c ΔI_c² / 2σ_γ,c²) over positions and intensities I.

    Mean field looks for the product of independent distributions Q_i that is closest to exp(-E). Starting from
    softmax(-ψ_u), each iteration sets Q_i(l) ∝ exp(-ψ_u,i(l) - Σ_l' μ(l, l') Σ_m w_m Σ_j k_m(i, j) Q_j(l')). The sums over
    all pairs are Gaussian filters: k₁ on the grid, k₂ on a permutohedral lattice, which approximates it (by 15 % for three
    features, by more for more). As in the authors' code a voxel also hears itself, and kernels are normalised.

    Args:
        smoothness_weight, appearance_weight: w₁ and w₂; 0 leaves a kernel out.
        smoothness_sigma, appearance_sigma: σ_α and σ_β, one number or one for each axis.
        intensity_sigma: σ_γ in the image's own units (standard deviations after `transforms.standardise`), one number or one
            for each channel. The authors' code counts in 255ths of a range of 6 standard deviations: its 42.5 is our 1.
        iterations: mean-field updates. 5 to 10 are common.
        units: whether σ_α and σ_β are in "voxels" or "mm".
        normalization: how a kernel K is divided by its row sums n = K 1: "symmetric" n^-½ K n^-½ (the authors'),
            "before" K n⁻¹, "after" n⁻¹ K, or "none".
        compatibility: μ, "potts" (1 for different labels, 0 for equal ones) or a `(classes, classes)` matrix.
        learn: which parameters `parameters()` gives to an optimiser: any of "weights", "compatibility" and "sigmas".
            A Potts matrix that is to be learned needs `classes`.
        classes: number of labels, when the compatibility is "potts" and is to be learned.

    Raises:
        ValueError: for values that make no sense, and in use for inputs that do not fit or are not finite.

    Source: Kamnitsas et al. 2017, section 2.5 and equation 5; Krähenbühl and Koltun 2011 and 2013. As a layer: Zheng et al.
    2015, which Kamnitsas et al. name as future work (section 5).
    """

    def __init__(
        self,
        *,
        smoothness_weight: float = 3.0,
        smoothness_sigma: float | Sequence[float] = 3.0,
        appearance_weight: float = 5.0,
        appearance_sigma: float | Sequence[float] = 10.0,
        intensity_sigma: float | Sequence[float] = 0.1,
        iterations: int = 5,
        units: str = "voxels",
        normalization: str = "symmetric",
        compatibility: str | Tensor | np.ndarray | Sequence[Sequence[float]] = "potts",
        learn: Sequence[str] = ("weights", "compatibility"),
        classes: int | None = None,
    ) -> None:
        super().__init__()
        _one_of("units", units, UNITS)
        _one_of("normalization", normalization, NORMALIZATIONS)
        learn = (learn,) if isinstance(learn, str) else tuple(learn)
        for name in learn:
            _one_of("learn", name, ("weights", "compatibility", "sigmas"))
        if not isinstance(iterations, int) or iterations < 0:
            raise ValueError(f"iterations={iterations!r}; expected a whole number from 0")
        self.iterations, self.units, self.normalization = iterations, units, normalization

        def parameter(value, group: str) -> nn.Parameter:
            return nn.Parameter(torch.as_tensor(value, dtype=torch.float32).clone(), requires_grad=group in learn)

        self.smoothness_weight = parameter(smoothness_weight, "weights")
        self.appearance_weight = parameter(appearance_weight, "weights")
        self.smoothness_sigma = parameter(smoothness_sigma, "sigmas")
        self.appearance_sigma = parameter(appearance_sigma, "sigmas")
        self.intensity_sigma = parameter(intensity_sigma, "sigmas")
        if isinstance(compatibility, str):
            _one_of("compatibility", compatibility, ("potts",))
            self.compatibility = parameter(1 - torch.eye(classes), "compatibility") if classes else None
        else:
            self.compatibility = parameter(compatibility, "compatibility")
            shape = tuple(self.compatibility.shape)
            if len(shape) != 2 or shape[0] != shape[1]:
                raise ValueError(f"compatibility has shape {shape}; expected (classes, classes)")
        self._check_values()

    def forward(
        self,
        logits: Tensor,
        image: Tensor,
        mask: Tensor | None = None,
        *,
        spacing: Sequence[float] | None = None,
        prepared: Prepared | Sequence[Prepared] | None = None,
    ) -> Tensor:
        """Refine a batch of soft segmentations.

        Args:
            logits: `(B, K, *space)`, unnormalised log-probabilities, as networks give them. Any number of spatial axes.
            image: `(B, C, *space)`, which tells the appearance kernel what looks alike.
            mask: `(B, *space)` bool; only the voxels inside take part. By default all.
            spacing: mm between voxels along each axis; needed with `units="mm"`.
            prepared: what `prepare` made for these images and masks, to be used again (unless sigmas are learned); mask
                and spacing are then not needed.

        Returns:
            log Q `(B, K, *space)`, of the logits' type, computed in float64 if the image is and else in float32; its softmax is
            Q. Outside the mask the logits as they came.
        """
        _check_shapes(logits, image, mask)
        if prepared is None:
            prepared = [self.prepare(x, None if mask is None else mask[b], spacing=spacing) for b, x in enumerate(image)]
        elif isinstance(prepared, Prepared):
            prepared = [prepared]
        if len(prepared) != len(logits):
            raise ValueError(f"prepared is for {len(prepared)} images; the batch has {len(logits)}")
        return torch.stack([self._refine_one(one, field) for one, field in zip(logits, prepared, strict=True)])

    @torch.no_grad()
    def refine(
        self,
        probabilities: np.ndarray | Tensor,
        case: Case,
        *,
        inside_mask: bool = True,
        clip: float = 1e-5,
        prepared: Prepared | None = None,
    ) -> np.ndarray:
        """Refine the probabilities `(K, D, H, W)` that `inference.predict` gives for a case; returns the same kind of array.

        Probabilities are kept from `clip` on, so that an overconfident 0 can still be talked out of it. Outside the case's
        mask nothing changes (`inside_mask=False` lets all voxels take part).
        """
        device = self.smoothness_weight.device
        values = torch.as_tensor(np.asarray(probabilities))
        if tuple(values.shape[1:]) != case.shape:
            raise ValueError(f"probabilities have shape {tuple(values.shape)}; {case.name} needs (classes, *{case.shape})")
        if prepared is None:
            mask = torch.from_numpy(case.mask) if inside_mask and case.mask is not None else None
            prepared = self.prepare(torch.from_numpy(case.image).to(device), mask, spacing=case.spacing)
        _check_grid(prepared, case.shape)
        index = prepared.index.to("cpu")
        inside = torch.index_select(values.flatten(1), 1, index).to(device, torch.float32)
        _check_finite("probabilities", inside)
        if inside.numel() and (inside.min() < -1e-3 or inside.max() > 1 + 1e-3):
            raise ValueError(
                f"probabilities reach from {inside.min():.3g} to {inside.max():.3g}; expected 0 to 1 (for logits, call the CRF)"
            )
        refined = self._mean_field(inside.clamp_(min=clip).log_(), prepared).softmax(0)
        result = values.flatten(1).to(torch.float32, copy=True)
        return result.index_copy_(1, index, refined.to(result)).view(values.shape).numpy()

    def prepare(self, image: Tensor, mask: Tensor | None = None, *, spacing: Sequence[float] | None = None) -> Prepared:
        """Build both kernels of one image `(C, *space)`, which do not depend on the segmentation, the weights or μ."""
        self._check_values()
        image = image.detach()  # no gradient flows to it
        dims = image.ndim - 1
        scale = image.new_ones(dims, dtype=torch.float32)
        if self.units == "mm":
            if spacing is None:
                raise ValueError('units="mm" needs the spacing of the voxels: give spacing=(...), in mm along each axis')
            scale = torch.as_tensor(spacing, dtype=torch.float32, device=image.device)
            if scale.shape != (dims,) or not (scale > 0).all():
                raise ValueError(f"spacing={tuple(spacing)}; expected {dims} positive numbers")
        kind = torch.float64 if image.dtype == torch.float64 else torch.float32
        inside = torch.ones(image.shape[1:], dtype=torch.bool) if mask is None else mask.bool()
        index = inside.flatten().nonzero()[:, 0].to(image.device)
        if not tuple(inside.shape) == tuple(image.shape[1:]):
            raise ValueError(f"mask has shape {tuple(inside.shape)}; expected {tuple(image.shape[1:])}, as the image")
        intensities = torch.index_select(image.flatten(1), 1, index).to(kind)
        _check_finite("image", intensities)
        sigmas = [
            _per("smoothness_sigma", self.smoothness_sigma, dims, "spatial axes").to(kind) / scale,
            _per("appearance_sigma", self.appearance_sigma, dims, "spatial axes").to(kind) / scale,
            _per("intensity_sigma", self.intensity_sigma, len(image), "channels").to(kind),
        ]
        return Prepared(index, tuple(image.shape[1:]), intensities, *sigmas, self.normalization)

    def _refine_one(self, logits: Tensor, prepared: Prepared) -> Tensor:
        _check_grid(prepared, logits.shape[1:])
        flat = logits.flatten(1)
        inside = torch.index_select(flat, 1, prepared.index)
        _check_finite("logits", inside)
        refined = self._mean_field(inside, prepared).log_softmax(0)
        return flat.index_copy(1, prepared.index, refined.to(logits.dtype)).view(logits.shape)

    def _mean_field(self, unary: Tensor, prepared: Prepared) -> Tensor:
        """Logits of Q `(K, N)`, from log P `(K, N)` up to a constant.

        Only differences between labels matter, so all is kept relative to the last label, and filtering, the dear part, is done
        for K - 1 differences. With E the energies Σ_l' μ(l, l') F(l') of the filtered Q, and D(l) = F(l) - F(K):
        E(l) - E(K) = Σ_l' (μ(l, l') - μ(K, l')) D(l') + r(l) F(K), where r sums a row of that matrix, and F(K) follows from
        the filtered constant 1 = Σ Q.
        """
        classes, kind = len(unary), prepared.dtype
        unary = unary.to(kind)
        if classes == 1 or not unary.shape[1]:
            return unary
        potts = self.compatibility is None  # then the matrix of the second equation is -1 and r is 0
        μ = 1 - torch.eye(classes, device=unary.device) if potts else self.compatibility
        if len(μ) != classes:
            raise ValueError(f"the compatibility matrix is for {len(μ)} classes, the segmentation has {classes}")
        relative = (μ[:-1] - μ[-1:]).to(kind)  # (K - 1, K)
        uneven = relative.sum(1, keepdim=True)

        kernels = []
        for weight, name in ((self.smoothness_weight, "smoothness"), (self.appearance_weight, "appearance")):
            if weight.requires_grad or float(weight) != 0:  # a kernel without weight is not even built
                kernels.append((weight.to(kind), getattr(prepared, name)))
        unary = unary[:-1] - unary[-1:]
        zero = unary.new_zeros(1, unary.shape[1])
        z = unary
        for _ in range(self.iterations if kernels else 0):
            # Q(l) - Q(K); with two labels sigmoid(z) - sigmoid(-z)
            if classes == 2:
                difference = torch.tanh(z / 2)
            else:
                q = torch.cat([z, zero]).softmax(0)
                difference = q[:-1] - q[-1:]
            if potts:
                z = unary
                for weight, kernel in kernels:
                    z = kernel.add(z, difference, weight)
            else:
                filtered = zero
                for weight, kernel in kernels:
                    filtered = kernel.add(filtered, difference, weight)
                z = unary - relative[:, :-1] @ filtered
                if uneven.requires_grad or uneven.any():
                    of_ones = sum(weight * kernel.of_ones for weight, kernel in kernels)
                    z = z - uneven * (of_ones - filtered.sum(0, keepdim=True)) / classes
        return torch.cat([z, zero])

    def _check_values(self) -> None:
        for name in ("smoothness_sigma", "appearance_sigma", "intensity_sigma"):
            value = getattr(self, name).detach()
            if not (torch.isfinite(value).all() and (value > 0).all()):
                raise ValueError(f"{name}={value.tolist()}; standard deviations must be positive and finite")
        for name in ("smoothness_weight", "appearance_weight"):
            value = getattr(self, name).detach()
            if value.ndim or not torch.isfinite(value):
                raise ValueError(f"{name}={value.tolist()}; expected one finite number")
        if self.compatibility is not None:
            _check_finite("compatibility", self.compatibility.detach())

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}, units={self.units!r}, normalization={self.normalization!r}"


class Prepared:
    """Both kernels of one image; each is built when it is first needed.

    Attributes:
        index: the voxels that take part, positions in the flattened grid `(N,)`.
        shape: size of the grid.
        dtype: what is computed in.
        smoothness, appearance: kernels; calling one filters `(c, N)`.
    """

    def __init__(self, index, shape, intensities, smoothness_sigma, appearance_sigma, intensity_sigma, normalization) -> None:
        self.index, self.shape, self._intensities, self._normalization = index, shape, intensities, normalization
        self.dtype = intensities.dtype
        self._smoothness_sigma, self._appearance_sigma = smoothness_sigma, appearance_sigma
        self._intensity_sigma = intensity_sigma

    @functools.cached_property
    def smoothness(self) -> Kernel:
        grid = GridGaussian(self.index, self.shape, self._smoothness_sigma)
        return Kernel(grid.filter, self._intensities.new_ones(1, len(self.index)), self._normalization)

    @functools.cached_property
    def appearance(self) -> Kernel:
        features = torch.empty(
            len(self.shape) + len(self._intensities), len(self.index), dtype=self._intensities.dtype, device=self.index.device
        )
        positions = unravel(self.index, self.shape)
        sigmas = torch.cat([self._appearance_sigma, self._intensity_sigma])
        for row, sigma, values in zip(features, sigmas.detach(), (*positions, *self._intensities)):
            torch.div(values, sigma, out=row)
        lattice = Permutohedral(features)
        if sigmas.requires_grad:
            # The same features once more, now as a function of the sigmas, for gradients.
            features = features * (sigmas.detach() / sigmas)[:, None]

            def filter(signal: Tensor) -> Tensor:
                return _LatticeFilter.apply(signal, features, lattice)
        else:
            del features

            def filter(signal: Tensor) -> Tensor:
                return _LatticeFilter.apply(signal, None, lattice)

        return Kernel(filter, self._intensities.new_ones(1, len(self.index)), self._normalization)


class Kernel:
    """A filter K with its normalisation; `of_ones` is what it makes of the constant 1, `(1, N)`."""

    def __init__(self, filter, ones: Tensor, normalization: str) -> None:
        self._filter, self._ones, self._before, self._after = filter, ones, None, None
        if normalization == "symmetric":
            self._before = self._after = (filter(ones) + 1e-20).rsqrt()
        elif normalization == "before":
            self._before = 1 / (filter(ones) + 1e-20)
        elif normalization == "after":
            self._after = 1 / (filter(ones) + 1e-20)

    @functools.cached_property
    def of_ones(self) -> Tensor:
        return self(self._ones)

    def __call__(self, signal: Tensor) -> Tensor:
        return self.add(self._ones.new_zeros(()), signal, self._ones.new_ones(()))

    def add(self, total: Tensor, signal: Tensor, weight: Tensor) -> Tensor:
        """total + weight K signal, in as few passes over memory as it takes."""
        if self._before is not None:
            signal = signal * self._before
        return torch.addcmul(total, self._filter(signal), weight if self._after is None else weight * self._after)


class _LatticeFilter(torch.autograd.Function):
    """The lattice as a differentiable operation on the signal `(c, N)` and, where asked for, on the features `(d, N)`."""

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
        # The lattice is piecewise linear in the features; its own slope says little. The Gaussian that it stands for has
        # ∂k(f_i, f_j)/∂f_i = -k (f_i - f_j), and the sums over j of that are filters again.
        signal, features, result = ctx.saved_tensors
        slope = torch.empty_like(features)
        for out, f in zip(slope, features - features.mean(1, keepdim=True)):
            out.copy_((gradient * (lattice.filter(f * signal) - f * result)).sum(0))
            out.add_((signal * (lattice.filter(f * gradient, transpose=True) - f * back)).sum(0))
        return back, slope, None


def whole_tumour(crf: DenseCRF, probabilities: np.ndarray, case: Case, *, prepared: Prepared | None = None) -> np.ndarray:
    """The paper's recipe for several tumour classes: refine tumour against background, and keep what kind of tumour it is.

    The class probabilities are merged into one "whole tumour" map, and the CRF refines that. Voxels that it takes away become
    background; voxels that it adds get their most probable tumour class (the paper does not say; this is our reading).

    Args:
        crf: a CRF for two classes.
        probabilities: `(K, D, H, W)`, class 0 the background.
        case: its image, and the mask outside which nothing changes.

    Returns:
        Labels `(D, H, W)` uint8.

    Source: Kamnitsas et al. 2017, section 4.2.2.
    """
    probabilities = np.asarray(probabilities)
    background = probabilities[0]
    refined = crf.refine(np.stack([background, 1 - background]), case, prepared=prepared)
    tumour = (1 + probabilities[1:].argmax(0)).astype(np.uint8)
    labels = np.where(refined[1] > refined[0], tumour, np.uint8(0))
    if case.mask is None:
        return labels
    return np.where(case.mask, labels, probabilities.argmax(0).astype(np.uint8))


def _per(name: str, sigma: Tensor, count: int, what: str) -> Tensor:
    if sigma.ndim == 0:
        return sigma.expand(count)
    if sigma.shape != (count,):
        raise ValueError(f"{name} has {sigma.numel()} values; expected one, or one for each of the {count} {what}")
    return sigma


def _check_shapes(logits: Tensor, image: Tensor, mask: Tensor | None) -> None:
    if logits.ndim < 3 or image.ndim != logits.ndim:
        raise ValueError(
            f"logits {tuple(logits.shape)} and image {tuple(image.shape)}; expected (B, K, *space) and (B, C, *space)"
        )
    expected = (logits.shape[0], *logits.shape[2:])
    for name, found in (("image", (image.shape[0], *image.shape[2:])), ("mask", None if mask is None else tuple(mask.shape))):
        if found is not None and found != expected:
            raise ValueError(f"{name} is on the grid (batch, *space) = {found}; the logits are on {expected}")


def _check_grid(prepared: Prepared, shape: Sequence[int]) -> None:
    if tuple(prepared.shape) != tuple(shape):
        raise ValueError(
            f"prepared is for an image of {tuple(prepared.shape)} voxels; the segmentation has {tuple(shape)}. "
            "Prepare each image for itself"
        )


def _check_finite(name: str, values: Tensor) -> None:
    values = values.detach()
    if not math.isfinite(float(values.sum())) and not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name}: {bad} of {values.numel()} values are NaN or infinite; repair or mask them before the CRF")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(allowed)}")
