"""The fully connected conditional random field: every pair of voxels is connected, through two Gaussian kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import as_image, as_tensor
from ..volume import Case
from .compiled import threads_for
from .kernels import Prepared, Voxels, check_finite, take_voxels

NORMALIZATIONS = ("symmetric", "before", "after", "none")
UNITS = ("voxels", "mm")
CLIP = 1e-5  # least probability


class DenseCRF(nn.Module):
    """Mean-field inference in a fully connected CRF with Gaussian edge potentials, as post-processing or as a layer.

    The energy of a labelling z is E(z) = Σ ψ_u(z_i) + Σ_{i<j} μ(z_i, z_j) [w₁ k₁(i, j) + w₂ k₂(i, j)], with the unary
    potential ψ_u = -log P(z_i | image), the smoothness kernel k₁ = exp(-Σ_d Δp_d² / 2σ_α,d²) over positions p, and the
    appearance kernel k₂ = exp(-Σ_d Δp_d² / 2σ_β,d² - Σ_c ΔI_c² / 2σ_γ,c²) over positions and intensities I.

    Mean field looks for the product of independent distributions Q_i that is closest to exp(-E). It starts from
    softmax(-ψ_u), and each iteration sets Q_i(l) ∝ exp(-ψ_u,i(l) - Σ_l' μ(l, l') Σ_m w_m Σ_j k_m(i, j) Q_j(l')). The sums over
    all pairs are Gaussian filters: k₁ on the grid, k₂ on a permutohedral lattice, which approximates it (with an error of 15 %
    for three features, and more for more features). As in the authors' code, the sums over j include j = i, and the kernels are
    normalised.

    Args:
        smoothness_weight, appearance_weight: w₁ and w₂; 0 leaves a kernel out.
        smoothness_sigma, appearance_sigma: σ_α and σ_β, one number or one for each axis.
        intensity_sigma: σ_γ in the image's own units (standard deviations after `transforms.standardise`), one number or one
            for each channel. The authors' code counts in 255ths of a range of 6 standard deviations: its 42.5 is our 1.
        iterations: number of mean-field updates; 5 to 10 are common.
        units: unit of σ_α and σ_β, "voxels" or "mm".
        normalization: how a kernel K is divided by its row sums n = K 1: "symmetric" n^-½ K n^-½ (the authors'),
            "before" K n⁻¹, "after" n⁻¹ K, or "none".
        compatibility: μ, "potts" (1 for different labels, 0 for equal ones) or a matrix `(classes, classes)`.
        learn: groups of parameters that are to be learned (`requires_grad`), any of "weights", "compatibility" and "sigmas".
            A Potts matrix that is to be learned needs `classes`.
        classes: number of labels, if the compatibility is "potts" and is to be learned.

    Raises:
        ValueError: for values that make no sense, and in use for inputs that do not fit or are not finite.

    Source: Kamnitsas et al. 2017, section 2.5 and eq. 5; Krähenbühl and Koltun 2011 and 2013. As a layer: Zheng et al.
    2015, which Kamnitsas et al. name as future work (section 5).
    Taught in notebook 07.
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
        if np.ndim(iterations) or iterations != int(iterations) or iterations < 0:
            raise ValueError(f"iterations={iterations!r}; expected a whole number from 0")
        self.iterations, self.units, self.normalization = int(iterations), units, normalization

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
            logits: unnormalised log-probabilities `(B, K, *space)`, as networks return them, with any number of spatial axes.
            image: image `(B, C, *space)` for the appearance kernel.
            mask: voxels that take part, `(B, *space)` bool; by default all.
            spacing: mm between voxels along each axis; needed with `units="mm"`.
            prepared: results of `prepare` for these images and masks, to be used again (unless sigmas are learned). Mask and
                spacing are then not needed.

        Returns:
            log Q `(B, K, *space)`, of the logits' type; its softmax is Q. It is computed in float64 if the image is float64, and
            in float32 otherwise. Outside the mask the logits are unchanged.
        """
        logits = logits if logits.is_floating_point() else logits.float()
        _check_shapes(logits, image, mask)
        self._check_device("logits", logits)
        if prepared is None:
            prepared = [self.prepare(x, None if mask is None else mask[b], spacing=spacing) for b, x in enumerate(image)]
        elif isinstance(prepared, Prepared):
            prepared = [prepared]
        if len(prepared) != len(logits):
            raise ValueError(f"prepared is for {len(prepared)} images; the batch has {len(logits)}")
        # A network around this layer may compute in half precision, which knows neither lattice cells nor small differences.
        with torch.autocast(logits.device.type, enabled=False):
            return torch.stack([self._refine_one(one, field) for one, field in zip(logits, prepared, strict=True)])

    @torch.no_grad()
    def refine(
        self,
        probabilities: np.ndarray | Tensor,
        case: Case,
        *,
        inside_mask: bool = True,
        clip: float = CLIP,
        prepared: Prepared | None = None,
    ) -> np.ndarray:
        """Refine the probabilities `(K, D, H, W)` that `inference.predict` returns for a case.

        Args:
            probabilities: class probabilities `(K, D, H, W)`.
            case: case with the image. Its mask limits the voxels that take part; the others do not change.
            inside_mask: whether to use the mask. False lets all voxels take part.
            clip: least probability. Smaller ones are raised to it, so that a probability of exactly 0 can still change.
            prepared: result of `prepare` for this case, to be used again.

        Returns:
            The refined probabilities, `(K, D, H, W)` float32.
        """
        device = self.smoothness_weight.device
        values = as_tensor(as_image(probabilities, "probabilities"))
        if tuple(values.shape[1:]) != case.shape:
            raise ValueError(f"probabilities have shape {tuple(values.shape)}; {case.name} needs (classes, *{case.shape})")
        if prepared is None:
            mask = as_tensor(case.mask) if inside_mask and case.mask is not None else None
            spacing = case.spacing if self.units == "mm" else None
            prepared = self.prepare(as_tensor(case.image).to(device), mask, spacing=spacing)
        self._check_prepared(prepared, case.shape)
        with torch.autocast(device.type, enabled=False), threads_for(prepared.voxels.loops):
            refined = self.mean_field(log_inside(values, prepared.voxels, clip), prepared).softmax(0)
        result = values.flatten(1).to(torch.float32, copy=True)
        return result.index_copy_(1, prepared.voxels.index.to("cpu"), refined.to(result)).view(values.shape).numpy()

    def prepare(self, image: Tensor, mask: Tensor | None = None, *, spacing: Sequence[float] | None = None) -> Prepared:
        """Build both kernels of one image `(C, *space)`; they do not depend on the segmentation, the weights or μ."""
        return self.prepare_voxels(take_voxels(image, mask), spacing=spacing)

    def prepare_voxels(self, voxels: Voxels, *, spacing: Sequence[float] | None = None) -> Prepared:
        """Build both kernels for voxels that were taken from an image, so that CRFs with other sigmas can share them."""
        self._check_values()
        self._check_device("image", voxels.intensities)
        dims, kind = len(voxels.shape), voxels.intensities.dtype
        scale = voxels.intensities.new_ones(dims, dtype=torch.float32)
        if self.units == "mm":
            if spacing is None:
                raise ValueError('units="mm" needs the spacing of the voxels: give spacing=(...), in mm along each axis')
            scale = torch.as_tensor(spacing, dtype=torch.float32, device=scale.device)
            if scale.shape != (dims,) or not (scale > 0).all():
                raise ValueError(f"spacing={tuple(spacing)}; expected {dims} positive numbers")
        sigmas = [
            _expand("smoothness_sigma", self.smoothness_sigma, dims, "spatial axes").to(kind) / scale,
            _expand("appearance_sigma", self.appearance_sigma, dims, "spatial axes").to(kind) / scale,
            _expand("intensity_sigma", self.intensity_sigma, len(voxels.intensities), "channels").to(kind),
        ]
        return Prepared(voxels, *sigmas, self.normalization)

    def _refine_one(self, logits: Tensor, prepared: Prepared) -> Tensor:
        self._check_prepared(prepared, logits.shape[1:])
        flat, index = logits.flatten(1), prepared.voxels.index
        inside = torch.index_select(flat, 1, index)
        check_finite("logits", inside)
        with threads_for(prepared.voxels.loops):
            refined = self.mean_field(inside, prepared).log_softmax(0)
        return flat.index_copy(1, index, refined.to(logits.dtype)).view(logits.shape)

    def mean_field(self, unary: Tensor, prepared: Prepared) -> Tensor:
        """Compute logits of Q `(K, N)` from log P `(K, N)`, both up to a constant.

        Only differences between labels matter, so everything is kept relative to the last label, and filtering, the costly part,
        is done for K - 1 differences. With the energies E(l) = Σ_l' μ(l, l') F(l') of the filtered Q, and D(l) = F(l) - F(K):
        E(l) - E(K) = Σ_l' (μ(l, l') - μ(K, l')) D(l') + r(l) F(K), where r sums a row of that matrix. F(K) follows from the
        filtered constant 1 = Σ Q.
        """
        classes, kind = len(unary), prepared.voxels.intensities.dtype
        unary = unary.to(kind)
        if classes == 1 or not unary.shape[1]:
            return unary
        # For Potts the first K - 1 columns of that matrix are minus the identity, and r is 0.
        potts = self.compatibility is None
        μ = 1 - torch.eye(classes, device=unary.device) if potts else self.compatibility
        if len(μ) != classes:
            raise ValueError(f"the compatibility matrix is for {len(μ)} classes, the segmentation has {classes}")
        relative = (μ[:-1] - μ[-1:]).to(kind)  # (K - 1, K)
        uneven = relative.sum(1, keepdim=True)

        def matters(weight: Tensor) -> bool:
            return weight.requires_grad or float(weight) != 0

        kernels = []  # a kernel without weight is not even built
        if matters(self.smoothness_weight):
            kernels.append((self.smoothness_weight.to(kind), prepared.smoothness))
        if matters(self.appearance_weight):
            kernels.append((self.appearance_weight.to(kind), prepared.appearance))
        add = [kernel.weighted(weight) for weight, kernel in kernels]
        unary = unary[:-1] - unary[-1:]
        zero = unary.new_zeros(1, unary.shape[1])
        z = unary
        for _ in range(self.iterations if kernels else 0):
            # Q(l) - Q(K); for two labels this is sigmoid(z) - sigmoid(-z) = tanh(z / 2).
            if classes == 2:
                difference = torch.tanh(z / 2)
            else:
                q = torch.cat([z, zero]).softmax(0)
                difference = q[:-1] - q[-1:]
            if potts:
                z = unary
                for add_weighted in add:
                    z = add_weighted(z, difference)
            else:
                filtered = zero
                for add_weighted in add:
                    filtered = add_weighted(filtered, difference)
                z = unary - relative[:, :-1] @ filtered
                if uneven.requires_grad or uneven.any():
                    constant = sum(weight * kernel.filtered_ones for weight, kernel in kernels)
                    z = z - uneven * (constant - filtered.sum(0, keepdim=True)) / classes
        return torch.cat([z, zero])

    def _check_device(self, name: str, values: Tensor) -> None:
        here = self.smoothness_weight.device
        if values.device != here:
            raise ValueError(
                f"{name}: on device {values.device}, but the CRF is on {here}; move it there with crf.to({str(values.device)!r})"
            )

    def _check_prepared(self, prepared: Prepared, shape: Sequence[int]) -> None:
        if prepared.voxels.shape != tuple(shape):
            raise ValueError(
                f"prepared is for an image of {prepared.voxels.shape} voxels; the segmentation has {tuple(shape)}. "
                "Prepare each image separately"
            )
        self._check_device("prepared", prepared.voxels.index)

    def _check_values(self) -> None:
        sigmas = {
            "smoothness_sigma": self.smoothness_sigma,
            "appearance_sigma": self.appearance_sigma,
            "intensity_sigma": self.intensity_sigma,
        }
        for name, value in sigmas.items():
            if not (torch.isfinite(value).all() and (value > 0).all()):
                raise ValueError(f"{name}={value.tolist()}; standard deviations must be positive and finite")
        for name, value in {"smoothness_weight": self.smoothness_weight, "appearance_weight": self.appearance_weight}.items():
            if value.ndim or not torch.isfinite(value):
                raise ValueError(f"{name}={value.tolist()}; expected one finite number")
        if self.compatibility is not None:
            check_finite("compatibility", self.compatibility.detach())

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}, units={self.units!r}, normalization={self.normalization!r}"


def whole_tumour(crf: DenseCRF, probabilities: np.ndarray, case: Case, *, prepared: Prepared | None = None) -> np.ndarray:
    """Refine tumour against background and keep the kind of tumour, as the paper does for several tumour classes.

    The class probabilities are merged into one "whole tumour" map, and the CRF refines that. Voxels that it removes become
    background. Voxels that it adds get their most probable tumour class (the paper does not say; this is our reading).

    Args:
        crf: a CRF for two classes.
        probabilities: class probabilities `(K, D, H, W)`, class 0 the background.
        case: case with the image, and the mask outside which nothing changes.
        prepared: result of `crf.prepare` for this case, to be used again.

    Returns:
        Class numbers `(D, H, W)`, uint8.

    Source: Kamnitsas et al. 2017, section 4.2.2.
    Taught in notebook 07.
    """
    probabilities = as_image(probabilities, "probabilities")
    background = probabilities[0]
    refined = crf.refine(np.stack([background, 1 - background]), case, prepared=prepared)
    tumour = (1 + probabilities[1:].argmax(0)).astype(np.uint8)
    labels = np.where(refined[1] > refined[0], tumour, np.uint8(0))
    if case.mask is None:
        return labels
    return np.where(case.mask, labels, probabilities.argmax(0).astype(np.uint8))


def log_inside(probabilities: Tensor, voxels: Voxels, clip: float) -> Tensor:
    """Return the logarithms of probabilities `(K, *space)`, raised to `clip` at least, at the voxels that take part: `(K, N)`."""
    inside = torch.index_select(probabilities.flatten(1), 1, voxels.index.to(probabilities.device))
    inside = inside.to(voxels.index.device, torch.float32)
    check_finite("probabilities", inside)
    low, high = map(float, inside.aminmax()) if inside.numel() else (0.0, 1.0)
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"probabilities reach from {low:.3g} to {high:.3g}; expected 0 to 1 (for logits, call the CRF)")
    return inside.clamp_(min=clip).log_()


def _expand(name: str, sigma: Tensor, count: int, what: str) -> Tensor:
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


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(allowed)}")
