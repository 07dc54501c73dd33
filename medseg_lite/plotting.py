"""Static figures: slices with their overlays, training curves, tables beside a paper's; and how a slice is turned and painted.

The slice viewer draws by the same rules (`PLANES`, `CLASS_COLOURS`, `paint`), so that a figure and the viewer show one picture.
Display convention, as in radiology: anterior is up in axial planes, superior is up in the others, the patient's left is on the
right of the picture, and sagittal planes look to the left (anterior on the left).

    plotting.show(plotting.slices(case), alt="Four sequences of one phantom; the tumour lies in the left parietal lobe")
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .volume import BRATS_CLASSES as BRATS_CLASSES  # beside the colours, for those who draw
from .volume import Case, as_label

# Okabe and Ito's colour-blind-safe set (https://jfly.uni-koeln.de/color/). The four of the BRATS classes are the four of the
# seven that stay furthest apart, blended half over grey, for normal, deuteranope, protanope and tritanope eyes (CIEDE2000 >= 10).
CLASS_COLOURS = ("#00000000", "#0072B2", "#56B4E9", "#F0E442", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
PROBABILITY_COLOUR = "#E69F00"

STYLE = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "axes.prop_cycle": plt.cycler(
        color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"],
        linestyle=["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))],
    ),
}


def style() -> AbstractContextManager:
    """The look of this module's figures, for a `with` block: `with plotting.style(): figure, axes = plt.subplots()`."""
    return plt.rc_context(STYLE)


def class_colour(value: int) -> str:
    """Colour of a class as "#rrggbb"; classes above 7 start again at the colour of class 1, the background is transparent."""
    return CLASS_COLOURS[value] if value < len(CLASS_COLOURS) else CLASS_COLOURS[(value - 1) % 7 + 1]


def class_name(value: int, classes: Sequence[str] | Mapping[int, str] | None) -> str:
    """Name of a class in `classes` (a sequence by class number, or a mapping), "class 5" where it has none."""
    named = classes if isinstance(classes, Mapping) else dict(enumerate(classes or ()))
    return str(named.get(value, f"class {value}" if value else "background"))


# ------------------------------------------------------------------------------------------------- slices of a volume


class Plane(NamedTuple):
    """How one anatomical plane of a RAS+ volume (D, H, W) is shown. Both picture axes run against the array's."""

    name: str
    cut: int  # array axis that the plane cuts
    x: int  # array axis along the picture's rows, right to left
    y: int  # array axis along the picture's columns, bottom to top
    edges: str  # directions at the picture's left, right, top and bottom edge


PLANES = (
    Plane("Axial", cut=2, x=0, y=1, edges="RLAP"),
    Plane("Coronal", cut=1, x=0, y=2, edges="RLSI"),
    Plane("Sagittal", cut=0, x=1, y=2, edges="APSI"),
)


def find_plane(name: str) -> Plane:
    """The plane called "axial", "coronal" or "sagittal"."""
    for plane in PLANES:
        if plane.name.lower() == str(name).lower():
            return plane
    raise ValueError(f"there is no plane {name!r}; expected 'axial', 'coronal' or 'sagittal'")


def cut(volume: np.ndarray, plane: Plane, index: int) -> np.ndarray:
    """Slice `index` of `volume` (D, H, W) as a picture (rows, columns), turned for display."""
    return volume.take(index, axis=plane.cut).T[::-1, ::-1]


def busiest_position(label: np.ndarray | None, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Along each axis the slice with most labelled voxels; the middle of the volume where nothing is labelled."""
    labelled = None if label is None else label != 0
    if labelled is None or not labelled.any():
        return tuple(n // 2 for n in shape)
    return tuple(int(labelled.sum(axis=tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))


def default_window(volume: np.ndarray, mask: np.ndarray | None = None) -> tuple[float, float]:
    """Intensities shown as black and as white: the 0.5 and 99.5 percentiles, inside the mask where there is one."""
    values = volume[mask] if mask is not None and mask.any() else volume
    values = values.reshape(-1)[:: max(1, values.size // 1_000_000)]  # a million voxels tell the percentiles well enough
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    if low == high:
        low, high = float(volume.min()), float(volume.max())
    return (low, high) if low < high else (low, low + 1.0)


class Overlay(NamedTuple):
    """Classes (uint8) or a probability map (float32 in 0..1) on the grid of a volume, or a slice of one.

    `style` is "probability" (one colour, as strong as the probability), "area" (classes filled with their colours), or
    "line", "dashes", "dots" (classes outlined), so that overlays are told apart by more than colour.
    """

    name: str
    array: np.ndarray
    style: str


def as_overlays(
    overlays: Mapping[str, np.ndarray] | np.ndarray | None, shape: tuple[int, int, int], label: np.ndarray | None = None
) -> list[Overlay]:
    """Check overlays and bring them into one form; a case's own label comes first, under the name "truth".

    Integers and booleans are classes, floats within 0..1 a probability map, other whole floats classes. Truth is filled, the
    first other overlay of classes is outlined, the next with a dashed line, further ones with a dotted line.
    Raises ValueError for another grid, NaN, values that are neither, or names that are not text.
    """
    given = {} if overlays is None else overlays if isinstance(overlays, Mapping) else {"prediction": overlays}
    if label is not None:
        given = {"truth": label, **given}
    checked: list[Overlay] = []
    outlines = iter(("line", "dashes"))
    for name, array in given.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"an overlay is called {name!r}; expected a text, as in overlays={{'prediction': array}}")
        array = np.asarray(array)
        what = f"overlay {name!r}"
        if array.shape != tuple(shape):
            raise ValueError(
                f"{what} has shape {array.shape} but the image is {tuple(shape)}; both must lie on one (D, H, W) grid: "
                "resample it, or pass the classes of one case without batch and channel axes"
            )
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{what} holds {array.dtype}; expected class numbers (integers) or probabilities (floats in 0..1)")
        if array.dtype.kind == "f":
            if not np.isfinite(array).all():
                raise ValueError(f"{what} has NaN or infinite values; replace them, for example with numpy.nan_to_num")
            if 0 <= array.min() and array.max() <= 1:
                checked.append(Overlay(name, array.astype(np.float32), "probability"))
                continue
            if (array != np.rint(array)).any():
                raise ValueError(
                    f"{what} holds floats from {array.min():.3g} to {array.max():.3g}; expected probabilities within 0..1 "
                    "or whole class numbers: take the softmax or the argmax of logits first"
                )
        line = "area" if name == "truth" else next(outlines, "dots")
        if array.dtype.kind == "b" or array.dtype == np.uint8:
            array = array.astype(np.uint8, copy=False)
        else:
            array = as_label(array, source=what)
        checked.append(Overlay(name, array, line))
    return checked


def outline(classes: np.ndarray, style: str = "line") -> np.ndarray:
    """Pixels of each class that touch another class or the picture's edge (4 neighbours), broken up for dashes and dots."""
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


def paint(
    picture: np.ndarray, window: tuple[float, float], overlays: Iterable[Overlay] = (), opacity: float = 0.5
) -> np.ndarray:
    """A grey picture (rows, columns) through a window, under slices of its overlays: uint8 (rows, columns, 3).

    Areas are blended with `opacity`, probabilities p with opacity × p, and outlines with twice the opacity, because thin lines
    look fainter than areas.
    """
    low, high = window
    grey = np.clip((picture.astype(np.float32) - low) * (255 / (high - low)), 0, 255)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    for overlay in overlays:
        values = overlay.array
        if overlay.style == "probability":
            colour, alpha = np.float32(_rgb(PROBABILITY_COLOUR)), opacity * values
        else:
            colour = np.float32([_rgb(class_colour(k)) for k in range(int(values.max(initial=0)) + 1)])[values]
            alpha = (values != 0) * opacity
            if overlay.style != "area":
                alpha = outline(values, overlay.style) * min(1.0, 2 * opacity)
        rgb += (colour - rgb) * alpha[..., None].astype(np.float32)
    return np.rint(rgb).astype(np.uint8)


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def slices(
    cases: Case | Sequence[Case],
    position: Sequence[int] | None = None,
    *,
    channels: Sequence[str] | None = None,
    overlays: Mapping[str, np.ndarray] | np.ndarray | Sequence | None = None,
    plane: str = "axial",
    columns: str = "channels",
    classes: Sequence[str] | Mapping[int, str] | None = None,
    windows: Mapping[str, tuple[float, float]] | None = None,
    opacity: float = 0.5,
    letters: bool = True,
    size: float = 2.4,
) -> Figure:
    """One slice of each case, one row per case.

    Args:
        cases: a case, or a list of cases with the same channels wanted.
        position: voxel indices (d, h, w) that the plane goes through; by default the slice with most labelled voxels.
        channels: sequences to show; all of the first case by default.
        overlays: as for `widgets.SliceViewer`; for a list of cases a list with one entry (or None) per case. A case's label
            is overlaid as "truth".
        plane: "axial", "coronal" or "sagittal".
        columns: "channels": one column per sequence with every overlay on it; "overlays": the first sequence plain, then once
            more under each overlay, to compare results side by side.
        classes: class names for the legend, by number; `case.info["classes"]` by default.
        windows: (black, white) intensities of a channel; by default the 0.5 and 99.5 percentiles of each picture's volume.
        opacity: of filled overlays, 0 to 1.
        letters: write the directions (R, L, A, P, S, I) on the edges.
        size: width of one picture in inches.
    """
    single = isinstance(cases, Case)
    cases = [cases] if single else list(cases)
    if not cases:
        raise ValueError("slices needs at least one case; found an empty list")
    if columns not in ("channels", "overlays"):
        raise ValueError(f"columns={columns!r}; expected 'channels' or 'overlays'")
    given = [overlays] if single else [None] * len(cases) if overlays is None else list(overlays)
    if not single and (isinstance(overlays, Mapping) or len(given) != len(cases)):
        raise ValueError(f"overlays must be a list with one entry for each of the {len(cases)} cases, in their order")
    view = find_plane(plane)
    channels = tuple(channels or cases[0].channels)
    layers = [as_overlays(o, c.shape, c.label) for o, c in zip(given, cases)]
    names = list(dict.fromkeys(o.name for row in layers for o in row))
    titles = list(channels) if columns == "channels" else [channels[0], *names]

    extents = [(c.shape[view.x] * c.spacing[view.x], c.shape[view.y] * c.spacing[view.y]) for c in cases]
    heights = [size * high / wide for wide, high in extents]
    legend: dict[str, Artist] = {}
    with style():
        figure = Figure(figsize=(size * len(titles), sum(heights) + 0.1 * len(cases) + 0.7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        grid = figure.subplots(len(cases), len(titles), squeeze=False, height_ratios=heights)
        for row, (case, layer) in enumerate(zip(cases, layers)):
            shown = case.select(channels)
            where = position if position is not None else busiest_position(case.label, case.shape)
            index = check_position(where, case.shape)[view.cut]
            painted = [o._replace(array=cut(o.array, view, index)) for o in layer]
            names_here = classes if classes is not None else case.info.get("classes")
            for axes, title in zip(grid[row], titles):
                channel, on = title, painted
                if columns == "overlays":  # each stands alone, so classes can be filled
                    channel = channels[0]
                    on = [o if o.style == "probability" else o._replace(style="area") for o in painted if o.name == title]
                volume = shown.image[channels.index(channel)]
                window = (windows or {}).get(channel) or default_window(volume, case.mask)
                axes.imshow(
                    paint(cut(volume, view, index), window, on, opacity),
                    aspect=case.spacing[view.y] / case.spacing[view.x],
                    interpolation="antialiased",
                )
                axes.set(xticks=[], yticks=[], title=title if row == 0 else "")
                axes.spines[:].set_visible(False)
                if letters:
                    _write_letters(axes, view.edges)
                _add_to_legend(legend, on, names_here)
            grid[row, 0].set_ylabel(f"{case.name}\n{view.name.lower()} {index}", fontsize=8)
        if legend:
            widest = 0.5 + 0.075 * max(map(len, legend))  # inches
            figure.legend(
                handles=list(legend.values()),
                loc="outside lower center",
                ncols=min(len(legend), max(1, int(figure.get_figwidth() / widest))),
                handlelength=1.4,
                columnspacing=1.2,
                fontsize=9,
            )
    return figure


def check_position(position: Sequence[int], shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Voxel indices (d, h, w) as ints, moved to the nearest voxel inside the volume. Raises ValueError for anything else."""
    try:
        numbers = [float(p) for p in position]
        if len(numbers) != 3 or any(n != int(n) for n in numbers):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"position is {position!r}; expected three whole voxel indices (d, h, w)") from None
    return tuple(int(min(max(p, 0), n - 1)) for p, n in zip(numbers, shape))


def _write_letters(axes, edges: str) -> None:
    places = [
        (0.02, 0.5, "left", "center"),
        (0.98, 0.5, "right", "center"),
        (0.5, 0.98, "center", "top"),
        (0.5, 0.02, "center", "bottom"),
    ]
    for letter, (x, y, horizontal, vertical) in zip(edges, places):
        axes.text(x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="white", fontsize=8)


def _add_to_legend(legend: dict[str, Artist], overlays: Sequence[Overlay], classes) -> None:
    """One patch per class in sight, and a grey line for each outlined overlay."""
    for overlay in overlays:
        if overlay.style == "probability":
            legend[overlay.name] = Patch(color=PROBABILITY_COLOUR, label=f"{overlay.name}, 0 to 1")
            continue
        for value in np.unique(overlay.array[overlay.array != 0]).tolist():
            text = class_name(value, classes)
            legend[text] = Patch(color=class_colour(value), label=text)
        if overlay.style != "area":
            dash = {"line": "-", "dashes": "--", "dots": ":"}[overlay.style]
            text = f"{overlay.name} (outline)"
            legend[text] = Line2D([], [], color="#555555", linestyle=dash, label=text)


# --------------------------------------------------------------------------------------------------- training curves


def history(frame: pd.DataFrame, *, size: float = 3.4) -> Figure:
    """Training curves side by side: the losses, every score by its family, and the learning rate.

    Args:
        frame: a "step" column and any of "loss"/"loss_*", "learning_rate", and scores such as "dice_whole", which share a
            panel with all columns of the same first word. Rows where a column is NaN are skipped for that column.
        size: width of one panel in inches.
    """
    if "step" not in frame.columns or len(frame.columns) < 2:
        raise ValueError(f"the history has columns {list(frame.columns)}; expected 'step' and at least one curve")
    panels: dict[str, list[str]] = {}
    for column in frame.columns.drop("step"):
        if pd.api.types.is_numeric_dtype(frame[column]) and frame[column].notna().any():
            panels.setdefault("learning rate" if column == "learning_rate" else column.split("_")[0], []).append(column)
    if not panels:
        raise ValueError(f"the history holds no numbers beside 'step': {list(frame.columns)}; train at least one step")
    with style():
        figure = Figure(figsize=(size * len(panels), 0.75 * size), layout="constrained")
        for axes, (name, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            for column in columns:
                curve = frame[["step", column]].dropna()
                label = column.removeprefix(f"{name}_").replace("_", " ")
                axes.plot(curve["step"], curve[column], label=label, marker="o" if len(curve) <= 25 else None, markersize=3)
            axes.set(xlabel="step", title=name)
            if name == "learning rate":
                axes.set_yscale("log")
            elif name in ("dice", "jaccard", "sensitivity", "precision", "specificity", "accuracy"):
                axes.set_ylim(0, 1)
            elif name == "loss" and (frame[columns].min(axis=None) >= 0):
                axes.set_ylim(bottom=0)
            if len(columns) > 1:
                axes.legend()
    return figure


def intensities(
    stages: Mapping[str, np.ndarray],
    label: np.ndarray,
    *,
    classes: Sequence[str] | Mapping[int, str] | None = None,
    bins: int = 80,
    size: float = 3.2,
) -> Figure:
    """Histograms of the same pixels at several stages, a row for each class, with normal distributions fitted to them.

    Args:
        stages: intensities by stage, `{"input": (*shape), "after the pre-processor": (*shape)}`.
        label: class numbers `(*shape)` of these pixels; a negative one leaves a pixel out.
        classes: their names, by number.
        bins: bars of each histogram; all of a stage share them. The outermost .05 % of a stage are not drawn.
        size: width of one panel in inches.

    Source: figure 6 of Drozdzal et al. 2018.
    """
    label = np.asarray(label)
    present = [int(k) for k in np.unique(label) if k >= 0]
    if not stages or not present:
        raise ValueError(f"{len(stages)} stages and classes {present}; intensities needs at least one of each")
    for name, values in stages.items():
        if np.shape(values) != label.shape:
            raise ValueError(f"stage {name!r} has shape {np.shape(values)}; expected that of the label, {label.shape}")
    with style():
        figure = Figure(figsize=(size * len(stages), 0.62 * size * len(present) + 0.3), layout="constrained")
        grid = figure.subplots(len(present), len(stages), squeeze=False, sharex="col")
        for column, (name, values) in enumerate(stages.items()):
            low, high = np.percentile(np.asarray(values)[label >= 0], (0.05, 99.95))
            edges = np.linspace(low, high, bins + 1) if low < high else np.array([low - 0.5, low + 0.5])
            for row, k in enumerate(present):
                axes, chosen = grid[row, column], np.asarray(values, np.float64)[label == k]
                mean, deviation = chosen.mean(), chosen.std()
                colour = class_colour(k) if k else "#999999"
                axes.hist(chosen, edges, density=True, color=colour, alpha=0.75, linewidth=0)
                if deviation > 0:
                    x = np.linspace(low, high, 200)
                    curve = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
                    axes.plot(x, curve, color="black", linestyle="--", linewidth=1.3)
                axes.set(yticks=[], title=name if row == 0 else "")
                axes.set_ylabel(class_name(k, classes) if column == 0 else "")
                letter = "abcdefghijklmnopqrstuvwxyz"[row * len(stages) + column]
                corner = {"transform": axes.transAxes, "va": "top", "fontsize": 9}
                axes.text(0.02, 0.97, f"({letter})", fontweight="bold", **corner)
                axes.text(0.98, 0.97, f"mean {_short(mean)}\nsd {_short(deviation)}", ha="right", **corner)
                axes.grid(False)
        for axes in grid[-1]:
            axes.set_xlabel("intensity")
        dashes = Line2D([], [], color="black", linestyle="--", label="normal distribution of the same mean and deviation")
        figure.legend(handles=[dashes], loc="outside lower center", fontsize=9)
    return figure


def _short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


# ------------------------------------------------------------------------------------------------------------- tables


class SideBySide:
    """Two tables, each under the name of its data; shows as HTML in a notebook and as text elsewhere."""

    def __init__(self, tables: list[tuple[str, pd.DataFrame]], digits: int):
        self.tables, self.digits = tables, digits

    def __repr__(self) -> str:
        blocks = [f"{title}\n{table.to_string(float_format=self._number, na_rep='–')}" for title, table in self.tables]
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        blocks = []
        for title, table in self.tables:
            body = table.to_html(float_format=self._number, na_rep="–", border=0)
            heading = f'<div style="font-weight:600;margin-bottom:.3em">{html.escape(title)}</div>'
            blocks.append(f"<div>{heading}{body}</div>")
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em 3em;align-items:flex-start">{"".join(blocks)}</div>'

    def _number(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


def paper_table(ours: pd.DataFrame, paper: pd.DataFrame, *, ours_on: str, paper_on: str, digits: int = 2) -> SideBySide:
    """Our numbers beside the paper's, each headed by the data it was measured on, so that nobody takes them for one experiment.

    paper_table(ours, paper, ours_on="24 brain phantoms", paper_on="BRATS 2015 training set")
    """
    for what, text in (("ours_on", ours_on), ("paper_on", paper_on)):
        if not text.strip():
            raise ValueError(f"{what} is empty; say which data the numbers come from")
    return SideBySide([(f"ours ({ours_on})", ours), (f"paper ({paper_on})", paper)], digits)


# ------------------------------------------------------------------------------------------------------------ showing


def show(figure: Figure, alt: str) -> None:
    """Display a figure as a PNG with alternative text, and close it.

    `alt` says in a sentence or two what the picture shows to someone who cannot see it. It is stored as the output's text and
    as `alt` in its metadata; of nbconvert's HTML templates "classic" writes it on the image, "lab" (as of 7.17) does not.
    Raises ValueError where it is empty.
    """
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError("alt is empty; describe in a sentence what the figure shows")
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    plt.close(figure)
    alt = " ".join(alt.split())
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": f"Figure: {alt}"}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)
