"""Three planes of a volume with its overlays, in the browser: the volume travels once, every step is drawn on the spot."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import anywidget
import ipywidgets
import matplotlib.font_manager
import numpy as np
import traitlets
from PIL import Image, ImageDraw, ImageFont

from .. import plotting
from ..paths import atomic_write
from ..volume import Case
from ._base import pack, page, script

_HERE = Path(__file__).parent
LARGEST = 400_000_000  # bytes: what a browser tab holds and sends without trouble


class StateError(traitlets.TraitError, ValueError):
    """A value that the viewer cannot show; the message says which, and what is expected."""


class SliceViewer(anywidget.AnyWidget):
    """Axial, coronal and sagittal planes of one case or array, with a crosshair, window, sequences and overlays.

        viewer = SliceViewer(case, {"prediction": classes})
        viewer.position = (64, 70, 33)      # every state can be set and read, and observed with viewer.observe

    The patient's left is on the right of the picture (see `plotting`). Truth and probabilities are drawn as areas, other overlays
    as outlines. Intensities travel as 256 grey levels between the `limits`, so the read-out is exact to 1/255 of that range.

    Args:
        source: a `Case` (its label becomes the overlay "truth"), or a 3-D array (D, H, W) with axes in RAS+ order.
        overlays: `{name: array}`, or one array, which is called "prediction". Integer arrays hold classes, float arrays within
            0..1 a probability. All have the shape (D, H, W) of the image.
        channel: sequence to show first.
        position: voxel indices (d, h, w) of the crosshair; by default where most voxels are labelled, else the middle.
        window: (black, white) intensities of the first channel; by default its 0.5 and 99.5 percentiles.
        limits: (lowest, highest) intensity kept for drawing, for every channel. Narrow them for fine windows, as on CT.
        visible: names of the overlays shown first; all by default. Areas on areas mix their colours, so show one at a time.
        opacity: of areas, 0 to 1; outlines are drawn twice as strong.
        classes: class names by number, a sequence or a mapping; by default `case.info["classes"]`.
        spacing: voxel size along (D, H, W) of an array, in any unit; a case has its own.
        letters: write directions on the edges. Switch off for data without anatomy, such as microscopy.
        viewer: "canvas", or "png" where custom widgets are blocked: plain ipywidgets and pictures drawn by Python.

    Attributes:
        position, channel, windows (by channel), opacity, visible (names of the overlays shown): synchronised with the browser.

    Raises:
        ValueError: for images that are not 3-D, empty or not finite, overlays on another grid, unknown names.
    """

    _esm = script("slice_viewer.js")
    _css = _HERE / "slice_viewer.css"
    _ipython_display_ = None  # ipywidgets 7 would display through it, and drop the PNG below

    position = traitlets.Any().tag(sync=True)  # a tuple of three ints, made from any three whole numbers
    channel = traitlets.Unicode().tag(sync=True)
    windows = traitlets.Dict().tag(sync=True)
    opacity = traitlets.Float().tag(sync=True)
    visible = traitlets.Tuple().tag(sync=True)
    _scene = traitlets.Dict().tag(sync=True)
    _volumes = traitlets.List().tag(sync=True)
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
        viewer: str = "canvas",
    ):
        if viewer not in ("canvas", "png"):
            raise ValueError(f"viewer={viewer!r}; expected 'canvas' or 'png'")
        case = source if isinstance(source, Case) else _as_case(source, spacing)
        if letters and case.axes != "RAS":
            raise ValueError(
                f"{case.name} has axes {case.axes}; expected RAS, which files.read_case turns files to. "
                "Turn the array, or pass letters=False to view it as it lies"
            )
        for name, image in zip(case.channels, case.image):
            _check_image(image, f"{case.name}, {name}" if isinstance(source, Case) else "the image")
        if case.image.size > LARGEST:
            raise ValueError(
                f"{case.name} holds {case.image.size / 1e6:.0f} million intensities in {len(case.channels)} channels; the viewer "
                f"sends {LARGEST / 1e6:.0f} million at most: show fewer channels (case.select) or a part (case.crop)"
            )
        # Set before the traits, because checking them needs these.
        self._case = case
        self._kind = viewer
        self._classes = classes if classes is not None else case.info.get("classes")
        self._take_overlays(plotting.as_overlays(overlays, case.shape, case.label))
        self._limits = {name: _find_limits(image, limits) for name, image in zip(case.channels, case.image)}
        channel = self._check_channel(case.channels[0] if channel is None else channel)
        opening = {
            name: np.clip(plotting.default_window(image, case.mask), *self._limits[name]).tolist()
            for name, image in zip(case.channels, case.image)
        }
        opening = {name: w if w[0] < w[1] else self._limits[name] for name, w in opening.items()}
        if window is not None:
            opening[channel] = window
        opening = self._check_windows(opening)
        # A plane one voxel thin (of a single 2-D picture, say) has nothing to show.
        thick = [p for p in plotting.PLANES if case.shape[p.x] > 1 and case.shape[p.y] > 1] or plotting.PLANES[:1]
        self._planes = [p if letters else p._replace(edges="") for p in thick]
        drawn = viewer == "canvas"
        super().__init__(
            _scene={
                "title": case.name,
                "shape": case.shape,
                "spacing": case.spacing,
                "planes": [p._asdict() for p in self._planes],
                "channels": [
                    {"name": name, "low": low, "high": high, "window": opening[name]}
                    for name, (low, high) in self._limits.items()
                ],
            },
            _volumes=self._pack_volumes() if drawn else [],
            _layers=self._pack_layers() if drawn else [],
            channel=channel,
            position=plotting.busiest_position(case.label, case.shape) if position is None else position,
            windows=opening,
            opacity=opacity,
            visible=tuple(o.name for o in self._overlays) if visible is None else tuple(visible),
        )
        self._panel = None if drawn else _png_panel(self)

    def __repr__(self) -> str:
        case, overlays = self._case, "+".join(o.name for o in self._overlays) or "no overlays"
        size = "×".join(map(str, case.shape))
        return f"SliceViewer({case.name!r}, {'+'.join(case.channels)}, {size} voxels, {overlays}, at {self.position})"

    @property
    def window(self) -> tuple[float, float]:
        """(black, white) intensities of the channel in view."""
        return self.windows[self.channel]

    @window.setter
    def window(self, window: tuple[float, float]) -> None:
        self.windows = {**self.windows, self.channel: window}

    def set_overlay(self, name: str, array: np.ndarray | None) -> None:
        """Add an overlay, replace the one of that name (a newer prediction, say), or remove it with None."""
        arrays = {o.name: o.array for o in self._overlays}
        if array is None:
            if name not in arrays:
                raise ValueError(f"there is no overlay {name!r}; there are {_list(arrays)}")
            del arrays[name]
        else:
            arrays[name] = array
        self._take_overlays(plotting.as_overlays(arrays, self._case.shape))
        known = [o.name for o in self._overlays]
        self.visible = tuple(n for n in known if n in self.visible or n == name)
        self._layers = self._pack_layers()

    # ------------------------------------------------------------------------------------------------ other forms

    def snapshot(self) -> bytes:
        """The present view as a PNG file: the three planes with crosshair, letters and legend."""
        file = io.BytesIO()
        _draw(self).save(file, format="png")
        return file.getvalue()

    def to_html(self, path: str | Path | None = None, *, title: str | None = None) -> str:
        """The viewer as one self-contained page that works without a kernel or a network; also written to `path` if given."""
        state = {key: getattr(self, key) for key in ("_scene", "position", "channel", "windows", "opacity", "visible")}
        state |= {"_volumes": self._pack_volumes(), "_layers": self._pack_layers()}
        text = page(
            title=title or f"Slices of {self._case.name}", state=state, script=self._esm, css=_HERE / "slice_viewer.css"
        )
        if path is not None:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def open(self) -> None:
        """Connect to the browser; the PNG form never asks it for a custom widget."""
        if self._kind == "canvas":
            super().open()

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        if self._panel is None:
            data, metadata = super()._repr_mimebundle_(**kwargs)
        else:
            view = {"version_major": 2, "version_minor": 0, "model_id": self._panel.model_id}
            data, metadata = {"text/plain": repr(self), "application/vnd.jupyter.widget-view+json": view}, {}
        overlays = f" with {_list(self.visible)}" if self.visible else ""
        alt = f"Slices of {self._case.name}, {self.channel}, through voxel {self.position}{overlays}"
        picture = base64.b64encode(self.snapshot()).decode()
        return {**data, "image/png": picture}, {**metadata, "image/png": {"alt": alt}}

    def _take_overlays(self, overlays: list[plotting.Overlay]) -> None:
        self._overlays = overlays
        labels = (o for o in overlays if o.style != "probability")
        self._present = {o.name: [k for k in np.flatnonzero(np.bincount(o.array.reshape(-1))).tolist() if k] for o in labels}

    def _pack_volumes(self) -> list[bytes]:
        return [pack(_to_bytes(image, *self._limits[c])) for c, image in zip(self._case.channels, self._case.image)]

    def _pack_layers(self) -> list[dict]:
        layers = []
        for name, array, style in self._overlays:
            if style == "probability":
                data, classes = _to_bytes(array, 0, 1), [(255, f"{name}, 0 to 1", plotting.PROBABILITY_COLOUR)]
            else:
                data = array
                classes = [(k, plotting.class_name(k, self._classes), plotting.class_colour(k)) for k in self._present[name]]
            layers.append({"name": name, "style": style, "classes": classes, "data": pack(data)})
        return layers

    # ----------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("position")
    def _valid_position(self, proposal):
        try:
            return plotting.check_position(proposal["value"], self._case.shape)
        except ValueError as error:
            raise StateError(str(error)) from None

    @traitlets.validate("channel")
    def _valid_channel(self, proposal):
        return self._check_channel(proposal["value"])

    @traitlets.validate("windows")
    def _valid_windows(self, proposal):
        return self._check_windows(proposal["value"])

    @traitlets.validate("opacity")
    def _valid_opacity(self, proposal):
        if np.isnan(proposal["value"]):
            raise StateError("opacity is NaN; expected a number from 0 to 1")
        return min(max(proposal["value"], 0.0), 1.0)

    @traitlets.validate("visible")
    def _valid_visible(self, proposal):
        known = [o.name for o in self._overlays]
        unknown = [n for n in proposal["value"] if n not in known]
        if unknown:
            raise StateError(f"there is no overlay {unknown[0]!r}; there are {_list(known)}")
        return tuple(n for n in known if n in proposal["value"])

    def _check_channel(self, channel: str) -> str:
        if channel not in self._case.channels:
            raise StateError(f"{self._case.name} has no channel {channel!r}; its channels are {_list(self._case.channels)}")
        return channel

    def _check_windows(self, windows: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
        if set(windows) != set(self._case.channels):
            raise StateError(f"windows are for {_list(windows)}; expected one for each of {_list(self._case.channels)}")
        checked = {}
        for name, window in windows.items():
            low, high = self._limits[name]
            black, white = _check_pair(window, f"the window of {name}")
            if white <= low or black >= high:
                raise StateError(
                    f"the window of {name} is {black:g} to {white:g}, outside the intensities kept, {low:g} to {high:g}; "
                    "choose a window among these, or create the viewer with other limits"
                )
            checked[name] = (max(black, low), min(white, high))
        return checked


def _as_case(array: np.ndarray, spacing: Sequence[float]) -> Case:
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
    return Case(image=array[None], channels=("image",), name="image", affine=np.diag([*sizes, 1]))


def _check_image(image: np.ndarray, what: str) -> None:
    if image.size == 0:
        raise ValueError(f"{what} has shape {image.shape}; there is no voxel in it")
    if image.dtype.kind not in "iuf":
        raise ValueError(f"{what} holds {image.dtype}; expected real numbers")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        count = int((~np.isfinite(image)).sum())
        raise ValueError(f"{what} has {count} NaN or infinite voxels; replace them, for example with numpy.nan_to_num")


def _check_pair(pair: Sequence[float], what: str) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in pair)
    except (TypeError, ValueError):
        raise StateError(f"{what} is {pair!r}; expected two numbers (low, high)") from None
    if not (np.isfinite([low, high]).all() and low < high):
        raise StateError(f"{what} is {low:g} to {high:g}; expected two finite numbers, the lower one first")
    return low, high


def _find_limits(image: np.ndarray, limits: tuple[float, float] | None) -> tuple[float, float]:
    """Intensities that become grey levels 0 and 255. The extreme 0.1 % are cut off, or a few hot voxels would cost contrast."""
    if limits is not None:
        return _check_pair(limits, "limits")
    low, high = float(image.min()), float(image.max())
    if image.dtype.kind in "iu" and high - low <= 255:
        return low, low + 255.0  # one level per value
    sample = image.reshape(-1)[:: max(1, image.size // 1_000_000)]
    cut_low, cut_high = (float(v) for v in np.percentile(sample, (0.1, 99.9)))
    if cut_low < cut_high:
        low, high = cut_low, cut_high
    return (low, high) if low < high else (low, low + 1.0)


def _to_bytes(image: np.ndarray, low: float, high: float) -> np.ndarray:
    levels = (image.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.clip(np.rint(levels, out=levels), 0, 255, out=levels).astype(np.uint8)


def _list(names) -> str:
    return ", ".join(map(repr, names)) or "none"


# ------------------------------------------------------------------------------------------------------- PNG form


def _draw(viewer: SliceViewer) -> Image.Image:
    """The planes in one row at one scale, as the browser shows them, with a legend below."""
    case, position, gap = viewer._case, viewer.position, 12
    extents = [(case.shape[p.x] * case.spacing[p.x], case.shape[p.y] * case.spacing[p.y]) for p in viewer._planes]
    scale = min(860 / sum(w for w, _ in extents), 380 / max(h for _, h in extents))
    sizes = [(max(1, round(w * scale)), max(1, round(h * scale))) for w, h in extents]
    font = ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), 13)
    entries = _legend(viewer)
    below = max(h for _, h in sizes) + 22
    places, x, y = [], 0, below + 8
    width = max(sum(w for w, _ in sizes) + gap * (len(sizes) - 1), 240)
    for text, *_ in entries:  # line by line, as wide as the planes
        length = int(font.getlength(text)) + 40
        if x and x + length > width:
            x, y = 0, y + 20
        places.append((x, y))
        x += length
    sheet = Image.new("RGB", (width, y + 20 if entries else below), "white")
    pen = ImageDraw.Draw(sheet)
    image = case.image[case.channels.index(viewer.channel)]
    left = 0
    for plane, (wide, high) in zip(viewer._planes, sizes):
        index = position[plane.cut]
        layers = [o._replace(array=plotting.cut(o.array, plane, index)) for o in viewer._overlays if o.name in viewer.visible]
        pixels = plotting.paint(plotting.cut(image, plane, index), viewer.window, layers, viewer.opacity)
        smooth = Image.Resampling.NEAREST if wide >= 3 * pixels.shape[1] else Image.Resampling.BICUBIC
        sheet.paste(Image.fromarray(pixels).resize((wide, high), smooth), (left, 22))
        u = left + (case.shape[plane.x] - position[plane.x] - 0.5) / case.shape[plane.x] * wide
        v = 22 + (case.shape[plane.y] - position[plane.y] - 0.5) / case.shape[plane.y] * high
        pen.line([(left, v), (left + wide - 1, v)], fill="#a0a0a0")
        pen.line([(u, 22), (u, 21 + high)], fill="#a0a0a0")
        centre, middle = left + wide / 2, 22 + high / 2
        spots = [(left + 4, middle, "lm"), (left + wide - 4, middle, "rm"), (centre, 26, "mt"), (centre, 18 + high, "mb")]
        for letter, (*spot, anchor) in zip(plane.edges, spots):
            pen.text(spot, letter, fill="white", font=font, anchor=anchor, stroke_width=1, stroke_fill="black")
        pen.text((left, 3), f"{plane.name} {index}", fill="#333333", font=font)
        left += wide + gap
    for (x, y), (text, colour, style) in zip(places, entries):
        box = (x, y, x + 12, y + 12)
        pen.rectangle(box, fill=colour if style in ("area", "probability") else None, outline=colour, width=2)
        pen.text((x + 18, y + 6), text, fill="#333333", font=font, anchor="lm")
    return sheet


def _legend(viewer: SliceViewer) -> list[tuple[str, str, str]]:
    """(text, colour, style) of each class in a visible overlay, then of each outlined overlay."""
    shown = [o for o in viewer._overlays if o.name in viewer.visible]
    probabilities = [
        (f"{o.name}, 0 to 1", plotting.PROBABILITY_COLOUR, "probability") for o in shown if o.style == "probability"
    ]
    labels = [o for o in shown if o.style != "probability"]
    values = sorted({k for o in labels for k in viewer._present[o.name]})
    classes = [(plotting.class_name(k, viewer._classes), plotting.class_colour(k), "area") for k in values]
    lines = {"line": "outline", "dashes": "dashed outline", "dots": "dotted outline"}
    outlines = [(f"{o.name} ({lines[o.style]})", "#555555", "line") for o in labels if o.style != "area"]
    return classes + probabilities + outlines


def _png_panel(viewer: SliceViewer) -> ipywidgets.VBox:
    """Plain ipywidgets for the viewer's traits, around a picture that Python draws."""
    picture = ipywidgets.Image(value=viewer.snapshot(), format="png", layout={"max_width": "100%", "object_fit": "contain"})
    sliders = {}
    for plane in viewer._planes:
        slider = ipywidgets.IntSlider(
            value=viewer.position[plane.cut], min=0, max=viewer._case.shape[plane.cut] - 1, description=plane.name
        )
        slider.observe(lambda change, axis=plane.cut: _set_position(viewer, axis, change["new"]), "value")
        sliders[plane.cut] = slider
    windows = {}
    for name, (low, high) in viewer._limits.items():
        windows[name] = ipywidgets.FloatRangeSlider(
            value=viewer.windows[name], min=low, max=high, step=(high - low) / 255, description="Window", readout_format=".2g"
        )
        windows[name].observe(lambda change, name=name: _set_window(viewer, name, change["new"]), "value")
    channel = ipywidgets.ToggleButtons(options=viewer._case.channels, value=viewer.channel)
    opacity = ipywidgets.FloatSlider(value=viewer.opacity, min=0, max=1, step=0.05, description="Opacity")
    traitlets.link((viewer, "channel"), (channel, "value"))
    traitlets.link((viewer, "opacity"), (opacity, "value"))
    boxes = {
        o.name: ipywidgets.Checkbox(value=o.name in viewer.visible, description=o.name, indent=False) for o in viewer._overlays
    }
    for name, box in boxes.items():
        box.observe(lambda change, name=name: _set_visible(viewer, name, change["new"]), "value")
    window_place = ipywidgets.HBox([windows[viewer.channel]])

    def refresh(change):
        for axis, slider in sliders.items():
            slider.value = viewer.position[axis]
        for name, slider in windows.items():
            slider.value = viewer.windows[name]
        for name, box in boxes.items():
            box.value = name in viewer.visible
        window_place.children = (windows[viewer.channel],)
        picture.value = viewer.snapshot()

    viewer.observe(refresh, ["position", "channel", "windows", "opacity", "visible", "_layers"])
    rows = [ipywidgets.HBox([*sliders.values()], layout={"flex_flow": "row wrap"}), ipywidgets.HBox([window_place, opacity])]
    if len(viewer._case.channels) > 1:
        rows.insert(0, channel)
    if boxes:
        rows.append(ipywidgets.HBox([*boxes.values()]))
    return ipywidgets.VBox([*rows, picture])


def _set_position(viewer: SliceViewer, axis: int, index: int) -> None:
    viewer.position = tuple(index if a == axis else p for a, p in enumerate(viewer.position))


def _set_window(viewer: SliceViewer, name: str, window: tuple[float, float]) -> None:
    if window[0] < window[1]:
        viewer.windows = {**viewer.windows, name: window}


def _set_visible(viewer: SliceViewer, name: str, shown: bool) -> None:
    viewer.visible = (*(n for n in viewer.visible if n != name), *[name] * shown)
