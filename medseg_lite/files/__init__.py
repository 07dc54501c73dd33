"""Read and write the files of a case. NIfTI and MetaImage are read. NIfTI is written, on the grid of the original file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..paths import file_for
from ..volume import Case, as_label, size_text
from ._metaimage import find_values, read_metaimage
from ._nifti import is_nifti, read_nifti, write_nifti
from ._scan import Scan, intensities, on_grid_of

__all__ = [
    "Scan",
    "find_values",
    "is_nifti",
    "read_case",
    "read_image",
    "read_label",
    "read_metaimage",
    "read_nifti",
    "write_case",
    "write_nifti",
]


def read_image(path: str | Path) -> Scan:
    """Read a MetaImage if the name ends in `.mhd` or `.mha`, otherwise a NIfTI file. Capital letters do not matter."""
    return read_metaimage(path) if Path(path).suffix.lower() in (".mhd", ".mha") else read_nifti(path)


def read_case(
    images: Mapping[str, str | Path] | str | Path,
    *,
    channels: Iterable[str] | None = None,
    label: str | Path | None = None,
    mask: str | Path | None = None,
    name: str | None = None,
    labels: Iterable[int] | None = None,
) -> Case:
    """Read the files of one subject, check that they fit together, and return a `Case`.

    Args:
        images: file of each channel, `{"flair": path, ...}`, NIfTI or MetaImage. Their order becomes the order of the channels.
            Or one 4-D file with all channels.
        channels: names of the volumes in a 4-D file, in their order.
        label: file with the class of each voxel. A file of floats is accepted if every value is a whole number.
        mask: file of the mask. Values above one half are inside, because stored masks may hold 0.99999997.
        name: name of the case. None takes the name of the folder that the files lie in.
        labels: classes that are allowed, for example `range(5)`. Any other value is an error.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has a defect, or two files do not lie on one grid. The message says what was found, what was expected
            and what to do.
    """
    if not images:
        raise ValueError("read_case needs at least one image file")
    if isinstance(images, Mapping):
        scans = {channel: read_image(path) for channel, path in images.items()}
    else:
        scans = _read_channels(images, tuple(channels or ()))
    first = next(iter(scans.values()))
    image = np.stack([_read_intensities(scan, first) for scan in scans.values()])
    label_array = mask_array = None
    if label is not None:
        scan = on_grid_of(first, read_image(label))
        label_array = as_label(scan.array, labels, scan.path)
    if mask is not None:
        scan = on_grid_of(first, read_image(mask))
        mask_array = scan.array > 0.5
        if not mask_array.any():
            raise ValueError(f"{scan.path} is an empty mask: no value is above 0.5; make the mask again or leave it out")
    return Case(
        image=image,
        channels=tuple(scans),
        name=name or _name_by_folder(first.path),
        label=label_array,
        mask=mask_array,
        affine=first.affine,
        native_axes=first.native_axes,
        header=first.header,
    )


def _name_by_folder(path: Path) -> str:
    """Return the name of the folder of a file. A file at the root of a drive has none and gives its own name."""
    return Path(os.path.abspath(path)).parent.name or path.name.split(".")[0]


def _read_intensities(scan: Scan, first: Scan) -> np.ndarray:
    """Return one channel of a case as a float32 array on the grid of the first one."""
    if scan.array.ndim != 3:
        raise ValueError(f"{scan.path} is 4-D ({size_text(scan.array.shape)}); expected one 3-D volume per file and sequence")
    return intensities(on_grid_of(first, scan))


def _read_channels(path: str | Path, channels: tuple[str, ...]) -> dict[str, Scan]:
    """Return the volumes of a 4-D file by the names of their channels."""
    scan = read_image(path)
    array = scan.array if scan.array.ndim == 4 else scan.array[..., None]
    if array.shape[3] != len(channels):
        raise ValueError(
            f"{scan.path} holds {array.shape[3]} volumes ({size_text(scan.array.shape)}); expected {len(channels)}: "
            f"{', '.join(channels) or 'name them with channels=(...)'}"
        )
    twice = [channel for channel in channels if channels.count(channel) > 1]
    if twice:
        raise ValueError(f"{len(twice)} volumes of {scan.path} are called {twice[0]!r}; give each channel a name of its own")
    return {channel: dataclasses.replace(scan, array=array[..., i]) for i, channel in enumerate(channels)}


def read_label(path: str | Path, case: Case, labels: Iterable[int] | None = None) -> np.ndarray:
    """Read a segmentation `(D, H, W)`, uint8, on the grid of `case`. `write_nifti` makes such files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file lies on another grid, or holds no class numbers.
    """
    grid = Scan(np.empty(case.shape, bool), case.affine, case.native_axes, case.header, Path(case.name))
    scan = on_grid_of(grid, read_image(path))
    return as_label(scan.array, labels, scan.path)


def write_case(folder: str | Path, case: Case) -> Path:
    """Write a case as a folder with one `<channel>.nii.gz` per channel, and `label.nii.gz` and `mask.nii.gz` if it has them."""
    folder, arrays = Path(folder), dict(zip(case.channels, case.image))
    for what in ("label", "mask"):
        if getattr(case, what) is not None:
            if what in arrays:
                raise ValueError(
                    f"{case.name} has a channel called {what!r}, whose file is that of its {what}: rename the channel"
                )
            arrays[what] = getattr(case, what)
    paths = {name: file_for(folder, name, ".nii.gz", what="channel") for name in arrays}
    for name, array in arrays.items():
        write_nifti(paths[name], array, case)
    return folder
