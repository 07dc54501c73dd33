"""Plain values: Python's own numbers, texts, lists and dictionaries, which every file of this package holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

import numpy as np
import torch


def make_plain(value: object, name: str, *, tensors: bool = False) -> object:
    """Return a value in Python's own numbers, texts, lists and dictionaries.

    NumPy's numbers and tensors become numbers, arrays become lists. A file with NumPy's own could be written, but not read back.

    Args:
        value: value to store.
        name: name of the value in error messages.
        tensors: True for a file of PyTorch, which holds tensors, tuples and keys of any kind. They stay as they are. False for JSON,
            whose keys are texts.

    Raises:
        TypeError: the value, or a part of it, is something else.
    """
    if value is None or type(value) in (bool, int, float, str) or (tensors and isinstance(value, (torch.Tensor, bytes))):
        return value
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return make_plain(value.tolist(), name)
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value, name, tensors)
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [make_plain(part, f"{name}[{n}]", tensors=tensors) for n, part in enumerate(value)]
        if isinstance(value, (set, frozenset)):
            return sorted(parts, key=str)
        return tuple(parts) if tensors and isinstance(value, tuple) else parts
    raise TypeError(
        f"{name} is of type {type(value).__name__}, which cannot be stored; expected numbers, texts, lists or dictionaries of them"
    )


def _plain_mapping(value: Mapping, name: str, tensors: bool) -> Mapping:
    pairs = [(make_plain(key, name), make_plain(part, f"{name}.{key}", tensors=tensors)) for key, part in value.items()]
    if tensors:
        same = all(new is old for pair, before in zip(pairs, value.items()) for new, old in zip(pair, before))
        return value if same else dict(pairs)  # a network's state has attributes of its own
    plain = {str(key): part for key, part in pairs}
    if len(plain) < len(pairs):
        raise TypeError(f"{name} has keys that become one when they are stored, among {', '.join(plain)}; rename one")
    return plain
