"""Several networks, one answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Averages the class probabilities of networks that lose the same margin; used like any of its members.

    Its logits are the logarithm of the averaged probabilities, so softmax gives the average back. Networks with a single output
    are averaged after their sigmoid, and the ensemble has a single output too.

    Source: Kamnitsas et al. 2017, section 4.1.3 (three networks that differ in their random start).
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one network")
        self.members = nn.ModuleList(members)
        for name in ("margin", "multiple", "spatial_dims", "classes", "in_channels"):
            values = [getattr(m, name) for m in members]
            if len(set(values)) > 1:
                raise ValueError(f"the networks of an ensemble must agree, but their {name} are {values}")
            setattr(self, name, values[0])
        if any(hasattr(m, "halo") for m in members):
            self.halo = max(m.halo for m in members)
        cards = [getattr(m, "card", {}) for m in members]
        channels = [c["channels"] for c in cards if "channels" in c]
        if any(c != channels[0] for c in channels):
            raise ValueError(f"the networks of an ensemble were trained on different channels: {channels}")
        self.card = cards[0]

    def for_inference(self) -> nn.Module:
        """The ensemble of its members' inference forms."""
        return _Average([m.for_inference() if hasattr(m, "for_inference") else m for m in self.members])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *(n + 2 margin))` to logits of the averaged probabilities `(B, K, *n)`."""
        return _average(self.members, x)


class _Average(nn.Module):
    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return _average(self.members, x)


def _average(members, x: Tensor) -> Tensor:
    logits = [m(x).float() for m in members]
    if logits[0].shape[1] == 1:
        return torch.logit(sum(z.sigmoid() for z in logits) / len(logits), eps=1e-6)
    return torch.log((sum(z.softmax(1) for z in logits) / len(logits)).clamp_min(1e-30))


def hierarchical_vote(
    predictions: Sequence[np.ndarray],
    *,
    labels: tuple[int, int, int] = (1, 2, 3),
    thresholds: tuple[float, float, float] = (0.4, 0.3, 0.4),
) -> np.ndarray:
    """Combine the segmentations of several networks by a tree of votes: tumour? core? enhancing?

    With v_k the number of networks that say class k, and n networks: a voxel is tumour if (v₁ + v₂ + v₃) / n ≥ t₁; a tumour
    voxel is core if (v₁ + v₃) / (v₁ + v₂ + v₃) ≥ t₂, else oedema; a core voxel enhances if v₃ / (v₁ + v₃) ≥ t₃.
    Votes for rare classes are so compared with their rivals only, and weigh more than in a plain majority.

    Args:
        predictions: label maps of one shape, 0 where there is no tumour.
        labels: numbers of non-enhancing core, oedema and enhancing core in them.
        thresholds: t₁, t₂, t₃.

    Returns:
        A label map of that shape, uint8.

    Source: Mlynarski et al. 2019, section 2.5 and figure 7.
    """
    if len(predictions) == 0:
        raise ValueError("a vote needs at least one prediction")
    stack = np.stack([np.asarray(p) for p in predictions])
    odd = np.setdiff1d(stack, [0, *labels])
    if odd.size or len(set(labels)) != 3 or 0 in labels:
        raise ValueError(
            f"the predictions hold {odd.tolist()} beside 0 and labels={labels}; three different classes are voted on"
        )
    core, oedema, enhancing = ((stack == k).sum(0) for k in labels)
    tumour_votes, core_votes = core + oedema + enhancing, core + enhancing
    t_tumour, t_core, t_enhancing = thresholds
    # Products instead of quotients: nothing is divided by zero, and ties like 2/5 >= .4 do not depend on rounding.
    tumour = tumour_votes >= t_tumour * len(stack) - 1e-9
    is_core = core_votes >= t_core * tumour_votes - 1e-9
    enhances = enhancing >= t_enhancing * core_votes - 1e-9
    result = np.where(is_core, np.where(enhances, labels[2], labels[0]), labels[1])
    return np.where(tumour & (tumour_votes > 0), result, 0).astype(np.uint8)
