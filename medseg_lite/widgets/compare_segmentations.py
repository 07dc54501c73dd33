"""Several segmentations of one case against the truth: what each found, missed and made up, slice by slice."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import anywidget
import numpy as np
import pandas as pd
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .. import metrics, plotting
from ..paths import atomic_write
from ..volume import Case, as_label, bounding_box
from ._base import pack, page, script
from .slice_viewer import StateError, _check_image, _find_limits, _to_bytes

_HERE = Path(__file__).parent
# Okabe and Ito's blue, vermilion and yellow: told apart without seeing red or green, and by their lightness.
OUTCOMES = {"found": "#0072B2", "missed": "#D55E00", "made up": "#F0E442"}


class CompareSegmentations(anywidget.AnyWidget):
    """Predictions side by side, coloured by whether they are right.

        compare = CompareSegmentations(case, {"DeepMedic": a, "with CRF": b}, regions="brats2015")
        compare.region = "core"
        compare.worst("with CRF")        # go to the slice with most wrong voxels
        compare.table                    # Dice, found, missed and made-up voxels of every prediction

    Blue: true positives (found). Vermilion: false negatives (missed). Yellow: false positives (made up). The bars under a picture
    count the wrong voxels of every slice; click one to go there.

    Args:
        case: labelled.
        predictions: `{name: classes (D, H, W)}`, up to six.
        regions: "brats2015", "brats2017", or label numbers by region, as in `metrics.evaluate`; by default all labels
            together and each by itself.
        classes: class names by number; by default `case.info["classes"]`.
        position: voxel (d, h, w); by default the worst slice of the first prediction.
        plane: "axial", "coronal" or "sagittal".
        opacity: of the colours.

    Attributes:
        region, position, plane, sequence, opacity: synchronised with the browser.

    Raises:
        ValueError: without a label or predictions, for predictions on another grid, unknown names.
    """

    _esm = script("compare_segmentations.js")
    _css = _HERE / "compare_segmentations.css"
    _ipython_display_ = None  # ipywidgets 7 would display through it, and drop the PNG below

    region = traitlets.Unicode().tag(sync=True)
    position = traitlets.Any().tag(sync=True)
    plane = traitlets.Enum([p.name.lower() for p in plotting.PLANES], "axial").tag(sync=True)
    sequence = traitlets.Unicode().tag(sync=True)
    opacity = traitlets.Float(0.7).tag(sync=True)
    _scene = traitlets.Dict().tag(sync=True)
    _volumes = traitlets.List().tag(sync=True)
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
        for name, image in zip(case.channels, case.image):
            _check_image(image, f"{case.name}, {name}")
        self._predictions = {}
        for name, array in predictions.items():
            if np.shape(array) != case.shape:
                raise ValueError(f"prediction {name!r} has shape {np.shape(array)}; expected {case.shape}, that of {case.name}")
            self._predictions[str(name)] = as_label(np.asarray(array), source=f"prediction {name!r}")
        if regions is None:
            given = classes if classes is not None else case.info.get("classes")
            present = sorted({int(k) for a in (case.label, *self._predictions.values()) for k in np.unique(a)} - {0})
            regions = {"all labels": present, **{plotting.class_name(k, given): [k] for k in present}}
        self._regions = metrics.as_regions(regions)
        self._case = case
        labelled = np.any([case.label > 0, *(p > 0 for p in self._predictions.values())], axis=0)
        mask = labelled if case.mask is None else case.mask | labelled
        self._box = bounding_box(mask if mask.any() else np.ones(case.shape, bool), border=2)
        self._shape = tuple(s.stop - s.start for s in self._box)
        limits = [_find_limits(image, None) for image in case.image]
        first = next(iter(self._regions))
        if position is None:
            position = self._worst(next(iter(self._predictions)), first, case.label)
        inside = None if case.mask is None else case.mask[self._box]
        super().__init__(
            _scene={
                "title": case.name,
                "start": [s.start for s in self._box],
                "shape": self._shape,
                "spacing": case.spacing,
                "planes": [p._asdict() for p in plotting.PLANES],
                "sequences": [
                    {"name": n, "window": plotting.default_window(image[self._box], inside), "low": low, "high": high}
                    for n, image, (low, high) in zip(case.channels, case.image, limits)
                ],
                "regions": self._regions,
                "predictions": list(self._predictions),
                "outcomes": OUTCOMES,
            },
            _volumes=[pack(_to_bytes(i[self._box], *limit)) for i, limit in zip(case.image, limits)],
            _labels=[pack(a[self._box]) for a in (case.label, *self._predictions.values())],
            **({"region": first, "sequence": case.channels[0], "position": position} | state),
        )

    def __repr__(self) -> str:
        return f"CompareSegmentations({self._case.name!r}, {' | '.join(self._predictions)}, {self.region}, at {self.position})"

    def worst(self, prediction: str | None = None) -> tuple[int, int, int]:
        """Go to the slice in which a prediction (the first by default) has most wrong voxels; returns the position."""
        prediction = next(iter(self._predictions)) if prediction is None else prediction
        if prediction not in self._predictions:
            known = ", ".join(map(repr, self._predictions))
            raise ValueError(f"there is no prediction {prediction!r}; there are {known}")
        self.position = self._worst(prediction, self.region, self._case.label, self.plane, self.position)
        return self.position

    @property
    def table(self) -> pd.DataFrame:
        """One row for each prediction and region: Dice, and voxels found, missed and made up."""
        rows = []
        for name, prediction in self._predictions.items():
            for region, labels in self._regions.items():
                p, t = np.isin(prediction, labels), np.isin(self._case.label, labels)
                counts = {"found": int((p & t).sum()), "missed": int((~p & t).sum()), "made up": int((p & ~t).sum())}
                rows.append({"prediction": name, "region": region, "dice": metrics.dice(p, t), **counts})
        return pd.DataFrame(rows)

    def _worst(self, prediction, region, label, plane="axial", position=None) -> tuple[int, int, int]:
        labels = self._regions[region]
        wrong = np.isin(self._predictions[prediction], labels) != np.isin(label, labels)
        busiest = plotting.busiest_position(wrong if wrong.any() else label, label.shape)
        if position is None:
            return busiest
        cut = plotting.find_plane(plane).cut
        return tuple(b if axis == cut else p for axis, (b, p) in enumerate(zip(busiest, position)))

    # ------------------------------------------------------------------------------------------------ other forms

    def snapshot(self) -> bytes:
        """The present slice of every prediction as a PNG file."""
        file = io.BytesIO()
        self._draw().savefig(file, format="png")
        return file.getvalue()

    def to_html(self, path: str | Path | None = None, *, title: str | None = None) -> str:
        """One self-contained page that works without a kernel or a network; also written to `path` if given."""
        keys = ("region", "position", "plane", "sequence", "opacity", "_scene", "_volumes", "_labels")
        text = page(
            title=title or f"Segmentations of {self._case.name}",
            state={key: getattr(self, key) for key in keys},
            script=self._esm,
            css=_HERE / "compare_segmentations.css",
        )
        if path is not None:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        scores = self.table.query("region == @self.region").set_index("prediction")["dice"]
        said = ", ".join(f"{name} {100 * score:.0f} %" for name, score in scores.items())
        alt = (
            f"{self._case.name}, {self.plane} slice through voxel {self.position}, region {self.region}: voxels found (blue), missed "
            f"(vermilion) and made up (yellow) by each prediction; Dice of the whole volume: {said}"
        )
        picture = base64.b64encode(self.snapshot()).decode()
        return {**data, "image/png": picture}, {**metadata, "image/png": {"alt": alt}}

    def _draw(self) -> Figure:
        plane, labels = plotting.find_plane(self.plane), self._regions[self.region]
        image = self._case.image[self._case.channels.index(self.sequence)][self._box]
        window = self._scene["sequences"][self._case.channels.index(self.sequence)]["window"]
        index = self.position[plane.cut] - self._box[plane.cut].start
        grey = plotting.paint(plotting.cut(image, plane, index), window)
        truth = plotting.cut(np.isin(self._case.label[self._box], labels), plane, index)
        scores = self.table.query("region == @self.region").set_index("prediction")["dice"]
        aspect = self._case.spacing[plane.y] / self._case.spacing[plane.x]
        columns = min(3, len(self._predictions))
        rows = -(-len(self._predictions) // columns)
        side = 9.4 / max(columns, 2)
        high = side * truth.shape[0] / truth.shape[1] * aspect
        with plotting.style():
            figure = Figure(figsize=(side * columns, (high + 0.3) * rows + 0.4), dpi=100, layout="constrained")
            panels = figure.subplots(rows, columns, squeeze=False).ravel()
            for axes in panels:
                axes.axis("off")
            for axes, (name, prediction) in zip(panels, self._predictions.items()):
                found = plotting.cut(np.isin(prediction[self._box], labels), plane, index)
                rgb = grey.astype(np.float32)
                for where, colour in zip((found & truth, ~found & truth, found & ~truth), OUTCOMES.values()):
                    rgb[where] += (np.float32(plotting._rgb(colour)) - rgb[where]) * self.opacity
                axes.imshow(np.rint(rgb).astype(np.uint8), aspect=aspect)
                axes.set_title(f"{name}: Dice {100 * scores[name]:.1f} %")
            handles = [Patch(color=colour, label=name) for name, colour in OUTCOMES.items()]
            figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return figure

    # ----------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("region")
    def _valid_region(self, proposal):
        return self._known(proposal["value"], self._regions, "region")

    @traitlets.validate("sequence")
    def _valid_sequence(self, proposal):
        return self._known(proposal["value"], self._case.channels, "channel")

    @traitlets.validate("position")
    def _valid_position(self, proposal):
        try:
            position = plotting.check_position(proposal["value"], self._case.shape)
        except ValueError as error:
            raise StateError(str(error)) from None
        return tuple(min(max(p, s.start), s.stop - 1) for p, s in zip(position, self._box))

    @traitlets.validate("opacity")
    def _valid_opacity(self, proposal):
        if np.isnan(proposal["value"]):
            raise StateError("opacity is NaN; expected a number from 0 to 1")
        return min(max(proposal["value"], 0.0), 1.0)

    @staticmethod
    def _known(value: str, known, what: str) -> str:
        if value not in known:
            raise StateError(f"there is no {what} {value!r}; there are {', '.join(map(repr, known))}")
        return value
