"""Signal, gradient and the size of the first update in each layer of an untrained network, for many ways to start it."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import torch
import traitlets
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import plotting, vitals
from ..models import deep
from ..models.layers import convolutions
from ..optimizers import RMSpropNesterov
from ._base import StateError, Widget, script, styles

MAPS = 8  # feature maps of every layer; 40 is what the layers of the paper's Deep have
STARTS = {  # standard deviation of the kernels, from the number n of a neuron's inputs
    "N(0, 0.01)": lambda n: 0.01 * (40 / MAPS) ** 0.5,  # so that n var(W) is that of 40 feature maps
    "Xavier": lambda n: (1 / n) ** 0.5,
    "He": lambda n: (2 / n) ** 0.5,
    "twice He": lambda n: 2 * (2 / n) ** 0.5,
}
SLOPES, DEPTHS, EPSILONS = (0.0, 0.01, 0.5, 1.0), (4, 8, 12), (1e-2, 1e-4, 1e-6, 1e-8, 1e-12, 1e-16, 1e-24)
PANELS = {"signal": ("signal",), "gradient": ("gradient", "kernel_gradient"), "update": ("update",)}
LOWEST = -30  # decimal logarithm of what counts as nothing


class SignalExplorer(Widget):
    """Three curves over the layers of an untrained network: signal, gradient, and the size of the first update.

        widget = SignalExplorer(segments, truth)
        widget.start = "He"             # or depth, slope, normalise, epsilon: the curves follow
        widget.table                    # the numbers of the curves, a row for each layer

    All are root mean squares. The numbers of one `layer` are written below the curves. The networks are plain pathways of 3³ convolutions
    with eight feature maps, then PReLU, as Deep of Kamnitsas et al. 2017. "N(0, 0.01)" is scaled so that it means for eight maps what it
    means for the paper's. The update is that of RMSProp with Nesterov momentum at a rate of 0.001, without penalties on the weights.
    Every setting is computed once, in some seconds, so the curves follow without a kernel.

    Args:
        segments: standardised image `(B, C, *n)`.
        truth: classes `(B, *m)`; n − m is at least 24, the margin of twelve layers on both sides. For fewer layers the middle is used.
        start: "N(0, 0.01)", "Xavier", "He" or "twice He".
        slope: slope of the PReLU for negative numbers: 0, .01, .5 or 1.
        depth: number of layers: 4, 8 or 12.
        normalise: whether batch normalisation follows each convolution.
        epsilon: constant inside the optimiser's root, one of `EPSILONS`.

    Raises:
        ValueError: for segments that are too small, or a setting that is not among those above.

    Taught in notebook 05.
    """

    _esm = script("signal_explorer.js")
    _css = styles("signal_explorer.css", "medseg-signal")

    start = traitlets.Any().tag(sync=True)
    slope = traitlets.Any().tag(sync=True)
    depth = traitlets.Any().tag(sync=True)
    normalise = traitlets.Any().tag(sync=True)
    epsilon = traitlets.Any().tag(sync=True)
    layer = traitlets.Int(1).tag(sync=True)

    def __init__(
        self,
        segments: Tensor,
        truth: Tensor,
        *,
        start: str = "N(0, 0.01)",
        slope: float = 0.01,
        depth: int = 8,
        normalise: bool = False,
        epsilon: float = 1e-4,
    ):
        margins = {(n - m) // 2 for n, m in zip(segments.shape[2:], truth.shape[1:])}
        if segments.ndim != 5 or truth.ndim != 4 or min(margins) < max(DEPTHS):
            raise ValueError(
                f"segments {tuple(segments.shape)} and truth {tuple(truth.shape)}; expected (B, C, *n) and (B, *m) "
                f"with n at least {2 * max(DEPTHS)} voxels longer than m"
            )
        names = {"start": tuple(STARTS), "slope": SLOPES, "depth": DEPTHS, "normalise": (False, True)}
        self._options = names | {"epsilon": EPSILONS}
        self._states = {key: self._compute(segments, truth, *key) for key in product(*names.values())}
        through = [v for s in self._states.values() for name in ("signal", *PANELS["gradient"]) for v in s[name] if v > LOWEST]
        updates = [v for s in self._states.values() for of_epsilon in s["update"] for v in of_epsilon]
        negligible = _log(_first_update([torch.ones(1)], 1e-30)[0])
        ends = {
            name: [math.floor(min(v)), math.ceil(max(v))]
            for name, v in (("signal", through), ("update", [*updates, negligible]))
        }
        places = {key: "|".join(str(o.index(v)) for o, v in zip(names.values(), key)) for key in self._states}
        scene = {"options": self._options, "states": {places[key]: s for key, s in self._states.items()}, "panels": PANELS}
        scene |= {"ends": ends | {"gradient": ends["signal"]}, "negligible": negligible}
        super().__init__(start=start, slope=slope, depth=depth, normalise=normalise, epsilon=epsilon, _scene=scene)

    def __repr__(self) -> str:
        return f"SignalExplorer({self._setting()}, layer {self.layer})"

    @property
    def table(self) -> pd.DataFrame:
        """Root mean squares of signal, gradient, the kernel's gradient and the first update, a row for each layer."""
        state = self._states[self.start, self.slope, self.depth, self.normalise]
        curves = state | {"update": state["update"][EPSILONS.index(self.epsilon)]}
        layers = pd.RangeIndex(1, self.depth + 1, name="layer")
        return pd.DataFrame({name: 10 ** np.array(logs) for name, logs in curves.items()}, index=layers)

    @staticmethod
    def _compute(segments: Tensor, truth: Tensor, start: str, slope: float, depth: int, normalise: bool) -> dict[str, list]:
        """Return decimal logarithms of the root mean squares of one setting, by layer; of the update by epsilon, too."""
        classes = max(2, int(truth.max()) + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = deep(in_channels=segments.shape[1], classes=classes, widths=[MAPS] * depth, batch_norm=normalise)
            for conv in convolutions(model):
                nn.init.normal_(conv.weight, std=STARTS[start](conv.weight[0].numel()))
        for block in model.normal:
            nn.init.constant_(block.act.weight, slope)
        around = [(n - m) // 2 - depth for n, m in zip(segments.shape[2:], truth.shape[1:])]
        middle = (..., *(slice(a, a + m + 2 * depth) for a, m in zip(around, truth.shape[1:])))
        found = vitals.signals(model.train(), segments[middle], truth)
        found = {name: tensors[:depth] for name, tensors in found.items()}  # without the classifier
        updates = [[_log(u) for u in _first_update(found["kernel_gradient"], epsilon)] for epsilon in EPSILONS]
        return {name: [_log(t) for t in tensors] for name, tensors in found.items()} | {"update": updates}

    def _setting(self) -> str:
        normalised = "batch normalisation" if self.normalise else "no normalisation"
        return f"{self.start}, slope {self.slope:g}, {self.depth} layers, {normalised}, epsilon {self.epsilon:g}"

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "Signal, gradient and the first update"

    def _alt(self) -> str:
        ends = self.table.iloc[[0, -1]]
        told = [f"{name.replace('_', ' ')} {a:.2g} and {b:.2g}" for name, (a, b) in ends.items()]
        return f"{self._setting()}: root mean squares in the first and in the last layer: {'; '.join(told)}"

    def _draw(self) -> Figure:
        """Draw the three curves, with the size of an update where epsilon is negligible as a dotted line."""
        table = self.table
        with plotting.style():
            figure = Figure(figsize=(9.4, 3.2), dpi=100, layout="constrained")
            for axes, (panel, names) in zip(figure.subplots(1, 3), PANELS.items()):
                for name, line in zip(names, ("-", "--")):
                    axes.semilogy(table.index, table[name], line, color="#222222", marker="o", markersize=4)
                low, high = self._scene["ends"][panel]
                axes.set(xlabel="layer", title=panel, ylim=(10.0**low, 10.0**high), xticks=table.index[:: len(table) // 4])
            axes.axhline(10 ** self._scene["negligible"], color="#222222", linestyle=":")
            figure.suptitle(self._setting(), fontsize=9)
        return figure

    @traitlets.validate("start", "slope", "depth", "normalise", "epsilon")
    def _valid_setting(self, proposal):
        name, value = proposal["trait"].name, proposal["value"]
        if value not in self._options[name]:
            raise StateError(f"{name} is {value!r}; expected one of {', '.join(map(str, self._options[name]))}")
        return self._options[name][list(self._options[name]).index(value)]

    @traitlets.observe("depth")
    def _stay_inside(self, change) -> None:
        self.layer = min(self.layer, self.depth)

    @traitlets.validate("layer")
    def _valid_layer(self, proposal):
        return min(max(proposal["value"], 1), self.depth)


def _first_update(gradients: list[Tensor], epsilon: float) -> list[Tensor]:
    """Return by what the optimiser, at its other defaults, changes weights with these gradients in its first step."""
    weights = [torch.zeros_like(g) for g in gradients]
    for weight, gradient in zip(weights, gradients):
        weight.grad = gradient
    RMSpropNesterov(weights, eps=epsilon).step()
    return weights


def _log(tensor: Tensor) -> float:
    """Return the decimal logarithm of a tensor's root mean square, as the browser gets it."""
    return round(max(LOWEST, math.log10(float(tensor.double().square().mean().sqrt()) or 1e-99)), 4)
