"""Small drawings on axes of your own: curves, bars, calibration, maps with their scale, receptive fields and block diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from .figures import STYLE, picture
from .meanings import CASING, COLOURS, PROBABILITY, SIGNED, UNSIGNED, class_colour, class_name

MARKERS = "osD^vP"
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")


def curves(
    axes: Axes,
    lines: Mapping[str, pd.Series | tuple],
    *,
    colours: Mapping[str, str] | None = None,
    marks: int = 12,
    legend="best",
) -> None:
    """Draw curves that are told apart by colour, dashes and markers.

    Args:
        axes: axes to draw on.
        lines: `{name: series}` with x in its index, or `{name: (x, y)}`. NaN values are left out.
        colours: colours by name; by default those of the style.
        marks: number of markers on a curve, about.
        legend: place of the legend as in `axes.legend(loc=…)`, or "" for none.
    """
    for (name, line), look, marker in zip(lines.items(), cycle(STYLE["axes.prop_cycle"]), cycle(MARKERS)):
        x, y = (line.index, line) if isinstance(line, pd.Series) else line
        x, y = np.asarray(x), np.asarray(y, float)
        x, y = x[~np.isnan(y)], y[~np.isnan(y)]
        look = look | {"color": (colours or {}).get(name, look["color"])}
        axes.plot(x, y, label=name, marker=marker, markersize=4, markevery=max(1, round(len(x) / marks)), **look)
    if legend:
        axes.legend(loc=legend)


def calibration(axes: Axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], **look) -> None:
    """Draw how often a thing is true against the probability that a network gave it. Calibrated networks lie on the diagonal.

    Args:
        axes: axes to draw on.
        lines: `{name: (mean probability in each bin, share that is true in each bin)}`.
        look: options of `curves`.
    """
    axes.plot([0, 1], [0, 1], color=COLOURS["neutral"], linewidth=1, linestyle="-", label="calibrated")
    curves(axes, lines, **({"legend": "upper left"} | look))
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="probability given by the network", ylabel="share that is true")


def bars(
    axes: Axes,
    table: pd.DataFrame,
    *,
    colours: Mapping[str, str] | None = None,
    points: Mapping[tuple[str, str], Sequence[float]] | None = None,
    digits: int = 2,
    legend: bool = True,
) -> None:
    """Draw a group of bars for each row of a table, for example each class, with one bar for each column.

    The number stands above its bar, so zero is seen too. Colour and hatching tell the columns apart.

    Args:
        axes: axes to draw on.
        table: heights of the bars. Nothing is drawn for NaN, and "–" is written.
        colours: colours by column; by default those of the style.
        points: single values behind a bar, by (row, column), drawn as dots.
        digits: digits after the point; a negative number writes none.
        legend: draw a legend below the axes.
    """
    width = 0.8 / len(table.columns)
    for n, (name, look, hatch) in enumerate(zip(table.columns, cycle(STYLE["axes.prop_cycle"]), cycle(HATCHES))):
        x = np.arange(len(table)) + (n - (len(table.columns) - 1) / 2) * width
        colour = (colours or {}).get(name, look["color"])
        axes.bar(x, table[name], 0.92 * width, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=name)
        for place, row, height in zip(x, table.index, table[name]):
            single = list((points or {}).get((row, name), ()))
            axes.plot([place] * len(single), single, ".", color="#333333", markersize=3)
            if digits >= 0:
                text, top = ("–", 0) if np.isnan(height) else (f"{height:.{digits}f}", max([height, 0, *single]))
                axes.annotate(text, (place, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(table)), [str(row) for row in table.index])
    axes.grid(axis="x", visible=False)
    if legend:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=9, columnspacing=1.2)


def intervals(axes: Axes, rows: Mapping[str, Mapping[str, object]]) -> None:
    """Draw a mean with its interval for each row and each series of a row; markers tell the series apart.

    Args:
        axes: axes to draw on; the values lie along x, the first row on top.
        rows: objects with a `mean`, a `low` and a `high`, as `statistics.two_way` returns them, by row and series.
    """
    names = list(dict.fromkeys(name for series in rows.values() for name in series))
    for n, name in enumerate(names):
        found = [(y, series[name]) for y, series in enumerate(rows.values()) if name in series]
        shift = 0.24 * (n - (len(names) - 1) / 2)
        axes.errorbar(
            [one.mean for _, one in found],
            [y + shift for y, _ in found],
            xerr=np.array([(one.mean - one.low, one.high - one.mean) for _, one in found]).T,
            fmt=MARKERS[n % len(MARKERS)],
            capsize=3,
            label=name,
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=len(names), fontsize=9)


def class_legend(
    figure: Figure, classes: Sequence[str] | Mapping[int, str], values: Sequence[int] | None = None, **look
) -> Legend:
    """Draw a legend of classes below a figure.

    Args:
        figure: figure with the layout "constrained".
        classes: class names, by number.
        values: class numbers to show; by default all but the background.
        look: further options of `figure.legend`.
    """
    numbers = classes if isinstance(classes, Mapping) else range(len(classes))
    shown = [k for k in numbers if k] if values is None else values
    handles = [Patch(color=class_colour(k, classes), label=class_name(k, classes)) for k in shown]
    return figure.legend(handles=handles, **({"loc": "outside lower center", "ncols": len(handles), "fontsize": 9} | look))


def map_with_scale(
    axes: Axes,
    values: np.ndarray,
    kind: str,
    *,
    limits: float | tuple[float, float] | None = None,
    label: str = "",
    scale: bool = True,
    **look,
) -> AxesImage:
    """Draw a map or a kernel with a colour bar.

    Args:
        axes: axes to draw on.
        values: numbers, (rows, columns), turned for display.
        kind: "probability" (0 to 1), "signed" (negative and positive numbers, zero is white) or "unsigned".
        limits: lowest and highest number, or the largest size that is drawn. By default the largest size there is; unsigned
            numbers start at 0 or below.
        label: text at the colour bar.
        scale: draw the colour bar.
        look: further options of `axes.imshow`.

    Raises:
        ValueError: for an unknown kind.
    """
    maps = {"probability": PROBABILITY, "signed": SIGNED, "unsigned": UNSIGNED}
    if kind not in maps:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(maps)}")
    if limits is None:
        limits = 1.0 if kind == "probability" else (float(np.nanmax(np.abs(values))) or 1.0)
        limits = (
            (float(np.nanmin(values)), float(np.nanmax(values))) if kind == "unsigned" and np.nanmin(values) < 0 else limits
        )
    low, high = limits if isinstance(limits, tuple) else (-limits if kind == "signed" else 0.0, limits)
    image = axes.imshow(values, **({"cmap": maps[kind], "vmin": low, "vmax": high, "interpolation": "nearest"} | look))
    picture(axes)
    if scale:
        axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, label=label).outline.set_visible(False)
    return image


def field(
    axes: Axes,
    centre: tuple[float, float],
    side: float | tuple[float, float],
    *,
    text: str = "",
    colour: str | None = None,
    corner: str = "upper right",
) -> None:
    """Draw the box of a receptive field over a picture, and its name outside a corner.

    Args:
        axes: axes with the picture.
        centre: (x, y) of the voxel that sees the field, in pixels of the picture.
        side: side in pixels, or (width, height).
        text: name, for example "13²".
        colour: colour of the box; by default that of receptive fields.
        corner: corner of the name, for example "lower left". Boxes round one voxel need different ones.
    """
    (x, y), (width, height) = centre, np.broadcast_to(side, 2)
    (vertical, horizontal), colour = corner.split(), colour or COLOURS["field"]
    box = {"fill": False, "edgecolor": colour, "linewidth": 1.8, "path_effects": [withStroke(linewidth=3.4, foreground=CASING)]}
    axes.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, **box))
    right, up = (1 if horizontal == "right" else -1), (1 if vertical == "upper" else -1)
    look = {"ha": "left" if right > 0 else "right", "va": "bottom" if up > 0 else "top", "weight": "bold", "fontsize": 9}
    look |= {"color": "white", "path_effects": [withStroke(linewidth=2, foreground=CASING)]}
    axes.annotate(text, (x + right * width / 2, y - up * height / 2), (2 * right, up), textcoords="offset points", **look)


def block_diagram(axes: Axes, boxes: Mapping[str, tuple], arrows: Sequence[tuple], *, fontsize: float = 9) -> None:
    """Draw boxes with text, and arrows from border to border.

    Args:
        axes: axes to draw on. Its limits are set round the boxes, its frame is taken off.
        boxes: `{name: (x, y, text)}` or `{name: (x, y, text, colour)}`. The text "+" makes a small circle, where channels are
            joined or maps are added.
        arrows: (from, to) by the boxes' names, or (from, to, text).
        fontsize: size of the letters; a box is as large as its text.
    """
    drawn = {}
    for name, (x, y, text, *colour) in boxes.items():
        look = {"boxstyle": "circle,pad=0.15" if text == "+" else "round,pad=0.4,rounding_size=0.2"}
        look |= {"facecolor": colour[0] if colour else "#eeeeee", "edgecolor": "#444444"}
        drawn[name] = axes.text(x, y, text, ha="center", va="center", fontsize=fontsize, bbox=look, zorder=3)
    for start, stop, *text in arrows:
        ends = {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[stop].get_bbox_patch(), "shrinkA": 0, "shrinkB": 1}
        where = drawn[stop].get_position(), drawn[start].get_position()
        axes.annotate("", *where, arrowprops={"arrowstyle": "-|>", "color": "#444444", "lw": 1.3} | ends, zorder=2)
        if text:
            axes.annotate(
                text[0], np.mean(where, axis=0), (0, 3), textcoords="offset points", ha="center", fontsize=fontsize - 1
            )
    x, y = np.transpose([box[:2] for box in boxes.values()])
    axes.set(xlim=(x.min() - 0.6, x.max() + 0.6), ylim=(y.min() - 0.5, y.max() + 0.5))
    picture(axes)
