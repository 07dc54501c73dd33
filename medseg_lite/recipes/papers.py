"""The recipe of each network, and the settings of a named recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .. import models
from ..models import Network
from .deepmedic import deepmedic
from .drozdzal import drozdzal
from .havaei import havaei
from .kayalibay import kayalibay
from .mlynarski import mlynarski
from .recipe import Recipe

_NETWORKS = {
    deepmedic: models.DEEPMEDIC,
    havaei: models.HAVAEI,
    kayalibay: models.KAYALIBAY,
    drozdzal: models.DROZDZAL,
    mlynarski: models.MLYNARSKI,
}


def recipe_for(network: str) -> Callable[..., Network]:
    """Return the recipe that trains a network, by the network's name."""
    for recipe, networks in _NETWORKS.items():
        if network in networks:
            return recipe
    raise ValueError(f"network={network!r}; expected one of {', '.join(models.NETWORKS)}")


# Arguments of a paper's recipe that say on what, where and how a training is watched, not how it trains.
_NOT_SETTINGS = {
    "cases",
    "network",
    "classes",
    "validation",
    "folder",
    "device",
    "seed",
    "progress",
    "engine",
    "width",
    "options",
    "start",
}


def find_settings(recipe: Recipe) -> dict[str, object]:
    """Return all settings of a named recipe: its own, and the defaults of its paper's recipe for the others."""
    parameters = inspect.signature(recipe_for(recipe.network)).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in _NOT_SETTINGS}
    return {name: value for name, value in {**defaults, **recipe.settings}.items() if value is not None and value != ()}
