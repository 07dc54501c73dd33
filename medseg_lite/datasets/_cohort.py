"""Cases that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..volume import Case


class Cohort(Sequence):
    """Cases by number or by name, each read from its files every time, so that a cohort may be larger than memory.

    `list(...)` keeps them all in memory, which is much faster where cases are used again and again, as in training.
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
