"""The content of one file, and the checks that all formats share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel import orientations

from ..volume import orientation, size_text, spans_space

GRID_TOLERANCE = 1e-3  # mm: affines that differ by less describe the same grid, unless voxels are smaller than a tenth of a mm
LOSS = 2**-11  # largest rounding error of intensities, relative to their range


@dataclass(eq=False)
class Scan:
    """The content of one file.

    Attributes:
        array: voxels in RAS+ order, `(D, H, W)` or `(D, H, W, C)`.
        affine: `(4, 4)` matrix from voxel indices to RAS+ world millimetres.
        native_axes: orientation in the file, such as "LPS".
        header: NIfTI header of the file, or None if it is another format.
        path: path of the file.
    """

    array: np.ndarray
    affine: np.ndarray
    native_axes: str
    header: nibabel.Nifti1Header | None
    path: Path


def as_scan(array: np.ndarray, affine: np.ndarray, header: nibabel.Nifti1Header | None, path: Path) -> Scan:
    """Return the content of a file in RAS+ order, after the checks that all formats share."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{path} is {array.ndim}-D ({size_text(array.shape)}); expected a 3-D volume. Export the whole volume, not one slice"
        )
    if not array.size:
        raise ValueError(f"{path} has no voxels ({size_text(array.shape)}); export it again")
    if not spans_space(affine):
        raise ValueError(
            f"{path} has an unusable affine {affine.tolist()}; set its orientation (sform or qform) and save again"
        )
    turn = orientation(affine)
    return _turned(Scan(array, affine, "".join(orientations.ornt2axcodes(turn)), header, path), turn)


def _turned(scan: Scan, turn: np.ndarray) -> Scan:
    """Return a scan with its axes permuted and flipped."""
    affine = scan.affine @ orientations.inv_ornt_aff(turn, scan.array.shape[:3])
    return dataclasses.replace(scan, array=orientations.apply_orientation(scan.array, turn), affine=affine)


def check_exists(path: Path, pattern: str) -> None:
    """Raise FileNotFoundError, with the names of the files beside it that match the pattern, if a file is missing."""
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob(pattern))[:6] if path.parent.is_dir() else []
        hint = f"; that folder holds {', '.join(beside)}" if beside else ""
        raise FileNotFoundError(f"{path} does not exist{hint}")


def check_content(path: Path) -> bytes:
    """Return the first bytes of a file. Raise ValueError if they show that it cannot be an image."""
    with open(path, "rb") as file:
        start = file.read(512)
    if path.name.startswith("._"):
        raise ValueError(f"{path} is macOS metadata, not an image; use the file without the leading '._'")
    if not start:
        raise ValueError(f"{path} is empty; download or export it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git-LFS pointer, not the data; run `git lfs pull` in its repository")
    if start.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not an image (a login or error page was saved); fetch it again")
    return start


def on_grid_of(first: Scan, scan: Scan) -> Scan:
    """Return a scan on the grid of another one. Raise ValueError if it lies elsewhere.

    Two files of one grid may be stored in different orientations. Where a grid lies at 45° between two axes, even their rounding
    may turn them to RAS+ in two ways. So the second one is turned to the first one's axes.
    """
    turn = np.rint(np.linalg.solve(first.affine[:3, :3], scan.affine[:3, :3]))
    permutes = (np.abs(turn).sum(axis=0) == 1).all() and (np.abs(turn).sum(axis=1) == 1).all()
    if permutes and not np.array_equal(turn, np.eye(3)):
        axes = np.abs(turn).argmax(axis=0)
        scan = _turned(scan, np.stack([axes, turn[axes, range(3)]], axis=1))
    here, there = scan.array.shape[:3], first.array.shape[:3]
    if here != there:
        raise ValueError(
            f"{scan.path} is {size_text(here)} but {first.path.name} is {size_text(there)}; the files of one case must share one "
            "grid: resample it to the other's grid first"
        )
    difference = np.abs(scan.affine - first.affine).max()
    smallest = np.linalg.norm(first.affine[:3, :3], axis=0).min()
    # Affines are stored as float32 in NIfTI.
    rounding = 4 * np.finfo(np.float32).eps * np.abs(first.affine).max()
    if difference > max(min(GRID_TOLERANCE, smallest / 100), rounding):
        axes = f" ({scan.native_axes} against {first.native_axes})" if scan.native_axes != first.native_axes else ""
        raise ValueError(
            f"{scan.path} and {first.path.name} have the same size but lie elsewhere in the world{axes}: their affines differ "
            f"by {difference:.3g} mm; resample one onto the other, or correct its header"
        )
    return scan


def intensities(scan: Scan) -> np.ndarray:
    """Return the voxels as a float32 array in C order, as the networks and transforms expect it.

    Raises ValueError if a voxel is not finite, if all are the same, or if float32 cannot tell them apart.
    """
    array, path = scan.array, scan.path
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise ValueError(f"{path} has {count} NaN or infinite voxels; replace them (numpy.nan_to_num) or export it again")
    low, high = array.min(), array.max()
    if low == high:
        raise ValueError(f"{path} is {low:g} everywhere: there is no image in it; export it again")
    with np.errstate(over="ignore"):
        image = np.ascontiguousarray(array, np.float32)
    if not np.can_cast(array.dtype, np.float32):
        low, high = float(low), float(high)
        if not np.isfinite(image).all() or np.abs(image - array).max() > LOSS * (high - low):
            raise ValueError(
                f"{path} holds values from {low:g} to {high:g}, which float32 cannot hold or tell apart; expected intensities that "
                "it can: subtract an offset, or divide by a factor"
            )
    return image
