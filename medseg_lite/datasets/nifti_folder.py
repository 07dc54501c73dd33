"""Your own scans: a folder of NIfTI files, found by name pattern.

Two layouts are understood. One sub-folder per case, which also covers BRATS 2017 to 2023:

    nifti_folder("BraTS20/HGG", channels={"flair": "*_flair.nii.gz", "t1c": "*_t1ce.nii.gz"}, label="*_seg.nii.gz",
                 labels=(0, 1, 2, 4))

Or all files side by side, where the one `*` of each pattern stands for the name of the case:

    nifti_folder("scans", channels={"t2": "images/*_0000.nii.gz"}, label="labels/*.nii.gz", mask="all")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ..files import read_case
from ..volume import Case
from ._cohort import describe

# Keys of the label and mask beside the channels' names, and what messages call them.
_LABEL, _MASK = "the label", "the mask"


class NiftiFolder(Sequence):
    """The cases that `nifti_folder` found, by number or by name.

    A case is read from its files every time it is asked for, so a cohort may be larger than memory; `list(...)` keeps
    them all in memory, which is much faster where cases are used again and again, as in training; `store` does as well for
    cohorts larger than memory.
    """

    def __init__(self, files: dict[str, dict[str, Path]], *, mask: str | None, labels, label_map):
        self._files, self._mask, self._labels, self._label_map = files, mask, labels, label_map

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, key: int | str | slice) -> Case | NiftiFolder:
        if isinstance(key, slice):
            files = {name: self._files[name] for name in self.names[key]}
            return NiftiFolder(files, mask=self._mask, labels=self._labels, label_map=self._label_map)
        name = key if isinstance(key, str) else self.names[key]
        if name not in self._files:
            raise KeyError(f"no case is called {name!r}; there are {_some(self.names)}")
        return self._read(name)

    def origin(self, name: str) -> object:
        """What a case is read from and how, without reading it: changes when one of its files does."""
        return describe([self._files[name], self._mask, self._labels, self._label_map])

    def __repr__(self) -> str:
        return f"NiftiFolder({len(self)} cases: {_some(self.names)})"

    def _read(self, name: str) -> Case:
        files = dict(self._files[name])
        label, mask = files.pop(_LABEL, None), files.pop(_MASK, None)
        case = read_case(files, label=label, mask=mask, name=name, labels=self._labels)
        if self._label_map is not None and case.label is not None:
            table = np.arange(256, dtype=np.uint8)
            table[list(self._label_map)] = list(self._label_map.values())
            case.label = table[case.label]
        if self._mask is None:
            case.mask = nonzero(case)
        return case


def nifti_folder(
    folder: str | Path,
    *,
    channels: Mapping[str, str],
    label: str | None = None,
    label_optional: bool = False,
    mask: str | None = None,
    labels: Iterable[int] | None = None,
    label_map: Mapping[int, int] | None = None,
    cases: Iterable[str] | None = None,
) -> NiftiFolder:
    """Find the cases in a folder, check that each has its files, and return a sequence that reads them on demand.

    Args:
        folder: one sub-folder per case, or all files side by side.
        channels: name and file pattern of each sequence, `{"flair": "*flair.nii.gz"}`. In a case's folder, exactly one
            NIfTI file must match. Side by side, the one `*` stands for the name of the case, and a file that several
            patterns match belongs to the longest. Files whose names start with a dot are ignored.
        label: pattern of the label; None for cases to predict on.
        label_optional: True accepts cases that have no label file.
        mask: pattern of the mask; None takes the voxels that are not 0 in every sequence, as fits skull-stripped
            scans; "all" uses the whole volume.
        labels: the class numbers that the label files may hold; any other is an error.
        label_map: class numbers to replace, `{4: 3}` for BRATS from 2017 on; `labels` speaks of the numbers before.
        cases: names of the cases wanted, in that order; by default all, sorted.

    Raises:
        FileNotFoundError, ValueError: the folder or a sequence is missing, several files match, or no case is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected the one that holds the cases")
    if not channels:
        raise ValueError('channels is empty; expected name and pattern of each sequence, {"flair": "*flair.nii.gz"}')
    patterns = dict(channels)
    if label is not None:
        patterns[_LABEL] = label
    if mask not in (None, "all"):
        patterns[_MASK] = mask
    for role, pattern in patterns.items():
        path = PurePosixPath(pattern)
        if not pattern or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the pattern of {role} is {pattern!r}; expected one inside the folder, as in '*flair.nii.gz'")

    for number in [*(label_map or {}).keys(), *(label_map or {}).values()]:
        if not 0 <= number <= 255:
            raise ValueError(f"label_map holds {number}; expected classes from 0 to 255")

    if any(_images(folder, pattern) for pattern in channels.values()):
        found = _find_side_by_side(folder, patterns)
    else:
        found = _find_in_folders(folder, patterns)
    if not found:
        there = _some(sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith(".")))
        raise FileNotFoundError(
            f"{folder} holds no case: no sub-folder with NIfTI files, and no file that matches "
            f"{' or '.join(channels.values())}. It holds {there}; point at the folder right above the cases"
        )
    if cases is not None:
        cases = list(cases)
        unknown = [name for name in cases if name not in found]
        if unknown or not cases:
            raise ValueError(f"cases is {cases}, but {folder} has {_some(list(found))}")
        found = {name: found[name] for name in cases}

    files = {}
    for name, matches in found.items():
        files[name] = {}
        for role, pattern in patterns.items():
            paths = matches[role]
            if not paths and role == _LABEL and label_optional:
                continue
            if len(paths) != 1:
                there = _some(matches["there"])
                what = f"no file for {role}" if not paths else f"{len(paths)} files for {role}"
                remedy = "correct the pattern or rename the file" if not paths else "narrow the pattern"
                if not paths and role == _LABEL:
                    remedy += ", or pass label_optional=True"
                elif not paths and role not in (_MASK, _LABEL):
                    remedy += ", or leave the case or the sequence out"
                raise ValueError(f"{name} in {folder} has {what} ({pattern!r}); it holds {there}: {remedy}")
            files[name][role] = paths[0]
    if labels is not None:
        labels = tuple(labels)
    return NiftiFolder(files, mask=mask, labels=labels, label_map=label_map)


def _find_in_folders(folder: Path, patterns: Mapping[str, str]) -> dict[str, dict]:
    found = {}
    for place in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        matches = {role: _images(place, pattern) for role, pattern in patterns.items()}
        # A folder whose NIfTI files all lie deeper, and match nothing, is no case: it may be the folder of the cases.
        if any(matches.values()) or _images(place, "*"):
            there = [path.relative_to(place).as_posix() for path in _images(place, "**/*")]
            found[place.name] = {**matches, "there": there}
    return found


def _find_side_by_side(folder: Path, patterns: Mapping[str, str]) -> dict[str, dict]:
    found, taken = {}, set()
    for role, pattern in sorted(patterns.items(), key=lambda item: -len(item[1])):
        if pattern.count("*") != 1 or set("?[") & set(pattern):
            raise ValueError(
                f"the pattern of {role} is {pattern!r}; where the files of all cases lie side by side it needs exactly "
                "one * (and no other wildcard), which stands for the name of the case"
            )
        before, after = pattern.split("*")
        for path in _images(folder, pattern):
            if path in taken:
                continue
            taken.add(path)
            relative = path.relative_to(folder).as_posix()
            name = relative[len(before) : len(relative) - len(after)]
            case = found.setdefault(name, {**{r: [] for r in patterns}, "there": []})
            case[role].append(path)
            case["there"].append(relative)
    return dict(sorted(found.items()))


def _images(folder: Path, pattern: str) -> list[Path]:
    """NIfTI files that match, without hidden ones such as the `._name` that macOS leaves in archives."""
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.name.endswith((".nii", ".nii.gz")) and not path.name.startswith(".") and path.is_file()
    )


def nonzero(case: Case) -> np.ndarray:
    inside = (case.image != 0).any(axis=0)
    if inside.mean() > 0.99:
        corner = ", ".join(f"{c} {v:g}" for c, v in zip(case.channels, case.image[:, 0, 0, 0]))
        raise ValueError(
            f"{case.name}: {100 * inside.mean():.1f} % of the voxels are not 0 (the first corner holds {corner}), so the mask "
            "cannot be made from them; pass the pattern of a mask file, or mask='all' to use the whole volume"
        )
    return inside


def _some(names: Sequence[str], most: int = 8) -> str:
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "nothing"
