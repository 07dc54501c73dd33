"""One slice to paint on: found, missed and made up, beside a network and other readers who outlined the same slice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .. import metrics, plotting
from ..arrays import as_array
from ..volume import Case
from ._base import StateError, Widget, check_images, check_known, find_limits, pack, script, styles, to_bytes

SCORES = {"Dice": metrics.dice, "precision": metrics.precision, "sensitivity": metrics.sensitivity}


def _to_text(painted: np.ndarray, widget: SegmentYourself) -> str:
    """Return a slice as a text of 0 and 1, which every notebook's connection carries."""
    return "".join(map(str, np.uint8(painted).ravel()))


def _from_text(text: str, widget: SegmentYourself) -> np.ndarray:
    return np.reshape([c == "1" for c in text], widget.truth.shape)


class SegmentYourself(Widget):
    """An axial slice to paint an object on. "Reveal" shows what was found, missed and made up, and how others did.

        paint = SegmentYourself(case, network_label, readers={"generous": generous})
        paint.painted            # what was painted, bool (D, H)
        paint.scores             # Dice, precision and sensitivity of you, the network and the readers, in this slice
        paint.painted = paint.truth

    Drag to paint; the right button or the eraser erases. After the answer is shown, the numbers follow every stroke. All of it is
    computed in the browser, so a page made with `to_html` needs no kernel. The truth is in the page: this is no examination.

    Args:
        case: case with a label.
        network: prediction of a network, `(D, H, W)`.
        readers: objects that other people outlined, `(D, H, W)` by name; see `phantoms.draw_as_reader`.
        region: label of the object, or several; by default all above 0. It is cut out of the prediction and of the readers' labels
            too, unless they are bool.
        index: slice along W; by default the one with most of the object.
        channel: sequence that is shown first; by default the case's first.

    Attributes:
        painted: what was painted, bool `(D, H)`.
        channel: sequence that is shown.
        revealed: whether the answer is shown.

    All attributes are synchronised with the browser.

    Raises:
        ValueError: for a case without label, a slice without object, arrays on another grid, a reader called "you" or "network", or
            an unknown channel.

    Taught in notebook 00.
    """

    _esm = script("segment_yourself.js")
    _css = styles("segment_yourself.css", "medseg-yourself")

    painted = traitlets.Any().tag(sync=True, to_json=_to_text, from_json=_from_text)
    channel = traitlets.Unicode().tag(sync=True)
    revealed = traitlets.Bool(False).tag(sync=True)
    _images = traitlets.List().tag(sync=True)  # of each sequence
    _drawn = traitlets.List().tag(sync=True)  # the truth, the network, and each reader

    def __init__(
        self,
        case: Case,
        network: np.ndarray,
        readers: Mapping[str, np.ndarray] | None = None,
        *,
        region: int | Iterable[int] | None = None,
        index: int | None = None,
        channel: str | None = None,
    ):
        check_images(case)
        if case.label is None:
            raise ValueError(f"{case.name} has no label to compare with")
        if unfit := {"you", "network"} & set(readers or ()):
            raise ValueError(f"a reader is called {unfit.pop()!r}, which is a row of the table already; choose another name")
        regions = metrics.as_regions({"object": range(1, 256) if region is None else region})["object"]
        whole = _find_object(case.label, regions, case.shape, "the label")
        self._case, self._index = case, plotting.busiest_position(whole, case.shape)[2] if index is None else index
        if not 0 <= self._index < case.shape[2] or not whole[:, :, self._index].any():
            raise ValueError(f"slice {self._index} of {case.name} shows nothing of the object; choose another")
        self.truth = whole[:, :, self._index]
        others = {"network": network, **(readers or {})}
        self._others = {n: _find_object(a, regions, case.shape, n)[:, :, self._index] for n, a in others.items()}
        slices, limits = case.image[:, :, :, self._index], [find_limits(image) for image in case.image]
        super().__init__(
            painted=np.zeros_like(self.truth),
            channel=channel or case.channels[0],
            _images=[pack(to_bytes(image, *ends)) for image, ends in zip(slices, limits)],
            _drawn=[pack(array) for array in (self.truth, *self._others.values())],
        )
        windows = [plotting.default_window(image, case.mask) for image in case.image]
        sequences = zip(case.channels, windows, limits)
        self._windows = dict(zip(case.channels, windows))
        self._scene = {
            "title": f"{case.name}, slice {self._index}",
            "shape": [*self.truth.shape, 1],
            "spacing": case.voxel_size[:2],
            "plane": plotting.find_plane("axial")._asdict(),
            "sequences": [{"name": n, "window": window, "low": low, "high": high} for n, window, (low, high) in sequences],
            "names": list(self._others),
            "colours": {n: plotting.COLOURS[n] for n in (*plotting.OUTCOMES[1:], "prediction", "truth")},
        }

    def __repr__(self) -> str:
        dice = ", ".join(f"{name} {score:.3f}" for name, score in self.scores["Dice"].items())
        return f"SegmentYourself({self._scene['title']!r}, Dice: {dice})"

    @property
    def scores(self) -> pd.DataFrame:
        """Dice, precision and sensitivity in this slice: of you, the network, and each reader."""
        rows = {name: [f(drawn, self.truth) for f in SCORES.values()] for name, drawn in self._everybody().items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(SCORES))

    def _everybody(self) -> dict[str, np.ndarray]:
        return {"you": self.painted, **self._others}

    def _page_state(self) -> dict[str, object]:
        return super()._page_state() | {"painted": _to_text(self.painted, self)}

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "Segment it yourself"

    def _alt(self) -> str:
        dice = ", ".join(f"{name} {score:.3f}" for name, score in self.scores["Dice"].items())
        return f"{self._scene['title']}, {self.channel}, and what everybody found, missed and made up in it. Dice: {dice}"

    def _draw(self) -> Figure:
        """Draw the slice, and the outcomes of you, the network and the readers."""
        plane, image, dice = (
            plotting.find_plane("axial"),
            self._case.image[self._case.channels.index(self.channel)],
            self.scores["Dice"],
        )
        grey, aspect = plotting.cut(image, plane, self._index), self._case.voxel_size[1] / self._case.voxel_size[0]
        drawn = {f"{name}: Dice {dice[name]:.2f}": a for name, a in self._everybody().items() if a.any()}
        with plotting.style():
            figure = Figure(figsize=(2.2 * (1 + len(drawn)), 3.3), dpi=100, layout="constrained")
            grid = figure.subplots(1, 1 + len(drawn), squeeze=False)[0]
            for axes, (title, array) in zip(grid, {f"the slice, {self.channel}": None, **drawn}.items()):
                outcomes = np.zeros(self.truth.shape, np.uint8) if array is None else plotting.outcomes(self.truth, array)
                area = plotting.Overlay("outcomes", plotting.cut(outcomes[:, :, None], plane, 0), "area")
                axes.imshow(plotting.paint(grey, self._windows[self.channel], [area], 0.65, plotting.OUTCOMES), aspect=aspect)
                axes.set_title(title, fontsize=9)
            plotting.picture(list(grid))
            handles = [Patch(color=plotting.COLOURS[n], label=n) for n in plotting.OUTCOMES[1:]]
            figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return figure

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("painted")
    def _valid_painted(self, proposal):
        painted = np.asarray(proposal["value"])
        if painted.shape != self.truth.shape:
            raise StateError(f"painted has shape {painted.shape}; expected {self.truth.shape}")
        return painted != 0

    @traitlets.validate("channel")
    def _valid_channel(self, proposal):
        return check_known(proposal["value"], self._case.channels, f"{self._case.name} has no channel")


def _find_object(array: np.ndarray, labels: list[int], shape: tuple[int, int, int], what: str) -> np.ndarray:
    """Return where an array has one of some labels, or where it is True."""
    array = as_array(array, what)
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}; expected that of the case, {shape}")
    return array if array.dtype == bool else np.isin(array, labels)
