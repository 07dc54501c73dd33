"""A game: the reader labels a voxel from what one pathway of DeepMedic sees, then again with what the second one adds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import ndimage

from .. import plotting
from ..volume import Case
from ._base import StateError, Widget, check_known, script, styles, to_bytes

SIDE, FACTOR = 17, 3  # of both views, in samples; the wide one takes every third voxel
REACH = SIDE // 2 * FACTOR
ANSWERS = ("not a lesion", "lesion")


class BeTheNetwork(Widget):
    """Voxels to label by eye, first from the neighbourhood that one scale sees, then with a second, wider and coarser view.

        widget = BeTheNetwork(cases)     # standardised or not, each with a label
        widget.score                     # right answers without and with the wide view, and voxels answered

    The near view has the 17² voxels around the voxel in its axial slice, which is all that Deep+ sees of that slice. The wide view
    has 17² samples three voxels apart, as DeepMedic's second pathway has. Half of the voxels are lesion. The others are as bright
    as a lesion and at least three voxels away from it, so brightness alone does not tell. After the second answer the truth is shown.

    All pictures and answers go to the browser at the start, so the game needs no kernel.

    Args:
        cases: a case with a label, or several; a voxel comes from any of them.
        channel: sequence that is shown; by default the first.
        count: number of voxels, an even number.
        seed: seed of the choice of voxels, and of their order.

    Attributes:
        asked: number of the voxel on show, from 0.
        near: answers without the wide view, True for a lesion.
        wide: answers with it. Their number is that of `near`, or one less while the wide view is being judged.

    All attributes are synchronised with the browser.

    Raises:
        ValueError: for no case, a case without label or channel, an odd number, or too few voxels to choose from.

    Source: Kamnitsas et al. 2017, section 2.4.
    Taught in notebook 06.
    """

    _esm = script("be_the_network.js")
    _css = styles("be_the_network.css", "medseg-network")

    asked = traitlets.Int(0).tag(sync=True)
    near = traitlets.List(traitlets.Bool()).tag(sync=True)
    wide = traitlets.List(traitlets.Bool()).tag(sync=True)
    _views = traitlets.List().tag(sync=True)  # of each voxel: near, wide, and the lesion in both, 17² bytes each

    def __init__(self, cases: Case | Sequence[Case], *, channel: str | None = None, count: int = 10, seed: int = 0):
        cases = [cases] if isinstance(cases, Case) else list(cases)
        if not cases:
            raise ValueError("there is no case; give a case with a label, or several")
        if not isinstance(count, int) or count < 2 or count % 2:
            raise ValueError(f"count is {count!r}; expected an even number: half of the voxels are lesion")
        for case in cases:
            check_known(channel or case.channels[0], case.channels, f"{case.name} has no channel")
            if case.label is None:
                raise ValueError(f"{case.name} has no label, so nobody knows the answers")
        rng, images = np.random.default_rng(seed), [c.image[c.channels.index(channel or c.channels[0])] for c in cases]
        groups = [find_candidates(image, case) for image, case in zip(images, cases)]
        self.voxels = []  # of each question: number of the case, position, truth
        for truth, what in ((True, "lesion voxels"), (False, "bright voxels away from a lesion")):
            found = [rng.permutation(pair[not truth]).tolist() for pair in groups]
            if (total := sum(map(len, found))) < count // 2:
                raise ValueError(f"the cases have {total} {what}; expected at least {count // 2}: give more cases")
            # One voxel of each case in turn, so that no patient with many of them fills the game.
            in_turn = [(n, v[turn], truth) for turn in range(count // 2) for n, v in enumerate(found) if turn < len(v)]
            self.voxels += in_turn[: count // 2]
        rng.shuffle(self.voxels)
        self._truth = [truth for _, _, truth in self.voxels]
        views = [cut_views(images[n], cases[n], voxel) for n, voxel, _ in self.voxels]
        super().__init__(_views=[[view.tobytes() for view in of_voxel] for of_voxel in views])
        self._pictures = views
        self._scene = {
            "truth": self._truth,
            "answers": ANSWERS,
            "names": [f"{cases[n].name}, voxel {', '.join(map(str, voxel))}" for n, voxel, _ in self.voxels],
            "side": SIDE,
            "factor": FACTOR,
            "plane": plotting.find_plane("axial")._asdict(),
            "colours": {"truth": plotting.COLOURS["truth"]},
        }

    def __repr__(self) -> str:
        score = self.score
        return f"BeTheNetwork({score['answered']} of {len(self._truth)} voxels, right: {score['near']} without the wide view, {score['wide']} with it)"

    @property
    def score(self) -> dict[str, int]:
        """Number of right answers without the wide view ("near") and with it ("wide"), and of voxels with both answers."""
        done = len(self.wide)
        right = {name: sum(a == t for a, t in zip(getattr(self, name)[:done], self._truth)) for name in ("near", "wide")}
        return right | {"answered": done}

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "You are the network: lesion or not?"

    def _alt(self) -> str:
        truth = ", ".join(f"{n + 1} {ANSWERS[t]}" for n, t in enumerate(self._truth))
        return f"{len(self._truth)} voxels, each with the {SIDE} by {SIDE} voxels around it and a wider, coarser view. Truth: {truth}"

    def _draw(self) -> Figure:
        """Draw both views of every voxel, the wide one below the near one, with the truth under them."""
        axial, columns = plotting.find_plane("axial"), min(len(self._truth), 10)
        rows = -(-len(self._truth) // columns)
        with plotting.style():
            figure = Figure(figsize=(1.05 * columns, 2.6 * rows + 0.3), dpi=100, layout="constrained")
            grid = figure.subplots(2 * rows, columns, squeeze=False)
        for axes in grid.ravel():
            axes.axis("off")
        for n, (pictures, truth) in enumerate(zip(self._pictures, self._truth)):
            for kind, side in enumerate((1, SIDE / FACTOR)):  # of the frame
                axes = grid[2 * (n // columns) + kind, n % columns]
                axes.imshow(plotting.cut(pictures[kind], axial, 0), cmap="gray", vmin=0, vmax=255)
                axes.add_patch(Rectangle(((SIDE - 1 - side) / 2,) * 2, side, side, fill=False, color="#F0E442"))
            grid[2 * (n // columns), n % columns].set_title(f"{n + 1}", fontsize=9)
            axes.text(0.5, -0.08, ANSWERS[truth], transform=axes.transAxes, ha="center", va="top", fontsize=7)
        figure.suptitle(f"above: {SIDE}² voxels of the slice; below: every third voxel, the upper view framed", fontsize=9)
        return figure

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("asked")
    def _valid_asked(self, proposal):
        return min(max(proposal["value"], 0), len(self._views) - 1)

    @traitlets.validate("near", "wide")
    def _valid_answers(self, proposal):
        if len(proposal["value"]) > len(self._views):
            raise StateError(f"{len(proposal['value'])} answers; there are {len(self._views)} voxels")
        return proposal["value"]


def find_candidates(image: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels of the lesion, and others that are as bright and three voxels or more away from it: positions `(N, 3)`."""
    lesion = case.label > 0
    if not lesion.any():
        return np.zeros((0, 3), int), np.zeros((0, 3), int)
    smooth = ndimage.uniform_filter(image.astype(np.float32), 3)  # a voxel with its neighbours, so that noise counts less
    bright = smooth >= np.median(smooth[lesion])
    away = ~ndimage.binary_dilation(lesion, iterations=3) & (True if case.mask is None else case.mask)
    return np.argwhere(lesion & bright), np.argwhere(away & bright)


def cut_views(image: np.ndarray, case: Case, voxel: Sequence[int]) -> list[np.ndarray]:
    """Return what is seen of a voxel's axial slice, near and wide, and the lesion there: four arrays `(17, 17, 1)`, uint8."""
    (d, h, w), window = voxel, plotting.default_window(image, case.mask)
    grey = to_bytes(np.pad(image[:, :, w], REACH, constant_values=image.min()), *window)
    lesion = np.pad(case.label[:, :, w] > 0, REACH).astype(np.uint8)
    middle, views = slice(REACH - SIDE // 2, REACH + SIDE // 2 + 1), []
    for plane in (grey, lesion):
        around = plane[d : d + 2 * REACH + 1, h : h + 2 * REACH + 1, None]
        views += [around[middle, middle], around[::FACTOR, ::FACTOR]]
    return views
