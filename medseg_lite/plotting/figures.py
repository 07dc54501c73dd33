"""Static figures: their style, training curves, histograms, tables beside a paper's, and how they are shown."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .meanings import class_colour, class_name

# Inches. A page of JupyterLab is 848 pixels wide. It shrinks a wider figure, with its letters.
WIDEST = 848 / 110
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


def set_style() -> None:
    """Set the look of all figures to this module's. `course.start()` calls it."""
    plt.rcParams.update(STYLE)


def picture(axes: Axes | Iterable[Axes]) -> None:
    """Take frame, ticks and grid off an axes that shows an image, or off several."""
    for one in np.ravel(axes):
        one.set(xticks=[], yticks=[])
        one.spines[:].set_visible(False)
        one.grid(False)


# --------------------------------------------------------------------------------------------------- training curves


def history(frame: pd.DataFrame, *, size: float = 2.55) -> Figure:
    """Draw training curves side by side: the losses, each family of scores, and the learning rate. Rows are as wide as a page.

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
        rows = int(np.ceil(len(panels) * size / WIDEST))
        wide = -(-len(panels) // rows)
        figure = Figure(figsize=(size * wide, 0.75 * size * rows), layout="constrained")
        for place, (name, columns) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, wide, place)
            for column in columns:
                curve = frame[["step", column]].dropna()
                label = column.removeprefix(f"{name}_").replace("_", " ")
                axes.plot(curve["step"], curve[column], label=label, marker="o" if len(curve) <= 25 else None, markersize=3)
            axes.set(xlabel="update", title=name)
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
    Taught in notebook 10.
    """
    label = np.asarray(label)
    present = [int(k) for k in np.unique(label) if k >= 0]
    if not stages or not present:
        raise ValueError(f"{len(stages)} stages and classes {present}; intensities needs at least one of each")
    for name, values in stages.items():
        if np.shape(values) != label.shape:
            raise ValueError(f"stage {name!r} has shape {np.shape(values)}; expected that of the label, {label.shape}")
    size = min(size, WIDEST / len(stages))
    with style():
        figure = Figure(figsize=(size * len(stages), 0.62 * size * len(present) + 0.3), layout="constrained")
        grid = figure.subplots(len(present), len(stages), squeeze=False, sharex="col")
        for column, (name, values) in enumerate(stages.items()):
            low, high = np.percentile(np.asarray(values)[label >= 0], (0.05, 99.95))
            edges = np.linspace(low, high, bins + 1) if low < high else np.array([low - 0.5, low + 0.5])
            for row, k in enumerate(present):
                axes, chosen = grid[row, column], np.asarray(values, np.float64)[label == k]
                mean, deviation = chosen.mean(), chosen.std()
                colour = class_colour(k, classes) if k else "#999999"
                axes.hist(chosen, edges, density=True, color=colour, alpha=0.75, linewidth=0)
                if deviation > 0:
                    x = np.linspace(low, high, 200)
                    curve = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
                    axes.plot(x, curve, color="black", linestyle="--", linewidth=1.3)
                axes.set(yticks=[], title=name if row == 0 else "")
                axes.set_ylabel(textwrap.fill(class_name(k, classes), 20) if column == 0 else "")
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


def show(figure: Figure, alt: str, *, caption: str | None = None) -> None:
    """Display a figure as a PNG with alternative text, a caption below it, and close it.

    The picture stays an image/png output, because every viewer shows one, while a picture inside an HTML output may be taken out
    where HTML is cleaned. The text is stored as `alt` in the picture's metadata. Of nbconvert's HTML templates "classic" writes it
    on the image; "lab" (as of 7.17) and JupyterLab do not. So the caption is an HTML output of its own, which readers see and
    screen readers read. It has no picture and no script, so cleaning leaves it as it is, but for its look.

    Args:
        figure: figure to show.
        alt: one or two sentences that say what the picture shows, for readers who cannot see it.
        caption: text below the picture; by default `alt`.

    Raises:
        ValueError: for an empty text.
    """
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError("alt is empty; describe in a sentence what the figure shows")
    file = io.BytesIO()
    with style():
        figure.savefig(file, format="png", bbox_inches="tight")
    plt.close(figure)
    alt = " ".join(alt.split())
    caption = " ".join((caption or alt).split())
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "Figure"}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)
    look = "max-width:848px;margin:0.2em 0 1em;font-size:0.9em;opacity:0.85"
    text = f'<figure style="{look}"><figcaption>{html.escape(caption)}</figcaption></figure>'
    display({"text/html": text, "text/plain": caption}, raw=True)
