"""A cohort kept on disk, each case read, checked and normalised once, so that training reads segments and never volumes."""

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


def store(
    cases: Sequence[Case],
    folder: str | Path,
    *,
    normalise: Callable[[Case], Case] | None = transforms.standardise,
    dtype: str = "float16",
    progress: bool = True,
) -> Cohort:
    """Write every case of a cohort to `folder`, normalised, and return the stored cohort, for sampling without loading.

        cases = datasets.store(datasets.msd("Task01_BrainTumour"), "cache/brains")
        recipes.deepmedic(cases, ...)

    Cases that are there already are kept if their files, `normalise` and `dtype` are still the same, and are written anew
    otherwise; so an interrupted call goes on where it stopped, and one with nothing left to do takes milliseconds. Of several
    processes let one do it before the others. A BRATS case (4 x 240 x 240 x 155) takes about 30 MB, half a second to write once it is read,
    and less than a millisecond to draw a segment from.

    Args:
        cases: read one at a time, so that the cohort may be larger than memory. A change is noticed by the name, size and time
            of the files of a cohort that this package's loaders made, and by the content of other cases.
        folder: gets one file per case, `<name>.safetensors`; the names must differ.
        normalise: what the network is to see of a case, or None for the case as it is. Any function of a case, also one that
            crops it or adds channels; it counts as changed when its source text does, or the arguments in a `functools.partial`.
        dtype: "float16" (3 decimal digits) or "float32" of the stored image. Blocks are float32 when they are read.

    Raises:
        ValueError: two cases have one name, a name contains a slash, or a case has a defect.
        OSError: the disk is full. Complete cases are kept.
    """
    folder, paths = Path(folder), {}
    settings = {"normalise": describe(normalise), "dtype": dtype}
    with tqdm(total=len(cases), desc=f"storing in {folder.name}", disable=not progress, dynamic_ncols=True) as bar:
        for number in range(len(cases)):
            case = None
            if hasattr(cases, "origin"):
                name, origin = cases.names[number], cases.origin(cases.names[number])
            else:
                case = cases[number]
                name, origin = case.name, _content(case)
            if name in paths:
                raise ValueError(f"two cases are called {name}; their files would overwrite each other: rename one")
            path = paths[name] = _path(folder, name)
            key = hashlib.sha256(json.dumps([origin, settings], sort_keys=True).encode()).hexdigest()
            if _key(path) != key:
                case = cases[number] if case is None else case
                case = case if normalise is None else normalise(case)
                write(path, case.replace(name=name), dtype=dtype, origin={"key": key, "settings": settings})
            bar.update()
    return _cohort(paths)


def stored(folder: str | Path, *, cases: Iterable[str] | None = None) -> Cohort:
    """The cohort that `store` wrote to `folder`, without the files that it was made from.

    Args:
        cases: names of the cases wanted, in that order; by default all, sorted.

    Raises:
        FileNotFoundError: there is none.
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
    """Of the case that is there, or None where there is no whole file."""
    try:
        return _made_by(StoredCase(path), "key")
    except (OSError, ValueError):
        return None


def _made_by(case: StoredCase, what: str) -> object:
    return case.stored_as.get(what) if isinstance(case.stored_as, dict) else None  # where `stored.write` was used alone


def _content(case: Case) -> list:
    arrays = [case.image, case.label, case.mask, case.affine]
    sums = [None if a is None else [zlib.crc32(np.ascontiguousarray(a)), a.shape, a.dtype.str] for a in arrays]
    return [case.name, case.channels, case.native_axes, *sums]
