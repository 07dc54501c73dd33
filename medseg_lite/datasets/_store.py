"""Keep a cohort on disk. Each case is read, checked and normalised once, so training reads segments and never whole volumes."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import transforms
from ..engine.stored import SUFFIX, StoredCase, write
from ..volume import Case
from ._cohort import Cohort, choose, describe

VERSION = 2  # raised when a reader or a normalisation of this package gives another result than before


def store(
    cases: Sequence[Case],
    folder: str | Path,
    *,
    normalise: Callable[[Case], Case] | None = transforms.standardise,
    dtype: str = "float16",
    progress: bool = True,
) -> Cohort:
    """Write every case of a cohort to `folder`, normalised, and return the stored cohort.

        cases = datasets.store(datasets.msd("Task01_BrainTumour"), "cache/brains")
        recipes.deepmedic(cases, ...)

    A case that is there already is kept if its files, `normalise` and `dtype` have not changed. Otherwise it is written anew. So an
    interrupted call goes on where it stopped, and a call with nothing to do takes milliseconds. If there are several processes, let
    one of them store the cohort before the others. A BRATS case (4 × 240 × 240 × 155) takes about 30 MB. Writing it takes half a
    second once it is read, and drawing a segment from it takes less than a millisecond.

    Args:
        cases: cases to store. They are read one at a time, so the cohort may be larger than memory. For a cohort that a loader of
            this package made, a change is noticed by the name, size and time of its files. For other cases it is noticed by
            their content.
        folder: folder for one file per case, `<name>.safetensors`. The names must differ.
        normalise: function of a case that returns what the network sees, or None for the case as it is. It may also crop the case
            or add channels. It counts as changed if its source text changes, or the arguments in a `functools.partial`.
        dtype: type of the stored image, "float16" (3 decimal digits) or "float32". Blocks are float32 when they are read.
        progress: True shows a progress bar.

    Returns:
        A cohort whose cases are read from disk block by block.

    Raises:
        ValueError: two cases have one name, a name contains a slash, or a case has a defect.
        OSError: the disk is full. Complete cases are kept.
    """
    folder, paths = Path(folder), {}
    settings = {"normalise": describe(normalise), "dtype": dtype}
    with tqdm(total=len(cases), desc=f"storing in {folder.name}", disable=not progress, dynamic_ncols=True) as bar:
        for number in range(len(cases)):
            if isinstance(cases, Cohort):
                case, name = None, cases.names[number]
                origin = cases.origin(name)
            else:
                case = cases[number]
                name, origin = case.name, _content(case)
            if name in paths:
                raise ValueError(f"two cases are called {name}; their files would overwrite each other: rename one")
            path = paths[name] = _path(folder, name)
            key = hashlib.sha256(json.dumps([VERSION, origin, settings], sort_keys=True).encode()).hexdigest()
            if _key(path) != key:
                case = cases[number] if case is None else case
                case = case if normalise is None else normalise(case)
                write(path, case.replace(name=name), dtype=dtype, origin={"key": key, "settings": settings})
            bar.update()
    return _cohort(paths)


def stored(folder: str | Path, *, cases: Iterable[str] | None = None) -> Cohort:
    """Return the cohort that `store` wrote to `folder`. The files that it was made from are not needed.

    Args:
        folder: folder that was given to `store`.
        cases: names of the cases to return, in that order. None returns all, sorted.

    Raises:
        FileNotFoundError: the folder holds no stored case.
        ValueError: a file is damaged, or the cases were not all stored with the same settings.
    """
    folder = Path(folder)
    found = {p.name.removesuffix(SUFFIX): p for p in sorted(folder.glob(f"*{SUFFIX}")) if not p.name.startswith(".")}
    if not found:
        raise FileNotFoundError(f"{folder} holds no stored case; make them with datasets.store(cases, {str(folder)!r})")
    cohort = _cohort(choose(found, cases, folder))
    for case in cohort:
        if _made_by(case, "settings") != _made_by(cohort[0], "settings"):
            raise ValueError(
                f"{case.path} and {cohort[0].path} were normalised differently or have different types; store the cohort again, "
                "in a folder of its own"
            )
    return cohort


def _cohort(paths: dict[str, Path]) -> Cohort:
    opened = {name: StoredCase(path) for name, path in paths.items()}
    return Cohort({name: partial(opened.__getitem__, name) for name in opened})


def _path(folder: Path, name: str) -> Path:
    if name != Path(name).name or name.startswith(".") or "\\" in name:
        raise ValueError(f"a case is called {name!r}; a name that becomes a file must have no slashes, nor begin with a dot")
    return folder / f"{name}{SUFFIX}"


def _key(path: Path) -> str | None:
    """Return the key of the case that is there, or None if there is no whole file."""
    try:
        return _made_by(StoredCase(path), "key")
    except (OSError, ValueError):
        return None


def _made_by(case: StoredCase, fact: str) -> object:
    """Return what `store` noted about a case. None if the case was written without `store`."""
    return case.stored_as.get(fact) if isinstance(case.stored_as, dict) else None


def _content(case: Case) -> list:
    """Return numbers that change with the content of a case."""
    arrays = [case.image, case.label, case.mask, case.affine]
    sums = [None if a is None else [zlib.crc32(np.ascontiguousarray(a)), a.shape, a.dtype.str] for a in arrays]
    return [case.name, case.channels, case.native_axes, *sums]
