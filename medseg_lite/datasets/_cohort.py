"""Cohorts: cases that are read when they are asked for, and what the readers of all data sets share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import torch

from ..files import find_values, is_nifti
from ..volume import Case


class Cohort(Sequence):
    """Cases by number or by name. Each is read from its files every time, so a cohort may be larger than memory.

    `list(...)` keeps all cases in memory. That is much faster where cases are used again and again, as in training. `store` is as
    fast for cohorts larger than memory.

    Args:
        readers: function that reads each case, by the name of the case.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Case]]):
        self._readers = dict(readers)

    @property
    def names(self) -> list[str]:
        """The names of the cases. No case is read."""
        return list(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, key: int | str | slice) -> Case | Cohort:
        if isinstance(key, slice):
            return Cohort({name: self._readers[name] for name in self.names[key]})
        name = key if isinstance(key, str) else self.names[key]
        if name not in self._readers:
            raise KeyError(f"no case is called {name!r}; there are {some(self.names)}")
        return self._readers[name]()

    def origin(self, name: str) -> object:
        """Describe the files of a case and how they are read, see `describe`. The case is not read."""
        return describe(self._readers[name])

    def __repr__(self) -> str:
        return f"Cohort({len(self)} cases: {some(self.names)})"


def case_names(cases: Sequence[Case]) -> list[str]:
    """Return the names of cases. Those of a cohort are known without reading it."""
    return cases.names if isinstance(cases, Cohort) else [case.name for case in cases]


def add_found(found: dict[str, object], name: str, what: object) -> None:
    """Add a case to those found. Raise ValueError if another one has its name."""
    if found.setdefault(name, what) != what:
        raise ValueError(f"two cases are called {name}: {_where(found[name])} and {_where(what)}; rename one, or move it away")


def _where(what: object) -> str:
    return str(what[0] if isinstance(what, tuple) else what)


def choose(found: Mapping[str, object], cases: Iterable[str] | None, folder: Path) -> dict:
    """Return the entries of some cases in the order asked for. None returns all.

    Raises ValueError if `cases` is empty or names a case that was not found in `folder`.
    """
    if cases is None:
        return dict(found)
    cases = [cases] if isinstance(cases, str) else list(cases)
    unknown = [name for name in cases if name not in found]
    if unknown or not cases:
        raise ValueError(f"cases is {cases}, but {folder} has {some(list(found))}")
    return {name: found[name] for name in cases}


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files in `folder` that match, without hidden ones such as the `._name` that macOS leaves in archives."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected the one that holds the data set")
    return sorted(p for p in folder.glob(pattern) if p.is_file() and not p.name.startswith("."))


def visible_images(folder: Path, pattern: str) -> list[Path]:
    """Return the NIfTI files in `folder` that match, without hidden ones."""
    return [path for path in visible(folder, pattern) if is_nifti(path)]


def stem(path: str | PurePath) -> str:
    """Return the name of a NIfTI file without `.nii` or `.nii.gz`."""
    return re.sub(r"\.nii(\.gz)?$", "", PurePath(path).name, flags=re.IGNORECASE)


def some(names: Sequence[str], most: int = 8) -> str:
    """Return the first names as text for an error message, with the number of the others."""
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "nothing"


def contents(folder: Path) -> str:
    """Return the names of what lies in a folder, as text for an error message."""
    if not folder.is_dir():
        return "nothing, it does not exist"
    return some(sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith(".")))


def nonzero_mask(case: Case) -> np.ndarray:
    """Return where any channel is not 0, the brain in a skull-stripped scan. Raise ValueError if that is everywhere."""
    inside = (case.image != 0).any(axis=0)
    if inside.mean() > 0.99:
        corner = ", ".join(f"{c} {v:g}" for c, v in zip(case.channels, case.image[:, 0, 0, 0]))
        raise ValueError(
            f"{case.name}: {100 * inside.mean():.1f} % of the voxels are not 0 (the first corner holds {corner}), so the mask "
            "cannot be made from them; pass the pattern of a mask file, or mask='all' to use the whole volume"
        )
    return inside


def describe(value: object) -> object:
    """Return a description, in terms of JSON, that changes when the result of a reader or of a function of cases may change.

    A file is known by name, size and time of change, a folder by the files in it. A function of this package is known by its name,
    any other by its source text too, and a `partial` also by its arguments. `_store.VERSION` stands for the functions of this
    package: it is raised when one of them gives another result.

    Raises ValueError for a function that uses variables of the function around it, which may change unseen.
    """
    if isinstance(value, Path):
        if value.is_dir():
            return [_describe_file(path) for path in sorted(value.rglob("*")) if path.is_file()]
        return [_describe_file(path) for path in (value, *_beside(value))]
    if isinstance(value, partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): describe(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [describe(v) for v in value]
    if inspect.isfunction(value):
        return _describe_function(value)
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _describe_function(function: Callable) -> list[str]:
    name = [function.__module__, function.__qualname__]
    if function.__closure__:
        raise ValueError(
            f"{function.__qualname__} uses variables of the function around it, so a change of them would go unseen; "
            "pass functools.partial(function, ...) with their values instead"
        )
    if function.__module__.partition(".")[0] == __package__.partition(".")[0]:
        return name
    try:
        return [*name, inspect.getsource(function)]
    except OSError:  # typed at a prompt
        return [*name, function.__code__.co_code.hex() + repr(function.__code__.co_consts)]


def _beside(path: Path) -> list[Path]:
    """Return the file with the values of a MetaImage header, which may change while the header stays."""
    try:
        return [find_values(path)] if path.suffix.lower() == ".mhd" else []
    except (OSError, ValueError):  # it is told when the case is read
        return []


def _describe_file(path: Path) -> list:
    try:
        found = path.stat()
    except FileNotFoundError:
        return [path.name, None]
    return [path.name, found.st_size, found.st_mtime_ns]
