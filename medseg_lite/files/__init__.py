"""Read and write the files of a case. NIfTI and MetaImage are read. NIfTI is written, on the grid of the original file."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np
from nibabel import orientations

from .paths import atomic_write
from .volume import Case, as_label, size_text

GRID_TOLERANCE = 1e-3  # mm: affines that differ by less describe the same grid


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


def read_nifti(path: str | Path) -> Scan:
    """Read a `.nii` or `.nii.gz` file and turn it to RAS+. A trailing axis of length one is dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read. The message says what it is (a text file, a web page, a Git-LFS pointer, a truncated
            download) and what to do.
    """
    path = Path(path)
    _check_exists(path, "*.nii*")
    _check_is_nifti(path)
    try:
        image = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
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
    return _as_scan(array, image.affine, image.header, path)


def _as_scan(array: np.ndarray, affine: np.ndarray, header: nibabel.Nifti1Header | None, path: Path) -> Scan:
    """Return the content of a file in RAS+ order, after the checks that all formats share."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{path} is {array.ndim}-D ({size_text(array.shape)}); expected a 3-D volume. Export the whole volume, not one slice"
        )
    if not array.size:
        raise ValueError(f"{path} has no voxels ({size_text(array.shape)}); export it again")
    if not _places_voxels(affine):
        raise ValueError(
            f"{path} has an unusable affine {affine.tolist()}; set its orientation (sform or qform) and save again"
        )
    native = "".join(nibabel.aff2axcodes(affine))
    turn = orientations.io_orientation(affine)
    affine = affine @ orientations.inv_ornt_aff(turn, array.shape[:3])
    return Scan(orientations.apply_orientation(array, turn), affine, native, header, path)


# MetaImage's names of types, without byte order.
_METAIMAGE_TYPES = {
    **{"MET_UCHAR": "u1", "MET_USHORT": "u2", "MET_UINT": "u4", "MET_ULONG": "u4", "MET_ULONG_LONG": "u8"},
    **{"MET_CHAR": "i1", "MET_SHORT": "i2", "MET_INT": "i4", "MET_LONG": "i4", "MET_LONG_LONG": "i8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}


def read_metaimage(path: str | Path) -> Scan:
    """Read a MetaImage and turn it to RAS+.

    A MetaImage is a `.mhd` header with a `.raw` or `.zraw` file of its values beside it, or one `.mha` file with both. The values
    may be compressed by zlib. Its world axes run to the patient's left, back and top.
    Format: https://itk.org/Wiki/ITK/MetaIO/Documentation.

    Raises:
        FileNotFoundError: there is no such file, or no file with its values.
        ValueError: it is no MetaImage, or its values are cut off or too many.
    """
    path = Path(path)
    _check_exists(path, "*.mh[ad]")
    _check_content(path)
    with open(path, "rb") as file:
        fields = _metaimage_fields(path, file)
        local = file.read() if fields["ElementDataFile"].upper() == "LOCAL" else None
    source = path if local is not None else _metaimage_source(path, fields["ElementDataFile"])
    shape, dtype = _metaimage_shape(path, fields)
    values = _metaimage_values(path, fields, shape, dtype, source, source.read_bytes() if local is None else local)
    # The first index varies fastest.
    array = np.frombuffer(values, dtype).reshape(shape[::-1]).T.astype(dtype.newbyteorder("="))
    return _as_scan(array, _metaimage_affine(path, fields, len(shape)), None, path)


def _metaimage_fields(path: Path, file: BinaryIO) -> dict[str, str]:
    """Return the fields of the header, lines `key = value`, the last of which is ElementDataFile."""
    fields: dict[str, str] = {}
    while "ElementDataFile" not in fields:
        line = file.readline(4096)
        key, equals, value = line.decode("latin-1").partition("=")
        if not equals or (not line.endswith(b"\n") and key.strip() != "ElementDataFile") or len(fields) > 200:
            raise ValueError(
                f"{path} is not a MetaImage: expected lines such as 'DimSize = 320 320 24', the last of them ElementDataFile, "
                f"but after {len(fields)} there is {line[:40]!r}; download or export it again"
            )
        fields[key.strip()] = value.strip()
    return fields


def _metaimage_shape(path: Path, fields: dict[str, str]) -> tuple[tuple[int, ...], np.dtype]:
    """Return the number of voxels along each axis, and the type of a voxel with its byte order."""
    shape = tuple(int(n) for n in _numbers(path, fields, "DimSize"))
    if len(shape) != _numbers(path, fields, "NDims")[0] or len(shape) not in (3, 4) or min(shape) < 1:
        raise ValueError(f"{path} has NDims = {fields['NDims']} and DimSize = {fields['DimSize']!r}; expected a 3-D volume")
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise ValueError(f"{path} has {fields['ElementNumberOfChannels']} numbers per voxel; expected one")
    if fields.get("ElementType") not in _METAIMAGE_TYPES:
        raise ValueError(
            f"{path} has ElementType = {fields.get('ElementType')!r}; expected one of {', '.join(_METAIMAGE_TYPES)}"
        )
    big = _flag(fields, "BinaryDataByteOrderMSB") or _flag(fields, "ElementByteOrderMSB")
    return shape, np.dtype((">" if big else "<") + _METAIMAGE_TYPES[fields["ElementType"]])


def _metaimage_source(path: Path, name: str) -> Path:
    """Return the file beside a `.mhd` that holds its values."""
    if name != Path(name).name or "\\" in name or name.upper().startswith("LIST") or "%" in name:
        raise ValueError(
            f"{path} keeps its values in {name!r}; expected LOCAL or one file in the same folder: convert it to .mha or NIfTI"
        )
    source = path.parent / name
    if not source.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*raw"))[:6]) or "no .raw file"
        raise FileNotFoundError(
            f"{source}, which holds the voxels of {path.name}, does not exist; that folder holds {there}: copy both files"
        )
    _check_content(source)
    return source


def _metaimage_values(path: Path, fields: dict[str, str], shape, dtype: np.dtype, source: Path, stored: bytes) -> bytes:
    """Return the bytes of the voxels, uncompressed, after checking their number."""
    expected, compressed = math.prod(shape) * dtype.itemsize, _flag(fields, "CompressedData")
    if compressed:
        try:
            stored = zlib.decompressobj().decompress(stored, expected + 1)  # and no more, whatever the file claims to hold
        except zlib.error as error:
            raise ValueError(f"{source} cannot be unpacked ({error}); it is damaged: download or export it again") from error
    elif "HeaderSize" in fields:
        skip = int(_numbers(path, fields, "HeaderSize")[0])
        stored = stored[len(stored) - expected if skip < 0 and len(stored) > expected else max(skip, 0) :]
    if len(stored) != expected:
        found = f"more than {expected}" if compressed and len(stored) > expected else f"{len(stored)}"
        raise ValueError(
            f"{source} holds {found} bytes of voxels; expected {expected} for {size_text(shape)} of {fields['ElementType']} as "
            f"{path.name} says: it is truncated or belongs to another header, download or export it again"
        )
    return stored


def _metaimage_affine(path: Path, fields: dict[str, str], n: int) -> np.ndarray:
    """Return the affine to RAS+ world millimetres of a MetaImage with `n` axes."""
    turn = next((k for k in ("TransformMatrix", "Rotation", "Orientation") if k in fields), "TransformMatrix")
    place = next((k for k in ("Offset", "Position", "Origin") if k in fields), "Offset")
    size = "ElementSpacing" if "ElementSpacing" in fields else "ElementSize"
    spacing = _numbers(path, fields, size, " ".join("1" * n))
    directions = _numbers(path, fields, turn, " ".join(str(v) for v in np.eye(n).ravel()))
    origin = _numbers(path, fields, place, " ".join("0" * n))
    if (len(spacing), len(directions), len(origin)) != (n, n * n, n):
        raise ValueError(
            f"{path} has ElementSpacing, {turn} or {place} of a length that does not fit {n} axes; export it again"
        )
    affine = np.eye(4)
    # Row i of the matrix is the direction of axis i, in a world whose first two axes are opposite to RAS+.
    affine[:3, :3] = (np.reshape(directions, (n, n))[:3, :3] * np.array(spacing[:3])[:, None]).T
    affine[:3, 3] = origin[:3]
    affine[:2] *= -1
    return affine


def _numbers(path: Path, fields: dict[str, str], key: str, default: str | None = None) -> list[float]:
    try:
        found = [float(n) for n in fields.get(key, default).split()]
        if found and np.isfinite(found).all():
            return found
        raise ValueError
    except (AttributeError, ValueError):
        found = f"{key} = {fields[key]!r}" if key in fields else f"no {key}"
        raise ValueError(f"{path} has {found}; expected numbers: its header is damaged, export it again") from None


def _flag(fields: dict[str, str], key: str) -> bool:
    return fields.get(key, "False").lower() in ("true", "1", "t")


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
    name = name or first.path.parent.name
    for scan in scans.values():
        if scan.array.ndim != 3:
            raise ValueError(
                f"{scan.path} is 4-D ({size_text(scan.array.shape)}); expected one 3-D volume per file and sequence"
            )
        _check_same_grid(scan, first)
        _check_intensities(scan)
    image = np.stack([_as_native_float(s.array) for s in scans.values()])
    label_array = mask_array = None
    if label is not None:
        scan = read_image(label)
        _check_same_grid(scan, first)
        label_array = as_label(scan.array, labels, scan.path)
    if mask is not None:
        scan = read_image(mask)
        _check_same_grid(scan, first)
        mask_array = scan.array > 0.5
        if not mask_array.any():
            raise ValueError(f"{scan.path} is an empty mask: no value is above 0.5; make the mask again or leave it out")
    return Case(
        image=image,
        channels=tuple(scans),
        name=name,
        label=label_array,
        mask=mask_array,
        affine=first.affine,
        native_axes=first.native_axes,
        header=first.header,
    )


def _read_channels(path: str | Path, channels: tuple[str, ...]) -> dict[str, Scan]:
    """Return the volumes of a 4-D file by the names of their channels."""
    scan = read_image(path)
    array = scan.array if scan.array.ndim == 4 else scan.array[..., None]
    if array.shape[3] != len(channels):
        raise ValueError(
            f"{scan.path} holds {array.shape[3]} volumes ({size_text(scan.array.shape)}); expected {len(channels)}: "
            f"{', '.join(channels) or 'name them with channels=(...)'}"
        )
    return {channel: dataclasses.replace(scan, array=array[..., i]) for i, channel in enumerate(channels)}


def read_label(path: str | Path, case: Case, labels: Iterable[int] | None = None) -> np.ndarray:
    """Read a segmentation `(D, H, W)`, uint8, on the grid of `case`. `write_nifti` makes such files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file lies on another grid, or holds no class numbers.
    """
    scan = read_nifti(path)
    grid = Scan(case.image[0], case.affine, case.native_axes, case.header, Path(case.name))
    _check_same_grid(scan, grid)
    return as_label(scan.array, labels, scan.path)


def write_nifti(path: str | Path, array: np.ndarray, case: Case) -> Path:
    """Write `(D, H, W)`, or `(K, D, H, W)` as a 4-D file, on the grid of the file that `case` was read from.

    The affine, orientation and header fields of that file are kept. Bool arrays are stored as uint8, integers in 32 bits at most,
    others as float32. The file appears only when it is complete.
    """
    path = Path(path)
    if not is_nifti(path):
        raise ValueError(f"{path} must end in .nii or .nii.gz")
    array = np.asarray(array)
    if array.shape[-3:] != case.shape or array.ndim not in (3, 4):
        raise ValueError(f"the array is {size_text(array.shape)} but {case.name} is {size_text(case.shape)}")
    if array.ndim == 4:
        array = np.moveaxis(array, 0, -1)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype.kind not in "iu":
        array = array.astype(np.float32)
    elif array.dtype.itemsize == 8:
        if array.min() < -(2**31) or array.max() >= 2**31:
            raise ValueError(f"the array holds {array.min()} to {array.max()}, which does not fit in 32 bits")
        array = array.astype(np.int32)
    turn = orientations.ornt_transform(orientations.axcodes2ornt(case.axes), orientations.axcodes2ornt(tuple(case.native_axes)))
    affine = case.affine @ orientations.inv_ornt_aff(turn, case.shape)
    header = case.header.copy() if case.header is not None else nibabel.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display range of the original does not fit a result
    image = nibabel.Nifti1Image(orientations.apply_orientation(array, turn), affine, header)
    if case.header is None:
        image.header.set_xyzt_units("mm")
    with atomic_write(path) as temporary:
        nibabel.save(image, temporary)
    return path


def write_case(folder: str | Path, case: Case) -> Path:
    """Write a case as a folder with one `<channel>.nii.gz` per channel, and `label.nii.gz` and `mask.nii.gz` if it has them."""
    folder = Path(folder)
    for channel, image in zip(case.channels, case.image):
        write_nifti(folder / f"{channel}.nii.gz", image, case)
    if case.label is not None:
        write_nifti(folder / "label.nii.gz", case.label, case)
    if case.mask is not None:
        write_nifti(folder / "mask.nii.gz", case.mask, case)
    return folder


def is_nifti(path: Path) -> bool:
    """Return whether the name of a file ends in `.nii` or `.nii.gz`. Capital letters do not matter."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _check_exists(path: Path, pattern: str) -> None:
    """Raise FileNotFoundError, with the names of the files beside it that match the pattern, if a file is missing."""
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob(pattern))[:6] if path.parent.is_dir() else []
        hint = f"; that folder holds {', '.join(beside)}" if beside else ""
        raise FileNotFoundError(f"{path} does not exist{hint}")


def _check_content(path: Path) -> bytes:
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


def _check_is_nifti(path: Path) -> None:
    start = _check_content(path)
    if path.suffix.lower() == ".gz" and not start.startswith(b"\x1f\x8b"[: len(start)]):
        kind = "a text file" if _is_text(start) else "not gzip-compressed"
        raise ValueError(f"{path} is {kind}, not a compressed NIfTI image; check what was saved under this name")
    if not is_nifti(path):
        raise ValueError(f"{path} must end in .nii or .nii.gz to be read as NIfTI")


def _kind(dtype: np.dtype) -> str:
    return "colour" if dtype.names else "complex" if dtype.kind == "c" else str(dtype)


def _places_voxels(affine: np.ndarray) -> bool:
    """Return whether the affine is finite and its three axes span the space, whatever the voxel size."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not np.isfinite(spacing).all() or not (spacing > 0).all():
        return False
    return abs(np.linalg.det(affine[:3, :3] / spacing)) > 1e-3 and None not in nibabel.aff2axcodes(affine)


def _is_text(start: bytes) -> bool:
    try:
        return all(c.isprintable() or c.isspace() for c in start.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _check_same_grid(scan: Scan, first: Scan) -> None:
    here, there = scan.array.shape[:3], first.array.shape[:3]
    if here != there:
        raise ValueError(
            f"{scan.path} is {size_text(here)} but {first.path.name} is {size_text(there)}; the files of one case must share one "
            "grid: resample it to the other's grid first"
        )
    if np.abs(scan.affine - first.affine).max() > GRID_TOLERANCE:
        axes = f" ({scan.native_axes} against {first.native_axes})" if scan.native_axes != first.native_axes else ""
        raise ValueError(
            f"{scan.path} and {first.path.name} have the same size but lie elsewhere in the world{axes}: their affines differ "
            f"by {np.abs(scan.affine - first.affine).max():.3g} mm; resample one onto the other, or correct its header"
        )


def _check_intensities(scan: Scan) -> None:
    if scan.array.dtype.kind == "f" and not np.isfinite(scan.array).all():
        count = int((~np.isfinite(scan.array)).sum())
        raise ValueError(f"{scan.path} has {count} NaN or infinite voxels; replace them (numpy.nan_to_num) or export it again")
    if scan.array.size and scan.array.min() == scan.array.max():
        raise ValueError(f"{scan.path} is {scan.array.flat[0]:g} everywhere: there is no image in it; export it again")


def _as_native_float(array: np.ndarray) -> np.ndarray:
    """Return a float32 array in C order, as the networks and transforms expect it."""
    return np.ascontiguousarray(array, np.float32)
