"""Read and write NIfTI files, versions 1 and 2."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel import orientations
from nibabel.openers import ImageOpener

from ..paths import atomic_write
from ..volume import Case, orientation, shear, size_text
from ._scan import Scan, as_scan, check_content, check_exists

_UNITS = {1: 1000.0, 3: 0.001}  # lengths in mm by NIfTI's codes of metres and microns; other codes stand for mm or for nothing
_warned: set[Path] = set()  # files without an orientation that the reader was told of


def read_nifti(path: str | Path) -> Scan:
    """Read a `.nii` or `.nii.gz` file and turn it to RAS+. A trailing axis of length one is dropped.

    Headers in metres or microns are converted to mm. A warning names a file that stores no orientation (both codes 0).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read. The message says what it is (a text file, a web page, a Git-LFS pointer, a truncated
            download) and what to do.
    """
    path = Path(path)
    check_exists(path, "*.nii*")
    _check_is_nifti(path)
    try:
        image = _load(path)
        array = np.asanyarray(image.dataobj)
        with ImageOpener(path) as file:  # the header as it is; nibabel corrects its own copy
            header = type(image.header).from_fileobj(file, check=False)
    except nibabel.filebasedimages.ImageFileError as error:
        raise ValueError(
            f"{path} is not a NIfTI file: its start is damaged or cut off, or it is another format under this name; "
            "download or export it again"
        ) from error
    except (EOFError, zlib.error, OSError, ValueError, OverflowError, nibabel.spatialimages.HeaderDataError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be read ({reason}); the file is truncated or damaged: download or export it again"
        ) from error
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path} holds {_kind(array.dtype)} values; expected one real number per voxel")
    _check_geometry(path, header, min(array.ndim, 3))
    affine = image.affine.copy()
    affine[:3] *= _unit(header)
    return as_scan(array, affine, image.header, path)


def _load(path: Path) -> nibabel.Nifti1Image:
    """Open a file without reading its voxels. `nibabel.load` finds no files whose ending has small and capital letters."""
    ending = path.name.lower().rindex(".nii")
    if path.name[ending : ending + 4] in (".nii", ".NII"):
        return nibabel.load(path)
    with ImageOpener(path) as file:
        size = file.read(4)
    large = nibabel.Nifti2Header.sizeof_hdr in (int.from_bytes(size, order) for order in ("little", "big"))
    kind = nibabel.Nifti2Image if large else nibabel.Nifti1Image
    return kind.from_file_map(kind.make_file_map({"image": str(path)}))


def _unit(header: nibabel.Nifti1Header | None) -> float:
    """Return how many mm the unit of a header has."""
    return 1.0 if header is None else _UNITS.get(int(header["xyzt_units"]) & 7, 1.0)


def _check_geometry(path: Path, header: nibabel.Nifti1Header, dims: int) -> None:
    """Raise ValueError if the voxel size is needed and not stored. Warn, once for each file, if the orientation is not stored."""
    if header["sform_code"] != 0:
        return
    sizes = header["pixdim"][1 : 1 + dims]
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(
            f"{path} has pixdim {size_text(sizes)}; expected three positive voxel sizes: correct its header or export it again"
        )
    if header["qform_code"] == 0 and path.absolute() not in _warned:
        _warned.add(path.absolute())
        warnings.warn(
            f"{path} stores no orientation (qform_code and sform_code are 0): which side is left is a guess, and its place in the "
            "world is made up. Compare it with the source, or export it again with its orientation",
            stacklevel=2,
        )


def _check_is_nifti(path: Path) -> None:
    start = check_content(path)
    if path.suffix.lower() in (".hdr", ".img"):
        raise ValueError(f"{path} is one half of a pair .hdr and .img; convert the pair to one .nii or .nii.gz file")
    if path.suffix.lower() == ".gz" and not start.startswith(b"\x1f\x8b"[: len(start)]):
        kind = "a text file" if _is_text(start) else "not gzip-compressed"
        raise ValueError(f"{path} is {kind}, not a compressed NIfTI image; check what was saved under this name")
    if path.suffix.lower() == ".nii" and start.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is gzip-compressed, but its name does not say so; rename it to {path.name}.gz")
    if not is_nifti(path):
        raise ValueError(f"{path} must end in .nii or .nii.gz to be read as NIfTI")


def is_nifti(path: Path) -> bool:
    """Return whether the name of a file ends in `.nii` or `.nii.gz`. Capital letters do not matter."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _kind(dtype: np.dtype) -> str:
    return "colour" if dtype.names else "complex" if dtype.kind == "c" else str(dtype)


def _is_text(start: bytes) -> bool:
    try:
        return all(c.isprintable() or c.isspace() for c in start.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def write_nifti(path: str | Path, array: np.ndarray, case: Case) -> Path:
    """Write `(D, H, W)`, or `(K, D, H, W)` as a 4-D file, on the grid of the file that `case` was read from.

    The affine, orientation, units, version and header fields of that file are kept. Bool arrays are stored as uint8, integers in 32
    bits at most, others as float32. The file appears only when it is complete.

    Raises:
        ValueError: the array is not on the grid of the case, or its values do not fit in the type.
        OSError: the file cannot be written there.
    """
    path = Path(path)
    if not is_nifti(path):
        raise ValueError(f"{path} must end in .nii or .nii.gz")
    array = np.asarray(array)
    if array.shape[-3:] != case.shape or array.ndim not in (3, 4):
        raise ValueError(f"the array is {size_text(array.shape)} but {case.name} is {size_text(case.shape)}")
    array = _storable(np.moveaxis(array, 0, -1) if array.ndim == 4 else array)
    turn = orientations.ornt_transform(orientation(case.affine), orientations.axcodes2ornt(tuple(case.native_axes)))
    affine = case.affine @ orientations.inv_ornt_aff(turn, case.shape)
    affine[:3] /= _unit(case.header)
    # NIfTI-1 counts voxels in 16 bits.
    large = isinstance(case.header, nibabel.Nifti2Header) or max(array.shape) > np.iinfo(np.int16).max
    kind = nibabel.Nifti2Image if large else nibabel.Nifti1Image
    header = kind.header_class() if case.header is None else kind.header_class.from_header(case.header)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display range of the original does not fit a result
    if case.header is None:
        header.set_xyzt_units("mm")
    _place(header, affine, new=case.header is None)
    image = kind(orientations.apply_orientation(array, turn), None, header)
    # `nibabel.save` would write to another name where an ending has small and capital letters, as "a.Nii.gz".
    with atomic_write(path) as temporary, ImageOpener(temporary, "wb") as file:
        image.to_stream(file)
    return path


def _place(header: nibabel.Nifti1Header, affine: np.ndarray, *, new: bool) -> None:
    """Set the affine of a header, unless it has that affine already. The codes that say which space it leads to are kept."""
    difference = np.abs(affine - header.get_best_affine()).max()
    if not new and difference <= 4 * np.finfo(np.float32).eps * np.abs(affine).max():
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        if header["qform_code"] == 0 and not np.allclose(header["pixdim"][1:4], sizes, rtol=1e-3, atol=0):
            header["pixdim"][1:4] = sizes  # which nothing but other readers needs here
        return
    aligned = int(header["sform_code"]) or 2
    # The quaternion of a qform cannot hold a sheared grid.
    header.set_qform(affine, int(header["qform_code"]) if shear(affine) < 1e-5 else 0)
    header.set_sform(affine, aligned)


def _storable(array: np.ndarray) -> np.ndarray:
    """Return an array in a type that every reader of NIfTI knows."""
    if array.dtype.kind not in "buif":
        raise ValueError(f"the array holds {_kind(array.dtype)} values; expected real numbers")
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            stored = array.astype(np.float32, copy=False)
        lost = np.isinf(stored) & np.isfinite(array)
        if lost.any():
            raise ValueError(f"the array holds {array[lost][0]:g}, which does not fit in float32; divide it by a factor")
        return stored
    if array.dtype.itemsize == 8:
        if array.min() < -(2**31) or array.max() >= 2**31:
            raise ValueError(f"the array holds {array.min()} to {array.max()}, which does not fit in 32 bits")
        return array.astype(np.int32)
    return array
