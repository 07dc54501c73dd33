"""Combine several networks: average their probabilities, or let their predictions vote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .arrays import as_array
from .models.network import Network


class Ensemble(Network):
    """The average of the class probabilities of networks that lose the same margin. It is used like any of its members.

    Its logits are the logarithm of the averaged probabilities, so softmax gives the average back. Networks with a single output
    are averaged after their sigmoid, and the ensemble has a single output too.

    Source: Kamnitsas et al. 2017, section 4.1.3 (three networks that differ in their random start).
    Taught in notebooks 09 and 11.
    """

    def __init__(self, members: Sequence[Network]):
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one network")
        self.copy_contract(members[0])
        for what, values in {
            "margin": [m.margin for m in members],
            "multiple": [m.multiple for m in members],
            "spatial_dims": [m.spatial_dims for m in members],
            "classes": [m.classes for m in members],
            "in_channels": [m.in_channels for m in members],
        }.items():
            if len(set(values)) > 1:
                raise ValueError(f"the networks of an ensemble must agree, but their {what} are {values}")
        channels = [m.card["channels"] for m in members if "channels" in m.card]
        if any(c != channels[0] for c in channels):
            raise ValueError(f"the networks of an ensemble were trained on different channels: {channels}")
        self.halo = max((m.halo for m in members if m.halo is not None), default=None)
        self.reach = max(m.reach for m in members)
        self.members = nn.ModuleList(members)

    def for_inference(self) -> Ensemble:
        """Return the ensemble of the members' inference forms."""
        return Ensemble([m.for_inference() for m in self.members])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *(n + 2 margin))` to logits of the averaged probabilities `(B, K, *n)`."""
        logits = [m(x).float() for m in self.members]
        if self.classes == 1:
            return torch.logit(sum(z.sigmoid() for z in logits) / len(logits), eps=1e-6)
        return torch.log((sum(z.softmax(1) for z in logits) / len(logits)).clamp_min(1e-30))


def hierarchical_vote(
    predictions: Sequence[np.ndarray],
    *,
    labels: tuple[int, int, int] = (1, 2, 3),
    thresholds: tuple[float, float, float] = (0.4, 0.3, 0.4),
) -> np.ndarray:
    """Combine the predictions of several networks by a tree of votes: tumour? core? enhancing?

    Let v_k be the number of networks that say class k, among n networks. A voxel is tumour if (v₁ + v₂ + v₃) / n ≥ t₁. A tumour
    voxel is core if (v₁ + v₃) / (v₁ + v₂ + v₃) ≥ t₂, else oedema. A core voxel enhances if v₃ / (v₁ + v₃) ≥ t₃. So votes for a
    rare class are compared with those for its rivals only, and weigh more than in a plain majority.

    Args:
        predictions: class numbers from each network, arrays of one shape, 0 where there is no tumour.
        labels: class numbers of non-enhancing core, oedema and enhancing core.
        thresholds: t₁, t₂, t₃.

    Returns:
        Class numbers in an array of that shape, uint8.

    Source: Mlynarski et al. 2019, section 2.5 and figure 7.
    Taught in notebook 13.
    """
    if len(predictions) == 0:
        raise ValueError("a vote needs at least one prediction")
    stack = np.stack([as_array(p) for p in predictions])
    labels = tuple(int(k) for k in labels)
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
