"""The base classes of the widgets, and what all widgets need: checks, grey levels, packed arrays, pages of their own."""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import anywidget
import matplotlib.font_manager
import numpy as np
import traitlets
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image, ImageFont

from .. import plotting
from ..paths import atomic_write
from ..volume import Case

_HERE = Path(__file__).parent
_EXPORT = "export default { render };"
LARGEST_IMAGE = 400_000_000  # bytes that a browser tab holds and receives without trouble

# No request leaves the page, and none of its data is run as code.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 1.5rem auto; max-width: 920px; padding: 0 1rem; background: Canvas; font-family: system-ui, sans-serif; }}
body:has(.medseg-compare, .medseg-operating) {{ max-width: 1240px; }}
body:has(.medseg-features) {{ max-width: 1440px; }}
h1 {{ font-size: 1.2rem; font-weight: 600; }}
{css}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<div id="widget"></div>
</main>
<script type="application/json" id="state">{state}</script>
<script type="module">
{code}
// Does what Jupyter's widget model does, without Jupyter.
const revive = (_, value) => value?.base64 === undefined ? value : Uint8Array.from(atob(value.base64), (c) => c.charCodeAt(0));
const state = JSON.parse(document.getElementById("state").textContent, revive);
const listeners = {{}};
const model = {{
  get: (key) => state[key],
  set(key, value) {{
    state[key] = value;
    for (const listener of listeners[`change:${{key}}`] ?? []) listener();
  }},
  save_changes() {{}},
  send() {{}},
  on: (event, listener) => (listeners[event] ??= []).push(listener),
  off() {{}},
}};
render({{ model, el: document.getElementById("widget") }});
</script>
</body>
</html>
"""


class StateError(traitlets.TraitError, ValueError):
    """A value that a widget cannot show. The message says which value, and what is expected."""


# ------------------------------------------------------------------------------------------------------------- classes


class Pictured:
    """A widget with a static picture, for readers without a kernel or a browser.

    A subclass says what the picture shows: `_draw` returns a figure or an image, `_alt` the text for those who cannot see it.
    """

    _ipython_display_ = None  # ipywidgets 7 would display through it, and drop the picture

    def snapshot(self) -> bytes:
        """Return the present view as a PNG file."""
        picture, file = self._draw(), io.BytesIO()
        (picture.savefig if isinstance(picture, Figure) else picture.save)(file, format="png")
        return file.getvalue()

    def _draw(self) -> Figure | Image.Image:
        raise NotImplementedError

    def _alt(self) -> str:
        raise NotImplementedError

    def _with_picture(self, data: dict, metadata: dict) -> tuple[dict, dict]:
        """Return a MIME bundle of the live widget, with the picture added."""
        picture = base64.b64encode(self.snapshot()).decode()
        return {**data, "image/png": picture}, {**metadata, "image/png": {"alt": self._alt()}}


class Widget(Pictured, anywidget.AnyWidget):
    """A widget that a script draws in the browser, in a notebook or in a page of its own.

    A subclass has `_esm` (see `script`), `_css` (see `styles`), its synchronised traits, `_title` for the heading of its page,
    and the picture and text of `Pictured`. Facts that never change go to the browser as `_scene`.
    """

    _scene = traitlets.Dict().tag(sync=True)

    def to_html(self, path: str | Path | None = None, *, title: str | None = None) -> str:
        """Return the widget as a page that needs neither kernel nor network, and write it to `path` if given."""
        return self._write_page(path, title)

    def _title(self) -> str:
        raise NotImplementedError

    def _page_state(self) -> dict[str, object]:
        """Return the value of each trait that the script reads."""
        foreign = {*anywidget.AnyWidget.class_trait_names(), "_esm", "_css", "_anywidget_id"}
        return {name: getattr(self, name) for name in self.trait_names(sync=True) if name not in foreign}

    def _write_page(self, path: str | Path | None, title: str | None, **further) -> str:
        state = self._page_state() | further
        text = page(title=title or self._title(), state=state, script=self._esm, css=self._css)
        if path is not None:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        return self._with_picture(*super()._repr_mimebundle_(**kwargs))

    @traitlets.validate("opacity")
    def _valid_opacity(self, proposal):
        if np.isnan(proposal["value"]):
            raise StateError("opacity is NaN; expected a number from 0 to 1")
        return min(max(proposal["value"], 0.0), 1.0)


class CaseWidget(Widget):
    """A widget that shows slices of a case, or of its part inside `_box`, through a voxel.

    A subclass sets `_case` and `_box` before its traits, because checking the traits needs them.
    """

    position = traitlets.Any().tag(sync=True)  # a tuple of three ints, made from any three whole numbers
    _volumes = traitlets.List().tag(sync=True)
    _case: Case
    _box: tuple[slice, slice, slice]

    @property
    def _shape(self) -> tuple[int, int, int]:
        return tuple(s.stop - s.start for s in self._box)

    def _describe_case(self) -> dict[str, object]:
        """Return what the scripts need to know about the part: its place, its planes, its sequences with their grey levels."""
        case, box = self._case, self._box
        inside = None if case.mask is None else case.mask[box]
        sequences = []
        for name, image in zip(case.channels, case.image):
            low, high = find_limits(image)
            window = plotting.default_window(image[box], inside)
            sequences.append({"name": name, "window": window, "low": low, "high": high})
        return {
            "title": case.name,
            "start": [s.start for s in box],
            "shape": self._shape,
            "spacing": case.voxel_size,
            "planes": [p._asdict() for p in plotting.PLANES],
            "sequences": sequences,
        }

    def _pack_volumes(self, limits: Sequence[tuple[float, float]]) -> list[bytes]:
        """Return the part of each sequence, packed as grey levels between its limits."""
        return [pack(to_bytes(image[self._box], *ends)) for image, ends in zip(self._case.image, limits)]

    @traitlets.validate("position")
    def _valid_position(self, proposal):
        try:
            position = plotting.check_position(proposal["value"], self._case.shape)
        except ValueError as error:
            raise StateError(str(error)) from None
        return tuple(min(max(p, s.start), s.stop - 1) for p, s in zip(position, self._box))


# -------------------------------------------------------------------------------------------------------------- checks


def check_images(case: Case) -> None:
    """Check that every sequence of a case can be drawn."""
    for name, image in zip(case.channels, case.image):
        check_image(image, f"{case.name}, {name}")


def check_image(image: np.ndarray, what: str) -> None:
    """Check that an image can be drawn: it has voxels, and they are finite real numbers."""
    if image.size == 0:
        raise ValueError(f"{what} has shape {image.shape}; there is no voxel in it")
    if image.dtype.kind not in "iuf":
        raise ValueError(f"{what} holds {image.dtype}; expected real numbers")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        count = int((~np.isfinite(image)).sum())
        raise ValueError(f"{what} has {count} NaN or infinite voxels; replace them, for example with numpy.nan_to_num")


def check_pair(pair: Sequence[float], what: str, names: str = "low, high") -> tuple[float, float]:
    """Return two finite numbers, the lower one first, as floats."""
    try:
        low, high = (float(v) for v in pair)
    except (TypeError, ValueError):
        raise StateError(f"{what} is {pair!r}; expected two numbers ({names})") from None
    if not (np.isfinite([low, high]).all() and low < high):
        raise StateError(f"{what} is {low:g} to {high:g}; expected two finite numbers, the lower one first")
    return low, high


def check_known(value: str, known: Collection[str], what: str) -> str:
    """Return a name that is known. `what` begins the message for one that is not: "there is no plane"."""
    if value not in known:
        raise StateError(f"{what} {value!r}; there are {list_names(known)}")
    return value


def list_names(names: Collection[str]) -> str:
    """Return names in quotation marks, for a message."""
    return ", ".join(map(repr, names)) or "none"


# ------------------------------------------------------------------------------------------------- what the browser gets


def find_limits(image: np.ndarray, limits: tuple[float, float] | None = None) -> tuple[float, float]:
    """Return the intensities that become grey levels 0 and 255.

    The extreme 0.1 % are cut off, because a few hot voxels would cost contrast. Integers that span fewer than 256 values get a
    level each.
    """
    if limits is not None:
        return check_pair(limits, "limits")
    low, high = float(image.min()), float(image.max())
    if high - low <= 255 and (image == np.rint(image)).all():
        return low, low + 255.0
    cut_low, cut_high = (float(v) for v in np.percentile(plotting.draw_sample(image), (0.1, 99.9)))
    if cut_low < cut_high:
        low, high = cut_low, cut_high
    return (low, high) if low < high else (low, low + 1.0)


def to_bytes(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the grey level (uint8) of each voxel."""
    levels = (image.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.clip(np.rint(levels, out=levels), 0, 255, out=levels).astype(np.uint8)


def pack(array: np.ndarray) -> bytes:
    """Return a uint8 array as gzip, which browsers unpack themselves. The level is the fastest: local connections are fast."""
    compressor = zlib.compressobj(level=1, wbits=31)
    return compressor.compress(np.ascontiguousarray(array, np.uint8)) + compressor.flush()


def script(*names: str) -> str:
    """Return scripts of this folder as one ES module without imports, as notebooks need it.

    The last one defines `render({model, el})`. The functions of shared.js stand in front.
    """
    parts = [(_HERE / file).read_text(encoding="utf-8") for file in ("shared.js", *names)]
    return "\n".join([*parts, _EXPORT, ""])


def styles(name: str, scope: str) -> str:
    """Return a style sheet of this folder, behind the rules of shared.css.

    The shared rules hold for the class `.medseg`. Here they get the widget's own class `scope`: a notebook with several kinds
    of widgets has the shared rules several times, and those of one widget must not override another widget's own rules.
    """
    shared, own = ((_HERE / file).read_text(encoding="utf-8") for file in ("shared.css", name))
    return f"{shared.replace('.medseg', f'.{scope}')}\n{own}"


def page(*, title: str, state: dict, script: str, css: str) -> str:
    """Return a self-contained page that runs a widget without a kernel or a network.

    Args:
        title: heading of the page, plain text.
        state: value of each trait that the script reads: JSON types, and bytes, at any depth.
        script: what `script` returns.
        css: what `styles` returns.
    """
    data = json.dumps(state, default=_bytes_as_base64, allow_nan=False, ensure_ascii=True)
    data = data.replace("<", "\\u003c")  # a name such as "</script>" must not end the element
    return _PAGE.format(title=html.escape(title), css=css, state=data, code=script.replace(_EXPORT, ""))


def _bytes_as_base64(value: object) -> dict:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} cannot be written into a page")


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    """Return the font of the pictures that are drawn without matplotlib."""
    return ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), 13)


@functools.cache
def signed_colormap() -> LinearSegmentedColormap:
    """Return the colours of maps with both signs: blue below zero, white at zero, vermilion above."""
    return LinearSegmentedColormap.from_list("signed", plotting.SIGNED_COLOURS)
