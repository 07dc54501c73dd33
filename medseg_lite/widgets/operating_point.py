"""Methods that give probabilities, cut at thresholds: outlines on a slice, and the scores of whole cases."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import metrics, plotting
from ..arrays import as_array
from ..volume import Case, bounding_box, new_name
from ._base import LARGEST_IMAGE, StateError, Widget, check_images, check_known, find_limits, pack, script, styles, to_bytes

# Hundredths, and finer steps below 0.01 and above 0.99, where a method that is very sure has its best threshold.
_TAIL = np.array([0, 1, 2, 5, *range(10, 100, 10)]) / 10000
THRESHOLDS = np.unique(np.round([*_TAIL, *np.arange(1, 100) / 100, *(1 - _TAIL)], 4))
SCORES, VOXELS = ["dice", "sensitivity", "precision", "specificity"], ["found", "missed", "made_up"]
CURVES = {  # what is drawn to the right, and upwards
    "Dice by threshold": ("step", "dice", "threshold", "Dice"),
    "precision by sensitivity": ("sensitivity", "precision", "sensitivity", "precision"),
    "ROC": ("false_positive_rate", "sensitivity", "1 − specificity", "sensitivity"),
}


class OperatingPoint(Widget):
    """A threshold for each method: its outline on a slice, and the scores of whole cases, which follow the slider.

        widget = OperatingPoint(case, {"network": p, "forest": q}, label=[1, 2], chosen={"network": 0.37, "forest": 0.6})
        widget.thresholds = {"forest": 0.25}     # the others stay
        widget.table                             # the scores of every method at its threshold
        widget.curves                            # the same at every threshold
        widget.best                              # the thresholds with the best Dice on these cases

    A voxel is predicted where its probability is above the threshold. Voxels outside the mask count only if they belong to the
    object. The browser gets the scores at each of some 130 thresholds, so they are exact, for all slices, and follow the slider
    without a kernel. The scores of several cases are means over the cases.

    To choose a threshold on the cases that it is judged on is cheating. The widget says so when it is done.

    Args:
        cases: a case with a label, or a list of cases.
        probabilities: `{name: probabilities (D, H, W) of the object}`, up to six methods; for a list of cases a list each.
        label: class of the object, or several classes that make it together.
        chosen: thresholds that were chosen on validation cases, by method. They are marked in the curve, and set at first.
        plane: "axial", "coronal" or "sagittal".
        channel: sequence below the outlines; by default the first.
        index: slice that is shown first; by default the one with most of the object.
        shared: whether the sliders move together; by default if `chosen` is not given.

    Attributes:
        thresholds: threshold of each method. One that is set moves to the nearest of the slider's steps.
        shared: whether the sliders move together. Setting it gives every method the threshold of the first.
        case: name of the case that is shown.
        index: slice that is shown.
        curve: "Dice by threshold", "precision by sensitivity" or "ROC".

    All attributes are synchronised with the browser.

    Raises:
        ValueError: for a case without label or object, for probabilities on another grid, NaN or outside 0 to 1, for names that
            are no text, for unknown methods, planes and channels.
    """

    _esm = script("operating_point.js")
    _css = styles("operating_point.css", "medseg-operating")

    thresholds = traitlets.Dict().tag(sync=True)
    shared = traitlets.Bool().tag(sync=True)
    case = traitlets.Unicode().tag(sync=True)
    index = traitlets.Int().tag(sync=True)
    curve = traitlets.Enum(list(CURVES), next(iter(CURVES))).tag(sync=True)
    _volumes = traitlets.List().tag(sync=True)  # of each case: image, truth, and the level of each voxel by method

    def __init__(
        self,
        cases: Case | Sequence[Case],
        probabilities: Mapping[str, np.ndarray | Sequence[np.ndarray]],
        *,
        label: int | Iterable[int] = 1,
        chosen: Mapping[str, float] | None = None,
        plane: str = "axial",
        channel: str | None = None,
        index: int | None = None,
        shared: bool | None = None,
    ):
        cases, self._methods = _check_methods(cases, probabilities)
        self._plane, labels = plotting.find_plane(plane), metrics.as_regions({"object": label})["object"]
        self._chosen = {name: _check_threshold(t, name, self._methods) for name, t in (chosen or {}).items()}
        self._grid = np.union1d(THRESHOLDS, list(self._chosen.values()))
        self._cases, counts, volumes = {}, [], []
        for number, case in enumerate(cases):
            part = _Part(case, labels, channel or case.channels[0])
            levels = [part.count(p[number], self._grid, name) for name, p in self._methods.items()]
            counts.append([numbers for _, numbers in levels])
            self._cases[new_name(case.name, self._cases)] = part
            volumes.append([part.packed_image(), pack(part.truth[part.box]), *(pack(level) for level, _ in levels)])
        if (size := sum(p.truth[p.box].size for p in self._cases.values()) * (2 + len(self._methods))) > LARGEST_IMAGE:
            raise ValueError(f"{size / 1e6:.0f} million voxels; expected {LARGEST_IMAGE / 1e6:.0f} at most: show fewer cases")
        self._scores = {name: self._score(*of_method) for name, of_method in zip(self._methods, zip(*counts))}
        first = {name: self._chosen.get(name, 0.5) for name in self._methods}
        super().__init__(thresholds=first, case=next(iter(self._cases)), _volumes=volumes)
        self._scene = self._describe(first)
        self.index = self._busiest() if index is None else index
        self.shared = not self._chosen if shared is None else shared

    def __repr__(self) -> str:
        values = ", ".join(f"{name} above {t:.4g}" for name, t in self.thresholds.items())
        return f"OperatingPoint({' | '.join(self._cases)}, {values}, {self._plane.name.lower()} {self.index})"

    @property
    def curves(self) -> pd.DataFrame:
        """Scores and numbers of voxels of each method at each threshold."""
        frames = [scores.assign(method=name, threshold=self._grid) for name, scores in self._scores.items()]
        return pd.concat(frames, ignore_index=True)[["method", "threshold", *SCORES, *VOXELS]]

    @property
    def table(self) -> pd.DataFrame:
        """Scores and numbers of voxels of each method at its present threshold, a row each."""
        curves = self.curves
        return curves[curves["threshold"] == curves["method"].map(self.thresholds)].reset_index(drop=True)

    @property
    def best(self) -> dict[str, float]:
        """Threshold with the best Dice on these cases, by method; of several the middle one, as in `metrics.best_threshold`."""
        dice = {name: scores["dice"].to_numpy() for name, scores in self._scores.items()}
        ties = {name: np.flatnonzero(d >= d.max() - 1e-9) for name, d in dice.items()}
        return {name: float(self._grid[k[len(k) // 2]]) for name, k in ties.items()}

    def _score(self, *counts: Sequence[np.ndarray]) -> pd.DataFrame:
        """Return the scores of a method at each threshold: means over the cases, and sums of voxels."""
        frames = [score_levels(*of_case) for of_case in counts]
        scores = sum(frame[SCORES] for frame in frames) / len(frames)
        scores[VOXELS] = sum(frame[VOXELS] for frame in frames)
        step = np.linspace(0, 1, len(self._grid))
        return scores.assign(false_positive_rate=1 - scores["specificity"], step=step)

    def _describe(self, first: dict[str, float]) -> dict[str, object]:
        """Return what does not change: methods, thresholds, the scores at each of them, and the place of each case."""
        cases = [part.describe() | {"title": name, "index": self._busiest(name)} for name, part in self._cases.items()]
        return {
            "methods": list(self._methods),
            "grid": self._grid.tolist(),
            "scores": [scores.to_dict("list") for scores in self._scores.values()],
            "chosen": self._chosen,
            "first": first,
            "cases": cases,
            "plane": self._plane._asdict(),
            "curves": CURVES,
            "colours": {name: plotting.COLOURS[name] for name in ("truth", "prediction")},
        }

    def _busiest(self, name: str | None = None) -> int:
        truth = self._cases[name or self.case].truth
        return int(plotting.busiest_position(truth, truth.shape)[self._plane.cut])

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return f"Thresholds of {' and '.join(self._methods)}"

    def _alt(self) -> str:
        rows = [f"{r.method} above {r.threshold:.4g}: Dice {100 * r.dice:.1f} %" for r in self.table.itertuples()]
        place = f"{self._plane.name} slice {self.index} of {self.case}"
        return f"{place} with the outlines of truth and prediction, and the curve {self.curve}; {', '.join(rows)}"

    def _draw(self) -> Figure:
        """Draw the slice with the outlines, and the curve below it, for each method; up to three in a row."""
        table, part, plane = self.table.set_index("method"), self._cases[self.case], self._plane
        rows, columns = -(-len(table) // 3), min(3, len(table))
        side, shape = 9.4 / max(columns, 2), part.describe()["shape"]
        high = side * shape[plane.y] / shape[plane.x] * part.case.voxel_size[plane.y] / part.case.voxel_size[plane.x]
        with plotting.style():
            figure = Figure(figsize=(side * columns, (high + 2.2) * rows + 0.7), dpi=100, layout="constrained")
            panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[high, 1.7] * rows)
            for axes in panels[-2:, len(table) - 3 * (rows - 1) :].ravel():
                axes.axis("off")
            for number, row in enumerate(table.itertuples()):
                upper, lower = panels[2 * (number // 3) : 2 * (number // 3) + 2, number % 3]
                found = self._methods[row.Index][list(self._cases).index(self.case)] > row.threshold
                layers = {"truth": part.truth[part.box], "prediction": (found & part.inside)[part.box]}
                overlays = [plotting.Overlay(n, a, "line", colour=plotting.COLOURS[n]) for n, a in layers.items()]
                image, here = part.image[part.box], self.index - part.box[plane.cut].start
                look = {"window": part.window, "voxel_size": part.case.voxel_size, "letters": True}
                plotting.draw_slice(upper, image, plane.name.lower(), here, overlays=overlays, **look)
                title = f"{row.Index} above {row.threshold:.4g}: Dice {100 * row.dice:.1f} %"
                upper.set_title(textwrap.fill(title, int(13 * side)))
                self._draw_curve(lower, row.Index)
            handles = [plotting.outline_handle(n, colour=plotting.COLOURS[n]) for n in ("truth", "prediction")]
            look = {"color": "none", "markeredgecolor": "#222222", "markersize": 9}
            handles += lower.plot([], [], "D", label="chosen on validation cases", **look) if self._chosen else []
            figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return figure

    def _draw_curve(self, axes: Axes, name: str) -> None:
        """Draw a method's curve with a dot at its threshold and a diamond at the chosen one; thin, the other methods' curves."""
        x, y, right, up = CURVES[self.curve]
        for other, scores in sorted(self._scores.items(), key=lambda item: item[0] == name):
            shown = scores[scores["found"] + scores["made_up"] > 0] if y == "precision" else scores
            axes.plot(shown[x], shown[y], "-", color="#222222" if other == name else "#AAAAAA", lw=2 if other == name else 1)
        for threshold, mark in ((self._chosen.get(name), {"ms": 11, "mfc": "none"}), (self.thresholds[name], {"ms": 7})):
            if threshold is not None:
                at = self._scores[name].iloc[int(np.flatnonzero(self._grid == threshold)[0])]
                axes.plot(at[x], at[y], "D" if "mfc" in mark else "o", color="#222222", clip_on=False, **mark)
        axes.set(xlabel=right, ylabel=up, xlim=(0, 1), ylim=(0, 1))
        if x == "step":
            ticks = [0.001, 0.25, 0.5, 0.75, 0.999]
            axes.set_xticks(np.searchsorted(self._grid, ticks) / (len(self._grid) - 1), [f"{t:g}" for t in ticks])

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("thresholds")
    def _valid_thresholds(self, proposal):
        given = {name: _check_threshold(t, name, self._methods) for name, t in proposal["value"].items()}
        snapped = {name: float(self._grid[np.abs(self._grid - t).argmin()]) for name, t in given.items()}
        return {name: snapped.get(name, self.thresholds.get(name)) for name in self._methods}

    @traitlets.observe("shared")
    def _share(self, change) -> None:
        if change["new"]:
            self.thresholds = dict.fromkeys(self._methods, self.thresholds[next(iter(self._methods))])

    @traitlets.validate("case")
    def _valid_case(self, proposal):
        return check_known(proposal["value"], self._cases, "there is no case")

    @traitlets.observe("case")
    def _turn(self, change) -> None:
        self.index = self._busiest()

    @traitlets.validate("index")
    def _valid_index(self, proposal):
        inside = self._cases[self.case].box[self._plane.cut]
        return min(max(proposal["value"], inside.start), inside.stop - 1)


class _Part:
    """A case, with the object, the voxels that count, and the box that the browser gets."""

    def __init__(self, case: Case, labels: list[int], channel: str):
        check_known(channel, case.channels, f"{case.name} has no channel")
        if case.label is None:
            raise ValueError(f"{case.name} has no label to compare with")
        self.case, self.truth = case, np.isin(case.label, labels)
        if not self.truth.any():
            raise ValueError(f"{case.name} has no voxel of label {labels}; it has {np.unique(case.label).tolist()}")
        check_images(case)
        self.image = case.image[case.channels.index(channel)]
        self.inside = self.truth | (True if case.mask is None else case.mask)
        self.box, self.limits = bounding_box(self.inside, border=2), find_limits(self.image)
        self.window = plotting.default_window(self.image[self.box], self.inside[self.box])

    def count(self, probability: np.ndarray, grid: np.ndarray, name: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the level of each voxel of the box, and how many voxels in and out of the object have each level."""
        if probability.shape != self.truth.shape:
            found = f"{name!r} has probabilities of shape {probability.shape} for {self.case.name}"
            raise ValueError(f"{found}; expected {self.truth.shape}, those of the object alone, such as probabilities[1]")
        if not (np.isfinite(probability).all() and -1e-3 <= probability.min() <= probability.max() <= 1 + 1e-3):
            what = f"{name!r} has probabilities that are NaN or outside 0 to 1 for {self.case.name}"
            raise ValueError(f"{what}; take the softmax of logits first, and divide votes by their number")
        level, size = count_below(probability, grid) * self.inside, len(grid) + 1
        return level[self.box], [np.bincount(level[w], minlength=size) for w in (self.truth, self.inside & ~self.truth)]

    def packed_image(self) -> bytes:
        return pack(to_bytes(self.image[self.box], *self.limits))

    def describe(self) -> dict[str, object]:
        start, shape = [s.start for s in self.box], [s.stop - s.start for s in self.box]
        grey = {"window": self.window, "low": self.limits[0], "high": self.limits[1]}
        return {"start": start, "shape": shape, "spacing": self.case.voxel_size, **grey}


def count_below(probability: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the number of thresholds below each probability, as uint8: it is above k where `probability > thresholds[k]`."""
    return np.searchsorted(thresholds.astype(probability.dtype), probability).astype(np.uint8)


def score_levels(positive: np.ndarray, negative: np.ndarray) -> pd.DataFrame:
    """Return scores at each threshold from the numbers of voxels in and out of the object that have 0, 1, … thresholds below."""
    tp, fp = (counts[::-1].cumsum()[::-1][1:] for counts in (positive, negative))
    fn, tn = positive.sum() - tp, negative.sum() - fp
    specificity = np.where(tn + fp > 0, tn / np.maximum(tn + fp, 1), 1.0)
    ratios = {"dice": 2 * tp / (2 * tp + fp + fn), "sensitivity": tp / (tp + fn), "precision": tp / np.maximum(tp + fp, 1)}
    return pd.DataFrame({**ratios, "specificity": specificity, "found": tp, "missed": fn, "made_up": fp})


def _check_methods(cases, probabilities) -> tuple[list[Case], dict[str, list[np.ndarray]]]:
    """Return the cases, and a list of arrays of floats by method, one for each case."""
    alone = isinstance(cases, Case)
    cases = [cases] if alone else list(cases)
    if not cases:
        raise ValueError("there is no case; give a case, or a list with at least one")
    if not isinstance(probabilities, Mapping) or not 1 <= len(probabilities) <= 6:
        raise ValueError("probabilities must be {name: probabilities (D, H, W)} with one to six methods")
    methods = {}
    for name, given in probabilities.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a method is called {name!r}; expected a text")
        given = [given] if alone else list(given)
        if len(given) != len(cases):
            raise ValueError(f"{name!r} has probabilities of {len(given)} cases; expected a list of {len(cases)}, one each")
        arrays = [as_array(p, f"the probabilities of {name!r}") for p in given]
        if kinds := {p.dtype.name for p in arrays if p.dtype.kind not in "biuf"}:
            raise ValueError(f"the probabilities of {name!r} are {kinds.pop()}; expected real numbers")
        methods[name] = [p if p.dtype.kind == "f" else p.astype(np.float32) for p in arrays]
    return cases, methods


def _check_threshold(value: float, name: str, methods: Iterable[str]) -> float:
    check_known(name, methods, "there is no method")
    if not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise StateError(f"the threshold of {name!r} is {value!r}; expected a number from 0 to 1")
    return float(value)
