"""Cases that are read when they are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from ..volume import Case


class Cohort(Sequence):
    """Cases by number or by name, each read from its files every time, so that a cohort may be larger than memory.

    `list(...)` keeps them all in memory, which is much faster where cases are used again and again, as in training; `store`
    does as well for cohorts larger than memory.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Case]]):
        self._readers = dict(readers)

    @property
    def names(self) -> list[str]:
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
        """What a case is read from and how, without reading it: changes when one of its files does."""
        return describe(self._readers[name])

    def __repr__(self) -> str:
        return f"Cohort({len(self)} cases: {some(self.names)})"


def choose(found: Mapping[str, object], cases: Iterable[str] | None, folder: Path) -> dict:
    """The cases wanted, in the order asked for; all where `cases` is None."""
    if cases is None:
        return dict(found)
    cases = [cases] if isinstance(cases, str) else list(cases)
    unknown = [name for name in cases if name not in found]
    if unknown or not cases:
        raise ValueError(f"cases is {cases}, but {folder} has {some(list(found))}")
    return {name: found[name] for name in cases}


def visible(folder: Path, pattern: str) -> list[Path]:
    """Files in `folder` that match, without the `._name` that macOS leaves in archives."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected the one that holds the data set")
    return sorted(p for p in folder.glob(pattern) if p.is_file() and not p.name.startswith("."))


def some(names: Sequence[str], most: int = 8) -> str:
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "nothing"


def describe(value: object) -> object:
    """What a case is made from, or how, in terms of JSON: equal as long as nothing changed.

    Files, and those in a folder, are known by name, size and time of change, functions by name and source text with the arguments that a `partial`
    gives them.

    Raises ValueError for a function that uses variables of the function around it, which may change unseen.
    """
    if isinstance(value, Path):
        if value.is_dir():
            return [_file(path) for path in sorted(value.rglob("*")) if path.is_file()]
        values = sorted(value.parent.glob(f"{value.stem}.*raw")) if value.suffix == ".mhd" else []
        return [_file(path) for path in (value, *values)]
    if isinstance(value, partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): describe(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [describe(v) for v in value]
    if inspect.isfunction(value):
        if value.__closure__:
            raise ValueError(
                f"{value.__qualname__} uses variables of the function around it, so a change of them would go unseen; "
                "pass functools.partial(function, ...) with their values instead"
            )
        return [value.__module__, value.__qualname__, _source(value)]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _file(path: Path) -> list:
    try:
        found = path.stat()
    except FileNotFoundError:
        return [path.name, None]
    return [path.name, found.st_size, found.st_mtime_ns]


@cache
def _source(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except OSError:  # typed at a prompt
        return function.__code__.co_code.hex() + repr(function.__code__.co_consts)
