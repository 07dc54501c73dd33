"""Slices of a volume as pictures: turned for display, seen through a window, painted with overlays.

The display convention is that of radiology: anterior is up in axial planes, superior is up in the others. The patient's left is
on the right of the picture. Sagittal planes have anterior on the left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..volume import as_label

# Okabe and Ito's colour-blind-safe set (https://jfly.uni-koeln.de/color/). The BRATS classes have the four of the seven colours
# that stay furthest apart when they are blended half over grey, for normal, deuteranope, protanope and tritanope eyes
# (CIEDE2000 >= 10).
CLASS_COLOURS = ("#00000000", "#0072B2", "#56B4E9", "#F0E442", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
PROBABILITY_COLOUR = "#E69F00"
# Negative, zero and positive numbers: blue and vermilion of the same set, which colour-blind readers tell apart.
SIGNED_COLOURS = ("#0072B2", "#FFFFFF", "#D55E00")


def class_colour(value: int) -> str:
    """Return the colour of a class as "#rrggbb". Class 8 has the colour of class 1 again. The background is transparent."""
    return CLASS_COLOURS[value] if value < len(CLASS_COLOURS) else CLASS_COLOURS[(value - 1) % 7 + 1]


def class_name(value: int, classes: Sequence[str] | Mapping[int, str] | None) -> str:
    """Return the name of a class in `classes` (a sequence by class number, or a mapping), or "class 5" if it has none there."""
    named = classes if isinstance(classes, Mapping) else dict(enumerate(classes or ()))
    return str(named.get(value, f"class {value}" if value else "background"))


def rgb(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue (0 to 255) of "#rrggbb"."""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


# -------------------------------------------------------------------------------------------------- planes and slices


class Plane(NamedTuple):
    """The display of one anatomical plane of a RAS+ volume (D, H, W). Both axes of the picture run against the array's.

    Attributes:
        name: "Axial", "Coronal" or "Sagittal".
        cut: array axis that the plane cuts.
        x: array axis along the picture's rows, from right to left.
        y: array axis along the picture's columns, from bottom to top.
        edges: letters of the directions at the left, right, top and bottom edge of the picture.
    """

    name: str
    cut: int
    x: int
    y: int
    edges: str


PLANES = (
    Plane("Axial", cut=2, x=0, y=1, edges="RLAP"),
    Plane("Coronal", cut=1, x=0, y=2, edges="RLSI"),
    Plane("Sagittal", cut=0, x=1, y=2, edges="APSI"),
)


def find_plane(name: str) -> Plane:
    """Return the plane called "axial", "coronal" or "sagittal"."""
    for plane in PLANES:
        if plane.name.lower() == str(name).lower():
            return plane
    raise ValueError(f"there is no plane {name!r}; expected 'axial', 'coronal' or 'sagittal'")


def cut(volume: np.ndarray, plane: Plane, index: int) -> np.ndarray:
    """Return slice `index` of `volume` (D, H, W) as a picture (rows, columns), turned for display."""
    return volume.take(index, axis=plane.cut).T[::-1, ::-1]


def busiest_position(label: np.ndarray | None, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the index of the slice with most labelled voxels along each axis, or the middle if nothing is labelled."""
    labelled = None if label is None else label != 0
    if labelled is None or not labelled.any():
        return tuple(n // 2 for n in shape)
    return tuple(int(labelled.sum(axis=tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))


def check_position(position: Sequence[int], shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return voxel indices (d, h, w) as ints, moved to the nearest voxel of the volume. Raise ValueError for anything else."""
    try:
        numbers = [float(p) for p in position]
        if len(numbers) != 3 or any(n != int(n) for n in numbers):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"position is {position!r}; expected three whole voxel indices (d, h, w)") from None
    return tuple(int(min(max(p, 0), n - 1)) for p, n in zip(numbers, shape))


def default_window(volume: np.ndarray, mask: np.ndarray | None = None) -> tuple[float, float]:
    """Return the intensities shown as black and as white: the 0.5 and 99.5 percentiles, inside the mask if there is one."""
    values = volume[mask] if mask is not None and mask.any() else volume
    values = values.reshape(-1)[:: max(1, values.size // 1_000_000)]  # a million voxels are enough for percentiles
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    if low == high:
        low, high = float(volume.min()), float(volume.max())
    return (low, high) if low < high else (low, low + 1.0)


# ----------------------------------------------------------------------------------------------------------- overlays


class Overlay(NamedTuple):
    """Classes (uint8) or a probability map (float32 within 0..1) on the grid of a volume, or a slice of one.

    Attributes:
        name: name in the legend.
        array: `(D, H, W)`, or `(rows, columns)` for a slice.
        style: "probability" (one colour, as strong as the probability), "area" (classes filled with their colours), or "line",
            "dashes", "dots" (classes outlined). So overlays are told apart by more than colour.
    """

    name: str
    array: np.ndarray
    style: str


def as_overlays(
    overlays: Mapping[str, np.ndarray] | np.ndarray | None, shape: tuple[int, int, int], label: np.ndarray | None = None
) -> list[Overlay]:
    """Check overlays and return them in one form. A case's own label comes first, under the name "truth".

    Integers and booleans are classes, floats within 0..1 a probability map, other whole floats classes. Truth is filled. The
    first other overlay of classes is outlined, the next has a dashed line, all further ones a dotted line.

    Raises:
        ValueError: for another grid, NaN, values that are neither classes nor probabilities, or names that are not text.
    """
    given = {} if overlays is None else overlays if isinstance(overlays, Mapping) else {"prediction": overlays}
    if label is not None:
        given = {"truth": label, **given}
    checked: list[Overlay] = []
    outlines = iter(("line", "dashes"))
    for name, array in given.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"an overlay is called {name!r}; expected a text, as in overlays={{'prediction': array}}")
        array, what = np.asarray(array), f"overlay {name!r}"
        if array.shape != tuple(shape):
            raise ValueError(
                f"{what} has shape {array.shape} but the image is {tuple(shape)}; both must lie on one (D, H, W) grid: "
                "resample it, or pass the classes of one case without batch and channel axes"
            )
        if _is_probability(array, what):
            checked.append(Overlay(name, array.astype(np.float32), "probability"))
            continue
        if array.dtype.kind == "b" or array.dtype == np.uint8:
            array = array.astype(np.uint8, copy=False)
        else:
            array = as_label(array, source=what)
        checked.append(Overlay(name, array, "area" if name == "truth" else next(outlines, "dots")))
    return checked


def _is_probability(array: np.ndarray, what: str) -> bool:
    """Tell a probability map from classes. Raise ValueError for numbers that are neither."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} holds {array.dtype}; expected class numbers (integers) or probabilities (floats in 0..1)")
    if array.dtype.kind != "f":
        return False
    if not np.isfinite(array).all():
        raise ValueError(f"{what} has NaN or infinite values; replace them, for example with numpy.nan_to_num")
    if 0 <= array.min() and array.max() <= 1:
        return True
    if (array != np.rint(array)).any():
        raise ValueError(
            f"{what} holds floats from {array.min():.3g} to {array.max():.3g}; expected probabilities within 0..1 "
            "or whole class numbers: take the softmax or the argmax of logits first"
        )
    return False


# ----------------------------------------------------------------------------------------------------------- painting


def outline(classes: np.ndarray, style: str = "line") -> np.ndarray:
    """Return the pixels of each class that touch another class or the picture's edge (4 neighbours).

    The style "dashes" or "dots" leaves out some of them.
    """
    padded = np.pad(classes, 1)
    edge = classes != 0
    edge &= (
        (padded[:-2, 1:-1] != classes)
        | (padded[2:, 1:-1] != classes)
        | (padded[1:-1, :-2] != classes)
        | (padded[1:-1, 2:] != classes)
    )
    if style != "line":
        v, u = np.indices(classes.shape)
        edge &= (u + v) % 6 < 4 if style == "dashes" else (u + v) % 3 < 1
    return edge


def blend(picture: np.ndarray, colour, strength: np.ndarray) -> np.ndarray:
    """Return a float32 picture (rows, columns, 3) with a colour over it.

    Args:
        picture: red, green and blue within 0..255.
        colour: (red, green, blue), or one for each pixel, (rows, columns, 3).
        strength: share of the colour in each pixel, (rows, columns) within 0..1.
    """
    return picture + (np.float32(colour) - picture) * strength[..., None].astype(np.float32)


def paint(
    picture: np.ndarray, window: tuple[float, float], overlays: Iterable[Overlay] = (), opacity: float = 0.5
) -> np.ndarray:
    """Return a grey picture (rows, columns) under slices of its overlays as uint8 (rows, columns, 3).

    Areas are blended with `opacity`, probabilities p with opacity × p, and outlines with twice the opacity, because thin lines
    look fainter than areas.

    Args:
        picture: intensities of a slice.
        window: intensities shown as black and as white.
        overlays: slices of overlays, painted in this order.
        opacity: opacity of areas, 0 to 1.
    """
    low, high = window
    shades = np.clip((picture.astype(np.float32) - low) * (255 / (high - low)), 0, 255)
    painted = np.repeat(shades[..., None], 3, axis=2)
    for overlay in overlays:
        values = overlay.array
        if overlay.style == "probability":
            painted = blend(painted, rgb(PROBABILITY_COLOUR), opacity * values)
            continue
        colours = np.float32([rgb(class_colour(k)) for k in range(int(values.max(initial=0)) + 1)])[values]
        strength = (values != 0) * opacity
        if overlay.style != "area":
            strength = outline(values, overlay.style) * min(1.0, 2 * opacity)
        painted = blend(painted, colours, strength)
    return np.rint(painted).astype(np.uint8)
