"""Stored predictions of several networks during their trainings: one slider moves all of them, beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .. import plotting
from ..metrics import dice
from ._base import Widget, check_image, find_limits, pack, script, styles, to_bytes


class TrainingScrubber(Widget):
    """One slice as several networks segmented it after so many updates, with a slider and a play button for all of them.

        scrubber = TrainingScrubber(image, truth, labels, steps, ["Jaccard", "cross-entropy"], ["background", "large", "tiny"])
        scrubber.frame = 3         # the fourth of the stored updates
        scrubber.dice              # what is written below the pictures

    The truth comes first, then one picture for each network. Each has its Dice below, by class, of this slice alone. A class that neither
    network nor truth has in the slice has no Dice. Pictures are rows and columns as `imshow` shows them, as from `plotting.cut`.

    Args:
        image: intensities of the slice, `(H, W)`.
        truth: class numbers, `(H, W)`.
        labels: predicted class numbers, `(V, T, H, W)`: V networks after T numbers of updates, uint8.
        steps: numbers of updates, T numbers that rise.
        names: V names of the networks.
        classes: class names, a sequence by number or a mapping. The background is class 0.
        frame: number of the stored update on show, from 0. By default the last one.
        opacity: opacity of the colours, from 0 to 1.

    Attributes:
        frame, opacity: as above, synchronised with the browser.

    Raises:
        ValueError: for arrays, steps or names that do not fit each other, and classes that have no name.

    Taught in notebook 08.
    """

    _esm = script("training_scrubber.js")
    _css = styles("training_scrubber.css", "medseg-scrubber")

    frame = traitlets.Int(0).tag(sync=True)
    opacity = traitlets.Float(0.75).tag(sync=True)
    _labels = traitlets.Bytes().tag(sync=True)  # truth first, then all frames of each network

    def __init__(
        self,
        image: np.ndarray,
        truth: np.ndarray,
        labels: np.ndarray,
        steps: Sequence[int],
        names: Sequence[str],
        classes: Sequence[str] | Mapping[int, str],
        **state: float,
    ):
        self._image, self._truth, self._frames = image, truth, labels = [np.asarray(a) for a in (image, truth, labels)]
        self._steps, self._names = np.asarray(steps).tolist(), [str(name) for name in names]
        named = dict(classes) if isinstance(classes, Mapping) else dict(enumerate(classes))
        _check_arrays(image, truth, labels)
        _check_names(labels, self._steps, self._names)
        if unnamed := sorted(({*np.unique(truth).tolist(), *np.unique(labels).tolist()} - {0}) - {*named}):
            raise ValueError(f"truth or labels hold class {unnamed[0]}, which has no name; named are {sorted(named)}")
        self._classes = {int(k): str(name) for k, name in named.items() if k}
        scores = [[[self._score(frame, k) for k in self._classes] for frame in frames] for frames in labels]
        super().__init__(**{"frame": len(self._steps) - 1} | state)
        self._grey = to_bytes(image, *find_limits(image.astype(np.float32)))
        colours = plotting.class_colours({0: "background", **self._classes})
        self._labels = pack(np.concatenate([truth[None].astype(np.uint8), labels.reshape(-1, *truth.shape)]))
        self._scene = {
            "size": truth.shape,
            "image": self._grey.tobytes(),
            "steps": self._steps,
            "names": self._names,
            "classes": [(k, name, colours[k]) for k, name in self._classes.items()],
            "dice": scores,
        }

    def __repr__(self) -> str:
        return f"TrainingScrubber({', '.join(self._names)}; after {self._steps[self.frame]} updates, {len(self._steps)} stored)"

    @property
    def dice(self) -> pd.DataFrame:
        """Dice of the slice after the present number of updates, a row for each network and a column for each class."""
        scores = [of_network[self.frame] for of_network in self._scene["dice"]]
        return pd.DataFrame(scores, index=self._names, columns=list(self._classes.values()), dtype=float)

    def _score(self, label: np.ndarray, k: int) -> float | None:
        found, true = label == k, self._truth == k
        return dice(found, true) if found.any() or true.any() else None

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "Training, update by update"

    def _alt(self) -> str:
        told = [f"{name} " + ", ".join(f"{c} {_percent(d)}" for c, d in row.items()) for name, row in self.dice.iterrows()]
        return f"One slice after {self._steps[self.frame]} updates: the truth, then {len(told)} networks with their Dice. {'; '.join(told)}"

    def _draw(self) -> Figure:
        """Draw the truth and the present prediction of each network, with the Dice of each class below."""
        grey, count = np.repeat(self._grey[..., None], 3, -1), len(self._names) + 1
        colours = np.zeros((256, 3), np.float32)
        for k, _, colour in self._scene["classes"]:
            colours[k] = plotting.rgb(colour)
        columns = min(count, 6)
        with plotting.style():
            figure = Figure(figsize=(1.6 * columns, 2.4 * -(-count // columns) + 0.4), dpi=100, layout="constrained")
            grid = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
            plotting.picture(grid)
            for axes, label, name in zip(grid, [self._truth, *self._frames[:, self.frame]], ["truth", *self._names]):
                axes.imshow(plotting.blend(grey, colours[label], self.opacity * (label > 0)).astype(np.uint8))
                axes.set_title(name, fontsize=9)
            for axes, (_, row) in zip(grid[1:], self.dice.iterrows()):
                axes.set_xlabel("\n".join(f"{name} {_percent(d)}" for name, d in row.items()), fontsize=7)
            for axes in grid[count:]:
                axes.set_visible(False)
            handles = [Patch(color=colour, label=name) for _, name, colour in self._scene["classes"]]
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
            figure.suptitle(f"after {self._steps[self.frame]} updates: Dice of this slice", fontsize=9)
        return figure

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("frame")
    def _valid_frame(self, proposal):
        return min(max(proposal["value"], 0), len(self._steps) - 1)


def _percent(score: float) -> str:
    return "–" if np.isnan(score) else f"{100 * score:.0f} %"


def _check_arrays(image: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> None:
    if image.ndim != 2 or truth.shape != image.shape:
        raise ValueError(f"the image has shape {image.shape} and the truth {truth.shape}; expected one slice (H, W) of each")
    check_image(image, "the image")
    if labels.ndim != 4 or labels.shape[2:] != image.shape or 0 in labels.shape:
        raise ValueError(f"labels have shape {labels.shape}; expected (networks, updates, {image.shape[0]}, {image.shape[1]})")
    if truth.dtype.kind not in "iub" or truth.min() < 0 or truth.max() > 255:
        raise ValueError(
            f"the truth holds {truth.dtype} from {truth.min()} to {truth.max()}; expected class numbers from 0 to 255"
        )
    if labels.dtype != np.uint8:
        raise ValueError(f"labels hold {labels.dtype}; expected class numbers as uint8")


def _check_names(labels: np.ndarray, steps: list[int], names: list[str]) -> None:
    if len(names) != len(labels) or len({*names}) != len(names):
        raise ValueError(f"names are {names}; expected {len(labels)} different ones, one for each network in labels")
    if len(steps) != labels.shape[1] or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(f"steps are {steps}; expected {labels.shape[1]} numbers of updates that rise")
