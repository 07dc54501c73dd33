"""A case: the image, label and mask of one subject on one voxel grid. The module `files` reads and writes cases.

Axes. Every array in memory is in RAS+ order. An image is `(C, D, H, W)`: D runs from the patient's left to the right, H from
posterior to anterior, W from inferior to superior. `Case.affine` maps voxel indices (d, h, w) to world millimetres. A file in
another orientation is turned when it is read. A result is turned back when it is written, so it lies on the grid of its file.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import zlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import nibabel
import numpy as np

from .arrays import as_array, as_image, as_label, as_mask, as_names
from .moved import forward

SHEAR = 2e-3  # cosine between two voxel axes above which a grid is sheared
BRATS_CLASSES = ("background", "necrosis", "oedema", "non-enhancing tumour", "enhancing tumour")  # BRATS 2012 to 2015


@dataclass(eq=False)
class Case:
    """The images of one subject, with label and mask.

    Arrays may be given as any kind of numbers, also as tensors or lists. The constructor, `replace` and every later assignment turn
    them into the kinds below, or raise a ValueError, so that all functions of a case may rely on these kinds. An array that has its
    kind already is shared, not copied.

    Attributes:
        image: `(C, D, H, W)` intensities, one channel per sequence, float32 and finite.
        channels: name of each channel, for example `("flair", "t1c")`. No two are the same.
        name: name of the case in messages, plots and result files.
        label: `(D, H, W)` uint8 class of each voxel, see `as_label`. None if the classes are not known.
        mask: `(D, H, W)` bool, True inside the brain or organ, see `as_mask`. None for the whole volume.
        affine: `(4, 4)` matrix from voxel indices to RAS+ world millimetres.
        native_axes: orientation of the file that the case was read from, such as "LPS". `write_nifti` turns results back to it.
        header: NIfTI header of that file, kept for writing.
        extra: further maps `(D, H, W)` on the same grid, for example the tissue fractions of a phantom.
        info: facts about the case (site, grade, voxel counts) for tables and captions.
        in_memory: True if the arrays are in memory, False if they are read from a file every time (`engine.stored.StoredCase`).
    """

    in_memory = True

    image: np.ndarray
    channels: tuple[str, ...]
    name: str = "case"
    label: np.ndarray | None = None
    mask: np.ndarray | None = None
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    native_axes: str = "RAS"
    header: nibabel.Nifti1Header | None = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    info: dict[str, object] = field(default_factory=dict)

    def __post_init__(self):
        self._settle([f.name for f in dataclasses.fields(Case)])

    def __setattr__(self, attribute: str, value: object) -> None:
        complete = self.in_memory and "info" in vars(self)  # the last attribute that the constructor sets
        if complete and attribute in ("image", "channels", "name", "label", "mask", "affine", "extra"):
            value = vars(self.replace(**{attribute: value}))[attribute]
        super().__setattr__(attribute, value)

    def _settle(self, changed: Iterable[str]) -> None:
        """Turn the attributes that changed into their kinds, and check that all fit each other."""
        own = vars(self)
        own["name"], own["channels"] = str(self.name), as_names(self.channels)
        own["affine"] = np.asarray(self.affine, np.float64)
        for what, settle in {"image": as_image, "label": as_label, "mask": as_mask}.items():
            if what in changed and (what == "image" or own[what] is not None):
                own[what] = settle(own[what], source=f"{self.name}: the {what}")
        if "extra" in changed:
            own["extra"] = {key: None if v is None else as_array(v, f"{self.name}: {key}") for key, v in self.extra.items()}
        self._check_fit()
        if "affine" in changed and not spans_space(self.affine):
            raise ValueError(
                f"{self.name}: the affine {self.affine.tolist()} places no voxels; expected three axes that span the space"
            )
        if "image" in changed:
            self._check_finite()

    def _check_fit(self) -> None:
        if self.image.ndim != 4:
            raise ValueError(
                f"{self.name}: the image has shape {self.image.shape}; expected (channels, D, H, W). "
                "For a single 2-D slice use image[None, :, :, None]"
            )
        if len(self.channels) != self.image.shape[0]:
            raise ValueError(
                f"{self.name}: {self.image.shape[0]} channels but {len(self.channels)} names {self.channels}; give one name for "
                "each, in one call: replace(image=..., channels=...)"
            )
        if not all(c.strip() for c in self.channels):
            raise ValueError(f"{self.name}: the channels are called {self.channels}; give each a name")
        twice = [c for c in self.channels if self.channels.count(c) > 1]
        if twice:
            raise ValueError(f"{self.name}: {len(twice)} channels are called {twice[0]!r}; give each channel a name of its own")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            found = f"has shape {self.affine.shape}" if self.affine.shape != (4, 4) else "holds NaN or infinite values"
            raise ValueError(f"{self.name}: the affine {found}; expected (4, 4) finite numbers")
        for what, array in {"label": self.label, "mask": self.mask, **self.extra}.items():
            if array is not None and array.shape != self.shape:
                raise ValueError(
                    f"{self.name}: the {what} is {size_text(array.shape)} but the image is {size_text(self.shape)}; "
                    "image, label and mask of one case must share one grid: change them in one call of replace"
                )

    def _check_finite(self) -> None:
        if not np.isfinite(self.image).all():
            counts = {c: np.count_nonzero(~np.isfinite(i)) for c, i in zip(self.channels, self.image)}
            channel, count = next((c, n) for c, n in counts.items() if n)
            raise ValueError(
                f"{self.name}, {channel} has {count} NaN or infinite voxels; replace them, for example with numpy.nan_to_num"
            )

    def __repr__(self) -> str:
        parts = [
            f"{self.name!r}",
            f"{'+'.join(self.channels)}",
            f"{size_text(self.shape)} voxels",
            f"{size_text(self.voxel_size)} mm",
        ]
        parts += ["label"] * self.labelled + ["mask"] * (self.mask is not None)
        return f"Case({', '.join(parts)})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of voxels along (D, H, W)."""
        return self.image.shape[1:]

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """The voxel size in mm along (D, H, W)."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def sheared(self) -> bool:
        """True if the voxel axes are not at right angles, as in a CT whose gantry was tilted."""
        return shear(self.affine) > SHEAR

    @property
    def spacing(self) -> tuple[float, float, float]:
        """The voxel size in mm along (D, H, W), from which distances are computed.

        Raises ValueError if the grid is sheared. Voxel sizes alone give wrong distances there.
        """
        if self.sheared:
            raise ValueError(
                f"{self.name}: the voxel axes are not at right angles (a sheared grid, as of a CT with a tilted gantry), so voxel "
                "sizes alone give wrong distances; resample the case to a grid with right angles. Metrics of surfaces also take "
                "spacing=case.steps"
            )
        return self.voxel_size

    @property
    def steps(self) -> tuple[float, float, float] | np.ndarray:
        """The grid for metrics of distances: `spacing`, or the `(3, 3)` steps along the axes in mm if the grid is sheared."""
        return self.affine[:3, :3] if self.sheared else self.voxel_size

    @property
    def labelled(self) -> bool:
        """True if the case has a label."""
        return self.label is not None

    @property
    def highest_label(self) -> int:
        """The highest class in the label."""
        return int(self.label.max())

    @property
    def std(self) -> np.ndarray:
        """The standard deviation of each channel inside the mask, `(C,)`."""
        return self.image[:, self.mask].std(axis=1) if self.mask is not None else self.image.std(axis=(1, 2, 3))

    @property
    def axes(self) -> str:
        """The direction in which each index grows, for example "RAS"."""
        return "".join(nibabel.orientations.ornt2axcodes(orientation(self.affine)))

    def replace(self, **changes) -> Case:
        """Return a copy with some attributes changed. The other arrays are shared, not copied."""
        unknown = changes.keys() - {f.name for f in dataclasses.fields(Case)}
        if unknown:
            raise TypeError(f"a case has no {', '.join(sorted(unknown))}")
        case = copy.copy(self)
        vars(case).update(changes)
        case._settle(changes)  # only what is new is looked at: a replaced name costs microseconds
        return case

    def select(self, channels: Iterable[str]) -> Case:
        """Return a copy with only these channels, in this order."""
        channels = tuple(channels)
        missing = [c for c in channels if c not in self.channels]
        if missing:
            raise ValueError(f"{self.name} has no {', '.join(missing)}; its channels are {', '.join(self.channels)}")
        return self.replace(image=self.image[[self.channels.index(c) for c in channels]], channels=channels)

    def relabelled(self, mapping: Mapping[int, int] | None) -> Case:
        """Return a copy whose classes are renumbered, `{4: 3}` for 4 to 3. Other classes, and a case without a label, stay.

        All classes change in one step, so `{1: 2, 2: 1}` swaps them.
        """
        table = label_table(mapping or {})
        return self.replace(label=table[self.label]) if mapping and self.labelled else self

    def crop(self, box: tuple[slice, slice, slice]) -> Case:
        """Return the part of the case inside `box`. The affine is moved with it, so world coordinates stay true."""
        start = [s.indices(n)[0] for s, n in zip(box, self.shape)]
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start

        def cut(array):
            return None if array is None else array[box]

        return self.replace(
            image=self.image[(slice(None), *box)],
            label=cut(self.label),
            mask=cut(self.mask),
            affine=affine,
            extra={k: cut(v) for k, v in self.extra.items()},
        )

    def code(self) -> str:
        """Return a short code of the content: channels, image, label and mask. Two cases with the same code are the same."""
        arrays = (self.image, self.label, self.mask)
        return array_code(*(a for a in arrays if a is not None), text=f"{self.name} {self.channels}")

    def count(self, group: str) -> int:
        """Return the number of voxels in a group of `group_voxels`."""
        return int(np.count_nonzero(group_voxels(group, self.label, self.whole_mask())))

    def whole_mask(self) -> np.ndarray:
        """Return the mask, or an array of True if the case has none."""
        return np.ones(self.shape, bool) if self.mask is None else self.mask

    def block(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Return `image[:, start:stop]` `(C, *n)`. Voxels beyond the border are mirrored, see `padded_region`."""
        return padded_region(self.image, start, stop)

    def label_block(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Return `label[start:stop]`, mirrored beyond the border like the image."""
        return padded_region(self.label, start, stop)


def spans_space(affine: np.ndarray) -> bool:
    """Return whether an affine is finite and its three voxel axes span the space, whatever the voxel size."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and np.isfinite(sizes).all() and (sizes > 0).all()):
        return False
    return abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-3


def shear(affine: np.ndarray) -> float:
    """Return the largest cosine between two voxel axes, 0 if they are at right angles."""
    steps = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(np.triu(steps.T @ steps, 1)).max())


def orientation(affine: np.ndarray) -> np.ndarray:
    """Return the world axis that each voxel axis runs along, and whether it runs up (1) or down (-1), `(3, 2)` as in nibabel.

    World axes are given to voxel axes such that the sum of the cosines between them is largest. Of equal sums, as at 45° between two
    axes, that of the order RAS is taken. So an array that was turned to RAS+ is in RAS+. nibabel's `io_orientation` does not promise
    this: its answer for a turned array may be another one.
    """
    left, _, right = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    cosines = left @ right  # of the nearest grid with right angles
    orders = [list(order) for order in itertools.permutations(range(3))]
    sums = [np.abs(cosines[order, range(3)]).sum() for order in orders]
    order = next(order for order, total in zip(orders, sums) if total > max(sums) - 1e-6)
    return np.stack([order, np.where(cosines[order, range(3)] < -1e-6, -1, 1)], axis=1)


def group_voxels(group: str, label: np.ndarray | None, mask: np.ndarray) -> np.ndarray:
    """Return where the voxels of a group are, `(D, H, W)` bool.

    Args:
        group: "mask", "labelled" (any class but 0), "background" (class 0 inside the mask), or "class 1", "class 2" and so on.
        label: label of the case. It is not needed for "mask".
        mask: mask of the case.
    """
    if group == "mask":
        return mask
    if group == "labelled":
        return label > 0
    if group == "background":
        return mask & (label == 0)
    return label == int(group.removeprefix("class "))


def bounding_box(mask: np.ndarray, border: int = 0) -> tuple[slice, ...]:
    """Return the smallest box that holds every True voxel of `mask`, widened by `border` voxels within the array."""
    box = []
    for axis, size in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not len(inside):
            raise ValueError("the mask is empty: no voxel is True, so it has no bounding box")
        box.append(slice(max(int(inside[0]) - border, 0), min(int(inside[-1]) + 1 + border, size)))
    return tuple(box)


def padded_region(array: np.ndarray, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
    """Return `array[..., start:stop]` over the last axes. Voxels beyond the border are mirrored.

    The border voxel itself is not repeated (`numpy.pad`'s "reflect"). Any distance beyond the border is allowed.
    """

    def read(low, high):
        return array[(..., *map(slice, low, high))]

    return mirrored_region(read, array.shape[array.ndim - len(start) :], start, stop)


def mirrored_region(read: Callable, shape: Sequence[int], start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
    """Return the region of `padded_region` of an array that `read` gives parts of.

    Args:
        read: function of two corners, `low` and `high`. It returns `array[..., low:high]` and is called once, with corners
            inside the array.
        shape: size of the array along its last axes.
        start, stop: corners of the region, which may lie outside the array.
    """
    before, after = [max(-a, 0) for a in start], [max(b - n, 0) for b, n in zip(stop, shape)]
    # What is mirrored lies as far inside the border as it comes to lie beyond it.
    low = [max(min(a, n - 1 - beyond), 0) for a, n, beyond in zip(start, shape, after)]
    high = [min(max(b, beyond + 1), n) for b, n, beyond in zip(stop, shape, before)]
    region = read(low, high)
    if any(beyond >= n for beyond, n in zip((*before, *after), (*shape, *shape))):
        # NumPy 1's pad is wrong where voxels are mirrored more than once.
        for axis, (a, b, n, first) in enumerate(zip(start, stop, shape, low), -len(shape)):
            region = np.take(region, mirrored(a, b, n) - first, axis=axis)
    elif any(before) or any(after):
        widths = [(0, 0)] * (region.ndim - len(shape)) + list(zip(before, after))
        place = (slice(a - c + w, b - c + w) for a, b, c, w in zip(start, stop, low, before))
        region = np.pad(region, widths, mode="reflect")[(..., *place)]
    return region


def mirrored(start: int, stop: int, size: int) -> np.ndarray:
    """Return the indices start … stop - 1 along an axis of `size` voxels. Those beyond its border are mirrored back inside."""
    if size == 1:
        return np.zeros(stop - start, int)
    index = np.arange(start, stop) % (2 * size - 2)
    return np.where(index < size, index, 2 * size - 2 - index)


def label_table(mapping: Mapping[int, int]) -> np.ndarray:
    """Return the new number of each class from 0 to 255, uint8. Classes that `mapping` does not name keep their number."""
    for number in (*mapping.keys(), *mapping.values()):
        if not 0 <= number <= 255:
            raise ValueError(f"label_map holds {number}; expected classes from 0 to 255")
    table = np.arange(256, dtype=np.uint8)
    table[list(mapping)] = list(mapping.values())
    return table


def new_name(name: str, taken: Container[str]) -> str:
    """Return a name that is not taken: the name itself, or the name with the first number from 2 on that makes it new."""
    numbered = (f"{name} {n}" for n in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def size_text(numbers: Iterable[float]) -> str:
    """Return sizes as text: `(240, 240, 155)` becomes "240×240×155"."""
    return "×".join(f"{n:g}" for n in numbers)


def array_code(*arrays: np.ndarray, text: str = "") -> str:
    """Return a short code of the content of arrays, from their shapes and from every 61st of their numbers.

    Args:
        arrays: arrays of any kind.
        text: text that goes into the code too.
    """
    code = zlib.crc32(text.encode())
    for array in arrays:
        code = zlib.crc32(str((array.shape, array.dtype.kind)).encode(), code)
        code = zlib.crc32(np.ascontiguousarray(array.reshape(-1)[::61]), code)
    return f"{code:08x}"


_FILES = ("Scan", "read_case", "read_image", "read_label", "read_metaimage", "read_nifti", "write_case", "write_nifti")
__getattr__ = forward(__name__, {name: f"medseg_lite.files.{name}" for name in _FILES})
