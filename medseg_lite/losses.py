"""The papers' cost functions. All take logits `(B, K, *space)` and integer targets `(B, *space)` and return a scalar."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models.layers import convolutions


def cross_entropy(logits: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean of −log p over all predicted voxels of all segments of the batch, or over those inside `mask`.

    Args:
        logits: `(B, K, *space)`.
        target: `(B, *space)` class numbers 0 to K − 1.
        mask: `(B, *space)`, True where a voxel counts. An empty mask gives zero, with a zero gradient.

    Source: Kamnitsas et al. 2017, eq. 3 (one voxel per patch) and eq. 4 (V voxels per segment).
    """
    _check(logits, target)
    if mask is None:
        return F.cross_entropy(logits, target)
    if mask.shape != target.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; expected that of the target, {tuple(target.shape)}")
    per_voxel = F.cross_entropy(logits, target, reduction="none")
    mask = mask.to(per_voxel.dtype)
    return (per_voxel * mask).sum() / mask.sum().clamp(min=1)


def weight_penalty(model: nn.Module, *, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    """l1 · Σ|W| + l2 · ΣW² over the kernels of all convolutions; biases, batch normalisation and PReLU are left free.

    Source: Kamnitsas et al. 2017, appendix B (l1 = 1e-6, l2 = 1e-4 for 3D networks).
    """
    weights = [c.weight for c in convolutions(model)]
    total = weights[0].new_zeros(())
    if l1:
        total = total + l1 * torch.stack([w.abs().sum() for w in weights]).sum()
    if l2:
        total = total + l2 * torch.stack([w.square().sum() for w in weights]).sum()
    return total


def _check(logits: Tensor, target: Tensor) -> None:
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(
            f"logits {tuple(logits.shape)} predict {expected} voxels but the target is {tuple(target.shape)}; "
            "a network of valid convolutions loses `model.margin` voxels on each side: crop the label alike"
        )
