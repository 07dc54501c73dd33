"""Plain descriptions of all that makes a run, so that its folder is never continued by another run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

from ..volume import array_code


def describe(value: object) -> object:
    """Return a plain description of a setting, made of numbers, texts, lists and dictionaries.

    Functions and classes are known by their names, a `partial` also by its arguments, other objects by their class.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return describe(value.tolist())
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [describe(part) for part in value]
        return sorted(parts, key=str) if isinstance(value, (set, frozenset)) else parts
    if isinstance(value, partial):
        return {
            "function": describe(value.func),
            **describe(value.keywords),
            **({"first": describe(value.args)} if value.args else {}),
        }
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__qualname__
    return type(value).__qualname__


def weights_code(model: nn.Module) -> str:
    """Return a short code of the weights of a network."""
    return array_code(*(value.detach().cpu().numpy() for value in model.state_dict().values()))


def find_differences(before: object, now: object, name: str = "") -> list[str]:
    """Return a line for each entry in which two descriptions differ, such as "optimizer.momentum was 0.6 and is 0.9"."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in dict.fromkeys([*before, *now])
            for line in find_differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [f"{name} was {_short(before)} and is {_short(now)}"]


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
