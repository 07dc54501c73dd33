"""The effect of each kernel of the dense CRF: sliders for its parameters, and one slice that follows them."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
import numpy as np
import torch
import traitlets
from PIL import Image, ImageDraw
from scipy import ndimage

from .. import plotting
from ..crf import DenseCRF
from ..metrics import dice
from ..volume import Case, bounding_box
from ._base import Pictured, StateError, font

KEPT, REMOVED, ADDED = "#56B4E9", "#D55E00", "#F0E442"  # told apart by colour-blind readers too
WIDTH, GAP = 250, 10  # pixels of one picture, and between two
# Range and title of each parameter's slider. The sliders are logarithmic, because what matters is the factor.
RANGES = {
    "smoothness_weight": (0.01, 30.0, "w₁ smoothness"),
    "smoothness_sigma": (0.3, 10.0, "σ_α voxels"),
    "appearance_weight": (0.01, 30.0, "w₂ appearance"),
    "appearance_sigma": (0.3, 30.0, "σ_β voxels"),
    "intensity_sigma": (0.05, 5.0, "σ_γ intensity"),
}


class CRFExplorer(Pictured, ipywidgets.VBox):
    """A slice before and after the CRF, the kernels of one marked voxel, and sliders for all parameters.

        explorer = CRFExplorer(case, probabilities)
        explorer.appearance_weight = 3          # every slider is also an attribute
        explorer.result                         # (rows, columns) bool: the foreground of the slice after the CRF

    There are four pictures: the network's foreground; the weight of every voxel in the marked one's smoothness kernel, and in
    its appearance kernel; and the foreground after the CRF, with what it kept, removed and added. If the case has a label, the
    Dice of this slice is written above.

    The CRF runs on this one slice alone, in two dimensions, so that it follows the sliders. Kernels are built anew only when a
    σ or the slice changes. Several classes are merged into one foreground, as `crf.whole_tumour` does.

    Args:
        case: case whose image the appearance kernel compares. Only voxels inside its mask take part.
        probabilities: `(K, D, H, W)`, class 0 the background.
        plane: "axial", "coronal" or "sagittal".
        index: slice shown; by default the one with most foreground.
        voxel: (row, column) of the marked voxel in the picture; by default on the rim of a larger piece of foreground.
        iterations: number of mean-field updates.
        **parameters: first values of the sliders, as for `DenseCRF`.

    Attributes:
        index, row, column: slice and marked voxel, as the sliders show them.
        smoothness_weight, smoothness_sigma, appearance_weight, appearance_sigma, intensity_sigma: parameters, as for
            `DenseCRF`.
        result: foreground of the slice after the CRF.

    Raises:
        ValueError: for probabilities on another grid or outside 0..1, for a NaN, for unknown parameters and planes.
    """

    index = traitlets.Int()
    row = traitlets.Int()
    column = traitlets.Int()
    smoothness_weight = traitlets.Float(3.0)
    smoothness_sigma = traitlets.Float(1.5)
    appearance_weight = traitlets.Float(3.0)
    appearance_sigma = traitlets.Float(6.0)
    intensity_sigma = traitlets.Float(0.5)

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
        self._plane = plotting.find_plane(plane)
        mask = np.ones(case.shape, bool) if case.mask is None else case.mask
        box = bounding_box(mask, border=2)
        self._case, self._mask = case.crop(box), mask[box]
        foreground = 1 - np.asarray(probabilities[0][box], np.float32)
        self._probability = np.where(self._mask, foreground, 0)
        self._windows = [plotting.default_window(image, self._mask) for image in self._case.image]
        self._iterations, self._prepared = iterations, {}
        self.result = None
        start = box[self._plane.cut].start
        position = plotting.busiest_position(self._probability > 0.5, self._case.shape)[self._plane.cut]
        self._offset = start  # slices are counted in the whole case
        self._last = start + self._case.shape[self._plane.cut] - 1
        index = start + position if index is None else index
        if voxel is None:
            p = plotting.cut(self._probability, self._plane, int(np.clip(index, start, self._last)) - start)
            voxel = np.unravel_index(np.abs(ndimage.gaussian_filter(p, 1.5) - 0.5).argmin(), p.shape)
        self._picture = ipywidgets.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})
        super().__init__(index=index, row=int(voxel[0]), column=int(voxel[1]), **parameters)
        self.children = [self._sliders(), self._picture]
        self.observe(self._refresh, ["index", "row", "column", *RANGES])
        self._refresh()

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name):.3g}" for name in RANGES)
        return f"CRFExplorer({self._case.name!r}, {self._plane.name.lower()} {self.index}, {values})"

    def _draw(self) -> Image.Image:
        return self._sheet

    def _alt(self) -> str:
        return (
            f"One {self._plane.name.lower()} slice of {self._case.name}, four times: the network's foreground; what a marked voxel "
            "hears through the smoothness and through the appearance kernel; the foreground after the CRF, with what it kept, "
            "removed and added"
        )

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return self._with_picture({"text/plain": repr(self), "application/vnd.jupyter.widget-view+json": view}, {})

    def _sliders(self) -> ipywidgets.HBox:
        """Return sliders for all parameters, in a column for each kernel and one for the slice and the marked voxel."""
        wide = {"style": {"description_width": "110px"}, "layout": {"width": "300px"}, "readout_format": ".2f"}
        sliders = {
            name: ipywidgets.FloatLogSlider(
                min=np.log10(low), max=np.log10(high), step=0.01, value=getattr(self, name), description=title, **wide
            )
            for name, (low, high, title) in RANGES.items()
        }
        wide["readout_format"] = "d"
        rows, columns = plotting.cut(self._mask, self._plane, 0).shape
        limits = {"index": (self._offset, self._last), "row": (0, rows - 1), "column": (0, columns - 1)}
        titles = {"index": f"{self._plane.name} slice", "row": "marked row", "column": "marked column"}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            sliders[name] = ipywidgets.IntSlider(value, low, high, description=titles[name], **wide)
        for name, slider in sliders.items():
            traitlets.link((self, name), (slider, "value"))
        by_kernel = (
            ("smoothness_weight", "smoothness_sigma"),
            ("appearance_weight", "appearance_sigma", "intensity_sigma"),
            ("index", "row", "column"),
        )
        groups = [ipywidgets.VBox([sliders[name] for name in names]) for names in by_kernel]
        return ipywidgets.HBox(groups, layout={"flex_flow": "row wrap"})

    # ------------------------------------------------------------------------------------------------------- picture

    def _refresh(self, change=None) -> None:
        """Run the CRF on the slice, and draw the four pictures."""

        def cut(volume):
            return torch.from_numpy(plotting.cut(volume, self._plane, self.index - self._offset).copy())

        image = torch.stack([cut(channel) for channel in self._case.image])
        p, mask = cut(self._probability), cut(self._mask)
        parameters = {name: getattr(self, name) for name in RANGES}
        crf = DenseCRF(**parameters, iterations=self._iterations, learn=())
        sigmas = (self.index, *(v for name, v in parameters.items() if "sigma" in name))
        if sigmas not in self._prepared:
            self._prepared = {sigmas: crf.prepare(image, mask)}  # the last one only
        logits = torch.stack([1 - p, p]).clamp(min=1e-5).log()
        refined = crf(logits[None], image[None], mask[None], prepared=self._prepared[sigmas])[0]
        before, after = (p > 0.5).numpy(), ((refined[1] > refined[0]) & mask).numpy()
        self.result = after

        grey = plotting.paint(image[0].numpy(), self._windows[0])
        truth = None if self._case.label is None else cut(self._case.label > 0).numpy()
        panels = [(_headline("network", before, truth), _tint(grey, [(before, KEPT)]), [])]
        for name, kernel in zip(("smoothness", "appearance"), self._kernels(image, mask, parameters)):
            title = f"{name}: hears {kernel.sum():.0f} voxels"
            panels.append((title, _tint(0.6 * grey, [(kernel.numpy(), plotting.PROBABILITY_COLOUR)], 1), []))
        changes = [("kept", before & after, KEPT), ("removed", before & ~after, REMOVED), ("added", after & ~before, ADDED)]
        legend = [(f"{text} {where.sum()}", colour) for text, where, colour in changes]
        panels.append((_headline("after the CRF", after, truth), _tint(grey, [(w, c) for _, w, c in changes]), legend))
        spacing = self._case.voxel_size
        aspect = spacing[self._plane.y] / spacing[self._plane.x]
        self._sheet = _draw_sheet(panels, aspect, (self.row, self.column))
        self._picture.value = self.snapshot()

    def _kernels(self, image, mask, parameters) -> list[torch.Tensor]:
        """Return the exact k₁ and k₂ between the marked voxel and every other, each `(rows, columns)`."""
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in mask.shape), indexing="ij")
        distance = (rows - self.row) ** 2 + (columns - self.column) ** 2
        difference = ((image - image[:, self.row, self.column, None, None]) ** 2).sum(0)
        smoothness = distance / parameters["smoothness_sigma"] ** 2
        appearance = distance / parameters["appearance_sigma"] ** 2 + difference / parameters["intensity_sigma"] ** 2
        return [torch.exp(-e / 2) * mask for e in (smoothness, appearance)]

    # -------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate(*RANGES)
    def _valid_parameter(self, proposal):
        low, high, _ = RANGES[proposal["trait"].name]
        return _within(proposal["trait"].name, proposal["value"], low, high)

    @traitlets.validate("index")
    def _valid_index(self, proposal):
        return _within("index", proposal["value"], self._offset, self._last)

    @traitlets.validate("row", "column")
    def _valid_voxel(self, proposal):
        shape = plotting.cut(self._mask, self._plane, 0).shape
        name = proposal["trait"].name
        return _within(name, proposal["value"], 0, shape[name == "column"] - 1)


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):  # NaN is caught too
        raise StateError(f"{name} is {value:g}; expected {low:g} to {high:g}")
    return value


def _headline(what: str, foreground: np.ndarray, truth: np.ndarray | None) -> str:
    score = "" if truth is None else f", Dice {100 * dice(foreground, truth):.0f} %"
    return f"{what}: {foreground.sum()} voxels{score}"


def _tint(grey: np.ndarray, layers: Sequence[tuple[np.ndarray, str]], opacity: float = 0.6) -> np.ndarray:
    """Return a grey picture `(rows, columns, 3)` with each layer (strength 0 to 1, colour) over it."""
    picture = grey.astype(np.float32)
    for strength, colour in layers:
        picture = plotting.blend(picture, plotting.rgb(colour), opacity * strength)
    return np.rint(picture).astype(np.uint8)


def _draw_sheet(panels, aspect: float, marked: tuple[int, int]) -> Image.Image:
    """Draw the panels (title, pixels, legend) in one row, titles above and legends below."""
    rows, columns = panels[0][1].shape[:2]
    scale = WIDTH / columns
    high = round(rows * scale * aspect)
    sheet = Image.new("RGB", (len(panels) * (WIDTH + GAP) - GAP, high + 44), "white")
    pen = ImageDraw.Draw(sheet)
    row, column = marked
    for n, (title, pixels, legend) in enumerate(panels):
        left = n * (WIDTH + GAP)
        pen.text((left, 3), title, fill="#333333", font=font())
        sheet.paste(Image.fromarray(pixels).resize((WIDTH, high), Image.Resampling.NEAREST), (left, 22))
        corner = (left + column * scale - 1, 22 + row * scale * aspect - 1)
        opposite = (left + (column + 1) * scale, 22 + (row + 1) * scale * aspect)
        pen.rectangle((*corner, *opposite), outline="#CC79A7", width=2)
        x = min(left, sheet.width - sum(26 + int(font().getlength(text)) for text, _ in legend))  # in sight to its end
        for text, colour in legend:
            pen.rectangle((x, high + 28, x + 11, high + 39), fill=colour, outline="#333333")
            pen.text((x + 16, high + 34), text, fill="#333333", font=font(), anchor="lm")
            x += 26 + int(font().getlength(text))
    return sheet
