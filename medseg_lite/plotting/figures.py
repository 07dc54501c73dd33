"""Static figures: slices with their overlays, training curves, histograms, and tables beside a paper's."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..volume import Case
from .painting import (
    PROBABILITY_COLOUR,
    Overlay,
    as_overlays,
    busiest_position,
    check_position,
    class_colour,
    class_name,
    cut,
    default_window,
    find_plane,
    paint,
)

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
    """Return the look of this module's figures, for a `with` block: `with plotting.style(): figure, axes = plt.subplots()`."""
    return plt.rc_context(STYLE)


# -------------------------------------------------------------------------------------------------------------- slices


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
    """Draw one slice of each case, one row per case.

    Args:
        cases: a case, or a list of cases that have the same channels.
        position: voxel indices (d, h, w) that the plane goes through; by default the slice with most labelled voxels.
        channels: sequences to show; by default all of the first case.
        overlays: as for `widgets.SliceViewer`; for a list of cases a list with one entry (or None) per case. A case's label is
            drawn as the overlay "truth".
        plane: "axial", "coronal" or "sagittal".
        columns: "channels" for one column per sequence with every overlay on it; "overlays" for the first sequence alone, then
            once more under each overlay, to compare results side by side.
        classes: class names for the legend, by number; by default `case.info["classes"]`.
        windows: (black, white) intensities by channel; by default the 0.5 and 99.5 percentiles of each volume.
        opacity: opacity of filled overlays, 0 to 1.
        letters: write the directions (R, L, A, P, S, I) on the edges.
        size: width of one picture in inches.

    Raises:
        ValueError: for an empty list, an unknown plane, channel or kind of columns, or overlays on another grid.
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
    view, channels = find_plane(plane), tuple(channels or cases[0].channels)
    layers = [as_overlays(o, c.shape, c.label) for o, c in zip(given, cases)]
    names = list(dict.fromkeys(o.name for row in layers for o in row))
    titles = list(channels) if columns == "channels" else [channels[0], *names]
    heights = [size * (c.shape[view.y] * c.voxel_size[view.y]) / (c.shape[view.x] * c.voxel_size[view.x]) for c in cases]
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
            for axes, title in zip(grid[row], titles):
                channel, on = title, painted
                if columns == "overlays":  # each overlay stands alone, so its classes can be filled
                    channel = channels[0]
                    on = [o if o.style == "probability" else o._replace(style="area") for o in painted if o.name == title]
                volume = shown.image[channels.index(channel)]
                window = (windows or {}).get(channel) or default_window(volume, case.mask)
                pixels = paint(cut(volume, view, index), window, on, opacity)
                axes.imshow(pixels, aspect=case.voxel_size[view.y] / case.voxel_size[view.x], interpolation="antialiased")
                axes.set(xticks=[], yticks=[], title=title if row == 0 else "")
                axes.spines[:].set_visible(False)
                if letters:
                    _write_letters(axes, view.edges)
                _add_to_legend(legend, on, classes if classes is not None else case.info.get("classes"))
            grid[row, 0].set_ylabel(f"{case.name}\n{view.name.lower()} {index}", fontsize=8)
        _draw_legend(figure, legend)
    return figure


def _write_letters(axes: Axes, edges: str) -> None:
    places = [(0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center")]
    places += [(0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom")]
    for letter, (x, y, horizontal, vertical) in zip(edges, places):
        axes.text(x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="white", fontsize=8)


def _add_to_legend(legend: dict[str, Artist], overlays: Sequence[Overlay], classes) -> None:
    """Add a patch for each class in sight, and a grey line for each outlined overlay."""
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


def _draw_legend(figure: Figure, legend: dict[str, Artist]) -> None:
    """Draw the legend below the figure, in as many columns as fit."""
    if legend:
        widest = 0.5 + 0.075 * max(map(len, legend))  # inches
        columns = min(len(legend), max(1, int(figure.get_figwidth() / widest)))
        look = {"loc": "outside lower center", "handlelength": 1.4, "columnspacing": 1.2, "fontsize": 9}
        figure.legend(handles=list(legend.values()), ncols=columns, **look)


# --------------------------------------------------------------------------------------------------- training curves


def history(frame: pd.DataFrame, *, size: float = 3.4) -> Figure:
    """Draw training curves side by side: the losses, each family of scores, and the learning rate.

    Args:
        frame: a "step" column and any of "loss"/"loss_*", "learning_rate", and scores such as "dice_whole". Columns with the
            same first word share a panel. A curve skips the rows in which its column is NaN.
        size: width of one panel in inches.

    Raises:
        ValueError: for a frame without "step", or without a curve.
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
    """Draw histograms of the same pixels at several stages, a row for each class, with normal distributions fitted to them.

    Args:
        stages: intensities by stage, `{"input": (*shape), "after the pre-processor": (*shape)}`.
        label: class numbers `(*shape)` of these pixels. A negative number leaves a pixel out.
        classes: class names, by number.
        bins: number of bars. All histograms of a stage have the same bars. The outermost 0.05 % of a stage are not drawn.
        size: width of one panel in inches.

    Raises:
        ValueError: for no stages, no classes, or a stage of another shape than the label.

    Source: Drozdzal et al. 2018, figure 6.
    Taught in notebook 08.
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
    """Format a number with three digits, or with all digits before the point."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


# ------------------------------------------------------------------------------------------------------------- tables


class SideBySide:
    """Tables side by side, each under the name of its data: HTML in a notebook, text elsewhere."""

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
    """Return our numbers beside the paper's. A title names the data of each, so that nobody takes them for one experiment.

        paper_table(ours, paper, ours_on="24 brain phantoms", paper_on="BRATS 2015 training set")

    Args:
        ours: table of our numbers.
        paper: table of the paper's numbers.
        ours_on: data that our numbers come from.
        paper_on: data that the paper's numbers come from.
        digits: digits after the point.

    Raises:
        ValueError: for a title without data.
    """
    for what, text in (("ours_on", ours_on), ("paper_on", paper_on)):
        if not text.strip():
            raise ValueError(f"{what} is empty; say which data the numbers come from")
    return SideBySide([(f"ours ({ours_on})", ours), (f"paper ({paper_on})", paper)], digits)


# ------------------------------------------------------------------------------------------------------------ showing


def show(figure: Figure, alt: str) -> None:
    """Display a figure as a PNG with alternative text, and close it.

    The text is stored as the output's text and as `alt` in its metadata. Of nbconvert's HTML templates "classic" writes it on
    the image, "lab" (as of 7.17) does not.

    Args:
        figure: figure to show.
        alt: one or two sentences that say what the picture shows, for readers who cannot see it.

    Raises:
        ValueError: for an empty text.
    """
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError("alt is empty; describe in a sentence what the figure shows")
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    plt.close(figure)
    alt = " ".join(alt.split())
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": f"Figure: {alt}"}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)
