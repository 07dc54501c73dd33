"""The static picture of the feature explorer: the map over the input, and the strongest channels as sorted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import matplotlib.colors
import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from .. import plotting
from ..features import FeatureMaps
from ..plotting.meanings import CASING
from ._base import CaseWidget, signed_colormap
from ._feature_numbers import is_signed, offsets

PALETTES = ("sequential", "signed")
CHANNELS = 32  # that the picture shows at most


def colormap(palette: str) -> Colormap:
    """Return the colours of a palette. Both are read without seeing red or green."""
    return signed_colormap() if palette == "signed" else matplotlib.colormaps["magma"]


def hex_colours(palette: str) -> list[str]:
    """Return the 256 colours of a palette as "#rrggbb"."""
    return [matplotlib.colors.to_hex(colour) for colour in colormap(palette)(np.linspace(0, 1, 256))]


@dataclass
class Panel:
    """One layer of a feature explorer, as it is drawn.

    Attributes:
        explorer: the `FeatureExplorer`, whose state says how to draw.
        layer, channel: layer and channel shown.
        maps: feature maps of the layer.
        numbers: numbers of the layer's channels.
        order: the layer's channels, as sorted.
    """

    explorer: CaseWidget
    layer: str
    channel: int
    maps: FeatureMaps
    numbers: dict[str, object]
    order: Sequence[int]

    def __post_init__(self):
        self.plane = plotting.find_plane(self.explorer.plane)
        automatic = "signed" if is_signed(self.maps.data) else "sequential"
        self.palette = automatic if self.explorer.colours == "auto" else self.explorer.colours

    def cut(self, channel: int) -> np.ndarray:
        """Return the slice of a channel at the crosshair."""
        index = self.maps.index(self.explorer.position)[self.plane.cut]
        values = plotting.cut(self.maps.data[channel].astype(np.float32), self.plane, index)
        mask = self.explorer._case.mask
        if not self.explorer.brain_only or mask is None:
            return values
        return np.ma.masked_where(plotting.cut(self.maps.sampled(mask), self.plane, index) == 0, values)

    def span(self, channel: int) -> tuple[float, float]:
        """Return the values at both ends of the colours, as in the browser."""
        numbers = self.numbers
        if self.explorer.scale == "layer":
            low, high = min(numbers["bottom"]), max(numbers["top"])
        elif self.explorer.scale == "p1-p99":
            low, high = numbers["p1"][channel], numbers["p99"][channel]
        else:
            low, high = numbers["bottom"][channel], numbers["top"][channel]
        if self.palette == "signed":
            limit = max(abs(low), abs(high))
            low, high = -limit, limit
        return (low, high) if low < high else (low, low + 1)

    def extent(self, offset: Sequence[float], stride: Sequence[float], shape: Sequence[int]) -> tuple[float, ...]:
        """Return the edges (left, right, bottom, top) of a slice on the picture, in input voxels from its upper left corner.

        Both axes of the picture run against the array's.
        """
        edges = []
        for axis in (self.plane.x, self.plane.y):
            box = self.explorer._box[axis]
            first = offset[axis] - stride[axis] / 2 - box.start + 0.5
            last = first + stride[axis] * shape[axis]
            edges += [box.stop - box.start - last, box.stop - box.start - first]
        return edges[0], edges[1], edges[3], edges[2]


def draw(explorer: CaseWidget, panels: Sequence[Panel]) -> Figure:
    """Draw the panels of a feature explorer below each other: the picture on the left, the channels on the right."""
    shape, spacing, plane = explorer._shape, explorer._case.voxel_size, plotting.find_plane(explorer.plane)
    tall = shape[plane.y] * spacing[plane.y] > 1.4 * shape[plane.x] * spacing[plane.x]
    with plotting.style():
        figure = Figure(figsize=(9.4, (4.6 if tall else 3.5) * len(panels) + 0.3), dpi=100, layout="constrained")
        rows = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(0.36, 0.64))
        for panel, (left, right) in zip(panels, rows):
            drawn = _picture(left, panel)
            if panel.maps.field is not None:
                _field(left, panel)
            bar = figure.colorbar(drawn, ax=left, location="bottom", pad=0.02, aspect=30)
            bar.solids.set_alpha(1)
            _sheet(right, panel)
            for axes in (left, right):
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.spines[:].set_visible(False)
        _legend(figure, explorer, panels)
    return figure


def _legend(figure: Figure, explorer: CaseWidget, panels: Sequence[Panel]) -> None:
    """Say below the panels what the outlines and the box mean."""
    meanings = {}
    if explorer.truth:
        meanings = {f"truth: {name}": explorer._class_colours[k] for name, k in explorer._classes.items()}
    sides = ["×".join(map(str, panel.maps.field.side)) for panel in panels if panel.maps.field is not None]
    if sides:
        meanings[f"receptive field at the crosshair, {' and '.join(dict.fromkeys(sides))} voxels"] = plotting.COLOURS["field"]
    handles = [Line2D([], [], color=colour, linestyle="-", linewidth=2, label=text) for text, colour in meanings.items()]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)


def _picture(axes: Axes, panel: Panel) -> AxesImage:
    """Draw the channel over the input, with outlines and crosshair. Return the image of the channel."""
    explorer, plane, maps = panel.explorer, panel.plane, panel.maps
    case, box, shape, start = explorer._case, explorer._box, explorer._shape, explorer._scene["start"]
    number, index = case.channels.index(explorer.sequence), explorer.position[plane.cut] - start[plane.cut]
    black, white = explorer._scene["sequences"][number]["window"]
    aspect, place = case.voxel_size[plane.y] / case.voxel_size[plane.x], panel.extent(start, (1, 1, 1), shape)
    grey = plotting.cut(case.image[number][box], plane, index)
    axes.imshow(grey, cmap="gray", vmin=black, vmax=white, extent=place, aspect=aspect)
    low, high = panel.span(panel.channel)
    colours = {"cmap": colormap(panel.palette), "vmin": low, "vmax": high, "alpha": explorer.opacity}
    place = panel.extent(maps.offset, maps.stride, maps.data.shape[1:])
    drawn = axes.imshow(panel.cut(panel.channel), extent=place, aspect=aspect, **colours)
    if explorer.truth and case.label is not None and min(shape[plane.x], shape[plane.y]) > 1:
        label = plotting.cut(case.label[box], plane, index)
        for k in np.unique(label[label > 0]).tolist():
            for line in plotting.borders(label == k):
                for colour, width in ((CASING, 2.4), (explorer._class_colours[k], 1.2)):
                    axes.plot(*(line.T + 0.5), color=colour, linewidth=width, linestyle="-")
    x, y = (shape[i] - (explorer.position[i] - start[i]) - 0.5 for i in (plane.x, plane.y))
    axes.axhline(y, color="#ffffff", lw=0.6, alpha=0.7)
    axes.axvline(x, color="#ffffff", lw=0.6, alpha=0.7)
    axes.set(xlim=(0, shape[plane.x]), ylim=(shape[plane.y], 0))
    axes.set_title(f"{panel.layer}, channel {panel.channel}, over {explorer.sequence}")
    return drawn


def _field(axes: Axes, panel: Panel) -> None:
    """Draw the receptive field of the maps' voxel at the crosshair."""
    explorer, maps, plane = panel.explorer, panel.maps, panel.plane
    centre, (first, last) = maps.position(maps.index(explorer.position)), offsets(maps.field)
    corner = [explorer._box[axis].stop - (centre[axis] + last[axis] + 1) for axis in (plane.x, plane.y)]
    sides = [last[axis] - first[axis] + 1 for axis in (plane.x, plane.y)]
    for colour, width in (("#FFFFFF", 3), (plotting.COLOURS["field"], 1.6)):
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=colour, linewidth=width))


def _sheet(axes: Axes, panel: Panel) -> None:
    """Draw the first channels, as sorted, side by side with their numbers."""
    explorer, plane, order, palette = panel.explorer, panel.plane, panel.order[:CHANNELS], colormap(panel.palette)
    tiles = []
    for channel in order:
        low, high = panel.span(channel)
        tiles.append(palette(np.clip((panel.cut(channel) - low) / (high - low), 0, 1))[..., :3])
    high, wide = tiles[0].shape[:2]
    gap, columns = max(1, wide // 20), min(8, len(order))
    lines = -(-len(tiles) // columns)
    corners = [(n % columns * (wide + gap), n // columns * (high + gap)) for n in range(len(tiles))]
    sheet = np.ones((lines * (high + gap) - gap, columns * (wide + gap) - gap, 3))
    for (x, y), tile in zip(corners, tiles):
        sheet[y : y + high, x : x + wide] = tile
    spacing, stride = explorer._case.voxel_size, panel.maps.stride
    stretch = spacing[plane.y] * stride[plane.y] / (spacing[plane.x] * stride[plane.x])
    axes.imshow(sheet, aspect=stretch, interpolation="nearest")
    for (x, y), channel in zip(corners, order):
        text = axes.text(x + 0.04 * wide, y + 0.04 * high, channel, color="white", fontsize=7, va="top")
        text.set_path_effects([matplotlib.patheffects.withStroke(linewidth=1.5, foreground="black")])
        text.set_in_layout(False)  # it lies on its tile, so there is nothing to measure
        if channel == panel.channel:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), wide, high, fill=False, edgecolor="#E69F00", lw=2))
    sorting = {
        "index": "in order",
        "activity": "by activity",
        "selectivity": f"by selectivity: {explorer.class_name}",
        "correlation": f"by correlation: {explorer.map_name}",
    }[explorer.sort]
    count = len(panel.maps.data)
    some = f"{len(order)} of {count} channels" if len(order) < count else f"all {count} channels"
    axes.set_title(f"{some}, {sorting}; {sum(panel.numbers['dead'])} dead")
