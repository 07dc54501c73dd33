"""A case on disk of which any block can be read without the rest: what cohorts larger than memory are trained from.

`datasets.store` writes a cohort so, each case read, checked and normalised once. A file is in the safetensors format
(https://github.com/huggingface/safetensors): plain arrays behind a header of JSON, which any language reads and nothing executes.
It holds

* `image` `(C, d, h, w)`, float16 or float32, and `label` `(d, h, w)`, uint8, of the smallest box outside which every channel
  is constant and nothing is labelled: a brain scan is half air;
* for each group of voxels that training draws from ("mask", "labelled", "background", "class 1", …) where in the volume,
  numbered in C order, its runs of adjacent voxels start, and how many of its voxels come before each run (uint32). The k-th
  voxel of a group is found in these by bisection, wherever it lies, and they are small beside a list of all voxels.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from safetensors.numpy import save_file

from ..paths import atomic_write
from ..volume import Case, bounding_box, mirrored

FORMAT = 1  # raised when files of before can no longer be read
SUFFIX = ".safetensors"
_TYPES = {"F16": "<f2", "F32": "<f4", "U8": "u1", "U32": "<u4"}
_LARGEST_HEADER = 2**26


class StoredCase(Case):
    """A case whose arrays stay on disk.

    Everything that takes a `Case` takes it: `image`, `label` and `mask` read the whole volume anew every time they are
    asked for (keep the array in a variable), `replace`, `select` and `crop` give ordinary cases in memory. The samplers
    read blocks instead. Maps in `extra` are not kept.

    Args:
        path: a file that `write` made.

    Attributes:
        stored_as: what the file was made from, and how: the `origin` given to `write`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is something else, of another version, or cut off.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with _open(self.path) as file:
            self._start, self._arrays, facts, self._state = _read_header(file, self.path)
        self.name, self.channels = facts["name"], tuple(facts["channels"])
        self.affine, self.native_axes = np.array(facts["affine"]), facts["native_axes"]
        self.info = {key: tuple(v) if isinstance(v, list) else v for key, v in facts["info"].items()}
        self.stored_as, self.extra = facts["origin"], {}
        self.std = np.array(facts["std"])
        self.counts = facts["counts"]
        self._shape, self._box = tuple(facts["shape"]), [tuple(side) for side in facts["box"]]
        self._background, self._masked, self._header = facts["background"], facts["masked"], facts["header"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (D, H, W)."""
        return self._shape

    @property
    def image(self) -> np.ndarray:
        """`(C, D, H, W)` float32, read now."""
        return self.block((0, 0, 0), self._shape)

    @property
    def label(self) -> np.ndarray | None:
        """`(D, H, W)` uint8, read now, or None."""
        return self.label_block((0, 0, 0), self._shape) if self.labelled else None

    @property
    def mask(self) -> np.ndarray | None:
        """`(D, H, W)` bool, read now, or None."""
        if not self._masked:
            return None
        file = self.open()
        starts, before = file.array("mask starts"), file.array("mask before")
        lengths = np.diff(before, append=np.uint32(self.counts["mask"]))
        flat = np.zeros(math.prod(self._shape), bool)
        flat[np.repeat(starts - before, lengths) + np.arange(self.counts["mask"])] = True
        return flat.reshape(self._shape)

    @property
    def labelled(self) -> bool:
        return "label" in self._arrays

    @property
    def highest_label(self) -> int:
        return max((int(g.split()[1]) for g in self.counts if g.startswith("class ")), default=0)

    @property
    def header(self) -> nibabel.Nifti1Header | None:
        if self._header is None:
            return None
        return nibabel.Nifti1Header(base64.b64decode(self._header), check=False)

    def replace(self, **changes) -> Case:
        """A case in memory, with some attributes changed."""
        return Case(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Case) if f.name not in changes}, **changes)

    def block(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """`image[:, start:stop]` `(C, *n)` float32; beyond the volume's border it is mirrored, as by `volume.padded_region`."""
        return self.open().block(start, stop)

    def label_block(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """`label[start:stop]` uint8, mirrored beyond the border like the image."""
        return self.open().label_block(start, stop)

    def open(self) -> Opened:
        """The file, memory-mapped until the result is let go.

        Nothing stays open in between: a cohort has more cases than a process may have open files, and memory in use does not
        grow with the voxels seen so far. To map a file again costs some 50 µs, next to a millisecond for a DeepMedic segment.
        """
        with _open(self.path) as file:
            if _state(file) != self._state:
                raise ValueError(f"{self.path} was written anew since it was opened; open the cohort again")
            return Opened(self, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Opened:
    """Reads blocks and single voxels of a stored case, each without the rest."""

    def __init__(self, case: StoredCase, view: mmap.mmap):
        self._case, self._view = case, view

    def block(self, start: Sequence[int], stop: Sequence[int], *, raw: bool = False) -> np.ndarray:
        """See `StoredCase.block`; `raw` leaves it in the type of the file, and where nothing is to be filled in, in the file."""
        image = self.array("image")
        background = np.array(self._case._background, image.dtype).reshape(-1, 1, 1, 1)  # to convert each voxel is slow
        found = self._block(image, start, stop, background)
        return found if raw else copied(found)

    def label_block(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """See `StoredCase.label_block`."""
        if not self._case.labelled:
            raise ValueError(f"{self._case.path}: {self._case.name} has no label")
        return np.array(self._block(self.array("label")[None], start, stop, 0)[0])

    def voxel(self, group: str, number: int) -> tuple[int, int, int]:
        """Where voxel `number` of a group lies; `StoredCase.counts` has the groups, and how many voxels each has."""
        count = self._case.counts.get(group, 0)
        if not 0 <= number < count:
            raise IndexError(f"{self._case.name} has {count} voxels of {group!r}; there is no number {number}")
        before = self.array(f"{group} before")
        run = np.searchsorted(before, np.uint32(number), side="right") - 1  # of its own type: nothing is copied
        flat = int(self.array(f"{group} starts")[run]) + int(number) - int(before[run])
        return tuple(int(n) for n in np.unravel_index(flat, self._case.shape))

    def array(self, name: str) -> np.ndarray:
        """One of the file's arrays, not read yet."""
        dtype, shape, offset = self._case._arrays[name]
        return np.frombuffer(self._view, dtype, math.prod(shape), self._case._start + offset).reshape(shape)

    def _block(self, stored: np.ndarray, start, stop, fill) -> np.ndarray:
        box = self._case._box
        if all(side[0] <= a and b <= side[1] for a, b, side in zip(start, stop, box)):
            return stored[(slice(None), *(slice(a - side[0], b - side[0]) for a, b, side in zip(start, stop, box)))]
        axes = [_reach(a, b, n) for a, b, n in zip(start, stop, self._case.shape)]
        # The part of it that lies within the stored box, and may be empty.
        low = [max(a.first, side[0]) for a, side in zip(axes, box)]
        high = [max(min(a.last, side[1]), n) for a, n, side in zip(axes, low, box)]
        part = stored[(slice(None), *(slice(a - s[0], b - s[0]) for a, b, s in zip(low, high, box)))]
        inside = all((a, b) == (r.first, r.last) for a, b, r in zip(low, high, axes))
        result = np.empty((len(stored), *(r.before + r.last - r.first + r.after for r in axes)), part.dtype)
        if not inside:
            result[...] = fill
        place = (slice(a - r.first + r.before, b - r.first + r.before) for a, b, r in zip(low, high, axes))
        result[(slice(None), *place)] = part
        for axis, reach in enumerate(axes, 1):
            if reach.index is not None:
                result = np.take(result, reach.index - reach.first, axis=axis)
            elif reach.before or reach.after:
                along = np.moveaxis(result, axis, 0)
                for count, view in ((reach.before, along), (reach.after, along[::-1])):
                    view[:count] = view[2 * count : count : -1]
        return result


class _Reach(NamedTuple):
    """What has to be read along one axis of a block."""

    first: int
    last: int
    before: int = 0  # voxels of it that lie before the volume, and are mirrored from those read
    after: int = 0
    index: np.ndarray | None = None  # which voxel each is, where mirroring once is not enough


def _reach(start: int, stop: int, size: int) -> _Reach:
    before, after = max(-start, 0), max(stop - size, 0)
    if max(before, after) + before + after < stop - start:
        return _Reach(start + before, stop - after, before, after)
    index = mirrored(start, stop, size)
    return _Reach(int(index.min()), int(index.max()) + 1, index=index)


def write(path: str | Path, case: Case, *, dtype: str = "float16", origin: object = None) -> Path:
    """Write a case as a file for `StoredCase`. The file appears only when it is complete.

    Args:
        path: ends in ".safetensors".
        dtype: of the image, "float16" (3 decimal digits, enough for standardised images) or "float32".
        origin: what it was made from, and how: anything that JSON can hold; `StoredCase.stored_as` gives it back.

    Raises:
        ValueError: the image does not fit in the type, or has NaN or infinite values.
        OSError: the disk is full.
    """
    path = Path(path)
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype is {dtype!r}; expected 'float16' or 'float32'")
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} must end in {SUFFIX}")
    if case.image.size == 0 or not np.isfinite(case.image).all():
        raise ValueError(f"{case.name} has NaN or infinite voxels, or none; correct them before it is stored")
    largest = float(np.abs(case.image).max())
    if dtype == "float16" and largest > float(np.finfo(np.float16).max):
        raise ValueError(f"{case.name} has intensities up to {largest:g}, too large for float16; choose dtype='float32'")
    image = case.image.astype(np.dtype(dtype).newbyteorder("<"))
    whole = np.ones(case.shape, bool)
    mask = whole if case.mask is None else case.mask
    content = (image != image[:, :1, :1, :1]).any(0) | (False if case.mask is None else mask)
    groups = {"mask": mask}
    if case.label is not None:
        label = case.label
        content |= label > 0
        groups |= {"labelled": label > 0, "background": mask & (label == 0)}
        groups |= {f"class {c}": label == c for c in np.unique(label).tolist() if c}
    box = bounding_box(content if content.any() else whole)
    arrays = {"image": np.ascontiguousarray(image[(slice(None), *box)])}
    if case.label is not None:
        arrays["label"] = np.ascontiguousarray(label[box], np.uint8)
    counts = {}
    for group, voxels in groups.items():
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
        "header": None if case.header is None else base64.b64encode(case.header.binaryblock).decode(),
        "std": case.image[:, mask].std(axis=1, dtype=np.float64).tolist() if mask.any() else [0.0] * len(image),
        "counts": counts,
        "info": case.info,
        "origin": origin,
    }
    try:
        with atomic_write(path) as temporary:
            save_file(arrays, temporary, metadata={"case": json.dumps(facts, default=_plain)})
    except Exception as error:  # safetensors has its own kind for what the system reports
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            size = sum(a.nbytes for a in arrays.values())
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: {case.name} needs {size / 1e6:.0f} MB in {path.parent}; make room and run it again: "
                "cases that are complete are kept",
            ) from error
        raise
    return path


def _runs(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of True voxels start, and how many True voxels come before each."""
    edges = np.flatnonzero(np.diff(voxels.ravel(), prepend=False, append=False))
    starts, stops = edges[::2], edges[1::2]
    before = np.concatenate([[0], np.cumsum(stops - starts)[:-1]]) if len(starts) else starts
    return starts.astype(np.uint32), before.astype(np.uint32)


def copied(part: np.ndarray) -> np.ndarray:
    """A float32 copy of a block."""
    part = np.array(part, order="C")
    return torch.from_numpy(part).float().numpy()  # three times as fast as NumPy from float16


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def _open(path: Path):
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; store the cohort again") from None


def _state(file) -> tuple[int, int, int]:
    """Changes when the file is replaced."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_header(file, path: Path) -> tuple[int, dict[str, tuple[str, tuple[int, ...], int]], dict, tuple]:
    """Where the arrays start; type, shape and place of each; the facts about the case; the state of the file."""
    state = _state(file)
    try:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, state[1]):
            raise ValueError("it has no header")
        entries = json.loads(file.read(length))
        facts = json.loads(entries.pop("__metadata__")["case"])
        if facts["format"] != FORMAT:
            raise ValueError(f"it has format {facts['format']}, this version reads {FORMAT}")
        arrays = {}
        for name, entry in entries.items():
            dtype, shape, (begin, end) = _TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if end - begin != np.dtype(dtype).itemsize * math.prod(shape):
                raise ValueError(f"{name} has the wrong size")
            arrays[name] = dtype, shape, begin
        expected = 8 + length + max(e["data_offsets"][1] for e in entries.values())
        if expected != state[1]:
            raise ValueError(f"it has {state[1]} bytes, not {expected}")
        missing = {
            "name",
            "channels",
            "shape",
            "box",
            "background",
            "affine",
            "native_axes",
            "masked",
            "header",
            "std",
            "counts",
            "info",
            "origin",
        } - set(facts)
        if missing or "image" not in arrays:
            raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'an image'}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a stored case ({error}); remove it and store the cohort again") from None
    return 8 + length, arrays, facts, state
