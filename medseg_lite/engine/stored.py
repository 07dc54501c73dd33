"""A case on disk, of which any block can be read without the rest. Cohorts larger than memory are trained from such cases.

`datasets.store` writes a cohort in this form: each case is read, checked and normalised once. A file is in the safetensors format
(https://github.com/huggingface/safetensors), which any language reads and nothing executes. It holds

* `image` `(C, d, h, w)`, float16 or float32, and `label` `(d, h, w)`, uint8. Both are cut to the smallest box outside which every
  channel is constant and nothing is labelled, because half of a brain scan is air.
* Two arrays (uint32) for each group of voxels that training draws from ("mask", "labelled", "background", "class 1", …). Voxels
  are numbered in C order. "… starts" says where runs of adjacent voxels of the group begin. "… before" says how many voxels of
  the group come before each run. The k-th voxel of a group is found in them by bisection. They are small beside a list of all
  voxels.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import json
import math
import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..paths import atomic_write
from ..plain import make_plain
from ..volume import Case, bounding_box, group_voxels, mirrored_region

FORMAT = 1  # raised when earlier files can no longer be read
SUFFIX = ".safetensors"
_LARGEST16 = float(np.finfo(np.float16).max)
_TYPES = {"F16": "<f2", "F32": "<f4", "U8": "u1", "U32": "<u4"}


class StoredCase(Case):
    """A case whose arrays stay on disk.

    It can be used wherever a `Case` can. `image`, `label` and `mask` read the whole volume every time, so keep the array in a
    variable. `replace`, `select` and `crop` return ordinary cases in memory. The samplers read blocks only. Maps in `extra` are
    not stored.

    Args:
        path: file that `write` made.

    Attributes:
        stored_as: the `origin` that was given to `write`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is something else, has another format number, or is cut off.
    """

    in_memory = False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with _open(self.path) as file, safe_open(self.path, "np") as checked:  # safetensors checks that the file is whole
                self._state = _state(file)
                facts = json.loads(checked.metadata()["case"])
                head = _read_head(file)
                self._head, self._arrays = zlib.crc32(head), _find_places(head)
            if facts["format"] != FORMAT:
                raise ValueError(f"it has format {facts['format']}, this version reads {FORMAT}")
            if "image" not in self._arrays:
                raise ValueError("it has no image")
            self.name, self.channels = facts["name"], tuple(facts["channels"])
            self.affine, self.native_axes = np.array(facts["affine"]), facts["native_axes"]
            self.info = {key: tuple(v) if isinstance(v, list) else v for key, v in facts["info"].items()}
            if isinstance(self.info.get("classes"), dict):  # whose keys are numbers, which JSON has no keys of
                self.info["classes"] = {int(number): name for number, name in self.info["classes"].items()}
            self.stored_as, self.extra = facts["origin"], {}
            self._std, self.counts = np.array(facts["std"]), facts["counts"]
            self._shape, self._box = tuple(facts["shape"]), [slice(*side) for side in facts["box"]]
            self._background, self._masked, self._header = facts["background"], facts["masked"], facts["header"]
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not a stored case ({type(error).__name__}: {error}); remove it and store the cohort again"
            ) from None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of voxels along (D, H, W)."""
        return self._shape

    @property
    def image(self) -> np.ndarray:
        """The image `(C, D, H, W)`, float32, read now."""
        return self.block((0, 0, 0), self._shape)

    @property
    def label(self) -> np.ndarray | None:
        """The label `(D, H, W)`, uint8, read now. None if the case has none."""
        return self.label_block((0, 0, 0), self._shape) if self.labelled else None

    @property
    def mask(self) -> np.ndarray | None:
        """The mask `(D, H, W)`, bool, read now. None if the case has none."""
        if not self._masked:
            return None
        file, count = self.open(), self.count("mask")
        starts, before = file.array("mask starts"), file.array("mask before")
        lengths = np.diff(before, append=np.uint32(count))
        flat = np.zeros(np.prod(self._shape), bool)
        flat[np.repeat(starts - before, lengths) + np.arange(count)] = True
        return flat.reshape(self._shape)

    @property
    def labelled(self) -> bool:
        """True if the case has a label. The label is not read."""
        return "label" in self._arrays

    @property
    def highest_label(self) -> int:
        """The highest class in the label, which is not read: a cohort of hundreds is looked through in milliseconds."""
        return max((int(g.split()[1]) for g in self.counts if g.startswith("class ")), default=0)

    @property
    def std(self) -> np.ndarray:
        """The standard deviation of each channel inside the mask, `(C,)`, as it was when the case was stored."""
        return self._std

    @property
    def dtype(self) -> str:
        """The type in which the image is stored, "float16" or "float32". Blocks are float32 when they are read."""
        return np.dtype(self._arrays["image"][0]).name

    @property
    def header(self) -> nibabel.Nifti1Header | None:
        """The NIfTI header of the file that the case was read from, with its extensions."""
        return None if self._header is None else _unpack_header(self._header)

    def replace(self, **changes) -> Case:
        """Return a case in memory, with some attributes changed."""
        return Case(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Case) if f.name not in changes}, **changes)

    def code(self) -> str:
        """Return a short code of the content, by what was measured when the case was stored. Nothing is read."""
        facts = [self.name, self.channels, self._shape, self._std.tolist(), sorted(self.counts.items())]
        return f"{zlib.crc32(str(facts).encode()):08x}"

    def count(self, group: str) -> int:
        """Return the number of voxels in a group, see `volume.group_voxels`. Nothing is read."""
        return self.counts.get(group, 0)

    def block(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Return `image[:, start:stop]` `(C, *n)`, float32, mirrored beyond the border as by `volume.padded_region`."""
        return to_float32(self.open().block(start, stop))

    def label_block(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Return `label[start:stop]`, uint8, mirrored beyond the border like the image."""
        return np.array(self.open().label_block(start, stop))

    def open(self) -> Opened:
        """Return a reader of the file, which stays mapped into memory as long as the reader or a block of it is in use.

        Nothing stays open in between. A cohort has more cases than a process may have open files, and the memory in use must not
        grow with the voxels seen so far. Mapping the file again costs some 50 µs; a DeepMedic segment costs half a millisecond.
        """
        with _open(self.path) as file:
            if not self._unchanged(file):
                raise ValueError(f"{self.path} was written anew since it was opened; open the cohort again")
            try:
                return Opened(self, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError as error:
                if error.errno not in (errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EACCES):
                    raise
                file.seek(0)
                return Opened(self, file.readall())  # a network drive whose files cannot be mapped

    def _unchanged(self, file: io.FileIO) -> bool:
        """Return whether a file is the one that was opened first.

        Some network drives give a file another inode each time. There the header decides, which describes all the content.
        """
        state = _state(file)
        return state == self._state or (state[1:] == self._state[1:] and zlib.crc32(_read_head(file)) == self._head)


class Opened:
    """A reader of the blocks and single voxels of a stored case. Each is read without the rest."""

    def __init__(self, case: StoredCase, view: mmap.mmap | bytes):
        self._case, self._view = case, view

    def array(self, name: str) -> np.ndarray:
        """Return one of the file's arrays, a view of the file: what is not used is not read."""
        dtype, shape, offset = self._case._arrays[name]
        return np.frombuffer(self._view, dtype, math.prod(shape), offset).reshape(shape)

    def block(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Return a block of the image in the type of the file. It is a view of the file if the file holds all of it."""
        image = self.array("image")
        return self._block(image, start, stop, np.array(self._case._background, image.dtype).reshape(-1, 1, 1, 1))

    def label_block(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Return a block of the label, or a view of it."""
        if not self._case.labelled:
            raise ValueError(f"{self._case.path}: {self._case.name} has no label")
        return self._block(self.array("label"), start, stop, 0)

    def voxel(self, group: str, number: int) -> tuple[int, int, int]:
        """Return the indices (d, h, w) of voxel `number` of a group, 0 to `StoredCase.count(group)` - 1."""
        count = self._case.count(group)
        if not 0 <= number < count:
            raise IndexError(f"{self._case.name} has {count} voxels of {group!r}; there is no number {number}")
        before = self.array(f"{group} before")
        # The number has the type of the array: NumPy would convert, and thereby read, the whole array otherwise.
        run = np.searchsorted(before, np.uint32(number), side="right") - 1
        flat = int(self.array(f"{group} starts")[run]) + int(number) - int(before[run])
        return tuple(int(n) for n in np.unravel_index(flat, self._case.shape))

    def _block(self, stored: np.ndarray, start, stop, fill) -> np.ndarray:
        """Return a block of a volume of which the file holds the box alone. The rest is `fill`."""
        box, lead = self._case._box, stored.shape[:-3]

        def read(low, high):
            # The part of the block that lies in the box, which may be empty.
            first = [min(max(a, side.start), b) for a, b, side in zip(low, high, box)]
            last = [max(min(b, side.stop), a) for a, b, side in zip(first, high, box)]
            part = stored[(..., *(slice(a - s.start, b - s.start) for a, b, s in zip(first, last, box)))]
            if (first, last) == (low, high):
                return part
            block = np.empty((*lead, *(b - a for a, b in zip(low, high))), stored.dtype)
            block[...] = fill
            block[(..., *(slice(a - c, b - c) for a, b, c in zip(first, last, low)))] = part
            return block

        return mirrored_region(read, self._case.shape, start, stop)


def write(path: str | Path, case: Case, *, dtype: str | None = None, origin: object = None) -> Path:
    """Write a case as a file for `StoredCase`. The file appears only when it is complete.

    Args:
        path: file name that ends in ".safetensors".
        case: case to write.
        dtype: type of the stored image, "float16" (3 decimal digits) or "float32". None takes float16 where it is enough, as for
            standardised images, and float32 otherwise, as for raw intensities of a wide range: see `choose_dtype`.
        origin: what the case was made from, and how: anything that JSON can hold. `StoredCase.stored_as` returns it.

    Raises:
        ValueError: the image does not fit in the type, or has NaN or infinite values.
        OSError: the disk is full.
    """
    path = Path(path)
    image = _stored_image(path, case, dtype)
    mask = case.whole_mask()
    groups, content = ["mask"], (image != image[:, :1, :1, :1]).any(0) | (False if case.mask is None else mask)
    if case.label is not None:
        content |= case.label > 0
        groups += ["labelled", "background", *(f"class {c}" for c in np.unique(case.label).tolist() if c)]
    box = bounding_box(content if content.any() else np.ones(case.shape, bool))
    arrays = {"image": np.ascontiguousarray(image[(slice(None), *box)])}
    if case.label is not None:
        arrays["label"] = np.ascontiguousarray(case.label[box], np.uint8)
    counts = {}
    for group in groups:
        voxels = group_voxels(group, case.label, mask)
        counts[group] = int(np.count_nonzero(voxels))
        arrays[f"{group} starts"], arrays[f"{group} before"] = _runs(voxels)
    facts = {
        "format": FORMAT,
        "name": case.name,
        "channels": case.channels,
        "shape": case.shape,
        "box": [(s.start, s.stop) for s in box],
        "background": image[:, 0, 0, 0].astype(float).tolist(),
        "affine": case.affine.tolist(),
        "native_axes": case.native_axes,
        "masked": case.mask is not None,
        "header": None if case.header is None else _pack_header(case.header),
        "std": case.image[:, mask].std(axis=1, dtype=np.float64).tolist() if mask.any() else [0.0] * len(image),
        "counts": counts,
        "info": make_plain(case.info, "info"),
        "origin": origin,
    }
    try:
        with atomic_write(path) as temporary:
            save_file(arrays, temporary, metadata={"case": json.dumps(facts, default=_plain)})
    except Exception as error:  # safetensors raises its own type for errors of the system
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            size = sum(a.nbytes for a in arrays.values())
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: {case.name} needs {size / 1e6:.0f} MB in {path.parent}; make room and run it again: "
                "cases that are complete are kept",
            ) from error
        raise
    return path


def _stored_image(path: Path, case: Case, dtype: str | None) -> np.ndarray:
    """Return the image in the type in which it is stored, after all checks."""
    if dtype not in (None, "float16", "float32"):
        raise ValueError(f"dtype is {dtype!r}; expected 'float16' or 'float32', or None for the one that is enough")
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} must end in {SUFFIX}")
    if case.image.size == 0 or not np.isfinite(case.image).all():
        raise ValueError(f"{case.name} has NaN or infinite voxels, or none; correct them before it is stored")
    largest = float(np.abs(case.image).max())
    if dtype == "float16" and largest > _LARGEST16:
        raise ValueError(f"{case.name} has intensities up to {largest:g}, too large for float16; choose dtype='float32'")
    return case.image.astype(choose_dtype(case.image) if dtype is None else dtype)


def choose_dtype(image: np.ndarray) -> str:
    """Return "float16" if an image `(C, D, H, W)` can be stored in this type, otherwise "float32".

    float16 has 11 binary digits and ends at 65504. It is taken if it holds every voxel exactly, or if each channel stays below 2048,
    beyond which float16 does not tell whole numbers apart, and no voxel moves by more than 2^-11 of the channel's range.
    """
    for channel in image:
        low, high = float(channel.min()), float(channel.max())
        if max(-low, high) > _LARGEST16:
            return "float32"
        error = np.abs(to_float32(channel.astype(np.float16)) - channel).max()
        if error > 0 and (max(-low, high) > 2**11 or error > 2**-11 * (high - low)):
            return "float32"
    return "float16"


def _pack_header(header: nibabel.Nifti1Header) -> str:
    """Return a NIfTI header with its extensions as text."""
    content = io.BytesIO()
    header.write_to(content)
    return base64.b64encode(content.getvalue()).decode()


def _unpack_header(text: str) -> nibabel.Nifti1Header:
    """Return the header that `_pack_header` made a text of. Its first number is its size, which tells the version of NIfTI."""
    content = base64.b64decode(text)
    sizes = {int.from_bytes(content[:4], order) for order in ("little", "big")}
    kind = nibabel.Nifti2Header if nibabel.Nifti2Header.sizeof_hdr in sizes else nibabel.Nifti1Header
    return kind.from_fileobj(io.BytesIO(content), check=False)


def _runs(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where runs of True voxels start, and how many True voxels come before each run."""
    edges = np.flatnonzero(np.diff(voxels.ravel(), prepend=False, append=False))
    starts, stops = edges[::2], edges[1::2]
    before = np.concatenate([[0], np.cumsum(stops - starts)[:-1]]) if len(starts) else starts
    return starts.astype(np.uint32), before.astype(np.uint32)


def to_float32(part: np.ndarray) -> np.ndarray:
    """Return a float32 copy of a block."""
    part = np.array(part, order="C")
    return torch.from_numpy(part).float().numpy()  # three times as fast as NumPy from float16


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def _open(path: Path) -> io.FileIO:
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; store the cohort again") from None


def _state(file: io.FileIO) -> tuple[int, int, int]:
    """Return numbers that change when the file is replaced."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_head(file: io.FileIO) -> bytes:
    """Return the header of a safetensors file, with the eight bytes of its length."""
    file.seek(0)
    start = file.read(8)
    return start + file.read(int.from_bytes(start, "little"))


def _find_places(head: bytes) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return type, shape and place of each array in the file.

    safetensors' own reader does not say where an array lies. It would have to be opened for each segment, which takes half as long
    again for the patches of 2D networks.
    """
    return {
        name: (_TYPES[entry["dtype"]], tuple(entry["shape"]), len(head) + entry["data_offsets"][0])
        for name, entry in json.loads(head[8:]).items()
        if name != "__metadata__"
    }
