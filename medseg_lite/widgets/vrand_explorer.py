"""Cells from a membrane map at a threshold: which are merged and which are split, and the scores that count them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import traitlets
from matplotlib.figure import Figure
from scipy import ndimage

from .. import metrics, plotting
from ..arrays import as_array, as_mask
from ..volume import Case
from ._base import StateError, Widget, check_image, find_limits, pack, script, styles, to_bytes

GRID = np.arange(51) / 50  # thresholds, among them those of the challenge
SHARE, FEWEST = 0.1, 20  # of a cell's pixels that a segment must hold to count as a part of it
LARGEST_SIDE = 256
COLOURS = {"merged": plotting.COLOURS["missed"], "split": plotting.COLOURS["made up"]}
SEGMENTS = (
    "#4477AA",
    "#228833",
    "#CCBB44",
    "#66CCEE",
    "#DDAA77",
    "#99DDAA",
)  # neighbours are told apart, nothing else is meant
SCORES = {
    "v_rand": "V_rand",
    "v_info": "V_info",
    "dice": "Dice of the membranes",
    "merged": "merged cells",
    "split": "split cells",
}


class VRandExplorer(Widget):
    """Segments of a membrane map in colours, with a threshold to move, and a brush that closes or opens a gap.

        explorer = VRandExplorer(case, probability)     # those of metrics.v_rand: the probability of being inside a cell
        explorer.threshold = 0.8
        explorer.scores()          # V_rand, V_info, Dice of the membranes, numbers of merged and of split cells
        explorer.curve             # V_rand and V_info against the threshold, without the brush

    A pixel is inside a cell where its probability is above the threshold. The browser finds the segments, lets them grow until lines
    one pixel wide are left, and computes all numbers, as `metrics.v_rand` and `metrics.v_info` do for one threshold and one slice. All
    numbers are those of the square that is shown.

    A segment is a part of a true cell if it holds a tenth of the cell's pixels, and 20 at least. A cell is merged if one of its parts
    is a part of another cell too, and split if it has two parts. Where segments meet, the lines and the pale pixels were added as they
    grew.

    Args:
        image: case whose first channel is shown, or an image `(D, H)`.
        probability: probability of being inside a cell, `(D, H)` of the slice or `(D, H, W)` of the case.
        truth: 1 inside cells, 0 on membranes, of the same shape; by default where the case's label is 0.
        index: slice along W of a case.
        corner: first voxel along D and H of the square; by default the square is in the middle.
        side: side of the square in pixels, 256 at most.
        threshold: first threshold.

    Attributes:
        threshold: probability above which a pixel is inside, one of `GRID`. Any other number moves to the nearest.
        edits: pixels that the brush has changed, `[d, h, inside]` from the corner, with 1 or 0 for inside.
        tool: "close a gap" or "open a gap".
        brush: side of the brush in pixels, an odd number.
        opacity: opacity of the colours.

    All attributes are synchronised with the browser.

    Raises:
        ValueError: for arrays whose shapes differ, probabilities outside 0 to 1, a square without a cell, a slice that is not there.

    Source: Arganda-Carreras et al. 2015, equations 1 to 5; Drozdzal et al. 2018, tables III and IV.
    Taught in notebook 10.
    """

    _esm = script("vrand_explorer.js")
    _css = styles("vrand_explorer.css", "medseg-vrand")

    threshold = traitlets.Float().tag(sync=True)
    edits = traitlets.List().tag(sync=True)
    tool = traitlets.Enum(["close a gap", "open a gap"], "close a gap").tag(sync=True)
    brush = traitlets.Int(5).tag(sync=True)
    opacity = traitlets.Float(0.55).tag(sync=True)
    _layers = traitlets.List().tag(sync=True)  # image, truth, and the number of thresholds below each probability

    def __init__(
        self,
        image: Case | np.ndarray,
        probability: np.ndarray,
        truth: np.ndarray | None = None,
        *,
        index: int = 0,
        corner: Sequence[int] | None = None,
        side: int = 144,
        threshold: float = 0.5,
    ):
        image, probability, truth, self._name = _check_slice(image, probability, truth, index)
        if not 8 <= side <= LARGEST_SIDE:
            raise ValueError(f"side is {side}; expected 8 to {LARGEST_SIDE} pixels")
        size = [min(side, n) for n in image.shape]
        first = [(n - s) // 2 for n, s in zip(image.shape, size)] if corner is None else [int(c) for c in corner]
        if len(first) != 2 or not all(0 <= c <= n - s for c, n, s in zip(first, image.shape, size)):
            raise ValueError(f"a square of {size} from {first} leaves the slice, which has {image.shape} pixels")
        square = tuple(slice(c, c + s) for c, s in zip(first, size))
        self._image, self._probability, self._truth = (a[square] for a in (image, probability, truth))
        if not self._truth.any():
            raise ValueError(
                "the square has no cell (no 1 in the truth); is it a membrane map that must be turned into 1 - map?"
            )
        if (count := ndimage.label(self._truth)[1]) > 255:
            raise ValueError(f"the square has {count} cells; expected 255 at most: make it smaller with side")
        ends = find_limits(self._image)
        levels = np.searchsorted(GRID, self._probability)
        layers = (to_bytes(self._image, *ends), self._truth, levels)
        super().__init__(threshold=threshold, _layers=[pack(layer) for layer in layers])
        scores = np.array([metrics.partition_scores(self._probability > t, self._truth)[0] for t in GRID])
        self.curve = dict(zip(("v_rand", "v_info"), scores.T.tolist()))
        look = {"window": plotting.default_window(self._image), "low": ends[0], "high": ends[1]}
        known = {"plane": plotting.find_plane("axial")._asdict(), "grid": GRID.tolist(), "curve": self.curve, "names": SCORES}
        colours = {"colours": COLOURS, "segments": SEGMENTS, "truth": plotting.COLOURS["truth"]}
        self._scene = {"shape": [*size, 1], "title": self._name, "part": [SHARE, FEWEST]} | look | known | colours

    def __repr__(self) -> str:
        return f"VRandExplorer({self._name!r}, threshold {self.threshold:g}, {len(self.edits)} pixels changed by the brush)"

    def inside(self) -> np.ndarray:
        """Return which pixels of the square are inside segments: above the threshold, or as the brush left them."""
        found = self._probability > self.threshold
        for d, h, value in self.edits:
            found[d, h] = value
        return found

    def scores(self) -> dict[str, float]:
        """Return V_rand, V_info, Dice of the membranes, and the numbers of merged and of split cells, as shown now."""
        inside, truth = self.inside(), self._truth
        scores = dict(zip(("v_rand", "v_info"), metrics.partition_scores(inside, truth)[0]))
        merged, split = self._faults(ndimage.label(inside)[0], ndimage.label(truth)[0])
        return scores | {"dice": metrics.dice(~inside, ~truth), "merged": int(merged.sum()), "split": int(split.sum())}

    @staticmethod
    def _faults(segments: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return of each true cell whether it is merged with another one, and whether it is split."""
        shared = np.zeros((cells.max() + 1, segments.max() + 1), int)
        np.add.at(shared, (cells.ravel(), segments.ravel()), 1)
        parts = (shared >= np.maximum(SHARE * shared.sum(axis=1, keepdims=True), FEWEST))[1:, 1:]
        return parts[:, parts.sum(axis=0) > 1].any(axis=1), parts.sum(axis=1) > 1

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return f"Merged and split cells of {self._name}"

    def _alt(self) -> str:
        s = self.scores()
        return (
            f"Segments of {self._name} above {self.threshold:g} in colours: {s['merged']} true cells are merged with others, outlined in "
            f"red, {s['split']} are split, outlined with dashes; V_rand {s['v_rand']:.3f}, V_info {s['v_info']:.3f}, Dice of the "
            f"membranes {s['dice']:.3f}. Beside it V_rand and V_info against the threshold."
        )

    def _draw(self) -> Figure:
        """Draw the image, the segments with the outlines of merged and split cells, and both scores against the threshold."""
        segments, cells, s = ndimage.label(self.inside())[0], ndimage.label(self._truth)[0], self.scores()
        view, faults = plotting.find_plane("axial"), dict(zip(COLOURS, self._faults(segments, cells)))
        picture, segments, cells = (plotting.cut(a[..., None], view, 0) for a in (self._image, segments, cells))
        painted = plotting.paint(picture, self._scene["window"])
        palette = np.float32([plotting.rgb(SEGMENTS[k % len(SEGMENTS)]) for k in range(segments.max() + 1)])
        coloured = plotting.blend(painted, palette[segments], self.opacity * (segments > 0))
        with plotting.style():
            figure = Figure(figsize=(9.4, 3.6), dpi=100, layout="constrained")
            left, middle, right = figure.subplots(1, 3)
            left.imshow(painted)
            middle.imshow(np.rint(coloured).astype(np.uint8))
            for (name, colour), style in zip(COLOURS.items(), ("line", "dashes")):
                for cell in np.flatnonzero(faults[name]) + 1:
                    plotting.outline(middle, cells == cell, colour=colour, style=style)
            plotting.picture([left, middle])
            left.set_title(self._name)
            middle.set_title(f"above {self.threshold:g}: V_rand {s['v_rand']:.3f}, V_info {s['v_info']:.3f}")
            for name, line in zip(self.curve, ("-", "--")):
                right.plot(GRID, self.curve[name], line, color="#222222", label=SCORES[name])
            right.axvline(self.threshold, color=plotting.COLOURS["neutral"])
            right.set(xlabel="threshold", ylim=(0, 1), title="without the brush")
            right.legend()
            handles = [
                plotting.outline_handle(f"{n} cell", colour=c, style=y)
                for (n, c), y in zip(COLOURS.items(), ("line", "dashes"))
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return figure

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("threshold")
    def _valid_threshold(self, proposal):
        if not 0 <= proposal["value"] <= 1:
            raise StateError(f"threshold is {proposal['value']}; expected a number from 0 to 1")
        return float(GRID[np.abs(GRID - proposal["value"]).argmin()])

    @traitlets.validate("brush")
    def _valid_brush(self, proposal):
        if proposal["value"] not in range(1, 12, 2):
            raise StateError(f"brush is {proposal['value']}; expected an odd number from 1 to 11")
        return proposal["value"]

    @traitlets.validate("edits")
    def _valid_edits(self, proposal):
        for edit in proposal["value"]:
            if len(edit) != 3 or not all(0 <= e < n for e, n in zip(edit, (*self._truth.shape, 2))):
                raise StateError(f"there is an edit {edit!r}; expected [d, h, inside] in a square of {self._truth.shape}")
        return proposal["value"]


def _check_slice(image, probability, truth, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Return image, probability and truth of one slice, and a name for them."""
    name = "slice"
    if isinstance(image, Case):
        if truth is None and image.label is None:
            raise ValueError(f"{image.name} has no label; give the truth")
        truth = image.label == 0 if truth is None else truth
        image, name = image.image[0], f"{image.name}, slice {index}"
    arrays = [as_array(a, what) for a, what in ((image, "the image"), (probability, "the probability"), (truth, "the truth"))]
    if any(a.ndim == 3 and not 0 <= index < a.shape[2] for a in arrays):
        raise ValueError(f"there is no slice {index}; there are 0 to {arrays[0].shape[-1] - 1}")
    image, probability, truth = (a[:, :, index] if a.ndim == 3 else a for a in arrays)
    if not image.ndim == 2 or not image.shape == probability.shape == truth.shape:
        raise ValueError(
            f"one slice of image, probability and truth has shapes {image.shape}, {probability.shape}, {truth.shape}; "
            "expected (D, H) three times. Of probabilities (K, D, H, W) take those of being inside a cell: probabilities[0]"
        )
    check_image(image, "the image")
    if probability.dtype.kind not in "biuf" or not (probability.min() >= 0 and probability.max() <= 1):
        raise ValueError("the probability is NaN or outside 0 to 1 somewhere; take the softmax of logits first")
    return image, probability.astype(np.float64), as_mask(truth, "the truth"), name
