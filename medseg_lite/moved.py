"""Names that have moved: the old ones go on working for one release, with a warning that gives the new one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping


def forward(module: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """Return a module's `__getattr__`, which finds names that stand elsewhere now.

    Args:
        module: name of the module, `__name__`.
        names: new place of each old name, such as `{"read_case": "medseg_lite.files.read_case"}`.
    """

    def find(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, new = names[name].rsplit(".", 1)
        warnings.warn(f"{module}.{name} is {names[name]} now", DeprecationWarning, stacklevel=2)
        return vars(importlib.import_module(place))[new]

    return find
