"""Training while it runs: its curves, and one slice as the network segments it by then."""

from __future__ import annotations

import base64
import io
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from matplotlib.figure import Figure
from torch import nn

from .. import features, plotting
from ..engine.tiles import check_fits
from ..metrics import dice
from ..paths import atomic_write
from ..volume import Case
from ._base import pack, page, script
from .slice_viewer import StateError, _check_image, _find_limits, _to_bytes

_HERE = Path(__file__).parent
POINTS = 400  # of the loss curve: a long run is averaged down to these
NOT_SCORES = ("step", "loss", "learning_rate", "seconds")


class TrainingMonitor(anywidget.AnyWidget):
    """Curves that grow and a segmentation that gets better, while `training.fit` runs.

        monitor = TrainingMonitor(model, case, every=20)
        display(monitor)
        training.fit(model, sampler, steps=400, optimizer=optimizer, on_update=monitor)
        monitor.frame = 0                # back to the beginning; -1 follows the newest

    Every `every` updates one slice of the case is segmented in evaluation mode; this draws no random numbers, so the network becomes
    the same as without the monitor. Colours fill what the network says, lines outline the truth.

    Args:
        model: the network in training.
        case: a case that it is not trained on, normalised like the training cases.
        every: updates between two pictures.
        plane, index: of the slice shown; by default the axial slice with most labels.
        channel: sequence shown.
        classes: class names by number; by default `case.info["classes"]`.

    Attributes:
        frame: which picture is shown; -1 follows the newest.
        opacity: of the colours.
        history: the rows that `fit` reported.

    Raises:
        ValueError: for a case that does not fit the network, or an unknown channel or plane.
    """

    _esm = script("training_monitor.js")
    _css = _HERE / "training_monitor.css"
    _ipython_display_ = None  # ipywidgets 7 would display through it, and drop the PNG below

    frame = traitlets.Int(-1).tag(sync=True)
    opacity = traitlets.Float(0.5).tag(sync=True)
    _scene = traitlets.Dict().tag(sync=True)
    _curves = traitlets.Dict().tag(sync=True)  # {"loss": [[step, value], ...], scores by name}
    _frames = traitlets.List().tag(sync=True)  # [{"step", "dice", "data"}, ...]

    def __init__(
        self,
        model: nn.Module,
        case: Case,
        *,
        every: int = 20,
        plane: str = "axial",
        index: int | None = None,
        channel: str | None = None,
        classes: Sequence[str] | Mapping[int, str] | None = None,
    ):
        if every < 1:
            raise ValueError(f"every={every}; expected 1 or more updates")
        check_fits(model, case)
        channel = case.channels[0] if channel is None else channel
        if channel not in case.channels:
            raise ValueError(f"{case.name} has no channel {channel!r}; its channels are {', '.join(case.channels)}")
        view = plotting.find_plane(plane)
        index = plotting.busiest_position(case.label, case.shape)[view.cut] if index is None else index
        if not 0 <= index < case.shape[view.cut]:
            raise ValueError(f"index={index}; expected 0 to {case.shape[view.cut] - 1}")
        image = case.image[case.channels.index(channel)]
        _check_image(image, f"{case.name}, {channel}")
        self._model, self._case, self._every, self._plane, self._index = model, case, every, view, index
        self._window, self._channel = plotting.default_window(image, case.mask), channel
        self.history: list[dict[str, float]] = []
        self._shown = 0.0  # when the curves were last sent
        low, high = _find_limits(image, None)
        count = getattr(model, "classes", 0) or (0 if case.label is None else int(case.label.max()) + 1)
        given = classes if classes is not None else case.info.get("classes")
        truth = None if case.label is None else self._cut(case.label)
        rows, columns = plotting.cut(image, view, index).shape
        super().__init__(
            _scene={
                "title": case.name,
                "size": (rows, columns),
                "aspect": case.spacing[view.y] / case.spacing[view.x],
                "grey": {"low": low, "high": high, "window": self._window},
                "image": pack(_to_bytes(plotting.cut(image, view, index), low, high)),
                "truth": None if truth is None else pack(truth),
                "classes": [(k, plotting.class_name(k, given), plotting.class_colour(k)) for k in range(1, count)],
                "place": f"{view.name} slice {index} of {case.name}",
            }
        )

    def __repr__(self) -> str:
        done = self.history[-1]["step"] if self.history else 0
        return f"TrainingMonitor({self._case.name!r}, {done} updates, {len(self._frames)} pictures)"

    def __call__(self, row: dict[str, float]) -> None:
        """Take the row of one update; `fit` calls this."""
        self.history.append(row)
        step = row["step"]
        picture = step % self._every == 0 or step == 1
        if picture:
            self._frames = [*self._frames, self._segment(step)]
        # Often enough to look alive, and not so often that it slows the training down.
        if picture or any(name not in NOT_SCORES for name in row) or time.monotonic() - self._shown > 1:
            self._curves = _curves(self.history)
            self._shown = time.monotonic()

    def _segment(self, step: int) -> dict:
        """What the network says about the slice now."""
        start = [self._index if axis == self._plane.cut else 0 for axis in range(3)]
        shape = [1 if axis == self._plane.cut else n for axis, n in enumerate(self._case.shape)]
        box = tuple(slice(a, a + n) for a, n in zip(start, shape))
        (maps,) = features.capture(self._model, self._case, "", region=box, progress=False).values()
        maps.offset = tuple(o - a for o, a in zip(maps.offset, start))
        classes = maps.laid_over(shape).argmax(0).astype(np.uint8)
        if self._case.mask is not None:
            classes[~self._case.mask[box]] = 0
        picture = plotting.cut(classes, self._plane, 0)
        score = None if self._case.label is None else dice(picture > 0, self._cut(self._case.label) > 0)
        return {"step": int(step), "dice": score, "data": pack(picture)}

    def _cut(self, volume: np.ndarray) -> np.ndarray:
        return plotting.cut(volume, self._plane, self._index)

    # ------------------------------------------------------------------------------------------------ other forms

    def snapshot(self) -> bytes:
        """The curves and up to four of the pictures as a PNG file."""
        file = io.BytesIO()
        self._draw().savefig(file, format="png")
        return file.getvalue()

    def to_html(self, path: str | Path | None = None, *, title: str | None = None) -> str:
        """The run so far as one self-contained page that works without a kernel or a network; also written to `path` if given."""
        self._curves = _curves(self.history)
        text = page(
            title=title or f"Training, watched on {self._case.name}",
            state={key: getattr(self, key) for key in ("frame", "opacity", "_scene", "_curves", "_frames")},
            script=self._esm,
            css=_HERE / "training_monitor.css",
        )
        if path is not None:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        self._curves = _curves(self.history)
        data, metadata = super()._repr_mimebundle_(**kwargs)
        done = f"{self.history[-1]['step']} updates, loss {self.history[-1]['loss']:.3f}" if self.history else "no update yet"
        alt = f"Training: {done}; curves, and {self._scene['place']} as the network segments it by and by"
        picture = base64.b64encode(self.snapshot()).decode()
        return {**data, "image/png": picture}, {**metadata, "image/png": {"alt": alt}}

    def _draw(self) -> Figure:
        curves = _curves(self.history)
        scores = {name: points for name, points in curves.items() if name != "loss"}
        count = len(self._frames)
        chosen = sorted({round(i * (count - 1) / 3) for i in range(4)}) if count else []
        grey = plotting.cut(self._case.image[self._case.channels.index(self._channel)], self._plane, self._index)
        truth = None if self._case.label is None else self._cut(self._case.label)
        with plotting.style():
            figure = Figure(figsize=(9.4, 2.4 + 2.6 * bool(chosen)), dpi=100, layout="constrained")
            parts = figure.subfigures(2 if chosen else 1, 1, squeeze=False).ravel()
            panels = parts[0].subplots(1, 1 + bool(scores), squeeze=False)[0]
            if "loss" in curves:
                panels[0].plot(*zip(*curves["loss"]))
            panels[0].set(title="loss", xlabel="update")
            if scores:
                for name, points in scores.items():
                    panels[1].plot(*zip(*points), marker="o", markersize=3, label=name.replace("_", " "))
                panels[1].set(title="validation", xlabel="update", ylim=(0, 1) if _within_one(scores) else None)
                panels[1].legend()
            if chosen:
                for axes, n in zip(parts[1].subplots(1, 4), [*chosen, *[None] * (4 - len(chosen))]):
                    axes.axis("off")
                    if n is None:
                        continue
                    classes = np.frombuffer(zlib.decompress(self._frames[n]["data"], wbits=31), np.uint8).reshape(grey.shape)
                    layers = [plotting.Overlay("prediction", classes, "area")]
                    if truth is not None:
                        layers.append(plotting.Overlay("truth", truth, "line"))
                    axes.imshow(plotting.paint(grey, self._window, layers, self.opacity), aspect=self._scene["aspect"])
                    axes.set_title(f"after {_updates(self._frames[n]['step'])}")
        return figure

    # ----------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("frame")
    def _valid_frame(self, proposal):
        return max(-1, min(proposal["value"], len(self._frames) - 1))

    @traitlets.validate("opacity")
    def _valid_opacity(self, proposal):
        if np.isnan(proposal["value"]):
            raise StateError("opacity is NaN; expected a number from 0 to 1")
        return min(max(proposal["value"], 0.0), 1.0)


def _updates(step: int) -> str:
    return f"{step} update" + "s" * (step != 1)


def _within_one(scores: dict[str, list]) -> bool:
    return all(0 <= value <= 1 for points in scores.values() for _, value in points)


def _curves(history: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """The loss, averaged down to a few hundred points, and every score, by name: [[step, value], ...]."""
    curves: dict[str, list[list[float]]] = {}
    width = max(1, math.ceil(len(history) / POINTS))
    for start in range(0, len(history), width):
        part = history[start : start + width]
        curves.setdefault("loss", []).append([part[-1]["step"], sum(row["loss"] for row in part) / len(part)])
    for row in history:
        for name, value in row.items():
            if name not in NOT_SCORES and math.isfinite(value):
                curves.setdefault(name, []).append([row["step"], float(value)])
    return curves
