"""Training while it runs: its curves, and one slice as the network segments it after so many updates."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from .. import features, plotting
from ..engine.tiles import check_fits
from ..metrics import dice
from ..models.network import Network
from ..volume import Case
from ._base import Widget, check_image, check_known, find_limits, pack, script, styles, to_bytes

POINTS = 400  # of the loss curve; the curve of a longer run is averaged down to these
NOT_SCORES = ("step", "loss", "learning_rate", "seconds")


class TrainingMonitor(Widget):
    """Curves that grow and a segmentation that gets better, while `training.fit` runs.

        monitor = TrainingMonitor(model, case, every=20)
        display(monitor)
        training.fit(model, sampler, steps=400, optimizer=optimizer, on_update=monitor)
        monitor.frame = 0                # back to the beginning; -1 follows the newest

    Every `every` updates one slice of the case is segmented in evaluation mode. This draws no random numbers, so the network
    becomes the same as without the monitor. Colours show the prediction, lines the outline of the truth.

    Args:
        model: the network in training.
        case: a case that the network is not trained on, normalised like the training cases.
        every: updates between two pictures.
        plane: "axial", "coronal" or "sagittal".
        index: slice shown; by default the one with most labels.
        channel: sequence shown; by default the first.
        classes: class names by number; by default `case.info["classes"]`.

    Attributes:
        frame: number of the picture shown; -1 follows the newest.
        opacity: opacity of the colours.
        history: rows that `fit` reported.

    Raises:
        ValueError: for a case that does not fit the network, or an unknown channel or plane.
    """

    _esm = script("training_monitor.js")
    _css = styles("training_monitor.css", "medseg-monitor")

    frame = traitlets.Int(-1).tag(sync=True)
    opacity = traitlets.Float(0.5).tag(sync=True)
    _curves = traitlets.Dict().tag(sync=True)  # {"loss": [[step, value], ...], scores by name}
    # All pictures, {"number", "step", "dice", "data"} each, are sent when the widget is shown. Later each new one is sent alone.
    _frames = traitlets.List().tag(sync=True)
    _newest = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        model: Network,
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
        check_known(channel, case.channels, f"{case.name} has no channel")
        view = plotting.find_plane(plane)
        index = plotting.busiest_position(case.label, case.shape)[view.cut] if index is None else index
        if not 0 <= index < case.shape[view.cut]:
            raise ValueError(f"index={index}; expected 0 to {case.shape[view.cut] - 1}")
        image = case.image[case.channels.index(channel)]
        check_image(image, f"{case.name}, {channel}")
        self._model, self._case, self._every, self._plane, self._index = model, case, every, view, index
        self._window, self._channel = plotting.default_window(image, case.mask), channel
        self.history: list[dict[str, float]] = []
        self._shown = 0.0  # when the curves were last sent
        low, high = find_limits(image)
        given = classes if classes is not None else case.info.get("classes")
        named = {k: plotting.class_name(k, given) for k in range(1, max(2, model.classes))}
        truth = None if case.label is None else self._cut(case.label)
        rows, columns = plotting.cut(image, view, index).shape
        super().__init__(
            _scene={
                "title": case.name,
                "size": (rows, columns),
                "aspect": case.voxel_size[view.y] / case.voxel_size[view.x],
                "grey": {"low": low, "high": high, "window": self._window},
                "image": pack(to_bytes(plotting.cut(image, view, index), low, high)),
                "truth": None if truth is None else pack(truth > 0),
                "classes": [(k, name, plotting.class_colour(k, named)) for k, name in named.items()],
                "colour": plotting.COLOURS["truth"],
                "place": f"{view.name} slice {index} of {case.name}",
            }
        )
        self.on_msg(lambda *message: self.send_state("_frames"))  # a view asks for pictures that it has missed

    def __repr__(self) -> str:
        done = self.history[-1]["step"] if self.history else 0
        return f"TrainingMonitor({self._case.name!r}, {done} updates, {len(self._frames)} pictures)"

    def __call__(self, row: dict[str, float]) -> None:
        """Take the row of one update, and segment the slice if it is time; `fit` calls this."""
        self.history.append(row)
        step = row["step"]
        picture = step % self._every == 0 or step == 1
        if picture:
            self._newest = self._segment(step)
            self._frames.append(self._newest)
        # Often enough to look alive, and not so often that it slows the training down.
        if picture or any(name not in NOT_SCORES for name in row) or time.monotonic() - self._shown > 1:
            self._curves = _curves(self.history)
            self._shown = time.monotonic()

    def _segment(self, step: int) -> dict:
        """Return the present prediction of the slice, with its Dice."""
        start = [self._index if axis == self._plane.cut else 0 for axis in range(3)]
        shape = [1 if axis == self._plane.cut else n for axis, n in enumerate(self._case.shape)]
        box = tuple(slice(a, a + n) for a, n in zip(start, shape))
        (maps,) = features.capture(self._model, self._case, "", region=box, progress=False).values()
        maps.offset = tuple(o - a for o, a in zip(maps.offset, start))
        logits = maps.laid_over(shape)
        classes = (logits.argmax(0) if len(logits) > 1 else logits[0] > 0).astype(np.uint8)  # a single output is for a sigmoid
        if self._case.mask is not None:
            classes[~self._case.mask[box]] = 0
        picture = plotting.cut(classes, self._plane, 0)
        score = None if self._case.label is None else dice(picture > 0, self._cut(self._case.label) > 0)
        return {"number": len(self._frames), "step": int(step), "dice": score, "data": pack(picture)}

    def _cut(self, volume: np.ndarray) -> np.ndarray:
        return plotting.cut(volume, self._plane, self._index)

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return f"Training, watched on {self._case.name}"

    def _alt(self) -> str:
        done = f"{self.history[-1]['step']} updates, loss {self.history[-1]['loss']:.3f}" if self.history else "no update yet"
        return f"Training: {done}; curves, and {self._scene['place']} as the network segments it by and by"

    def _page_state(self) -> dict[str, object]:
        self._curves = _curves(self.history)
        return super()._page_state()

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        self._curves = _curves(self.history)
        self.send_state("_frames")
        return super()._repr_mimebundle_(**kwargs)

    def _draw(self) -> Figure:
        """Draw the curves and up to four of the pictures."""
        curves = _curves(self.history)
        scores = {name: points for name, points in curves.items() if name != "loss"}
        last = len(self._frames) - 1
        chosen = sorted({round(i * last / 3) for i in range(4)}) if self._frames else []
        with plotting.style():
            figure = Figure(figsize=(9.4, 2.4 + 2.6 * bool(chosen)), dpi=100, layout="constrained")
            parts = figure.subfigures(2 if chosen else 1, 1, squeeze=False).ravel()
            panels = parts[0].subplots(1, 1 + bool(scores), squeeze=False)[0]
            if "loss" in curves:
                panels[0].plot(*zip(*curves["loss"]))
            panels[0].set(title="loss by update")
            if scores:
                for name, points in scores.items():
                    panels[1].plot(*zip(*points), marker="o", markersize=3, label=name.replace("_", " "))
                panels[1].set(
                    title="validation by update", xlim=panels[0].get_xlim(), ylim=(0, 1) if _within_one(scores) else None
                )
                panels[1].legend()
            if chosen:
                pictures = parts[1].subplots(1, 4)
                for axes in pictures:
                    axes.axis("off")
                for axes, number in zip(pictures, chosen):
                    self._draw_frame(axes, self._frames[number])
                self._draw_legend(parts[1])
        return figure

    def _draw_frame(self, axes: Axes, frame: dict) -> None:
        """Draw one picture: the prediction as colours, the truth as an outline."""
        grey = self._cut(self._case.image[self._case.channels.index(self._channel)])
        classes = np.frombuffer(zlib.decompress(frame["data"], wbits=31), np.uint8).reshape(grey.shape)
        colours = np.float32([[0, 0, 0], *(plotting.rgb(colour) for _, _, colour in self._scene["classes"])])
        picture = plotting.blend(plotting.paint(grey, self._window), colours[classes], self.opacity * (classes > 0))
        axes.imshow(np.rint(picture).astype(np.uint8), aspect=self._scene["aspect"])
        if self._case.label is not None:
            plotting.outline(axes, self._cut(self._case.label) > 0, colour=plotting.COLOURS["truth"])
        score = "" if frame["dice"] is None else f"\nDice of this slice {100 * frame['dice']:.0f} %"
        axes.set_title(f"after {frame['step']} update{'s' * (frame['step'] != 1)}{score}")

    def _draw_legend(self, figure: SubFigure) -> None:
        """Draw the legend of the pictures below them."""
        handles = [Patch(color=colour, label=name) for _, name, colour in self._scene["classes"]]
        if self._case.label is not None:
            handles.append(plotting.outline_handle("truth", colour=plotting.COLOURS["truth"]))
        look = {"handlelength": 1.4, "columnspacing": 1.2, "fontsize": 9}
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **look)

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("frame")
    def _valid_frame(self, proposal):
        return max(-1, min(proposal["value"], len(self._frames) - 1))


def _within_one(scores: dict[str, list]) -> bool:
    return all(0 <= value <= 1 for points in scores.values() for _, value in points)


def _curves(history: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """Return the loss, averaged down to a few hundred points, and every score, by name: [[step, value], ...]."""
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
