"""Your own scans: a folder of NIfTI files, found by name pattern.

Two layouts are understood. Either there is one sub-folder per case. This also fits BRATS 2017 to 2023:

    nifti_folder("BraTS20/HGG", channels={"flair": "*_flair.nii.gz", "t1c": "*_t1ce.nii.gz"}, label="*_seg.nii.gz",
                 labels=(0, 1, 2, 4))

Or all files lie side by side. Then the one `*` of each pattern stands for the name of the case:

    nifti_folder("scans", channels={"t2": "images/*_0000.nii.gz"}, label="labels/*.nii.gz", mask="all")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from ..files import read_case
from ..volume import Case, label_table
from ._cohort import Cohort, choose, contents, nonzero_mask, some, visible_images

# Keys of label and mask, and of the names of all files, beside the names of the channels. Error messages use them.
_LABEL, _MASK, _ALL = "the label", "the mask", "all files"


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
) -> Cohort:
    """Find the cases in a folder, check that each has its files, and return a cohort that reads them on demand.

    Args:
        folder: folder with one sub-folder per case, or with all files side by side.
        channels: name and file pattern of each channel, `{"flair": "*flair.nii.gz"}`. In a case's folder, exactly one NIfTI file
            must match. Side by side, the one `*` stands for the name of the case, and a file that several patterns match belongs
            to the longest pattern. Files whose names start with a dot are ignored.
        label: file pattern of the label. None for cases to predict on.
        label_optional: True accepts cases that have no label file.
        mask: file pattern of the mask. None takes the voxels that are not 0 in every channel, which fits skull-stripped scans.
            "all" uses the whole volume.
        labels: class numbers that the label files may hold. Any other is an error.
        label_map: class numbers to replace, `{4: 3}` for BRATS from 2017 on. `labels` is about the numbers before.
        cases: names of the cases to return, in that order. None returns all, sorted.

    Raises:
        FileNotFoundError: the folder is missing or holds no case.
        ValueError: a pattern is not usable, or a case has no file or several files for one pattern.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected the one that holds the cases")
    if not channels:
        raise ValueError('channels is empty; expected name and pattern of each channel, {"flair": "*flair.nii.gz"}')
    patterns = dict(channels)
    if reserved := [name for name in (_LABEL, _MASK, _ALL) if name in patterns]:
        raise ValueError(f"a channel is called {reserved[0]!r}, which stands for something else here; give it another name")
    if label is not None:
        patterns[_LABEL] = label
    if mask not in (None, "all"):
        patterns[_MASK] = mask
    _check_patterns(patterns)
    label_table(label_map or {})
    side_by_side = any(visible_images(folder, pattern) for pattern in channels.values())
    found = (_find_side_by_side if side_by_side else _find_in_folders)(folder, patterns)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no case: no sub-folder with NIfTI files, and no file that matches "
            f"{' or '.join(channels.values())}. It holds {contents(folder)}; point at the folder right above the cases"
        )
    options = {"nonzero": mask is None, "labels": None if labels is None else tuple(labels), "label_map": label_map}
    return Cohort(
        {
            name: partial(_read, name, _one_file_each(folder, name, matches, patterns, label_optional), **options)
            for name, matches in choose(found, cases, folder).items()
        }
    )


def _check_patterns(patterns: Mapping[str, str]) -> None:
    for role, pattern in patterns.items():
        path = PurePosixPath(pattern)
        if not pattern or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the pattern of {role} is {pattern!r}; expected one inside the folder, as in '*flair.nii.gz'")


def _find_in_folders(folder: Path, patterns: Mapping[str, str]) -> dict[str, dict]:
    """Return, for each case, the files that match each pattern, and as `_ALL` the names of all its files."""
    found = {}
    for place in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        matches = {role: visible_images(place, pattern) for role, pattern in patterns.items()}
        # A folder whose NIfTI files all lie deeper, and match nothing, is no case. It may be the folder of the cases.
        if any(matches.values()) or visible_images(place, "*"):
            there = [path.relative_to(place).as_posix() for path in visible_images(place, "**/*")]
            found[place.name] = {**matches, _ALL: there}
    return found


def _find_side_by_side(folder: Path, patterns: Mapping[str, str]) -> dict[str, dict]:
    """Return the same as `_find_in_folders`, where all files lie in one folder."""
    found, taken = {}, set()
    for role, pattern in sorted(patterns.items(), key=lambda item: -len(item[1])):
        if pattern.count("*") != 1 or set("?[") & set(pattern):
            raise ValueError(
                f"the pattern of {role} is {pattern!r}; where the files of all cases lie side by side it needs exactly "
                "one * (and no other wildcard), which stands for the name of the case"
            )
        before, after = pattern.split("*")
        for path in visible_images(folder, pattern):
            if path in taken:
                continue
            taken.add(path)
            relative = path.relative_to(folder).as_posix()
            name = relative[len(before) : len(relative) - len(after)]
            case = found.setdefault(name, {**{r: [] for r in patterns}, _ALL: []})
            case[role].append(path)
            case[_ALL].append(relative)
    return dict(sorted(found.items()))


def _one_file_each(
    folder: Path, name: str, matches: dict, patterns: Mapping[str, str], label_optional: bool
) -> dict[str, Path]:
    """Return the one file of a case that matches each pattern. The label may be missing if it is optional."""
    files = {}
    for role, pattern in patterns.items():
        paths = matches[role]
        if len(paths) == 1:
            files[role] = paths[0]
        elif paths:
            raise ValueError(
                f"{name} in {folder} has {len(paths)} files for {role} ({pattern!r}); it holds {some(matches[_ALL])}: "
                "narrow the pattern"
            )
        elif role != _LABEL or not label_optional:
            remedy = {_LABEL: ", or pass label_optional=True", _MASK: ""}.get(role, ", or leave the case or the channel out")
            raise ValueError(
                f"{name} in {folder} has no file for {role} ({pattern!r}); it holds {some(matches[_ALL])}: "
                f"correct the pattern or rename the file{remedy}"
            )
    return files


def _read(name: str, files: Mapping[str, Path], *, nonzero: bool, labels, label_map) -> Case:
    images = {role: path for role, path in files.items() if role not in (_LABEL, _MASK)}
    case = read_case(images, label=files.get(_LABEL), mask=files.get(_MASK), name=name, labels=labels)
    case = case.relabelled(label_map)
    return case.replace(mask=nonzero_mask(case)) if nonzero else case
