"""Several networks, one answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Averages the class probabilities of networks that lose the same margin; used like any of its members.

    Its logits are the logarithm of the averaged probabilities, so softmax gives the average back.

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
        cards = [getattr(m, "card", {}) for m in members]
        channels = [c["channels"] for c in cards if "channels" in c]
        if any(c != channels[0] for c in channels):
            raise ValueError(f"the networks of an ensemble were trained on different channels: {channels}")
        self.card = cards[0]

    def for_inference(self) -> nn.Module:
        """The ensemble of its members' inference forms."""
        return _Average([m.for_inference() if hasattr(m, "for_inference") else m for m in self.members])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *(n + 2 margin))` to the logarithm of the averaged probabilities `(B, K, *n)`."""
        return _average(self.members, x)


class _Average(nn.Module):
    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return _average(self.members, x)


def _average(members, x: Tensor) -> Tensor:
    total = sum(m(x).float().softmax(1) for m in members)
    return torch.log((total / len(members)).clamp_min(1e-30))
