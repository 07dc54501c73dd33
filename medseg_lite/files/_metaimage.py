"""Read MetaImage files."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..volume import size_text
from ._scan import Scan, as_scan, check_content, check_exists

# MetaImage's names of types, without byte order.
_METAIMAGE_TYPES = {
    **{"MET_UCHAR": "u1", "MET_USHORT": "u2", "MET_UINT": "u4", "MET_ULONG": "u4", "MET_ULONG_LONG": "u8"},
    **{"MET_CHAR": "i1", "MET_SHORT": "i2", "MET_INT": "i4", "MET_LONG": "i4", "MET_LONG_LONG": "i8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
# Lengths in mm.
_UNITS = {"?": 1.0, "mm": 1.0, "um": 1e-3, "cm": 10.0}


def read_metaimage(path: str | Path) -> Scan:
    """Read a MetaImage and turn it to RAS+.

    A MetaImage is a `.mhd` header with a `.raw` or `.zraw` file of its values beside it, or one `.mha` file with both. The values
    may be compressed by zlib. Its world axes run to the patient's left, back and top. Its units are mm unless it names others.
    Format: https://itk.org/Wiki/ITK/MetaIO/Documentation.

    Raises:
        FileNotFoundError: there is no such file, or no file with its values.
        ValueError: it is no MetaImage, its values are cut off or too many, or it does not say how large a voxel is.
    """
    path = Path(path)
    check_exists(path, "*.mh[ad]")
    check_content(path)
    source, fields, local = _open(path)
    shape, dtype = _metaimage_shape(path, fields)
    values = _metaimage_values(path, fields, shape, dtype, source, source.read_bytes() if local is None else local)
    # The first index varies fastest.
    array = np.frombuffer(values, dtype).reshape(shape[::-1]).T.astype(dtype.newbyteorder("="))
    return as_scan(array, _metaimage_affine(path, fields, len(shape)), None, path)


def find_values(path: Path) -> Path:
    """Return the file that holds the values of a MetaImage: itself, or the one beside it. The values are not read."""
    return _open(path, local=False)[0]


def _open(path: Path, *, local: bool = True) -> tuple[Path, dict[str, str], bytes | None]:
    """Return the file of the values, the header, and the values if they are in the same file and wanted."""
    with open(path, "rb") as file:
        fields = _metaimage_fields(path, file)
        if fields["ElementDataFile"].upper() == "LOCAL":
            return path, fields, file.read() if local else None
    return _metaimage_source(path, fields["ElementDataFile"]), fields, None


def _metaimage_fields(path: Path, file: BinaryIO) -> dict[str, str]:
    """Return the fields of the header, lines `key = value`, the last of which is ElementDataFile."""
    fields: dict[str, str] = {}
    while "ElementDataFile" not in fields:
        line = file.readline(4096)
        key, equals, value = _text(line).partition("=")
        if not equals or (not line.endswith(b"\n") and key.strip() != "ElementDataFile") or len(fields) > 200:
            raise ValueError(
                f"{path} is not a MetaImage: expected lines such as 'DimSize = 320 320 24', the last of them ElementDataFile, "
                f"but after {len(fields)} there is {line[:40]!r}; download or export it again"
            )
        fields[key.strip()] = value.strip()
    return fields


def _text(line: bytes) -> str:
    """Return a line of a header, which may name a file in the letters of any language."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _metaimage_shape(path: Path, fields: dict[str, str]) -> tuple[tuple[int, ...], np.dtype]:
    """Return the number of voxels along each axis, and the type of a voxel with its byte order."""
    shape = tuple(int(n) for n in _numbers(path, fields, "DimSize"))
    if len(shape) != _numbers(path, fields, "NDims")[0] or len(shape) not in (3, 4) or min(shape) < 1:
        raise ValueError(f"{path} has NDims = {fields['NDims']} and DimSize = {fields['DimSize']!r}; expected a 3-D volume")
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise ValueError(f"{path} has {fields['ElementNumberOfChannels']} numbers per voxel; expected one")
    if not _flag(fields, "BinaryData", "True"):
        raise ValueError(f"{path} has BinaryData = {fields['BinaryData']}, voxels as text; convert it to binary or to NIfTI")
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
    if not source.is_file():  # Windows, where many of these files come from, does not tell a.RAW from a.raw
        same = [other for other in path.parent.iterdir() if other.name.casefold() == name.casefold()]
        source = same[0] if len(same) == 1 else source
    if not source.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*raw"))[:6]) or "no .raw file"
        raise FileNotFoundError(
            f"{source}, which holds the voxels of {path.name}, does not exist; that folder holds {there}: copy both files"
        )
    check_content(source)
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
    size = "ElementSize" if "ElementSize" in fields and "ElementSpacing" not in fields else "ElementSpacing"
    spacing = _numbers(path, fields, size)
    if min(spacing[:3]) <= 0:
        raise ValueError(
            f"{path} has {size} = {fields[size]!r}; expected three positive voxel sizes: correct its header or export it again"
        )
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
    return np.diag([_unit(path, fields)] * 3 + [1.0]) @ affine


def _unit(path: Path, fields: dict[str, str]) -> float:
    """Return how many mm the unit of the header has."""
    name = fields.get("DistanceUnits", "mm").removeprefix("MET_DISTANCE_UNITS_").lower()
    if name not in _UNITS:
        raise ValueError(f"{path} has DistanceUnits = {fields['DistanceUnits']!r}; expected one of {', '.join(_UNITS)}")
    return _UNITS[name]


def _numbers(path: Path, fields: dict[str, str], key: str, default: str | None = None) -> list[float]:
    try:
        found = [float(n) for n in fields.get(key, default).split()]
        if found and np.isfinite(found).all():
            return found
        raise ValueError
    except (AttributeError, ValueError):
        found = f"{key} = {fields[key]!r}" if key in fields else f"no {key}"
        raise ValueError(f"{path} has {found}; expected numbers: its header is damaged, export it again") from None


def _flag(fields: dict[str, str], key: str, default: str = "False") -> bool:
    return fields.get(key, default).lower() in ("true", "1", "t")
