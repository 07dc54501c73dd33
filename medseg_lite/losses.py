"""The papers' cost functions. A loss takes logits `(B, K, *space)` and class numbers `(B, *space)`, and returns a scalar.

Logits in half precision are made float32 first. Nothing here makes the CPU wait for a GPU, so class numbers and weights that lie on a
GPU already are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .devices import send
from .models.layers import convolutions


def cross_entropy(
    logits: Tensor, target: Tensor, *, mask: Tensor | None = None, class_weights: Tensor | Sequence[float] | None = None
) -> Tensor:
    """Return the mean of −log p over all predicted voxels of the batch, or over those inside `mask`.

    p is the probability of a voxel's true class.

    Args:
        logits: network output `(B, K, *space)`.
        target: class numbers 0 to K − 1, `(B, *space)`.
        mask: `(B, *space)`, True where a voxel counts. An empty mask gives zero, with a zero gradient.
        class_weights: K numbers, the weights of the classes. The mean is then weighted by the weight of each voxel's true
            class. With the inverse of the class frequencies as weights, all classes count the same. They are float32, because one
            over the frequency of a rare class exceeds the range of float16.

    Source: Kamnitsas et al. 2017, eq. 3 (one voxel per patch) and eq. 4 (V voxels per segment); Kayalibay et al. 2017,
    sections 4.1 and 5.2 (class weights).
    Taught in notebooks 04 and 08.
    """
    logits, target = _check(logits, target)
    weights = None
    if class_weights is not None:
        weights = _check_weights("class_weights", class_weights, logits)
    if mask is None:
        return F.cross_entropy(logits, target, weights)
    if mask.shape != target.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; expected that of the target, {tuple(target.shape)}")
    per_voxel = F.cross_entropy(logits, target, weights, reduction="none")
    mask = mask.to(per_voxel.dtype)
    total = (per_voxel * mask).sum()
    if weights is None:
        return total / mask.sum().clamp(min=1)
    return total / (mask * weights[target]).sum().clamp(min=1e-6)


def balanced_cross_entropy(logits: Tensor, target: Tensor, *, target_weights: Sequence[float]) -> Tensor:
    """Return −Σ w log p over all voxels of the batch, where the voxels of class c share the weight t_c evenly.

    A voxel of class c has the weight w = t_c / N_c, where N_c is the number of voxels of class c in the batch. So the share of
    each class in the loss is that in `target_weights`, however rare the class is. A class that is absent from the batch
    contributes nothing.

    Args:
        logits: network output `(B, K, *space)`.
        target: class numbers 0 to K − 1, `(B, *space)`.
        target_weights: t, K numbers that sum to 1: (.7, .1, .1, .1) for the paper's 2D networks, (.4, .2, .2, .2) for 3D.

    Source: Mlynarski et al. 2019, eq. 1 and 2. The paper has one more factor, one over the number of voxels. It is left out
    here, because the weights already sum to 1.
    Taught in notebooks 12 and 13.
    """
    logits, target = _check(logits, target)
    weights = _check_weights("target_weights", target_weights, logits, total=1)
    # PyTorch's bincount would make the CPU wait for the largest class number.
    counts = torch.stack([(target == c).sum() for c in range(len(weights))])
    return F.cross_entropy(logits, target, weights / counts.clamp(min=1), reduction="sum")


def deep_supervision(
    outputs: tuple[Tensor, Sequence[Tensor]], target: Tensor, *, loss=cross_entropy, main: float = 0.75
) -> Tensor:
    """Return a convex combination of a network's loss and those of its auxiliary classifiers, which share 1 − `main` evenly.

    Args:
        outputs: logits `(B, K, *space)` and a list of auxiliary logits, as a network's `with_auxiliary` returns them.
        target: class numbers 0 to K − 1, `(B, *space)`.
        loss: function `loss(logits, target)`.
        main: weight of the network's own loss; .75 in the paper, which leaves .05 for each of 5 subnetworks.

    Source: Mlynarski et al. 2019, eq. 3.
    Taught in notebooks 12 and 13.
    """
    logits, auxiliary = outputs
    if not 0 <= main <= 1 or not auxiliary:
        raise ValueError(f"main={main} with {len(auxiliary)} auxiliary outputs; expected 0 to 1 and at least one of them")
    share = (1 - main) / len(auxiliary)
    return main * loss(logits, target) + share * sum(loss(other, target) for other in auxiliary)


def jaccard_distance(logits: Tensor, target: Tensor, *, per_class: bool = False) -> Tensor:
    """Return Σ_c (1 − J_c) over all classes, the background included; the result lies between 0 and K.

    J_c = Σ p t / (Σ p² + Σ t² − Σ p t) over all voxels of the batch, where p is the probability of class c, and t is 1 where
    the label is c and 0 elsewhere. For hard labels, 1 − J_c is the number of wrong voxels divided by the union of prediction
    and label.

    The paper's equation has a square root in the first sum. Without it, as in the authors' code, J_c is at most 1 and
    2 J_c / (1 + J_c) is the Dice score. Where class c does not occur in the label, 1 − J_c is 1 for every prediction, and its
    gradient is 0.

    Args:
        logits: network output `(B, K, *space)`.
        target: class numbers 0 to K − 1, `(B, *space)`.
        per_class: whether to return the K terms instead of their sum.

    Source: Kayalibay et al. 2017, eq. 3 and 4.
    Taught in notebook 08.
    """
    logits, target = _check(logits, target)
    p = logits.softmax(dim=1).clamp(1e-8, 1).transpose(0, 1).flatten(1)  # (K, voxels), never all zero
    t = F.one_hot(target, p.shape[0]).to(p.dtype).flatten(0, -2).T
    both = (p * t).sum(1)
    distances = 1 - both / (p.square().sum(1) + t.sum(1) - both)
    return distances if per_class else distances.sum()


def minmax_jaccard(prediction: Tensor, target: Tensor) -> Tensor:
    """Return Σ min(P, T) / Σ max(P, T) of class numbers: the multi-class Jaccard index that the paper rejects.

    It treats class numbers as quantities. To predict class 0 for a voxel of class 2 costs more than to predict class 1, and
    another numbering of the classes gives another score. Two empty maps give 1. The score is computed on the CPU, in float64, which
    Apple's GPUs lack.

    Source: Kayalibay et al. 2017, eq. 5.
    Taught in notebook 08.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction has shape {tuple(prediction.shape)}; expected that of the target, {tuple(target.shape)}"
        )
    prediction, target = prediction.cpu(), target.cpu()
    most = torch.maximum(prediction, target).double().sum()
    least = torch.minimum(prediction, target).double().sum()
    return torch.where(most > 0, least / most.clamp(min=1), 1.0)


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Return −(2 Σ o y + smooth) / (Σ o + Σ y + smooth) over all voxels of the batch.

    o is the predicted probability of the object, and y is 1 inside the object and 0 elsewhere. The loss is −1 when every voxel is
    right, and near 0 when none is. The sums run over the batch, so an image without the object adds only its false positives.

    Args:
        logits: `(B, 1, *space)`, which go through a sigmoid, or `(B, K, *space)`, which go through a softmax. With a softmax
            the loss is the mean over the classes 1 to K − 1.
        target: class numbers, `(B, *space)`. With a sigmoid, every class but 0 is the object.
        smooth: number that keeps the loss defined where there is no object; the authors' code has 1.

    Source: Drozdzal et al. 2018, section 3.3.
    Taught in notebook 10.
    """
    logits, target = _check(logits, target)
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
    """Return l1 · Σ|W| + l2 · ΣW² over the kernels of all convolutions; biases, batch normalisation and PReLU are not penalised.

    Source: Kamnitsas et al. 2017, appendix B (l1 = 1e-6, l2 = 1e-4 for 3D networks).
    """
    weights = [c.weight for c in convolutions(model)]
    total = weights[0].new_zeros(())
    if l1:
        total = total + l1 * torch.stack([w.abs().sum() for w in weights]).sum()
    if l2:
        total = total + l2 * torch.stack([w.square().sum() for w in weights]).sum()
    return total


def _check_weights(name: str, given: Tensor | Sequence[float], logits: Tensor, *, total: float | None = None) -> Tensor:
    """Return the weights of the classes on the device of the logits, after checking their number, and their values on the CPU."""
    weights = torch.as_tensor(given, dtype=logits.dtype)
    wrong = weights.shape != logits.shape[1:2]
    if not wrong and weights.device.type == "cpu":
        wrong = not (weights >= 0).all() or (total is not None and abs(float(weights.sum()) - total) > 1e-4)
    if wrong:
        rule = "none of them negative" if total is None else f"none negative, that sum to {total}"
        raise ValueError(f"{name}={given}; expected {logits.shape[1]} numbers, {rule}")
    return send(weights, logits.device)


def _check(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and target as they are computed with, float32 (or float64) and int64, after checking shape and kind."""
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(
            f"logits {tuple(logits.shape)} predict {expected} voxels but the target is {tuple(target.shape)}; "
            "a network of valid convolutions loses `model.margin` voxels on each side: crop the label alike"
        )
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"the target holds {target.dtype}; expected class numbers, whole numbers of any integer type")
    return logits if logits.dtype == torch.float64 else logits.float(), target.long()
