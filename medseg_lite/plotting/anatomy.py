"""Slices of cases with overlays, as static figures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from ..volume import Case
from .figures import picture, style
from .meanings import CASING, COLOURS, PROBABILITY_COLOUR, class_colour, class_name
from .painting import Overlay, as_overlays, borders, busiest_position, check_position, cut, default_window, find_plane, paint

# Lines of 1.8 pixels at 110 dots per inch. Dashes are given in multiples of the width.
OUTLINE_WIDTH = 1.8 * 72 / 110
DASHES = {"line": "-", "dashes": (0, (4, 2.5)), "dots": (0, (1.2, 1.6))}
OUTLINES = {"line": "outline", "dashes": "dashed outline", "dots": "dotted outline"}
# Inches. A page of JupyterLab is 848 pixels wide; a wider figure is shrunk there, with its letters.
WIDEST, LEFT, GAP = 848 / 110, 0.42, 0.05


def outline(axes: Axes, mask: np.ndarray, *, colour: str, dashed: bool = False, style: str | None = None) -> None:
    """Draw the borders of a mask along the edges of its pixels, over a picture that `imshow` drew.

    A dark casing keeps the line visible on every background.

    Args:
        axes: axes of the picture.
        mask: mask or class numbers, (rows, columns). Borders between classes are drawn too.
        colour: colour of the line.
        dashed: draw dashes.
        style: "line", "dashes" or "dots", in place of `dashed`.
    """
    mask, dash = np.asarray(mask), DASHES[style or ("dashes" if dashed else "line")]
    around = borders(mask != 0)
    passes = [(around, CASING, 2.2, "-", 0.7), (around, colour, 1, dash, 1), (borders(mask, inner=True), colour, 0.6, dash, 1)]
    for lines, paint_with, width, dashes, alpha in passes:
        look = {"capstyle": "butt", "joinstyle": "miter", "clip_on": False, "linestyles": [dashes], "alpha": alpha}
        drawn = LineCollection(lines, colors=paint_with, linewidths=width * OUTLINE_WIDTH, **look)
        axes.add_collection(drawn, autolim=False)


def draw_slice(
    axes: Axes,
    volume: np.ndarray,
    plane: str,
    index: int,
    *,
    window: tuple[float, float] | None = None,
    overlays: Sequence[Overlay] = (),
    voxel_size: Sequence[float] = (1, 1, 1),
    opacity: float = 0.5,
    classes: Sequence[str] | Mapping[int, str] | None = None,
    letters: bool = False,
) -> None:
    """Draw a slice of a volume with its overlays, without frame or ticks.

    Args:
        axes: axes to draw on.
        volume: intensities (D, H, W).
        plane: "axial", "coronal" or "sagittal".
        index: voxel index along the axis that the plane cuts.
        window: (black, white) intensities; by default the 0.5 and 99.5 percentiles of the volume.
        overlays: overlays on the grid of the volume, as `as_overlays` makes them.
        voxel_size: mm of a voxel along D, H and W.
        opacity: opacity of filled overlays, 0 to 1.
        classes: class names, by number. The colours follow them.
        letters: write the directions (R, L, A, P, S, I) on the edges.
    """
    view = find_plane(plane)
    painted = [o._replace(array=cut(o.array, view, index)) for o in overlays]
    filled = [o for o in painted if o.style not in OUTLINES]
    pixels = paint(cut(volume, view, index), window or default_window(volume), filled, opacity, classes)
    axes.imshow(pixels, aspect=voxel_size[view.y] / voxel_size[view.x], interpolation="antialiased")
    for overlay in painted:
        if overlay.style in OUTLINES:
            outline(axes, overlay.array, colour=overlay.colour or COLOURS["prediction"], style=overlay.style)
    picture(axes)
    if letters:
        _write_letters(axes, view.edges)


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
        size: width of one picture in inches. It is less where the figure would be wider than a page.

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
    view_ratio = [(c.shape[view.y] * c.voxel_size[view.y]) / (c.shape[view.x] * c.voxel_size[view.x]) for c in cases]
    with style():
        figure, grid = _lay_out(titles, view_ratio, size)
        legend: dict[str, Artist] = {}
        for row, (case, layer) in enumerate(zip(cases, layers)):
            shown, named = case.select(channels), classes if classes is not None else case.info.get("classes")
            where = position if position is not None else busiest_position(case.label, case.shape)
            index = check_position(where, case.shape)[view.cut]
            look = {"voxel_size": case.voxel_size, "opacity": opacity, "classes": named, "letters": letters}
            for axes, title in zip(grid[row], titles):
                channel, on = title, layer
                if columns == "overlays":  # each overlay stands alone, so its classes can be filled
                    channel = channels[0]
                    on = [o if o.style == "probability" else o._replace(style="area") for o in layer if o.name == title]
                volume = shown.image[channels.index(channel)]
                window = (windows or {}).get(channel) or default_window(volume, case.mask)
                draw_slice(axes, volume, plane, index, window=window, overlays=on, **look)
                on = [o._replace(array=cut(o.array, view, index)) for o in on]
                if columns == "overlays" or axes is grid[row, 0]:
                    _write_absent(axes, on, alone=columns == "overlays")
                _add_to_legend(legend, on, named)
            grid[row, 0].set_ylabel(f"{case.name}\n{view.name.lower()} {index}", fontsize=9)
        _draw_legend(figure, legend)
    return figure


def _lay_out(titles: Sequence[str], ratios: Sequence[float], size: float) -> tuple[Figure, np.ndarray]:
    """Return a figure with its axes in place, in inches: a row for each ratio of height to width, a column for each title.

    A layout engine would leave white bands, for it does not know the pictures' shapes.
    """
    size = min(size, (WIDEST - LEFT) / len(titles) - GAP)
    titles = [textwrap.fill(title, max(8, int(size / 0.085))) for title in titles]
    top = 0.08 + 0.165 * max(title.count("\n") + 1 for title in titles)
    width, height = LEFT + (size + GAP) * len(titles), top + sum(size * r + GAP for r in ratios)
    figure = Figure(figsize=(width, height))
    grid = np.empty((len(ratios), len(titles)), object)
    y = height - top
    for row, ratio in enumerate(ratios):
        y -= size * ratio
        for column, title in enumerate(titles):
            place = (LEFT + column * (size + GAP)) / width, y / height, size / width, size * ratio / height
            grid[row, column] = figure.add_axes(place, title=title if row == 0 else "")
            picture(grid[row, column])
        y -= GAP
    return figure, grid


def _write_letters(axes: Axes, edges: str) -> None:
    """Write the directions on the edges of a picture."""
    places = [(0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center")]
    places += [(0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom")]
    for letter, (x, y, horizontal, vertical) in zip(edges, places):
        axes.text(x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="white", fontsize=9)


def _write_absent(axes: Axes, overlays: Sequence[Overlay], *, alone: bool) -> None:
    """Say which overlays of classes mark nothing in this slice, so that an empty picture does not look broken."""
    absent = [o.name for o in overlays if o.style != "probability" and not o.array.any()]
    if absent:
        text = "(none in this slice)" if alone else "\n".join(f"{name}: none in this slice" for name in absent)
        casing = [withStroke(linewidth=2, foreground="black")]
        axes.text(
            0.5, 0.9, text, transform=axes.transAxes, ha="center", va="top", color="white", fontsize=8, path_effects=casing
        )


def _add_to_legend(legend: dict[str, Artist], overlays: Sequence[Overlay], classes) -> None:
    """Add a patch for each class that is filled and for each probability, and a line for each outlined overlay."""
    for overlay in overlays:
        if overlay.style == "probability":
            legend[overlay.name] = Patch(color=overlay.colour or PROBABILITY_COLOUR, label=f"{overlay.name}, 0 to 1")
        elif overlay.style == "area":
            for value in np.unique(overlay.array[overlay.array != 0]).tolist():
                text = class_name(value, classes)
                legend[text] = Patch(color=class_colour(value, classes), label=text)
        elif overlay.array.any():
            text = f"{overlay.name} ({OUTLINES[overlay.style]})"
            legend[text] = outline_handle(text, colour=overlay.colour, style=overlay.style)


def outline_handle(label: str, *, colour: str, style: str = "line") -> Line2D:
    """Return the legend's icon of an outline: its colour, its dashes and its casing."""
    casing = [withStroke(linewidth=3.4, foreground=CASING)]
    return Line2D([], [], color=colour, linestyle=DASHES[style], linewidth=1.8, label=label, path_effects=casing)


def _draw_legend(figure: Figure, legend: dict[str, Artist]) -> None:
    """Draw the legend below the figure, in as many columns as fit."""
    if legend:
        widest = 0.55 + 0.075 * max(len(handle.get_label()) for handle in legend.values())  # inches
        columns = min(len(legend), max(1, int(figure.get_figwidth() / widest)))
        look = {"handlelength": 1.8, "columnspacing": 1.2, "fontsize": 9, "borderaxespad": 0.2}
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        figure.legend(handles=list(legend.values()), ncols=columns, **place, **look)
