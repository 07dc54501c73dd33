"""One kernel of a few weights learns from a row of numbers: a slider for the learning rate, and the loss that it leads to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import traitlets
from matplotlib.figure import Figure

from .. import plotting
from ._base import StateError, Widget, script, styles

LOWEST, HIGHEST = 0.001, 1.0  # ends of the slider


class LearningRate(Widget):
    """Gradient descent of one kernel on a row of numbers, for a learning rate that a slider sets.

        widget = LearningRate([0, 0, 1, 3, 2, 0, 1], kernel=[-1, 0, 1])
        widget.rate = 0.05
        widget.updates = 20        # how many updates the view has gone
        widget.weights             # the kernel after each update, (most + 1, k)
        widget.losses              # the loss after each update, (most + 1,)

    A hidden kernel has made the target from the row: t[r] is the sum of kernel[i] * row[r + i]. The kernel that learns begins with
    zeros. Its loss is the mean squared difference to the target, and each update moves it against the gradient by `rate`. The
    browser shows output and target after the present update, the three weights beside the hidden ones, and the whole curve of the
    loss, so that a move of the slider shows at once whether the rate is too small, good, or makes the loss grow.

    Args:
        row: a row of at least as many finite numbers as the kernel has.
        kernel: the hidden kernel, 2 to 5 weights.
        rate: learning rate, from 0.001 to 1.
        updates: updates that the view has gone.
        most: updates that are computed.

    Attributes:
        rate, updates: as above, synchronised with the browser.

    Raises:
        ValueError: for rows and kernels of other shapes or that are not finite, and a rate outside the slider.
    """

    _esm = script("learning_rate.js")
    _css = styles("learning_rate.css", "medseg-rate")

    rate = traitlets.Float().tag(sync=True)
    updates = traitlets.Int().tag(sync=True)

    def __init__(
        self,
        row: Sequence[float],
        kernel: Sequence[float] = (-1, 0, 1),
        *,
        rate: float = 0.01,
        updates: int = 0,
        most: int = 60,
    ):
        row, kernel = np.asarray(row, np.float64), np.asarray(kernel, np.float64)
        if kernel.ndim != 1 or not 2 <= len(kernel) <= 5 or not np.isfinite(kernel).all():
            raise ValueError(f"the kernel is {kernel.tolist()}; expected 2 to 5 finite weights in a row")
        if row.ndim != 1 or len(row) < len(kernel) or not np.isfinite(row).all():
            raise ValueError(f"the row has shape {row.shape}; expected a row of at least {len(kernel)} finite numbers")
        self._windows = np.lib.stride_tricks.sliding_window_view(row, len(kernel))
        self._target, self._kernel, self._most = self._windows @ kernel, kernel, most
        super().__init__(rate=rate, updates=updates)
        self._scene = {"row": row.tolist(), "kernel": kernel.tolist(), "most": most, "lowest": LOWEST, "highest": HIGHEST}

    def __repr__(self) -> str:
        return f"LearningRate(rate {self.rate:.3g}: loss {self.losses[0]:.3g} -> {self.losses[-1]:.3g} in {self._most} updates)"

    @property
    def weights(self) -> np.ndarray:
        """The kernel at the start and after each update, `(most + 1, k)`."""
        w, all_weights = np.zeros(len(self._kernel)), []
        for _ in range(self._most + 1):
            all_weights.append(w)
            error = self._windows @ w - self._target
            w = w - self.rate * 2 / len(error) * (error @ self._windows)
        return np.array(all_weights)

    @property
    def losses(self) -> np.ndarray:
        """The loss at the start and after each update, `(most + 1,)`."""
        return np.square(self.weights @ self._windows.T - self._target).mean(axis=1)

    @property
    def verdict(self) -> str:
        """A judgement of the rate by the loss after all updates: "too small", "good" or "too large"."""
        first, *_, last = self.losses
        return "too large" if last > first else "good" if last < first / 100 else "too small"

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "Learning rate"

    def _alt(self) -> str:
        return (
            f"Left, the output of a kernel beside its target after {self.updates} updates; right, the loss at each of {self._most} "
            f"updates: from {self.losses[0]:.3g} to {self.losses[-1]:.3g}. The rate {self.rate:.3g} is {self.verdict}"
        )

    def _draw(self) -> Figure:
        """Draw output and target, and the curve of the loss, as the browser shows them."""
        weights, losses = self.weights[self.updates], self.losses
        with plotting.style():
            figure = Figure(figsize=(9, 2.9), layout="constrained", dpi=100)
            left, right = figure.subplots(1, 2)
            left.plot(self._target, "o", color="#D55E00", mfc="none", ms=8, label="target")
            left.plot(self._windows @ weights, "o-", color="#0072B2", ms=4, label="output")
            written = ", ".join(f"{w:.3g}".replace("-", "−") for w in weights)
            left.set(title=f"after {self.updates} updates: w = ({written})", xlabel="place in the row")
            left.legend()
            right.plot(losses, color="#0072B2")
            right.plot(self.updates, losses[self.updates], "o", color="#222222")
            right.set(yscale="log", title=f"rate {self.rate:.3g}: {self.verdict}", xlabel="update", ylabel="loss")
        return figure

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("rate")
    def _valid_rate(self, proposal):
        if not LOWEST <= proposal["value"] <= HIGHEST:  # NaN is caught too
            raise StateError(f"rate is {proposal['value']:g}; expected a number from {LOWEST:g} to {HIGHEST:g}")
        return proposal["value"]

    @traitlets.validate("updates")
    def _valid_updates(self, proposal):
        return min(max(proposal["value"], 0), self._most)
