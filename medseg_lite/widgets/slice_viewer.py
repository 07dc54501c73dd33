"""Three planes of a volume with its overlays. The volume is sent to the browser once, which then draws every slice itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import traitlets
from PIL import Image, ImageDraw

from .. import plotting
from ..plotting.meanings import CASING
from ..volume import Case
from ._base import (
    LARGEST_IMAGE,
    CaseWidget,
    StateError,
    check_image,
    check_images,
    check_known,
    check_pair,
    find_limits,
    font,
    list_names,
    pack,
    script,
    styles,
    to_bytes,
)

# Pixels of a dash, and from one dash to the next.
DASHES = {"line": (100, 100), "dashes": (7, 12), "dots": (2, 5)}
MARGIN = 4  # pixels left of the legend


class SliceViewer(CaseWidget):
    """Axial, coronal and sagittal planes of one case or array, with a crosshair, window, sequences and overlays.

        viewer = SliceViewer(case, {"prediction": classes})
        viewer.position = (64, 70, 33)      # every state can be set and read, and observed with viewer.observe

    The patient's left is on the right of the picture (see `plotting.painting`). Truth and probabilities are drawn as areas,
    other overlays as outlines. Intensities travel as 256 grey levels between the `limits`, so the read-out is exact to 1/255 of
    that range.

    Args:
        source: a `Case` (its label becomes the overlay "truth"), or a 3-D array (D, H, W) with axes in RAS+ order.
        overlays: `{name: array}`, or one array, which is called "prediction". Integer arrays hold classes, float arrays within
            0..1 a probability. All have the shape (D, H, W) of the image.
        channel: sequence to show first.
        position: voxel indices (d, h, w) of the crosshair. The default is the place with most labelled voxels, or else the
            middle.
        window: (black, white) intensities of the first channel. The default is its 0.5 and 99.5 percentiles.
        limits: (lowest, highest) intensity kept for drawing, for every channel. Narrow them for fine windows, as on CT.
        visible: names of the overlays shown first; by default all. Areas on areas mix their colours, so show one at a time.
        opacity: opacity of areas, 0 to 1. In the browser outlines are drawn twice as strong.
        classes: class names by number, a sequence or a mapping; by default `case.info["classes"]`.
        spacing: voxel size of an array along (D, H, W), in any unit. A case has its own.
        letters: write directions on the edges. Switch them off for data without anatomy, such as microscopy.

    Attributes:
        position: voxel indices (d, h, w) of the crosshair.
        channel: sequence shown.
        windows: (black, white) intensities by channel.
        opacity: opacity of areas.
        visible: names of the overlays shown.

    All attributes are synchronised with the browser.

    Raises:
        ValueError: for images that are not 3-D, empty or not finite, overlays on another grid, unknown names.
    """

    _esm = script("slice_viewer.js")
    _css = styles("slice_viewer.css", "medseg-slices")

    channel = traitlets.Unicode().tag(sync=True)
    windows = traitlets.Dict().tag(sync=True)
    opacity = traitlets.Float().tag(sync=True)
    visible = traitlets.Tuple().tag(sync=True)
    _layers = traitlets.List().tag(sync=True)

    def __init__(
        self,
        source: Case | np.ndarray,
        overlays: Mapping[str, np.ndarray] | np.ndarray | None = None,
        *,
        channel: str | None = None,
        position: Sequence[int] | None = None,
        window: tuple[float, float] | None = None,
        limits: tuple[float, float] | None = None,
        visible: Sequence[str] | None = None,
        opacity: float = 0.5,
        classes: Sequence[str] | Mapping[int, str] | None = None,
        spacing: Sequence[float] = (1, 1, 1),
        letters: bool = True,
    ):
        case = source if isinstance(source, Case) else _as_case(source, spacing)
        if letters and case.axes != "RAS":
            raise ValueError(
                f"{case.name} has axes {case.axes}; expected RAS, which files.read_case turns files to. "
                "Turn the array, or pass letters=False to view it as it lies"
            )
        if isinstance(source, Case):
            check_images(case)
        if case.image.size > LARGEST_IMAGE:
            raise ValueError(
                f"{case.name} holds {case.image.size / 1e6:.0f} million intensities in {len(case.channels)} channels; the viewer "
                f"sends {LARGEST_IMAGE / 1e6:.0f} million at most: show fewer channels (case.select) or a part (case.crop)"
            )
        # These are set before the traits, because checking the traits needs them.
        self._case, self._box = case, tuple(slice(0, n) for n in case.shape)
        self._classes = classes if classes is not None else case.info.get("classes")
        self._take_overlays(plotting.as_overlays(overlays, case.shape, case.label))
        self._limits = {name: find_limits(image, limits) for name, image in zip(case.channels, case.image)}
        channel = self._check_channel(case.channels[0] if channel is None else channel)
        windows = self._opening_windows() | ({} if window is None else {channel: window})
        windows = self._check_windows(windows)
        # A plane one voxel thin, as of a single 2-D picture, has nothing to show.
        thick = [p for p in plotting.PLANES if case.shape[p.x] > 1 and case.shape[p.y] > 1] or plotting.PLANES[:1]
        self._planes = [p if letters else p._replace(edges="") for p in thick]
        super().__init__(
            _scene=self._describe(windows),
            _volumes=self._pack_volumes(self._limits.values()),
            _layers=self._pack_layers(),
            channel=channel,
            position=plotting.busiest_position(case.label, case.shape) if position is None else position,
            windows=windows,
            opacity=opacity,
            visible=tuple(o.name for o in self._overlays) if visible is None else tuple(visible),
        )

    def __repr__(self) -> str:
        case, overlays = self._case, "+".join(o.name for o in self._overlays) or "no overlays"
        size = "×".join(map(str, case.shape))
        return f"SliceViewer({case.name!r}, {'+'.join(case.channels)}, {size} voxels, {overlays}, at {self.position})"

    @property
    def window(self) -> tuple[float, float]:
        """The (black, white) intensities of the channel in view."""
        return self.windows[self.channel]

    @window.setter
    def window(self, window: tuple[float, float]) -> None:
        self.windows = {**self.windows, self.channel: window}

    def set_overlay(self, name: str, array: np.ndarray | None) -> None:
        """Add an overlay, replace the one of that name (by a newer prediction, say), or remove it with None."""
        arrays = {o.name: o.array for o in self._overlays}
        if array is None:
            check_known(name, arrays, "there is no overlay")
            del arrays[name]
        else:
            arrays[name] = array
        self._take_overlays(plotting.as_overlays(arrays, self._case.shape))
        known = [o.name for o in self._overlays]
        self.visible = tuple(n for n in known if n in self.visible or n == name)
        self._layers = self._pack_layers()

    # ------------------------------------------------------------------------------------------ what the browser gets

    def _take_overlays(self, overlays: list[plotting.Overlay]) -> None:
        self._overlays = overlays
        labels = (o for o in overlays if o.style != "probability")
        self._present = {o.name: [k for k in np.flatnonzero(np.bincount(o.array.reshape(-1))).tolist() if k] for o in labels}

    def _opening_windows(self) -> dict[str, tuple[float, float]]:
        """Return the default window of each channel, cut to its limits."""
        opening = {}
        for name, image in zip(self._case.channels, self._case.image):
            window = np.clip(plotting.default_window(image, self._case.mask), *self._limits[name]).tolist()
            opening[name] = window if window[0] < window[1] else self._limits[name]
        return opening

    def _describe(self, windows: Mapping[str, tuple[float, float]]) -> dict[str, object]:
        channels = [{"name": n, "low": low, "high": high, "window": windows[n]} for n, (low, high) in self._limits.items()]
        case, planes = self._case, [p._asdict() for p in self._planes]
        return {"title": case.name, "shape": case.shape, "spacing": case.voxel_size, "planes": planes, "channels": channels}

    def _pack_layers(self) -> list[dict]:
        layers = []
        for overlay in self._overlays:
            if overlay.style == "probability":
                data, classes = to_bytes(overlay.array, 0, 1), [(255, f"{overlay.name}, 0 to 1", overlay.colour)]
            else:
                data, present = overlay.array, self._present[overlay.name]
                classes = [(k, plotting.class_name(k, self._classes), plotting.class_colour(k, self._classes)) for k in present]
            look = {"name": overlay.name, "style": overlay.style, "colour": overlay.colour}
            layers.append({**look, "classes": classes, "data": pack(data)})
        return layers

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return f"Slices of {self._case.name}"

    def _alt(self) -> str:
        overlays = f" with {list_names(self.visible)}" if self.visible else ""
        return f"Slices of {self._case.name}, {self.channel}, through voxel {self.position}{overlays}"

    def _draw(self) -> Image.Image:
        """Draw the planes in one row at one scale, as the browser shows them, with a legend below."""
        case, gap = self._case, 12
        extents = [(case.shape[p.x] * case.voxel_size[p.x], case.shape[p.y] * case.voxel_size[p.y]) for p in self._planes]
        scale = min(860 / sum(w for w, _ in extents), 380 / max(h for _, h in extents))
        sizes = [(max(1, round(w * scale)), max(1, round(h * scale))) for w, h in extents]
        width = max(sum(w for w, _ in sizes) + gap * (len(sizes) - 1), 240)
        below = max(h for _, h in sizes) + 22
        entries = self._legend()
        places, x, y = [], MARGIN, below + 8
        for text, *_ in entries:  # line by line, as wide as the planes
            length = int(font().getlength(text)) + 48
            if x > MARGIN and x + length - 17 > width:
                x, y = MARGIN, y + 20
            places.append((x, y))
            x += length
        sheet = Image.new("RGB", (width, y + 20 if entries else below), "white")
        left = 0
        for plane, size in zip(self._planes, sizes):
            self._draw_plane(plane, sheet, left, size)
            left += size[0] + gap
        pen = ImageDraw.Draw(sheet)
        for (x, y), (text, colour, style) in zip(places, entries):
            if style in DASHES:
                _draw_outline(pen, [np.array([(x, y + 6), (x + 24, y + 6)], float)], colour, style, 2)
            else:
                pen.rectangle((x, y, x + 24, y + 12), fill=colour)
            pen.text((x + 31, y + 6), text, fill="#333333", font=font(), anchor="lm")
        return sheet

    def _draw_plane(self, plane: plotting.Plane, sheet: Image.Image, left: int, size: tuple[int, int]) -> None:
        """Draw one plane with crosshair and letters onto the sheet, `left` pixels from its edge, under a caption."""
        case, position, (wide, high) = self._case, self.position, size
        index, pen = position[plane.cut], ImageDraw.Draw(sheet)
        image = case.image[case.channels.index(self.channel)]
        layers = [o._replace(array=plotting.cut(o.array, plane, index)) for o in self._overlays if o.name in self.visible]
        areas = [o for o in layers if o.style not in DASHES]
        pixels = plotting.paint(plotting.cut(image, plane, index), self.window, areas, self.opacity, self._classes)
        smooth = Image.Resampling.NEAREST if wide >= 3 * pixels.shape[1] else Image.Resampling.BICUBIC
        sheet.paste(Image.fromarray(pixels).resize(size, smooth), (left, 22))
        scale = wide / pixels.shape[1], high / pixels.shape[0]
        for overlay in layers:
            if overlay.style in DASHES:
                around, inner = plotting.borders(overlay.array != 0), plotting.borders(overlay.array, inner=True)
                for lines, width in ((around, 2), (inner, 1)):
                    _draw_outline(
                        pen, [(line + 0.5) * scale + (left, 22) for line in lines], overlay.colour, overlay.style, width
                    )
        u = left + (case.shape[plane.x] - position[plane.x] - 0.5) / case.shape[plane.x] * wide
        v = 22 + (case.shape[plane.y] - position[plane.y] - 0.5) / case.shape[plane.y] * high
        pen.line([(left, v), (left + wide - 1, v)], fill="#a0a0a0")
        pen.line([(u, 22), (u, 21 + high)], fill="#a0a0a0")
        centre, middle = left + wide / 2, 22 + high / 2
        spots = [(left + 4, middle, "lm"), (left + wide - 4, middle, "rm"), (centre, 26, "mt"), (centre, 18 + high, "mb")]
        for letter, (*spot, anchor) in zip(plane.edges, spots):
            pen.text(spot, letter, fill="white", font=font(), anchor=anchor, stroke_width=1, stroke_fill="black")
        caption = f"{plane.name} {index}, {self.channel}"
        fits = font().getlength(caption) <= wide
        pen.text((left, 3), caption if fits else f"{plane.name} {index}", fill="#333333", font=font())

    def _legend(self) -> list[tuple[str, str, str]]:
        """Return (text, colour, style) of each class in a visible area, then of each other visible overlay."""
        shown, entries = [o for o in self._overlays if o.name in self.visible], {}
        for k in sorted({k for o in shown if o.style == "area" for k in self._present[o.name]}):
            entries[plotting.class_name(k, self._classes)] = plotting.class_colour(k, self._classes), "area"
        for o in shown:
            if o.style != "area":
                kind = {"probability": ", 0 to 1", "line": " (outline)", "dashes": " (dashed)", "dots": " (dotted)"}[o.style]
                entries[o.name + kind] = o.colour, o.style
        return [(text, *look) for text, look in entries.items()]

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("channel")
    def _valid_channel(self, proposal):
        return self._check_channel(proposal["value"])

    @traitlets.validate("windows")
    def _valid_windows(self, proposal):
        return self._check_windows(proposal["value"])

    @traitlets.validate("visible")
    def _valid_visible(self, proposal):
        known = [o.name for o in self._overlays]
        for name in proposal["value"]:
            check_known(name, known, "there is no overlay")
        return tuple(n for n in known if n in proposal["value"])

    def _check_channel(self, channel: str) -> str:
        return check_known(channel, self._case.channels, f"{self._case.name} has no channel")

    def _check_windows(self, windows: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
        known = self._case.channels
        if set(windows) != set(known):
            raise StateError(f"windows are for {list_names(windows)}; expected one for each of {list_names(known)}")
        checked = {}
        for name, window in windows.items():
            low, high = self._limits[name]
            black, white = check_pair(window, f"the window of {name}")
            if white <= low or black >= high:
                raise StateError(
                    f"the window of {name} is {black:g} to {white:g}, outside the intensities kept, {low:g} to {high:g}; "
                    "choose a window among these, or create the viewer with other limits"
                )
            checked[name] = (max(black, low), min(white, high))
        return checked


def _as_case(array: np.ndarray, spacing: Sequence[float]) -> Case:
    """Return an array (D, H, W) as a case of one channel."""
    array = np.asarray(array)
    if array.ndim != 3:
        hint = {
            2: "a single picture is image[:, :, None]",
            4: "pass one channel, image[0], or a Case, which names its channels",
        }.get(array.ndim, "pass a volume, or a Case")
        raise ValueError(f"the image has shape {array.shape}; expected three axes (D, H, W): {hint}")
    sizes = np.asarray(spacing, float)
    if sizes.shape != (3,) or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"spacing is {spacing!r}; expected three positive numbers, the voxel size along (D, H, W)")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    check_image(array, "the image")
    return Case(image=array[None], channels=("image",), name="image", affine=np.diag([*sizes, 1]))


def _draw_outline(pen: ImageDraw.ImageDraw, lines: Sequence[np.ndarray], colour: str, style: str, width: int) -> None:
    """Draw lines of upright and level pieces, (points, 2). Dashes go round the corners. Wide lines have a dark casing."""
    for line in lines if width > 1 else ():
        pen.line([tuple(point) for point in line.tolist()], fill=CASING, width=2 * width, joint="curve")
    on, period = DASHES[style]
    for line in lines:
        done = 0.0  # pixels since the line began
        for a, b in itertools.pairwise(line):
            length = float(np.abs(b - a).sum())
            for k in range(int(done // period), int((done + length) // period) + 1):
                start, stop = max(k * period - done, 0), min(k * period + on - done, length)
                if start < stop:
                    pen.line(
                        [tuple(a + (b - a) * start / length), tuple(a + (b - a) * stop / length)], fill=colour, width=width
                    )
            done += length
