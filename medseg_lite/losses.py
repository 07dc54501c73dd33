"""The papers' cost functions. All take logits `(B, K, *space)` and integer targets `(B, *space)` and return a scalar."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models.layers import convolutions


def cross_entropy(
    logits: Tensor, target: Tensor, *, mask: Tensor | None = None, class_weights: Tensor | Sequence[float] | None = None
) -> Tensor:
    """Mean of −log p over all predicted voxels of all segments of the batch, or over those inside `mask`.

    Args:
        logits: `(B, K, *space)`.
        target: `(B, *space)` class numbers 0 to K − 1.
        mask: `(B, *space)`, True where a voxel counts. An empty mask gives zero, with a zero gradient.
        class_weights: K numbers; a voxel counts as much as its true class weighs, and the mean is a weighted one. With
            the inverse of the class frequencies, every class matters as much as every other.

    Source: Kamnitsas et al. 2017, eq. 3 (one voxel per patch) and eq. 4 (V voxels per segment); the weights,
    Kayalibay et al. 2017, sections 4.1 and 5.2.
    """
    _check(logits, target)
    weights = None
    if class_weights is not None:
        weights = torch.as_tensor(class_weights, dtype=logits.dtype, device=logits.device)
        if weights.shape != logits.shape[1:2] or bool((weights < 0).any()):
            raise ValueError(f"class_weights={class_weights}; expected {logits.shape[1]} numbers, none of them negative")
    if mask is None:
        return F.cross_entropy(logits, target, weights)
    if mask.shape != target.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; expected that of the target, {tuple(target.shape)}")
    per_voxel = F.cross_entropy(logits, target, weights, reduction="none")
    mask = mask.to(per_voxel.dtype)
    counts = mask if weights is None else mask * weights[target]
    return (per_voxel * mask).sum() / (counts.sum().clamp(min=1) if weights is None else counts.sum().clamp(min=1e-6))


def balanced_cross_entropy(logits: Tensor, target: Tensor, *, target_weights: Sequence[float]) -> Tensor:
    """−Σ w log p over all voxels of the batch, where the voxels of class c share the weight t_c evenly.

    w = t_c / N_c with N_c the batch's voxels of class c, so classes count as `target_weights` say however rare they are. A
    class that is absent from the batch contributes nothing.

    Args:
        logits: `(B, K, *space)`.
        target: `(B, *space)` class numbers.
        target_weights: t, K numbers of sum 1: (.7, .1, .1, .1) for the paper's 2D networks, (.4, .2, .2, .2) for 3D.

    Source: Mlynarski et al. 2019, eq. 1 and 2. The paper's further factor, one over the number of voxels, is left out: the
    weights already sum to 1.
    """
    _check(logits, target)
    weights = torch.as_tensor(target_weights, dtype=torch.float32, device=logits.device)
    if weights.shape != logits.shape[1:2] or bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-4:
        raise ValueError(f"target_weights={target_weights}; expected {logits.shape[1]} numbers from 0 on of sum 1")
    counts = torch.bincount(target.flatten(), minlength=len(weights))
    return F.cross_entropy(logits.float(), target, weights / counts.clamp(min=1), reduction="sum")


def deep_supervision(
    outputs: tuple[Tensor, Sequence[Tensor]], target: Tensor, *, loss=cross_entropy, main: float = 0.75
) -> Tensor:
    """Convex combination of a network's loss and those of its auxiliary classifiers, which share 1 − `main` evenly.

    Args:
        outputs: logits `(B, K, *space)` and a list of auxiliary ones, as `with_auxiliary` of a network gives them.
        target: `(B, *space)` class numbers.
        loss: `loss(logits, target)`.
        main: weight of the network's own loss; .75 in the paper, which leaves .05 for each of 5 subnetworks.

    Source: Mlynarski et al. 2019, eq. 3.
    """
    logits, auxiliary = outputs
    if not 0 <= main <= 1 or not auxiliary:
        raise ValueError(f"main={main} with {len(auxiliary)} auxiliary outputs; expected 0 to 1 and at least one of them")
    share = (1 - main) / len(auxiliary)
    return main * loss(logits, target) + share * sum(loss(other, target) for other in auxiliary)


def jaccard_distance(logits: Tensor, target: Tensor, *, per_class: bool = False) -> Tensor:
    """Σ_c (1 − J_c) over all classes, the background too; between 0 and K.

    J_c = Σ p t / (Σ p² + Σ t² − Σ p t), p the probability of class c and t one where it is right, over all voxels of the
    batch. It is the share of voxels wrongly called c or not c in the union of both, for whole numbers.

    The paper's equation has a square root in the first sum; without it, as in the authors' code, J is at most 1 and
    2 J / (1 + J) is the Dice score. Where class c does not occur, 1 − J_c is 1 whatever is predicted and teaches nothing.

    Args:
        logits: `(B, K, *space)`. Sums are made in float32 at least, for they run over more voxels than float16 can count.
        target: `(B, *space)` class numbers 0 to K − 1.
        per_class: return the K terms instead of their sum.

    Source: Kayalibay et al. 2017, eq. 3 and 4.
    """
    _check(logits, target)
    if logits.dtype != torch.float64:
        logits = logits.float()
    with torch.autocast(logits.device.type, enabled=False):
        p = logits.softmax(dim=1).clamp(1e-8, 1).transpose(0, 1).flatten(1)  # (K, voxels), never all zero
        t = F.one_hot(target, p.shape[0]).to(p.dtype).flatten(0, -2).T
        both = (p * t).sum(1)
        distances = 1 - both / (p.square().sum(1) + t.sum(1) - both)
    return distances if per_class else distances.sum()


def minmax_jaccard(prediction: Tensor, target: Tensor) -> Tensor:
    """Σ min(P, T) / Σ max(P, T) of class numbers: the multi-class Jaccard index that the paper rejects.

    It takes the names of classes for quantities: to call a voxel of class 2 class 0 costs more than to call it class 1, and
    another numbering gives another score. Two empty maps give 1.

    Source: Kayalibay et al. 2017, eq. 5.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction has shape {tuple(prediction.shape)}; expected that of the target, {tuple(target.shape)}"
        )
    most = torch.maximum(prediction, target).double().sum()
    least = torch.minimum(prediction, target).double().sum()
    return torch.where(most > 0, least / most.clamp(min=1), 1.0)


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """−(2 Σ o y + smooth) / (Σ o + Σ y + smooth) over all voxels of the batch: −1 when all is right, near 0 when nothing is.

    o is the probability of the object and y one inside it. As the sums run over the batch, an image without the object
    costs only what is wrongly found in it.

    Args:
        logits: `(B, 1, *space)` (a sigmoid's), or `(B, K, *space)` (a softmax's), of which the mean over classes 1 to K − 1.
        target: `(B, *space)` class numbers.
        smooth: keeps the loss defined where there is no object; the authors' code has 1.

    Source: Drozdzal et al. 2018, section 3.3.
    """
    _check(logits, target)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if logits.shape[1] == 1:
        object_, truth = logits.sigmoid(), (target > 0).unsqueeze(1)
    else:
        object_ = logits.softmax(1)[:, 1:]
        truth = torch.stack([target == k for k in range(1, logits.shape[1])], dim=1)
    axes = (0, *range(2, logits.ndim))
    truth = truth.to(object_.dtype)
    both, sizes = (object_ * truth).sum(axes), object_.sum(axes) + truth.sum(axes)
    return -((2 * both + smooth) / (sizes + smooth)).mean()


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
