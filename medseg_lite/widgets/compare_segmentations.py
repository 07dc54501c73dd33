"""Predictions of one case against the truth: voxels found, missed and made up, slice by slice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .. import metrics, plotting
from ..volume import Case, as_label, bounding_box, new_name
from ._base import CaseWidget, check_images, check_known, pack, script, styles

OUTCOMES = {name: plotting.COLOURS[name] for name in plotting.OUTCOMES[1:]}


class CompareSegmentations(CaseWidget):
    """Predictions side by side, coloured by whether they are right.

        compare = CompareSegmentations(case, {"DeepMedic": a, "with CRF": b}, regions="brats2015")
        compare.region = "core"
        compare.worst("with CRF")        # go to the slice with most wrong voxels
        compare.table                    # Dice, found, missed and made-up voxels of every prediction

    Green: true positives (found). Red: false negatives (missed). Violet: false positives (made up). The bars under a
    picture count the wrong voxels of every slice; click one to go there.

    Args:
        case: a case with a label.
        predictions: `{name: classes (D, H, W)}`, up to six.
        regions: "brats2015", "brats2017", or label numbers by region, as in `metrics.evaluate`. The default is all labels
            together and each by itself.
        classes: class names by number; by default `case.info["classes"]`.
        position: voxel (d, h, w); by default in the worst slice of the first prediction.
        **state: first values of the attributes below.

    Attributes:
        region: region that is compared.
        position: voxel indices (d, h, w) of the crosshair.
        plane: "axial", "coronal" or "sagittal".
        sequence: sequence below the colours.
        opacity: opacity of the colours.

    All attributes are synchronised with the browser.

    Raises:
        ValueError: for no label, no predictions, predictions on another grid, unknown names.
    """

    _esm = script("compare_segmentations.js")
    _css = styles("compare_segmentations.css", "medseg-compare")

    region = traitlets.Unicode().tag(sync=True)
    plane = traitlets.Enum([p.name.lower() for p in plotting.PLANES], "axial").tag(sync=True)
    sequence = traitlets.Unicode().tag(sync=True)
    opacity = traitlets.Float(0.7).tag(sync=True)
    _labels = traitlets.List().tag(sync=True)

    def __init__(
        self,
        case: Case,
        predictions: Mapping[str, np.ndarray],
        *,
        regions: str | Mapping[str, Iterable[int] | int] | None = None,
        classes: Sequence[str] | Mapping[int, str] | None = None,
        position: Sequence[int] | None = None,
        **state,
    ):
        if case.label is None:
            raise ValueError(f"{case.name} has no label to compare with")
        if not isinstance(predictions, Mapping) or not 1 <= len(predictions) <= 6:
            raise ValueError("predictions must be {name: classes (D, H, W)} with one to six entries")
        check_images(case)
        self._predictions = {}
        for name, array in predictions.items():
            if np.shape(array) != case.shape:
                raise ValueError(f"prediction {name!r} has shape {np.shape(array)}; expected {case.shape}, that of {case.name}")
            name = new_name(str(name), self._predictions)
            self._predictions[name] = as_label(array, source=f"prediction {name!r}")
        if regions is None:
            given = classes if classes is not None else case.info.get("classes")
            present = sorted({int(k) for a in (case.label, *self._predictions.values()) for k in np.unique(a)} - {0})
            regions = {"all labels": present}
            for k in present:
                regions[new_name(plotting.class_name(k, given), regions)] = [k]
        self._regions = metrics.as_regions(regions)
        labelled = np.any([case.label > 0, *(p > 0 for p in self._predictions.values())], axis=0)
        mask = labelled if case.mask is None else case.mask | labelled
        self._case, self._box = case, bounding_box(mask if mask.any() else np.ones(case.shape, bool), border=2)
        region, scene = next(iter(self._regions)), self._describe_case()
        if position is None:
            position = self._worst(next(iter(self._predictions)), region)
        super().__init__(
            _scene=scene | {"regions": self._regions, "predictions": list(self._predictions), "outcomes": OUTCOMES},
            _volumes=self._pack_volumes([(s["low"], s["high"]) for s in scene["sequences"]]),
            _labels=[pack(a[self._box]) for a in (case.label, *self._predictions.values())],
            **({"region": region, "sequence": case.channels[0], "position": position} | state),
        )

    def __repr__(self) -> str:
        return f"CompareSegmentations({self._case.name!r}, {' | '.join(self._predictions)}, {self.region}, at {self.position})"

    def worst(self, prediction: str | None = None) -> tuple[int, int, int]:
        """Go to the slice in which a prediction (by default the first) has most wrong voxels. Return the position."""
        prediction = next(iter(self._predictions)) if prediction is None else prediction
        check_known(prediction, self._predictions, "there is no prediction")
        cut, busiest = plotting.find_plane(self.plane).cut, self._worst(prediction, self.region)
        self.position = tuple(b if axis == cut else p for axis, (b, p) in enumerate(zip(busiest, self.position)))
        return self.position

    @property
    def table(self) -> pd.DataFrame:
        """A row for each prediction and region: Dice, and the number of voxels found, missed and made up."""
        rows = []
        for name, prediction in self._predictions.items():
            for region, labels in self._regions.items():
                p, t = np.isin(prediction, labels), np.isin(self._case.label, labels)
                counts = {"found": int((p & t).sum()), "missed": int((~p & t).sum()), "made up": int((p & ~t).sum())}
                rows.append({"prediction": name, "region": region, "dice": metrics.dice(p, t), **counts})
        return pd.DataFrame(rows)

    def _scores(self) -> pd.Series:
        """Return the Dice of each prediction in the region shown."""
        return self.table.query("region == @self.region").set_index("prediction")["dice"]

    def _worst(self, prediction: str, region: str) -> tuple[int, int, int]:
        """Return the index of the slice with most wrong voxels along each axis."""
        labels, label = self._regions[region], self._case.label
        wrong = np.isin(self._predictions[prediction], labels) != np.isin(label, labels)
        return plotting.busiest_position(wrong if wrong.any() else label, label.shape)

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return f"Segmentations of {self._case.name}"

    def _alt(self) -> str:
        scores = ", ".join(f"{name} {100 * score:.0f} %" for name, score in self._scores().items())
        return (
            f"{self._case.name}, {self.plane} slice of {self.sequence} through voxel {self.position}, region {self.region}: voxels "
            f"found (green), missed (red) and made up (violet) by each prediction; Dice of the whole volume: {scores}"
        )

    def _draw(self) -> Figure:
        """Draw the present slice of every prediction, up to three in a row."""
        plane, scores = plotting.find_plane(self.plane), self._scores()
        rows, columns = -(-len(self._predictions) // 3), min(3, len(self._predictions))
        side, x, y = 9.4 / max(columns, 2), plane.x, plane.y
        shape, spacing = self._scene["shape"], self._case.voxel_size
        high = side * shape[y] / shape[x] * (spacing[y] / spacing[x])
        with plotting.style():
            figure = Figure(figsize=(side * columns, (high + 0.3) * rows + 0.7), dpi=100, layout="constrained")
            panels = figure.subplots(rows, columns, squeeze=False).ravel()
            for axes in panels:
                axes.axis("off")
            for axes, (name, prediction) in zip(panels, self._predictions.items()):
                self._draw_outcomes(axes, prediction)
                axes.set_title(f"{name}: Dice {100 * scores[name]:.1f} %")
            index = self.position[plane.cut]
            figure.suptitle(
                f"{self._case.name}, region {self.region} over {self.sequence}, {self.plane} slice {index}; Dice of all slices",
                fontsize="medium",
            )
            handles = [Patch(color=colour, label=name) for name, colour in OUTCOMES.items()]
            figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return figure

    def _draw_outcomes(self, axes: Axes, prediction: np.ndarray) -> None:
        """Draw the slice of the sequence, coloured by what a prediction found, missed and made up."""
        case, box, cut = self._case, self._box, plotting.find_plane(self.plane).cut
        number, labels = case.channels.index(self.sequence), self._regions[self.region]
        outcomes = plotting.outcomes(*(np.isin(array[box], labels) for array in (case.label, prediction)))
        plotting.draw_slice(
            axes,
            case.image[number][box],
            self.plane,
            self.position[cut] - box[cut].start,
            window=self._scene["sequences"][number]["window"],
            overlays=[plotting.Overlay("outcomes", outcomes, "area")],
            voxel_size=case.voxel_size,
            opacity=self.opacity,
            classes=plotting.OUTCOMES,
            letters=True,
        )

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("region")
    def _valid_region(self, proposal):
        return check_known(proposal["value"], self._regions, "there is no region")

    @traitlets.validate("sequence")
    def _valid_sequence(self, proposal):
        return check_known(proposal["value"], self._case.channels, f"{self._case.name} has no channel")
