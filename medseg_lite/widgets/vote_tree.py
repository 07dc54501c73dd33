"""Votes of several networks that fall down a tree: tumour? core? enhancing? Thresholds to move, and the scores that follow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import traitlets
from matplotlib.figure import Figure

from .. import metrics, plotting
from ..ensembles import hierarchical_vote
from ..volume import Case, as_label, bounding_box
from ._base import CaseWidget, StateError, check_images, pack, script, styles

PAPER = (0.4, 0.3, 0.4)  # thresholds
LOWEST = 0.01  # at zero, a class could win without a vote
MOST = 10  # networks: all their shares of votes are more than 0.01 apart, which is the sliders' step
QUESTIONS = ("tumour", "core", "enhancing")
REGIONS = {"whole tumour": (1, 2, 3), "core": (1, 3), "enhancing core": (3,)}  # in the order of `labels`, from 1
SCORES = {name: getattr(metrics, name) for name in ("dice", "sensitivity", "specificity")}


class VoteTree(CaseWidget):
    """One slice of a case as several networks vote on it, the votes on one voxel in the tree, and a threshold for each question.

        tree = VoteTree(case, {"axial 1": a, "axial 2": b, "coronal 1": c})
        tree.position = (30, 40, 32)          # or a click into the slice
        tree.thresholds = (0.6, 0.5, 0.5)
        tree.votes                            # what each network says about the voxel
        tree.path                             # each question with its votes and its answer
        tree.merged                           # the vote, as ensembles.hierarchical_vote makes it
        tree.scores                           # Dice, sensitivity and specificity of the three regions

    The scores are those of the whole case. The browser computes them itself, because they only depend on how many voxels have how many
    votes for tumour, core and enhancing core, and which truth. The curves show sensitivity and specificity of a region as its own
    threshold moves; triangles are the single networks.

    Args:
        case: case with a label. Voxels outside its mask count only where the label or a network says that they are tumour.
        predictions: class numbers from each network by name, two to ten arrays `(D, H, W)`.
        labels: class numbers of non-enhancing core, oedema and enhancing core.
        channel: sequence that is shown; by default the first.
        thresholds: share of the votes that each question needs, three numbers from 0.01 to 1.
        position: voxel (d, h, w); by default one that the networks disagree on.

    Attributes:
        thresholds: as above, synchronised with the browser.
        position: the voxel whose votes are shown, likewise.

    Raises:
        ValueError: for a case without label, maps on another grid or with other classes, thresholds outside their range.

    Source: Mlynarski et al. 2019, section 2.3 and figure 7.
    Taught in notebook 13.
    """

    _esm = script("vote_tree.js")
    _css = styles("vote_tree.css", "medseg-votes")

    thresholds = traitlets.List().tag(sync=True)
    plane = traitlets.Unicode("axial", read_only=True).tag(sync=True)

    def __init__(
        self,
        case: Case,
        predictions: Mapping[str, np.ndarray],
        *,
        labels: Sequence[int] = (1, 2, 3),
        channel: str | None = None,
        thresholds: Sequence[float] = PAPER,
        position: Sequence[int] | None = None,
    ):
        if not isinstance(predictions, Mapping) or not 2 <= len(predictions) <= MOST:
            raise ValueError(f"predictions must be {{name: classes (D, H, W)}} with two to {MOST} entries")
        channel = channel or case.channels[0]
        if case.label is None or channel not in case.channels:
            raise ValueError(f"{case.name} has no label to compare with, or no channel {channel!r}; it has {case.channels}")
        self._case, self._labels, self._maps = case.select([channel]), tuple(labels), {}
        check_images(self._case)
        for name, array in predictions.items():
            if np.shape(array) != case.shape:
                raise ValueError(f"prediction {name!r} has shape {np.shape(array)}; expected {case.shape}, that of {case.name}")
            self._maps[str(name)] = as_label(array, source=f"prediction {name!r}")
        maps = [*self._maps.values()]
        hierarchical_vote([case.label, *maps], labels=self._labels)  # complains about other classes
        self._kinds = [self._as_kinds(a) for a in (case.label, *maps)]
        self._counted = np.any(self._kinds, axis=0) | case.whole_mask()
        self._box = bounding_box(self._counted, border=2)
        self.classes = [plotting.class_name(k, case.info.get("classes")) for k in (0, *self._labels)]
        super().__init__(thresholds=thresholds, position=self._split_voxel() if position is None else position)
        scene = self._describe_case()
        sequence = scene["sequences"][0]
        self._volumes = self._pack_volumes([(sequence["low"], sequence["high"])]) + [pack(a[self._box]) for a in self._kinds]
        known = {"names": [*self._maps], "questions": QUESTIONS, "regions": REGIONS, "paper": PAPER, "lowest": LOWEST}
        colours = plotting.class_colours(self.classes)
        look = {"classes": self.classes, "colours": [colours[k] for k in range(4)], "truth": plotting.COLOURS["truth"]}
        counts = {"histogram": self._histogram(), "single": [self._score(a) for a in self._kinds[1:]]}
        self._scene = scene | known | look | counts

    def __repr__(self) -> str:
        dice = ", ".join(f"{region} {d:.3f}" for region, d in self.scores["dice"].items())
        t = ", ".join(f"{t:g}" for t in self.thresholds)
        return f"VoteTree({self._case.name!r}, {len(self._maps)} networks, thresholds {t}, Dice: {dice}, at {self.position})"

    @property
    def votes(self) -> dict[str, str]:
        """Name of the class that each network gives to the voxel."""
        return {name: self.classes[kind[self.position]] for name, kind in zip(self._maps, self._kinds[1:])}

    @property
    def path(self) -> pd.DataFrame:
        """The questions of the tree about the voxel: votes for it, votes that count, whether it is asked, and its answer."""
        found = [kind[self.position] for kind in self._kinds[1:]]
        votes = [len(found), *(sum(kind in kinds for kind in found) for kinds in REGIONS.values())]
        rows, asked = {}, True
        for question, votes_for, of, threshold in zip(QUESTIONS, votes[1:], votes, self.thresholds):
            answer = asked and votes_for > 0 and votes_for >= threshold * of - 1e-9
            rows[question] = [votes_for, of, asked, answer]
            asked = answer
        return pd.DataFrame.from_dict(rows, orient="index", columns=["for", "of", "asked", "answer"]).rename_axis("question")

    @property
    def merged(self) -> np.ndarray:
        """Class numbers that the vote gives, `(D, H, W)`."""
        return hierarchical_vote([*self._maps.values()], labels=self._labels, thresholds=tuple(self.thresholds))

    @property
    def scores(self) -> pd.DataFrame:
        """Dice, sensitivity and specificity of the vote, a row for each region."""
        found = self._score(self._as_kinds(self.merged))
        return pd.DataFrame(found, index=[*REGIONS], columns=[*SCORES]).rename_axis("region")

    def _as_kinds(self, array: np.ndarray) -> np.ndarray:
        """Return 1, 2, 3 where an array holds the first, second and third of the labels, and 0 elsewhere, uint8."""
        return sum((array == label) * np.uint8(k) for k, label in enumerate(self._labels, 1))

    def _score(self, kinds: np.ndarray) -> list[list[float]]:
        pairs = [[np.isin(a[self._counted], members) for a in (kinds, self._kinds[0])] for members in REGIONS.values()]
        return [[score(*pair) for score in SCORES.values()] for pair in pairs]

    def _histogram(self) -> list[list[int]]:
        """Return rows: votes for tumour, for core, for enhancing core, true class from 0 to 3, and the number of such voxels."""
        truth, *kinds = (a[self._counted] for a in self._kinds)
        votes = [sum(np.isin(kind, members).astype(int) for kind in kinds) for members in REGIONS.values()]
        shape = (*[len(kinds) + 1] * 3, 4)
        counts = np.bincount(np.ravel_multi_index((*votes, truth), shape))
        there = np.flatnonzero(counts)
        return np.stack([*np.unravel_index(there, shape), counts[there]], axis=1).tolist()

    def _split_voxel(self) -> tuple[int, int, int]:
        """Return a voxel of the slice with most tumour that the networks give as many classes as there are."""
        index = plotting.busiest_position(self._case.label > 0, self._case.shape)[2]
        here = [kind[:, :, index] for kind in self._kinds[1:]]
        differ = sum(np.any([kind == k for kind in here], axis=0).astype(int) for k in range(4))
        voxel = np.unravel_index((differ + (self._case.label[:, :, index] > 0)).argmax(), differ.shape)
        return (*map(int, voxel), index)

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "Votes in a tree"

    def _alt(self) -> str:
        told = [
            f"{q}: {row['for']} of {row['of']}, {'yes' if row['answer'] else 'no'}"
            for q, row in self.path.iterrows()
            if row["asked"]
        ]
        return (
            f"{self!r}. Left, the merged slice with the outline of the truth; right, the votes on one voxel: {'; '.join(told)}"
        )

    def _draw(self) -> Figure:
        """Draw the merged slice with the truth outlined, and the votes on the voxel against the thresholds."""
        plane, case, path = plotting.find_plane("axial"), self._case, self.path
        image, merged, truth = (plotting.cut(a, plane, self.position[2]) for a in (case.image[0], self.merged, case.label))
        with plotting.style():
            figure = Figure(figsize=(8.4, 3.8), dpi=100, layout="constrained")
            left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
            area = [plotting.Overlay("vote", merged, "area")]
            names = dict(zip((0, *self._labels), self.classes))
            painted = plotting.paint(image, self._scene["sequences"][0]["window"], area, 0.6, names)
            left.imshow(painted, aspect=case.voxel_size[plane.y] / case.voxel_size[plane.x])
            plotting.outline(left, truth > 0, colour=plotting.COLOURS["truth"])
            voxel = np.subtract(case.shape, self.position) - 1
            left.plot(*voxel[:2], "o", ms=9, mfc="none", mec="#FFFFFF")
            plotting.picture(left)
            left.set_title("vote; white: truth")
            for row, (region, threshold) in enumerate(zip(REGIONS, self.thresholds)):
                votes, of, asked, answer = path.iloc[row]
                right.barh(row, votes / max(of, 1), color=plotting.COLOURS["neutral"], height=0.45, alpha=1 if asked else 0.3)
                right.plot([threshold] * 2, [row - 0.225, row + 0.225], "-", color="#000000", lw=3)
                text = f"{votes} of {of} votes: {'yes' if answer else 'no'}" if asked else "not asked"
                right.text(0, row - 0.3, f"{QUESTIONS[row]}? {text}", fontsize=9)
                right.text(1.02, row, f"Dice {self.scores['dice'][region]:.3f}", fontsize=9, va="center")
            right.set(xlim=(0, 1), ylim=(2.6, -0.6), yticks=[], xlabel="share of the votes; black: threshold")
        return figure

    @traitlets.validate("thresholds")
    def _valid_thresholds(self, proposal):
        values = proposal["value"]
        if len(values) != 3 or not all(LOWEST <= v <= 1 for v in values):  # NaN is caught too
            raise StateError(f"thresholds are {values}; expected three numbers from {LOWEST} to 1")
        return [float(v) for v in values]
