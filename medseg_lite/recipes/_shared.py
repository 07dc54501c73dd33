"""What the recipes share: the network from its seed, checks of the cases, the validation, the card of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .. import datasets, models, training
from ..volume import Case


def check(cases: Sequence[Case], network: str, networks: Sequence[str], classes: int | None) -> int:
    """The number of classes, once it is clear that there is something to train on and a network to train."""
    if not cases:
        raise ValueError("no cases to train on; give at least one labelled case")
    if network not in networks:
        raise ValueError(f"network={network!r}; expected one of {', '.join(networks)}")
    return 1 + max(map(_highest_label, cases)) if classes is None else classes


def _highest_label(case: Case) -> int:
    """Return the highest class of a labelled case. A stored case knows it without reading its label."""
    if not case.labelled:
        raise ValueError(f"{case.name} has no label; training needs one")
    return case.highest_label


def build(
    network: str,
    cases: Sequence[Case],
    classes: int,
    width: float,
    seed: int,
    device,
    *,
    channels: int | None = None,
    **options,
) -> nn.Module:
    """The network with the weights that the seed draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(models, network)(
            in_channels=channels or len(cases[0].channels), classes=classes, width=width, **options
        )
    return model.to(device)


def validation_of(cases: Sequence[Case], classes: int) -> Callable | None:
    """The validation of `training.fit`, where there are cases for it."""
    return training.validate_on(cases, regions=regions_of(classes)) if cases else None


def card(network: str, cases: Sequence[Case], classes: int, steps: int, seed: int, device) -> dict:
    """What was done, for the checkpoint."""
    return {
        "network": network,
        "channels": list(cases[0].channels),
        "classes": classes,
        "trained_on": datasets.case_names(cases),
        "steps": steps,
        "seed": seed,
        "device": str(device),
    }


def regions_of(classes: int) -> str | dict[str, list[int]]:
    """The regions to score: BRATS 2015's for five classes, otherwise each class but the background by itself.

    A network with one class is one with a single output, a sigmoid's.
    """
    if classes == 5:
        return "brats2015"
    return {"lesion": [1]} if classes <= 2 else {f"class_{c}": [c] for c in range(1, classes)}
