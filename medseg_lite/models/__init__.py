"""The papers' networks, one builder per named network, at the papers' sizes unless `width` says otherwise."""

from .checkpoint import load, save
from .deepmedic import (
    big_deep_plus,
    deep,
    deep_plus,
    deeper2d_seg,
    deepmedic,
    dm2d_patch,
    dm2d_seg,
    large2d_seg,
    shallow,
    shallow_plus,
    wider2d_seg,
)

__all__ = [
    "NETWORKS",
    "big_deep_plus",
    "deep",
    "deep_plus",
    "deeper2d_seg",
    "deepmedic",
    "dm2d_patch",
    "dm2d_seg",
    "large2d_seg",
    "load",
    "save",
    "shallow",
    "shallow_plus",
    "wider2d_seg",
]

NETWORKS = tuple(name for name in __all__ if name not in ("NETWORKS", "load", "save"))  # the builders, by name
