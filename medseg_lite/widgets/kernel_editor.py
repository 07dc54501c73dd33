"""A kernel that can be edited and slides over a picture, and the feature map that it makes, computed in the browser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import metrics, plotting
from ..plotting import COLOURS, SIGNED_COLOURS
from ._base import StateError, Widget, check_known, check_pair, pack, script, signed_colormap, styles

LARGEST = 1024 * 1024  # pixels; the map of a larger picture would not follow the keys
HEAVIEST = 1e6  # weights beyond this are typing errors
# The colours end at this quantile of |feature map|, so that the rim of a stripped brain does not pale its inside.
QUANTILE = 0.97
OWN = "your own"


def _as_tuples(array: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in np.asarray(array, np.float64).tolist())


def _presets(size: int) -> dict[str, np.ndarray]:
    """Return kernels worth knowing, `(size, size)` each."""
    identity = np.zeros((size, size))
    identity[size // 2, size // 2] = 1
    if size == 3:
        smooth, slope = np.array([1, 2, 1]), np.array([-1, 0, 1])
        laplacian = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    else:
        smooth, slope = np.array([1, 4, 6, 4, 1]), np.array([-1, -2, 0, 2, 1])
        rim = np.array([[0, 0, 1, 0, 0], [0, 1, 2, 1, 0], [1, 2, 0, 2, 1], [0, 1, 2, 1, 0], [0, 0, 1, 0, 0]])
        laplacian = (rim - rim.sum() * identity) / 4
    return {
        "identity": identity,
        "blur": np.full((size, size), 1 / size**2),
        "Sobel x": np.outer(smooth, slope),
        "Sobel y": np.outer(slope, smooth),
        "Laplacian": laplacian,
        "sharpen": identity - laplacian,
    }


PRESETS = {size: {name: _as_tuples(k) for name, k in _presets(size).items()} for size in (3, 5)}


class KernelEditor(Widget):
    """A kernel that slides over a picture and writes its feature map.

        editor = KernelEditor(image, truth=tumour)       # both (rows, columns)
        editor.kernel = [[0, 1, 0], [1, -4, 1], [0, 1, 0]]
        editor.preset = "Sobel x"                        # a kernel by name
        editor.bias, editor.relu = -0.5, True
        editor.feature_map                               # (rows - k + 1, columns - k + 1)
        editor.threshold = 0.7
        editor.dice                                      # of "map > threshold" and the truth

    Each pixel of the feature map is the sum of products of the kernel and the pixels under it, and the bias, as
    `torch.nn.functional.conv2d` computes it, without padding: there is no value where the kernel would lie across the edge. ReLU,
    if it is on, sets what is below zero to zero. The products of one pixel are shown; "Step" moves on by one pixel, and "Play"
    fills the map row by row. Colours are symmetric about zero: blue below, white at zero, vermilion above. They stay as they are
    while the kernel changes, because a response has a size; a switch lets them follow.

    Args:
        image: one picture `(rows, columns)` of real numbers, an array or a CPU tensor.
        kernel: 3×3 or 5×5 numbers; by default the 3×3 identity.
        preset: name of a kernel, instead of `kernel`: "identity", "blur", "Sobel x", "Sobel y", "Laplacian", "sharpen".
        size: side of that preset, 3 or 5.
        position: (row, column) of the marked pixel, counted in the image; by default its middle.
        window: intensities shown as black and white; by default the image's 0.5 and 99.5 percentiles.
        truth: mask of the object `(rows, columns)`. It is outlined, and "map > threshold" is compared with it.
        bias: number added to each sum.
        relu: whether ReLU follows.
        threshold: what the map is compared with; by default half of its largest value.
        limit: value at which the colours end; by default the 97 % quantile of the first map's magnitudes.

    Attributes:
        kernel: k tuples of k numbers.
        bias, relu, threshold: as above.
        position: (row, column) of the marked pixel, in the middle of the kernel.
        locked: whether the colours stay. If not, they end at the same quantile of each map.
        image: picture `(rows, columns)`. Another one may replace it, of the same size if there is a `truth`.

    All but `image` are synchronised with the browser.

    Raises:
        ValueError: for pictures that are not 2-D, too small, too large or not finite, kernels of another size, unknown names, a
            truth on another grid, numbers that are not finite.
    """

    _esm = script("kernel_editor.js")
    _css = styles("kernel_editor.css", "medseg-kernel")

    image = traitlets.Any()
    kernel = traitlets.Any().tag(sync=True)  # k tuples of k floats, made from any 3×3 or 5×5 numbers
    position = traitlets.Any().tag(sync=True)  # a tuple of two ints
    bias = traitlets.Float().tag(sync=True)
    relu = traitlets.Bool().tag(sync=True)
    threshold = traitlets.Float().tag(sync=True)
    locked = traitlets.Bool(True).tag(sync=True)
    limit = traitlets.Float(1.0).tag(sync=True)
    _picture = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        image: np.ndarray,
        kernel: Sequence[Sequence[float]] | None = None,
        *,
        preset: str | None = None,
        size: int = 3,
        position: Sequence[int] | None = None,
        window: tuple[float, float] | None = None,
        truth: np.ndarray | None = None,
        bias: float = 0.0,
        relu: bool = False,
        threshold: float | None = None,
        limit: float | None = None,
    ):
        if kernel is not None and preset is not None:
            raise ValueError(f"both a kernel and preset={preset!r} are given; give one of them")
        image = _check_image(image)
        kernel = _find_preset(preset or "identity", size) if kernel is None else _check_kernel(kernel)
        position = [n // 2 for n in image.shape] if position is None else position
        self._window = None if window is None else check_pair(window, "window", "black, white")
        self._truth = None if truth is None else _check_truth(truth, image.shape)
        super().__init__(
            image=image,
            kernel=kernel,
            position=_check_position(position, image.shape, len(kernel)),
            bias=bias,
            relu=relu,
            _picture=self._pack(image),
            _scene={
                "presets": {name: {size: PRESETS[size][name] for size in PRESETS} for name in PRESETS[3]},
                "own": OWN,
                "colours": SIGNED_COLOURS,
                "outlines": {name: COLOURS[name] for name in ("truth", "prediction")},
                "quantile": QUANTILE,
                "heaviest": HEAVIEST,
            },
        )
        values = self.feature_map
        self.limit = _limit(values) if limit is None else limit
        self.threshold = float(values.max()) / 2 if threshold is None else threshold

    def __repr__(self) -> str:
        rows, columns = self.image.shape
        k = len(self.kernel)
        return f"KernelEditor({rows}×{columns} pixels, {self.preset}, {k}×{k}, at {self.position})"

    @property
    def preset(self) -> str:
        """The name of the present kernel, or "your own". Set it to load a preset in the present size."""
        known = PRESETS[len(self.kernel)]
        return next((name for name, kernel in known.items() if kernel == self.kernel), OWN)

    @preset.setter
    def preset(self, name: str) -> None:
        self.kernel = _find_preset(name, len(self.kernel))

    @property
    def feature_map(self) -> np.ndarray:
        """The map that the browser shows, computed here: `(rows - k + 1, columns - k + 1)` float64."""
        k = len(self.kernel)
        windows = np.lib.stride_tricks.sliding_window_view(self.image.astype(np.float64), (k, k))
        values = np.einsum("rcij,ij->rc", windows, np.array(self.kernel)) + self.bias
        return np.maximum(values, 0) if self.relu else values

    @property
    def prediction(self) -> np.ndarray:
        """The pixels whose map is above the threshold: `(rows, columns)` bool, False on the rim, where there is no value."""
        border = len(self.kernel) // 2
        return np.pad(self.feature_map > self.threshold, border)

    @property
    def dice(self) -> float | None:
        """Dice of the prediction and the truth, or None without a truth."""
        return None if self._truth is None else metrics.dice(self.prediction, self._truth)

    def _pack(self, image: np.ndarray) -> dict:
        black, white = self._window or plotting.default_window(image)
        packed = {"shape": image.shape, "window": (black, white), "data": pack(image.view(np.uint8))}
        return packed | ({} if self._truth is None else {"truth": pack(self._truth)})

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "Sliding kernel"

    def _alt(self) -> str:
        rows = "; ".join(" ".join(f"{w:.6g}" for w in row) for row in self.kernel)
        added = f", bias {self.bias:.4g}" if self.bias else ""
        judged = (
            ""
            if self.dice is None
            else f"; map above {self.threshold:.3g} and the outlined truth have a Dice of {self.dice:.2f}"
        )
        return (
            f"A picture, the pixels under the kernel, the kernel {self.preset} ({rows}{added}), their products, and the feature map, "
            f"blue below zero and vermilion above{judged}"
        )

    def _draw(self) -> Figure:
        """Draw picture, pixels, kernel, products and feature map, as the browser shows them."""
        rows, columns = self.image.shape
        k, values, (row, column) = len(self.kernel), self.feature_map, self.position
        limit, border = self.limit if self.locked else _limit(values), k // 2
        black, white = self._picture["window"]
        with plotting.style():
            high = min(max(3.1 * rows / columns, 2.2), 5) + 0.7
            figure = Figure(figsize=(10.4, high), layout="constrained", dpi=100)
            left, *middle, right = figure.subplots(1, 5, width_ratios=(1.5, 0.8, 0.8, 0.8, 1.5))
            left.imshow(self.image, cmap="gray", vmin=black, vmax=white)
            left.set_title("image")
            self._draw_arithmetic(middle)
            framed = np.full((rows, columns), np.nan)
            framed[border : rows - border, border : columns - border] = values
            shown = right.imshow(framed, cmap=signed_colormap(), vmin=-limit, vmax=limit)
            right.set_title("feature map")
            bar = figure.colorbar(shown, ax=right, location="bottom", ticks=[-limit, 0, limit], pad=0.02, aspect=30)
            bar.ax.set_xticklabels([_short(-limit), "0", f"+{_short(limit)}"])
            blank = figure.colorbar(shown, ax=left, location="bottom", ticks=[], pad=0.02, aspect=30)
            blank.ax.set_visible(False)  # keeps both pictures equally large
            for axes, side in ((left, k), (right, 1)):
                corner = (column - side / 2, row - side / 2)
                axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="#009E73", linewidth=2))
            if self._truth is not None:
                plotting.outline(left, self.prediction, colour=COLOURS["prediction"])
                for axes in (left, right):
                    plotting.outline(axes, self._truth, colour=COLOURS["truth"], dashed=axes is left)
                left.set_xlabel(f"white: truth; pink: map > {_short(self.threshold)}\nDice {self.dice:.2f}")
            for axes in (left, *middle, right):
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.spines[:].set_visible(axes in (left, right))
        return figure

    def _draw_arithmetic(self, panels: Sequence[Axes]) -> None:
        """Draw the pixels under the kernel, the kernel and their products as numbers, and what they add up to."""
        kernel, (row, column) = np.array(self.kernel), self.position
        k, border = len(kernel), len(kernel) // 2
        patch = self.image[row - border : row + border + 1, column - border : column + border + 1].astype(np.float64)
        products = kernel * patch
        digits, size = (3, 10) if k == 3 else (2, 7)
        for axes, title, numbers in zip(panels, ("pixels", f"× {self.preset}", "= products"), (patch, kernel, products)):
            end = np.abs(numbers).max() or 1
            decimals = 3 if end < 0.1 else 2
            axes.imshow(numbers, cmap=signed_colormap(), vmin=-2 * end, vmax=2 * end)
            for (i, j), number in np.ndenumerate(numbers):
                text = _short(number, digits) if axes is panels[1] else f"{number + 0.0:.{decimals}f}".replace("-", "−")
                axes.text(j, i, text, ha="center", va="center", fontsize=size)
            axes.set_title(title)
        value = self.feature_map[row - border, column - border]
        steps = [f"row {row}, column {column}:", f"products add up to {_short(products.sum())}"]
        steps += [f"with bias {_short(self.bias)}"] * bool(self.bias) + ["after ReLU"] * self.relu
        panels[1].set_xlabel("\n".join([*steps, f"feature {_short(value)}"]))

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("image")
    def _valid_image(self, proposal):
        image = _check_image(proposal["value"])
        if self._truth is not None and image.shape != self._truth.shape:
            raise StateError(f"the image has shape {image.shape}, the truth {self._truth.shape}; make a new editor with both")
        return image

    @traitlets.validate("kernel")
    def _valid_kernel(self, proposal):
        return _check_kernel(proposal["value"])

    @traitlets.validate("position")
    def _valid_position(self, proposal):
        return _check_position(proposal["value"], self.image.shape, len(self.kernel))

    @traitlets.validate("bias", "threshold", "limit")
    def _valid_number(self, proposal):
        name, value = proposal["trait"].name, proposal["value"]
        if not abs(value) <= HEAVIEST or (name == "limit" and value <= 0):  # NaN is caught too
            kind = "a number above 0" if name == "limit" else f"a finite number from {-HEAVIEST:g} to {HEAVIEST:g}"
            raise StateError(f"{name} is {value:g}; expected {kind}")
        return value

    @traitlets.observe("image")
    def _image_changed(self, change):
        self._picture = self._pack(self.image)
        self.position = self.position  # is checked again, because the picture may be smaller

    @traitlets.observe("kernel")
    def _kernel_changed(self, change):
        self.position = self.position  # is checked again, because a larger kernel keeps further from the edge


def _check_image(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 2:
        hint = {3: "plotting.cut(volume, plotting.PLANES[0], index) is one axial slice", 4: "choose a channel and a slice"}
        raise StateError(
            f"the image has shape {image.shape}; expected two axes (rows, columns): {hint.get(image.ndim, 'pass one picture')}"
        )
    if image.dtype.kind not in "biuf":
        raise StateError(f"the image holds {image.dtype}; expected real numbers")
    if min(image.shape) < 5:
        raise StateError(f"the image has {image.shape[0]}×{image.shape[1]} pixels; a 5×5 kernel needs at least 5×5")
    if image.size > LARGEST:
        raise StateError(
            f"the image has {image.shape[0]}×{image.shape[1]} pixels; the editor follows the keys up to {LARGEST:,} of them: "
            "show a part (image[:512, :512]) or every second pixel (image[::2, ::2])"
        )
    with np.errstate(over="ignore"):
        image = np.ascontiguousarray(image, "<f4")  # the byte order that browsers have
    if not np.isfinite(image).all():
        count = int((~np.isfinite(image)).sum())
        raise StateError(f"the image has {count} NaN or infinite pixels; replace them, for example with numpy.nan_to_num")
    return image


def _check_truth(truth: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    truth = np.asarray(truth)
    if truth.shape != shape:
        raise StateError(f"the truth has shape {truth.shape}; expected the image's, {shape}")
    return (truth > 0).astype(np.uint8)


def _check_kernel(kernel: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    try:
        array = np.asarray(kernel, np.float64)
    except (TypeError, ValueError):
        raise StateError(f"the kernel is {kernel!r}; expected 3×3 or 5×5 numbers, row by row") from None
    if array.shape not in ((3, 3), (5, 5)):
        raise StateError(f"the kernel has shape {array.shape}; expected (3, 3) or (5, 5)")
    if not (np.abs(array) <= HEAVIEST).all():  # NaN is caught too
        row, column = np.argwhere(~(np.abs(array) <= HEAVIEST))[0].tolist()
        raise StateError(
            f"the kernel's weight in row {row}, column {column} is {array[row, column]:g}; "
            f"expected finite numbers from {-HEAVIEST:g} to {HEAVIEST:g}"
        )
    return _as_tuples(array)


def _find_preset(name: str, size: int) -> tuple[tuple[float, ...], ...]:
    if size not in PRESETS:
        raise ValueError(f"size={size!r}; expected 3 or 5")
    return PRESETS[size][check_known(name, PRESETS[size], "there is no preset")]


def _check_position(position: Sequence[int], shape: tuple[int, int], k: int) -> tuple[int, int]:
    """Return (row, column) as ints, moved to the nearest pixel at which the kernel fits into the image."""
    try:
        numbers = [float(p) for p in position]
        if len(numbers) != 2 or any(n != int(n) for n in numbers):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise StateError(f"position is {position!r}; expected two whole numbers (row, column)") from None
    return tuple(int(min(max(p, k // 2), n - 1 - k // 2)) for p, n in zip(numbers, shape))


def _limit(values: np.ndarray) -> float:
    """Return the value at which the colours of a feature map end, on both sides of zero."""
    magnitudes = np.sort(np.abs(values), axis=None)
    return float(magnitudes[int(QUANTILE * (magnitudes.size - 1))] or magnitudes[-1] or 1)


def _short(number: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, but with every digit before the point."""
    return (f"{number:.{digits}g}" if abs(number) < 1000 else f"{number:.0f}").replace("-", "−")
