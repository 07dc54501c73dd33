"""The effect of each kernel of the dense CRF: sliders for its parameters, and one slice that follows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from scipy import ndimage

from .. import plotting
from ..crf import DenseCRF
from ..crf.dense import CLIP
from ..crf.kernels import Prepared
from ..crf.permutohedral import shear
from ..metrics import dice
from ..volume import Case, bounding_box
from ._base import StateError, Widget, check_images, pack, script, styles

COLOURS = {
    "kept": plotting.class_colour("lesion"),
    "removed": plotting.COLOURS["removed"],
    "added": plotting.COLOURS["added"],
    "influence": plotting.COLOURS["probability"],
    "lesion": plotting.class_colour("lesion"),
    "background": "#ffffff",
    "truth": plotting.COLOURS["truth"],
}
MARK = plotting.COLOURS["field"]
# The range of each parameter's slider. The sliders are logarithmic, because what matters is the factor.
RANGES = {
    "smoothness_weight": (0.01, 30.0),
    "smoothness_sigma": (0.3, 10.0),
    "appearance_weight": (0.01, 30.0),
    "appearance_sigma": (0.3, 30.0),
    "intensity_sigma": (0.05, 5.0),
}
SWITCHES = ("smoothness", "appearance", "iterations")
MOST_ITERATIONS = 20


class CRFExplorer(Widget):
    """A slice before and after the CRF, the kernels of one marked voxel, and sliders for all parameters.

        explorer = CRFExplorer(case, probabilities)
        explorer.appearance_weight = 3          # every slider is also an attribute
        explorer.smoothness = False             # without the smoothness kernel
        explorer.iterations = 1                 # after the first update
        explorer.result                         # (rows, columns) bool: the foreground of the slice after the CRF
        explorer.energy                         # of the network's labels, and of the labels after the CRF

    There are four pictures: the network's foreground; the weight of every voxel in the marked one's smoothness kernel, and in
    its appearance kernel; and the foreground after the CRF, with what it kept, removed and added. Click a voxel to mark it. Lines
    lead to it from some of the voxels that it listens to. They are as thick as the voxel's weight in the kernel times the
    network's certainty about it, |2p − 1|, and have the colour of what it votes for. If the case has a label, its outline and the
    Dice of this slice are shown.

    The CRF runs on this one slice alone, in two dimensions. The browser runs it itself, so that the pictures follow the sliders
    without a kernel; `result` is computed by `crf.DenseCRF`. Several classes are merged into one foreground, as
    `crf.whole_tumour` does.

    Args:
        case: case whose image the appearance kernel compares. Only voxels inside its mask take part.
        probabilities: `(K, D, H, W)`, class 0 the background.
        plane: "axial", "coronal" or "sagittal".
        index: slice shown; by default the one with most foreground.
        voxel: (row, column) of the marked voxel in the picture; by default on the rim of a larger piece of foreground.
        iterations: number of mean-field updates at first.
        **parameters: first values of the sliders, as for `DenseCRF`.

    Attributes:
        index, row, column: slice and marked voxel.
        smoothness_weight, smoothness_sigma, appearance_weight, appearance_sigma, intensity_sigma: parameters, as for
            `DenseCRF`.
        smoothness, appearance: whether the CRF has this kernel.
        iterations: number of mean-field updates, 0 to 20.
        result: foreground of the slice after the CRF.
        energy: energies of two labellings of the slice, "network" (p > 0.5) and "after the CRF".

    All attributes but `result` and `energy` are synchronised with the browser. A page of its own (`to_html`) holds the present slice only.

    Raises:
        ValueError: for probabilities on another grid or outside 0..1, for a NaN, for unknown parameters and planes.
    """

    _esm = script("crf_explorer.js")
    _css = styles("crf_explorer.css", "medseg-crf")

    index = traitlets.Int().tag(sync=True)
    row = traitlets.Int().tag(sync=True)
    column = traitlets.Int().tag(sync=True)
    smoothness_weight = traitlets.Float(3.0).tag(sync=True)
    smoothness_sigma = traitlets.Float(1.5).tag(sync=True)
    appearance_weight = traitlets.Float(3.0).tag(sync=True)
    appearance_sigma = traitlets.Float(6.0).tag(sync=True)
    intensity_sigma = traitlets.Float(0.5).tag(sync=True)
    smoothness = traitlets.Bool(True).tag(sync=True)
    appearance = traitlets.Bool(True).tag(sync=True)
    iterations = traitlets.Int(5).tag(sync=True)
    _slice = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        case: Case,
        probabilities: np.ndarray,
        *,
        plane: str = "axial",
        index: int | None = None,
        voxel: tuple[int, int] | None = None,
        iterations: int = 5,
        **parameters: float,
    ):
        probabilities = np.asarray(probabilities)
        if probabilities.shape[1:] != case.shape or len(probabilities) < 2:
            raise ValueError(
                f"probabilities have shape {probabilities.shape}; {case.name} needs (classes, *{case.shape}), at least 2 classes"
            )
        if not (np.isfinite(probabilities).all() and -1e-3 <= probabilities.min() <= probabilities.max() <= 1 + 1e-3):
            raise ValueError("probabilities hold NaN or values outside 0 to 1; take the softmax of logits first")
        if unknown := sorted(set(parameters) - set(RANGES)):
            raise ValueError(f"there is no parameter {unknown[0]!r}; there are {', '.join(RANGES)}")
        check_images(case)
        self._plane = plotting.find_plane(plane)
        mask = np.ones(case.shape, bool) if case.mask is None else case.mask
        box = bounding_box(mask, border=2)
        self._case, self._mask = case.crop(box), mask[box]
        foreground = 1 - np.asarray(probabilities[0][box], np.float32)
        self._probability = np.where(self._mask, foreground, 0)
        self._window = plotting.default_window(self._case.image[0], self._mask)
        self._prepared: dict[tuple, Prepared] = {}
        start = box[self._plane.cut].start
        position = plotting.busiest_position(self._probability > 0.5, self._case.shape)[self._plane.cut]
        self._offset = start  # slices are counted in the whole case
        self._last = start + self._case.shape[self._plane.cut] - 1
        index = start + position if index is None else index
        if voxel is None:
            p = plotting.cut(self._probability, self._plane, int(np.clip(index, start, self._last)) - start)
            voxel = np.unravel_index(np.abs(ndimage.gaussian_filter(p, 1.5) - 0.5).argmin(), p.shape)
        super().__init__(index=index, row=int(voxel[0]), column=int(voxel[1]), iterations=iterations, **parameters)
        self._scene = self._describe()
        self._send_slice()

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name):.3g}" for name in RANGES)
        off = "".join(f", without {name}" for name in ("smoothness", "appearance") if not getattr(self, name))
        where = f"{self._plane.name.lower()} {self.index}"
        return f"CRFExplorer({self._case.name!r}, {where}, {values}, iterations={self.iterations}{off})"

    @property
    def result(self) -> np.ndarray:
        """The foreground of the slice after the CRF, `(rows, columns)` bool."""
        image, p, mask = (torch.from_numpy(part.copy()) for part in self._cut_slice())
        refined = self._crf()(_logits(p)[None], image[None], mask[None], prepared=self._prepare())[0]
        return ((refined[1] > refined[0]) & mask).numpy()

    @property
    def energy(self) -> dict[str, float]:
        """The energy of the network's labels and of those after the CRF, as in equation 5, over unordered pairs of voxels."""
        crf, prepared = self._crf(), self._prepare()
        p, index = torch.from_numpy(self._cut(self._probability).copy()), prepared.voxels.index
        unary = -_logits(p).flatten(1)[:, index]
        found = {}
        for name, foreground in (("network", p > 0.5), ("after the CRF", torch.from_numpy(self.result))):
            label = foreground.flatten()[index].float()
            total = torch.where(label > 0, unary[1], unary[0]).sum()
            for weight, kernel in ((crf.smoothness_weight, "smoothness"), (crf.appearance_weight, "appearance")):
                if weight > 0:  # every pair of a foreground and a background voxel costs its weight
                    total += weight * ((1 - label) * getattr(prepared, kernel)(label[None])[0]).sum()
            found[name] = float(total)
        return found

    def _crf(self) -> DenseCRF:
        parameters = {name: getattr(self, name) for name in RANGES}
        for kernel in ("smoothness", "appearance"):
            parameters[f"{kernel}_weight"] *= getattr(self, kernel)
        return DenseCRF(**parameters, iterations=self.iterations, learn=())

    def _prepare(self) -> Prepared:
        """Return the kernels of the present slice; the last ones are kept."""
        key = (self.index, *(getattr(self, name) for name in RANGES if "sigma" in name))
        if key not in self._prepared:
            image, _, mask = (torch.from_numpy(part.copy()) for part in self._cut_slice())
            self._prepared = {key: self._crf().prepare(image, mask)}
        return self._prepared[key]

    def _cut(self, volume: np.ndarray) -> np.ndarray:
        return plotting.cut(volume, self._plane, self.index - self._offset)

    def _cut_slice(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the image `(C, rows, columns)`, the probability of the foreground, and the mask of the present slice."""
        image = np.stack([self._cut(channel) for channel in self._case.image])
        return image, self._cut(self._probability), self._cut(self._mask)

    def _kernels(self) -> list[np.ndarray]:
        """Return the exact k₁ and k₂ between the marked voxel and every other, each `(rows, columns)`."""
        image, _, mask = self._cut_slice()
        rows, columns = np.indices(mask.shape)
        distance = (rows - self.row) ** 2 + (columns - self.column) ** 2
        difference = ((image - image[:, self.row, self.column, None, None]) ** 2).sum(0)
        appearance = distance / self.appearance_sigma**2 + difference / self.intensity_sigma**2
        return [np.exp(-e / 2) * mask for e in (distance / self.smoothness_sigma**2, appearance)]

    # --------------------------------------------------------------------------------------------- what the browser gets

    def _describe(self) -> dict[str, object]:
        """Return what does not change: names, ranges, colours, and the first values, to which "Reset" returns."""
        spacing = self._case.voxel_size
        return {
            "title": self._case.name,
            "plane": self._plane.name,
            "spacing": (spacing[self._plane.y], spacing[self._plane.x]),
            "aspect": spacing[self._plane.y] / spacing[self._plane.x],
            "picture": (*self._cut(self._mask).shape[::-1], self._last - self._offset + 1),
            "slices": (self._offset, self._last),
            "window": self._window,
            "ranges": RANGES,
            "first": {name: getattr(self, name) for name in (*RANGES, *SWITCHES, "index", "row", "column")},
            "most": MOST_ITERATIONS,
            "shear": shear(2 + len(self._case.image), dtype=torch.float64).tolist(),
            "colours": COLOURS | {"mark": MARK},
        }

    @traitlets.observe("index")
    def _send_slice(self, change=None) -> None:
        if not self._scene:  # the first slice is sent when all traits are set
            return
        image, probability, mask = self._cut_slice()
        truth = None if self._case.label is None else pack(self._cut(self._case.label) > 0)
        exact = [pack(np.ascontiguousarray(part, "<f4").view(np.uint8)) for part in (image, probability)]
        self._slice = {"shape": mask.shape, "image": exact[0], "probability": exact[1], "mask": pack(mask), "truth": truth}

    # --------------------------------------------------------------------------------------------------- static forms

    def to_html(self, path: str | Path | None = None, *, title: str | None = None) -> str:
        """Return the present slice as a page that needs neither kernel nor network, and write it to `path` if given."""
        return self._write_page(path, title, _alone=True)

    def _title(self) -> str:
        return f"What a dense CRF does to {self._case.name}"

    def _alt(self) -> str:
        values = ", ".join(f"{name.replace('_', ' ')} {getattr(self, name):.3g}" for name in RANGES)
        return (
            f"{self._plane.name} slice {self.index} of {self._case.name}, four times: the network's foreground; how strongly "
            "each voxel influences a marked one through the smoothness and through the appearance kernel; the foreground after "
            f"the CRF, with what it kept, removed and added. {values}"
        )

    def _draw(self) -> Figure:
        """Draw the four pictures, as the browser shows them."""
        before, after = self._cut(self._probability) > 0.5, self.result
        truth = None if self._case.label is None else self._cut(self._case.label) > 0
        changes = {"kept": before & after, "removed": before & ~after, "added": after & ~before}
        kernels = self._kernels()
        grey = plotting.paint(self._cut(self._case.image[0]), self._window)
        high = 2.35 * grey.shape[0] / grey.shape[1] * self._scene["aspect"]
        with plotting.style():
            figure = Figure(figsize=(9.4, high + 0.9), dpi=110, layout="constrained")
            panels = figure.subplots(1, 4)
            self._draw_panel(panels[0], _headline("network", before, truth), grey, {"kept": before}, truth, ["lesion"])
            for axes, name, kernel in zip(panels[1:], ("smoothness", "appearance"), kernels):
                title = f"{name} kernel:\nthe sum of the weights is {kernel.sum():.0f}"
                self._draw_panel(axes, title, 0.6 * grey, {"influence": kernel}, None, ["weight 0 to 1"], 1)
            counts = [f"{name} {where.sum()}" for name, where in changes.items()]
            self._draw_panel(panels[3], _headline("after the CRF", after, truth), grey, changes, truth, counts)
        return figure

    def _draw_panel(self, axes, title, grey, layers, truth, names, opacity=0.6) -> None:
        """Draw grey levels with layers `{colour: strength}` over them, the marked voxel, the truth and a legend."""
        picture = grey.astype(np.float32)
        for name, strength in layers.items():
            picture = plotting.blend(picture, plotting.rgb(COLOURS[name]), opacity * strength)
        axes.imshow(np.rint(picture).astype(np.uint8), aspect=self._scene["aspect"])
        side = max(4.0, 0.1 * grey.shape[1])
        for colour, width in (("white", 3.5), (MARK, 2)):
            corner = (self.column - side / 2, self.row - side / 2)
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=width, zorder=5))
        axes.set_title(title)
        plotting.picture(axes)
        handles = [Patch(facecolor=COLOURS[layer], label=text) for layer, text in zip(layers, names)]
        if truth is not None:
            plotting.outline(axes, truth, colour=COLOURS["truth"])
            handles.append(plotting.outline_handle("truth", colour=COLOURS["truth"]))
        look = {"handlelength": 1, "handletextpad": 0.4, "columnspacing": 0.9, "fontsize": 8}
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, **look)

    # -------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate(*RANGES)
    def _valid_parameter(self, proposal):
        return _within(proposal["trait"].name, proposal["value"], *RANGES[proposal["trait"].name])

    @traitlets.validate("iterations")
    def _valid_iterations(self, proposal):
        return _within("iterations", proposal["value"], 0, MOST_ITERATIONS)

    @traitlets.validate("index")
    def _valid_index(self, proposal):
        return _within("index", proposal["value"], self._offset, self._last)

    @traitlets.validate("row", "column")
    def _valid_voxel(self, proposal):
        shape = plotting.cut(self._mask, self._plane, 0).shape
        name = proposal["trait"].name
        return _within(name, proposal["value"], 0, shape[name == "column"] - 1)


def _logits(p: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the probabilities of background and foreground."""
    return torch.stack([1 - p, p]).clamp(min=CLIP).log()


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):  # NaN is caught too
        raise StateError(f"{name} is {value:g}; expected {low:g} to {high:g}")
    return value


def _headline(what: str, foreground: np.ndarray, truth: np.ndarray | None) -> str:
    score = "" if truth is None else f", Dice {100 * dice(foreground, truth):.0f} %"
    return f"{what}:\n{foreground.sum()} voxels{score}"
