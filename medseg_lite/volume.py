"""A case: the image, label and mask of one subject on one voxel grid. `files` reads and writes them.

Axes. Everything in memory is in RAS+ order: an image is `(C, D, H, W)` where D runs from the patient's left to the
right, H from posterior to anterior and W from inferior to superior. `Case.affine` maps voxel indices (d, h, w) to world
millimetres. Files in another orientation are turned on reading and turned back on writing, so that a result always lies
on the very grid of the file it was made from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import nibabel
import numpy as np

BRATS_CLASSES = ("background", "necrosis", "oedema", "non-enhancing tumour", "enhancing tumour")  # BRATS 2012 to 2015


@dataclass(eq=False)
class Case:
    """One subject.

    Attributes:
        image: `(C, D, H, W)` intensities, one channel per sequence.
        channels: name of each channel, for example `("flair", "t1c")`.
        name: what messages, plots and result files call this case.
        label: `(D, H, W)` uint8 class of each voxel, or None where it is not known.
        mask: `(D, H, W)` bool, True inside the region of interest (the brain), or None for the whole volume.
        affine: `(4, 4)` voxel indices to RAS+ world millimetres.
        native_axes: orientation of the file it came from, such as "LPS"; `write_nifti` turns results back to it.
        header: NIfTI header of the file it came from, kept for writing.
        extra: further maps `(D, H, W)` on the same grid (a phantom's tissue fractions, say).
        info: facts about the case (site, grade, voxel counts), for tables and captions.
    """

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
        self.channels = tuple(self.channels)
        self.affine = np.asarray(self.affine, np.float64)
        if self.image.ndim != 4:
            raise ValueError(
                f"{self.name}: the image has shape {self.image.shape}; expected (channels, D, H, W). "
                "For a single 2-D slice use image[None, :, :, None]"
            )
        if len(self.channels) != self.image.shape[0]:
            raise ValueError(f"{self.name}: {self.image.shape[0]} channels but {len(self.channels)} names {self.channels}")
        if self.affine.shape != (4, 4):
            raise ValueError(f"{self.name}: the affine has shape {self.affine.shape}; expected (4, 4)")
        for what in ("label", "mask"):
            array = getattr(self, what)
            if array is not None and array.shape != self.shape:
                raise ValueError(
                    f"{self.name}: the {what} is {size_text(array.shape)} but the image is {size_text(self.shape)}; "
                    "image, label and mask of one case must share one grid"
                )

    def __repr__(self) -> str:
        parts = [
            f"{self.name!r}",
            f"{'+'.join(self.channels)}",
            f"{size_text(self.shape)} voxels",
            f"{size_text(self.spacing)} mm",
        ]
        parts += ["label"] * self.labelled + ["mask"] * (self.mask is not None)
        return f"Case({', '.join(parts)})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (D, H, W)."""
        return self.image.shape[1:]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along (D, H, W)."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def labelled(self) -> bool:
        """Whether the classes of its voxels are known."""
        return self.label is not None

    @property
    def highest_label(self) -> int:
        """The highest class in the label."""
        return int(self.label.max())

    @property
    def axes(self) -> str:
        """Direction in which each index grows, for example "RAS"."""
        return "".join(nibabel.aff2axcodes(self.affine))

    def replace(self, **changes) -> Case:
        """A copy with some attributes changed (arrays that are not changed are shared, not copied)."""
        return dataclasses.replace(self, **changes)

    def select(self, channels: Iterable[str]) -> Case:
        """A copy with only these channels, in this order."""
        channels = tuple(channels)
        missing = [c for c in channels if c not in self.channels]
        if missing:
            raise ValueError(f"{self.name} has no {', '.join(missing)}; its channels are {', '.join(self.channels)}")
        return self.replace(image=self.image[[self.channels.index(c) for c in channels]], channels=channels)

    def crop(self, box: tuple[slice, slice, slice]) -> Case:
        """The part of the case inside `box`, with the affine moved along so that world coordinates stay true."""
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


def bounding_box(mask: np.ndarray, border: int = 0) -> tuple[slice, ...]:
    """Smallest box that holds every True voxel of `mask`, widened by `border` voxels within the array."""
    box = []
    for axis, size in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not len(inside):
            raise ValueError("the mask is empty: no voxel is True, so it has no bounding box")
        box.append(slice(max(int(inside[0]) - border, 0), min(int(inside[-1]) + 1 + border, size)))
    return tuple(box)


def padded_region(array: np.ndarray, start: Iterable[int], stop: Iterable[int]) -> np.ndarray:
    """`array[..., start:stop]` over the last axes, where indices beyond the border are mirrored back inside.

    The border voxel itself is not repeated (`numpy.pad`'s "reflect"), and any distance is allowed.
    """
    start, stop = list(start), list(stop)
    for axis, (a, b) in enumerate(zip(start, stop), array.ndim - len(start)):
        size = array.shape[axis]
        if a >= 0 and b <= size:
            array = array[(slice(None),) * axis + (slice(a, b),)]
            continue
        array = np.take(array, mirrored(a, b, size), axis=axis)
    return array


def mirrored(start: int, stop: int, size: int) -> np.ndarray:
    """Indices start … stop - 1 along an axis of `size` voxels, those beyond its border mirrored back inside."""
    if size == 1:
        return np.zeros(stop - start, int)
    index = np.arange(start, stop) % (2 * size - 2)
    return np.where(index < size, index, 2 * size - 2 - index)


def as_label(array: np.ndarray, labels: Iterable[int] | None = None, source: object = "the label") -> np.ndarray:
    """Check class numbers and return them as uint8.

    Raises ValueError where a value is not finite, not whole, or not among `labels`.
    """
    if array.dtype.kind == "f":
        whole = np.rint(array)
        if not np.isfinite(array).all():
            raise ValueError(f"{source} has NaN or infinite values; a label holds whole class numbers")
        if np.abs(array - whole).max(initial=0) > 1e-3:
            odd = float(array[np.abs(array - whole) > 1e-3].flat[0])
            raise ValueError(
                f"{source} holds {odd:g}, not a whole class number; it was interpolated: resample labels with nearest neighbour"
            )
        array = whole
    found = np.unique(array)
    if found.size and (found[0] < 0 or found[-1] > 255):
        raise ValueError(f"{source} holds classes {found[0]:g} to {found[-1]:g}; expected 0 to 255")
    if labels is not None:
        labels = tuple(labels)
        wrong = sorted(set(found.astype(int).tolist()) - set(labels))
        if wrong:
            raise ValueError(
                f"{source} holds label {', '.join(map(str, wrong))}; expected only {', '.join(map(str, labels))}. "
                "Map its labels first, or say which ones you use"
            )
    return array.astype(np.uint8)


def size_text(numbers: Iterable[float]) -> str:
    """Return sizes as text: `(240, 240, 155)` becomes "240×240×155"."""
    return "×".join(f"{n:g}" for n in numbers)
