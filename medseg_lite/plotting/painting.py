"""Slices of a volume as pictures: turned for display, seen through a window, painted with overlays.

The display convention is that of radiology: anterior is up in axial planes, superior is up in the others. The patient's left is
on the right of the picture. Sagittal planes have anterior on the left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..arrays import as_array, as_label, as_mask
from .meanings import OVERLAY_COLOURS, PROBABILITY_COLOUR, class_colour, rgb

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


def draw_sample(values: np.ndarray, count: int = 1_000_000) -> np.ndarray:
    """Return at most `count` numbers of an array, which are enough for its percentiles, as a flat array.

    They are drawn at random from the whole array, always the same ones. Every n-th number would be no sample: where n is the number of
    slices it is one slice alone.
    """
    flat = values.reshape(-1)
    return flat if flat.size <= count else flat[np.random.default_rng(0).integers(flat.size, size=count)]


def default_window(volume: np.ndarray, mask: np.ndarray | None = None) -> tuple[float, float]:
    """Return the intensities shown as black and as white: the 0.5 and 99.5 percentiles, inside the mask if there is one."""
    mask = None if mask is None else as_mask(mask)
    values = volume[mask] if mask is not None and mask.any() else volume
    low, high = (float(v) for v in np.percentile(draw_sample(values), (0.5, 99.5)))
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
        colour: colour of the outline or of the probability. Areas have none: each class has its own.
    """

    name: str
    array: np.ndarray
    style: str
    colour: str = ""


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
    outlines = iter(zip(("line", "dashes", "dots"), OVERLAY_COLOURS))
    for name, array in given.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"an overlay is called {name!r}; expected a text, as in overlays={{'prediction': array}}")
        what = f"overlay {name!r}"
        array = as_array(array, what)
        if array.shape != tuple(shape):
            raise ValueError(
                f"{what} has shape {array.shape} but the image is {tuple(shape)}; both must lie on one (D, H, W) grid: "
                "resample it, or pass the classes of one case without batch and channel axes"
            )
        if _is_probability(array, what):
            checked.append(Overlay(name, array.astype(np.float32), "probability", PROBABILITY_COLOUR))
            continue
        if array.dtype.kind == "b" or array.dtype == np.uint8:
            array = array.astype(np.uint8, copy=False)
        else:
            array = as_label(array, source=what)
        look = ("area",) if name == "truth" else next(outlines, ("dots", OVERLAY_COLOURS[-1]))
        checked.append(Overlay(name, array, *look))
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


def borders(classes: np.ndarray, *, inner: bool = False) -> list[np.ndarray]:
    """Return the borders between classes as lines along the edges of pixels.

    Args:
        classes: class numbers, or a mask, (rows, columns).
        inner: return the borders between two classes only, not those with the background.

    Returns:
        Arrays (points, 2) of x and y, in the coordinates of `imshow`: pixel centres are whole numbers. Closed lines end where
        they begin. No edge is drawn twice, so dashes stay dashes.
    """
    padded = np.pad(np.asarray(classes), 1)
    (above, below), (left, right) = (padded[:-1, 1:-1], padded[1:, 1:-1]), (padded[1:-1, :-1], padded[1:-1, 1:])
    across = np.argwhere((above != below) & (not inner or (above != 0) & (below != 0)))
    down = np.argwhere((left != right) & (not inner or (left != 0) & (right != 0)))
    edges = [((r, c), (r, c + 1)) for r, c in across.tolist()] + [((r, c), (r + 1, c)) for r, c in down.tolist()]
    neighbours: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for a, b in edges:
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
    # Lines begin where three edges meet, then anywhere on the closed lines that are left.
    begins = sorted(neighbours, key=lambda corner: len(neighbours[corner]) % 2 == 0)
    lines = []
    for begin in begins:
        while neighbours[begin]:
            lines.append(np.array(_walk(neighbours, begin))[:, ::-1] - 0.5)
    return lines


def _walk(neighbours: dict, corner: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the corners of a line from `corner` on, straight where it can be. Take its edges out of `neighbours`."""
    line, step = [corner], (0, 0)
    while neighbours[corner]:
        ahead = corner[0] + step[0], corner[1] + step[1]
        following = ahead if ahead in neighbours[corner] else min(neighbours[corner])
        neighbours[corner].remove(following)
        neighbours[following].remove(corner)
        line[len(line) - (following == ahead) :] = [following]
        step, corner = (following[0] - corner[0], following[1] - corner[1]), following
    return line


def outline_pixels(classes: np.ndarray, style: str = "line") -> np.ndarray:
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


def outcomes(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return where a mask was found (1), missed (2) and made up (3). `meanings.OUTCOMES` has the names of these numbers."""
    truth, prediction = np.asarray(truth) != 0, np.asarray(prediction) != 0
    return np.uint8(truth & prediction) + 2 * np.uint8(truth & ~prediction) + 3 * np.uint8(~truth & prediction)


def blend(picture: np.ndarray, colour, strength: np.ndarray) -> np.ndarray:
    """Return a float32 picture (rows, columns, 3) with a colour over it.

    Args:
        picture: red, green and blue within 0..255.
        colour: (red, green, blue), or one for each pixel, (rows, columns, 3).
        strength: share of the colour in each pixel, (rows, columns) within 0..1.
    """
    return picture + (np.float32(colour) - picture) * strength[..., None].astype(np.float32)


def paint(
    picture: np.ndarray,
    window: tuple[float, float],
    overlays: Iterable[Overlay] = (),
    opacity: float = 0.5,
    classes: Sequence[str] | Mapping[int, str] | None = None,
) -> np.ndarray:
    """Return a grey picture (rows, columns) under slices of its overlays as uint8 (rows, columns, 3).

    Areas are blended with `opacity`, probabilities p with opacity × p, and outlines with twice the opacity, because thin lines
    look fainter than areas.

    Args:
        picture: intensities of a slice.
        window: intensities shown as black and as white.
        overlays: slices of overlays, painted in this order.
        opacity: opacity of areas, 0 to 1.
        classes: class names, by number. The colours follow them.
    """
    low, high = window
    shades = np.clip((picture.astype(np.float32) - low) * (255 / (high - low)), 0, 255)
    painted = np.repeat(shades[..., None], 3, axis=2)
    for overlay in overlays:
        values = overlay.array
        if overlay.style == "probability":
            painted = blend(painted, rgb(PROBABILITY_COLOUR), opacity * values)
            continue
        colours = np.float32([rgb(class_colour(k, classes)) for k in range(int(values.max(initial=0)) + 1)])[values]
        strength = (values != 0) * opacity
        if overlay.style != "area":
            strength = outline_pixels(values, overlay.style) * min(1.0, 2 * opacity)
        painted = blend(painted, colours, strength)
    return np.rint(painted).astype(np.uint8)
