"""Each paper's training recipe, complete: what the notebooks, the command line and the benchmarks all call."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .. import models
from ._shared import regions_of
from .crossvalidation import cross_validate
from .deepmedic import deepmedic
from .drozdzal import drozdzal
from .havaei import havaei
from .kayalibay import kayalibay
from .mlynarski import mlynarski, pretrain_subnetwork

__all__ = [
    "cross_validate",
    "deepmedic",
    "drozdzal",
    "havaei",
    "kayalibay",
    "mlynarski",
    "of_network",
    "pretrain_subnetwork",
    "regions_of",
]


def of_network(network: str) -> Callable[..., nn.Module]:
    """The recipe that trains a network, by the network's name."""
    for recipe, networks in (
        (deepmedic, models.DEEPMEDIC),
        (havaei, models.HAVAEI),
        (kayalibay, models.KAYALIBAY),
        (drozdzal, models.DROZDZAL),
        (mlynarski, models.MLYNARSKI),
    ):
        if network in networks:
            return recipe
    raise ValueError(f"network={network!r}; expected one of {', '.join(models.NETWORKS)}")
