"""A valley of two weights: plain descent, plain descent on a multiplied loss, and steps of a fixed length, update by update."""

from __future__ import annotations

import numpy as np
import traitlets
from matplotlib.figure import Figure

from .. import plotting
from ._base import StateError, Widget, script, styles

BALLS = ("plain descent", "loss × factor", "fixed length")
COLOURS = ("#D55E00", "#E69F00", "#0072B2")
MARKERS = ("s", "v", "o")
ENDS = {"rate": (0.01, 3.0), "factor": (0.01, 10.0), "stretch": (1.0, 8.0)}  # of the sliders
START = (-6.0, 2.0)
MOST = 80  # updates
EDGE = (8.0, 3.2)  # what is shown lies between minus this and this


class Valley(Widget):
    """Three balls in a valley of two weights: what a learning rate means to plain descent, and what to steps of a fixed length.

        valley = Valley(rate=0.5, factor=0.01)
        valley.updates = 40        # how many updates the balls have gone
        valley.falls = True        # the rate falls to zero
        valley.paths               # weights of each ball at the start and after each update, (81, 2)
        valley.distances           # their distances to the minimum, (81,)

    The loss is (w₁²/s² + w₂²)/2, so its contours are s times as long as wide, and its curvature is 1 across the valley and 1/s² along
    it. One ball follows the gradient times the rate. The second one does so on the loss times a factor. The third one makes steps as
    long as the rate, whatever the gradient's length. None has momentum.

    Plain descent grows beyond 2/curvature: from a rate of 2 on, and on the multiplied loss from 2/factor on. The ball with steps of a
    fixed length never settles. It ends by jumping across the minimum, half a step away from it in the mean, until the rate falls.

    Args:
        rate: learning rate, which is the length of a step of the third ball; from 0.01 to 3.
        factor: what the second ball's loss is multiplied by, from 0.01 to 10.
        stretch: how many times the valley is as long as wide, from 1 to 8.
        falls: whether the rate falls linearly, to zero after the last of 80 updates.
        updates: updates that the view has gone.

    All are synchronised with the browser, which computes all numbers itself.

    Raises:
        ValueError: for a rate, factor or stretch outside its slider.

    Source: Mlynarski et al. 2019, section 2.4 and eq. 4. The paper halves its rate; here it falls linearly.
    Taught in notebook 13.
    """

    _esm = script("valley.js")
    _css = styles("valley.css", "medseg-valley")

    rate = traitlets.Float(0.5).tag(sync=True)
    factor = traitlets.Float(0.01).tag(sync=True)
    stretch = traitlets.Float(4.0).tag(sync=True)
    falls = traitlets.Bool(False).tag(sync=True)
    updates = traitlets.Int(0).tag(sync=True)

    def __init__(self, **state: float | bool):
        super().__init__(**state)
        look = {"balls": BALLS, "colours": COLOURS, "ends": ENDS}
        self._scene = look | {"start": START, "most": MOST, "edge": EDGE}

    def __repr__(self) -> str:
        ends = ", ".join(f"{name} {d[self.updates]:.3g}" for name, d in self.distances.items())
        falls = ", falling" if self.falls else ""
        return f"Valley(rate {self.rate:g}{falls}, factor {self.factor:g}, after {self.updates} updates at distance: {ends})"

    @property
    def paths(self) -> dict[str, np.ndarray]:
        """Weights of each ball at the start and after each update, `(updates + 1, 2)`."""
        curvature, paths = np.array([1 / self.stretch**2, 1]), {}
        for name in BALLS:
            path = [np.array(START)]
            for n in range(MOST):
                rate, gradient = self.rate * (1 - n / MOST if self.falls else 1), curvature * path[-1]
                if name == "loss × factor":
                    gradient = self.factor * gradient
                length = np.hypot(*gradient) if name == "fixed length" else 1
                path.append(path[-1] - (rate / length * gradient if length else 0))
            paths[name] = np.array(path)
        return paths

    @property
    def distances(self) -> dict[str, np.ndarray]:
        """Distance of each ball to the minimum at the start and after each update, `(updates + 1,)`."""
        return {name: np.hypot(*path.T) for name, path in self.paths.items()}

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "A valley of two weights"

    def _alt(self) -> str:
        return (
            f"{self!r}. Above, contours of a valley {self.stretch:g} times as long as wide, with the three paths; below, the distance to "
            "the minimum by update, on a logarithmic scale"
        )

    def _draw(self) -> Figure:
        """Draw the contours with the three paths, and the distances below."""
        with plotting.style():
            figure = Figure(figsize=(7.2, 5.4), dpi=100, layout="constrained")
            above, below = figure.subplots(2, 1, height_ratios=(1.5, 1))
            x, y = np.meshgrid(np.linspace(-EDGE[0], EDGE[0], 200), np.linspace(-EDGE[1], EDGE[1], 90))
            above.contour(x, y, np.hypot(x / self.stretch, y), levels=0.5 * np.arange(1, 8), colors="0.75", linewidths=0.8)
            distances = self.distances
            for (name, path), colour, marker in zip(self.paths.items(), COLOURS, MARKERS):
                gone = path[: self.updates + 1]
                above.plot(*gone.T, "-", color=colour, lw=1.2)
                above.plot(*gone[-1], marker, color=colour, ms=8, mec="#222222")
                below.plot(distances[name][: self.updates + 1], "-", color=colour, label=name)
                below.plot(self.updates, distances[name][self.updates], marker, color=colour)
            above.set(xlim=(-EDGE[0], EDGE[0]), ylim=(-EDGE[1], EDGE[1]), aspect="equal", xlabel="w₁", ylabel="w₂")
            above.grid(visible=False)
            falls = ", falling to zero" if self.falls else ""
            above.set_title(f"rate {self.rate:g}{falls}; factor {self.factor:g}; after {self.updates} updates")
            below.set(yscale="log", xlim=(0, MOST), ylim=(1e-3, 1e2), xlabel="update", ylabel="distance to the minimum")
            figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure

    @traitlets.validate("rate", "factor", "stretch")
    def _valid_number(self, proposal):
        name, value = proposal["trait"].name, proposal["value"]
        low, high = ENDS[name]
        if not low <= value <= high:  # NaN is caught too
            raise StateError(f"{name} is {value:g}; expected a number from {low:g} to {high:g}")
        return value

    @traitlets.validate("updates")
    def _valid_updates(self, proposal):
        return min(max(proposal["value"], 0), MOST)
