"""One raw slice times a gain plus an offset: its histogram, and what networks with different inputs make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import traitlets
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .. import inference, metrics, plotting
from ..models import Network
from ..volume import Case
from ._base import StateError, Widget, check_images, find_limits, pack, script, styles, to_bytes

GAINS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
MOST = 3  # networks side by side


class GainOffset(Widget):
    """Two sliders, gain and offset of a raw case, and for each network its prediction of a slice and the Dice score.

        widget = GainOffset({"raw": raw, "standardised": (other, transforms.standardise), "learned": pipeline}, case)
        widget.gain, widget.offset = 2.0, 100
        widget.table      # Dice of each network now, and mean and deviation of what it is given
        widget.dice       # of each network, an array (gains, offsets)

    The case that a network is given is gain × intensity + offset, prepared as the network wants it. Every setting is computed once, at
    the start, so the sliders need no kernel. Where a network's card has a "threshold", the class is where its probability is above it.

    Args:
        networks: a network, or a network and the function that prepares a case for it, by name; up to three.
        case: raw case with a label.
        index: slice along W; by default the one with most of the class.
        label: class whose prediction is shown.
        gains: factors, rising; by default nine from 1/4 to 4.
        offsets: offsets, rising, in the units of the case; by default five, as many deviations of the case as −2 to 2.
        channel: sequence that is shown; by default the first. Gain and offset change all.

    Attributes:
        gain: one of `gains`. Any other number moves to the nearest.
        offset: one of `offsets`, likewise. Both are synchronised with the browser.

    Raises:
        ValueError: for no network or more than three, a case without label or with an empty slice, gains or offsets that do not rise.

    Source: Drozdzal et al. 2018, sections 1 and 5.
    Taught in notebook 11.
    """

    _esm = script("gain_offset.js")
    _css = styles("gain_offset.css", "medseg-gain")

    gain = traitlets.Float().tag(sync=True)
    offset = traitlets.Float().tag(sync=True)
    _image = traitlets.Bytes().tag(sync=True)
    _truth = traitlets.Bytes().tag(sync=True)
    _predictions = traitlets.List().tag(sync=True)  # of each network, by gain and then by offset

    def __init__(
        self,
        networks: Mapping[str, Network | tuple[Network, Callable[[Case], Case]]],
        case: Case,
        *,
        index: int | None = None,
        label: int = 1,
        gains: Sequence[float] = GAINS,
        offsets: Sequence[float] | None = None,
        channel: str | None = None,
    ):
        if not 1 <= len(networks) <= MOST:
            raise ValueError(f"there are {len(networks)} networks; expected one to {MOST}, by name")
        check_images(case)
        channel = channel or case.channels[0]
        if case.label is None or channel not in case.channels:
            raise ValueError(f"{case.name} has no label to compare with, or no channel {channel!r}; it has {case.channels}")
        self._case, self._label = case, label
        self._index = plotting.busiest_position(case.label == label, case.shape)[2] if index is None else index
        if not 0 <= self._index < case.shape[2] or not (case.label[:, :, self._index] == label).any():
            raise ValueError(f"slice {self._index} of {case.name} has no voxel of class {label}")
        self._image_now = case.image[case.channels.index(channel), :, :, self._index].astype(np.float64)
        deviation = float(f"{case.image.std():.1g}")
        self.gains = _check_rising(gains, "gains")
        self.offsets = _check_rising([k * deviation for k in (-2, -1, 0, 1, 2)] if offsets is None else offsets, "offsets")
        self._pairs = {name: n if isinstance(n, tuple) else (n, None) for name, n in networks.items()}
        settings = [(g, o) for g in self.gains for o in self.offsets]
        self._found = {name: [self._predict(*pair, *s) for s in settings] for name, pair in self._pairs.items()}
        ends, truth = find_limits(self._image_now), self._truth_now
        super().__init__(
            gain=min(self.gains, key=lambda g: abs(g - 1)),
            offset=min(self.offsets, key=abs),
            _image=pack(to_bytes(self._image_now, *ends)),
            _truth=pack(truth),
            _predictions=[[pack(p) for p, *_ in found] for found in self._found.values()],
        )
        self._scene = {
            "title": f"{case.name}, slice {self._index}",
            "shape": [*truth.shape, 1],
            "aspect": case.voxel_size[1] / case.voxel_size[0],
            "plane": plotting.find_plane("axial")._asdict(),
            "window": plotting.default_window(self._image_now),
            "low": ends[0],
            "high": ends[1],
            "gains": self.gains,
            "offsets": self.offsets,
            "span": self._span(),
            "names": list(networks),
            "dice": [[d for _, d, *_ in found] for found in self._found.values()],
            "given": [[given for *_, given in found] for found in self._found.values()],
            "ramp": [to_hex(plotting.UNSIGNED(k / 20)) for k in range(21)],
            "colours": {name: plotting.COLOURS[name] for name in plotting.OUTCOMES[1:]},
        }

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {dice:.3f}" for name, dice in self.table["dice"].items())
        return (
            f"GainOffset({self._case.name!r}, slice {self._index}, gain {self.gain:g}, offset {self.offset:g}, Dice: {scores})"
        )

    @property
    def table(self) -> pd.DataFrame:
        """Dice of each network now, and mean and deviation of the slice that it is given, a row for each network."""
        rows = {name: [found[self._place()][1], *found[self._place()][2]] for name, found in self._found.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["dice", "mean", "deviation"]).rename_axis("network")

    @property
    def dice(self) -> dict[str, np.ndarray]:
        """Dice of each network at every setting, an array (gains, offsets)."""
        shape = len(self.gains), len(self.offsets)
        return {name: np.reshape([d for _, d, *_ in found], shape) for name, found in self._found.items()}

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """Pixels that each network predicts as the class now, bool `(D, H)`."""
        return {name: found[self._place()][0] for name, found in self._found.items()}

    @property
    def _truth_now(self) -> np.ndarray:
        return self._case.label[:, :, self._index] == self._label

    def _place(self) -> int:
        return self.gains.index(self.gain) * len(self.offsets) + self.offsets.index(self.offset)

    def _span(self) -> list[float]:
        """Return the ends of the histogram's axis: those of the slice at all offsets and at gains up to two."""
        ends = np.percentile(self._image_now, (0.5, 99.5))
        reached = [g * e + o for g in self.gains if g <= max(2, self.gains[0]) for e in ends for o in self.offsets]
        return [float(min(reached)), float(max(reached))]

    def _predict(self, network: Network, prepare, gain: float, offset: float) -> tuple[np.ndarray, float, list[float]]:
        """Return the pixels predicted as the class in the slice, the Dice score, and mean and deviation of the slice as it is given."""
        changed = self._case.replace(image=(gain * self._case.image + offset).astype(np.float32))
        given = changed if prepare is None else prepare(changed)
        here = slice(self._index, self._index + 1)
        part = given.crop((slice(None), slice(None), here)) if network.spatial_dims == 2 else given
        threshold = network.card.get("threshold")
        if threshold is None:
            found = inference.predict(network, part, progress=False) == self._label
        else:
            found = inference.predict(network, part, output="probabilities", progress=False)[self._label] > threshold
        found = found[:, :, 0 if network.spatial_dims == 2 else self._index]
        seen = given.image[..., self._index]
        return found, metrics.dice(found, self._truth_now), [float(seen.mean()), float(seen.std())]

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "Gain and offset"

    def _alt(self) -> str:
        scores = ", ".join(f"{name} {dice:.3f}" for name, dice in self.table["dice"].items())
        return (
            f"{self._scene['title']}, times {self.gain:g} plus {self.offset:g}: the slice above its histogram, and for each network "
            f"pixels found, missed and made up above a map of Dice by gain and offset. Dice now: {scores}"
        )

    def _draw(self) -> Figure:
        """Draw the slice above its histogram, and each network's outcomes above its map of Dice by gain and offset."""
        plane, window, truth = plotting.find_plane("axial"), self._scene["window"], self._truth_now
        shown = self.gain * self._image_now + self.offset
        with plotting.style():
            figure = Figure(figsize=(2.35 * (1 + len(self._found)), 4), dpi=100, layout="constrained")
            (top, *tops), (low, *lows) = figure.subplots(2, 1 + len(self._found), squeeze=False, height_ratios=(2, 1))
            grey = plotting.paint(plotting.cut(shown[:, :, None], plane, 0), window)
            top.imshow(grey, aspect=self._scene["aspect"])
            top.set_title(f"× {self.gain:g} + {self.offset:g}")
            low.hist(np.clip(shown.ravel(), *self._scene["span"]), np.linspace(*self._scene["span"], 80), color="#222222")
            low.set(yticks=[], xlabel="intensity")
            for (name, found), above, below in zip(self.predictions.items(), tops, lows):
                original, outcomes = self._image_now[:, :, None], plotting.outcomes(truth, found)[:, :, None]
                area = plotting.Overlay("outcomes", plotting.cut(outcomes, plane, 0), "area")
                above.imshow(
                    plotting.paint(plotting.cut(original, plane, 0), window, [area], 0.65, plotting.OUTCOMES),
                    aspect=self._scene["aspect"],
                )
                above.set_title(f"{name}: Dice {self.table['dice'][name]:.3f}", fontsize=9)
                scale = below.imshow(self.dice[name].T, vmin=0, vmax=1, cmap=plotting.UNSIGNED, origin="lower", aspect="auto")
                below.plot(
                    self.gains.index(self.gain), self.offsets.index(self.offset), "s", ms=9, mfc="none", mec="#D55E00", mew=2
                )
                below.set_xticks(range(0, len(self.gains), 2), [f"{g:g}" for g in self.gains[::2]])
                below.set_yticks(range(len(self.offsets)), [f"{o:g}" for o in self.offsets])
                below.set(xlabel="gain")
                below.grid(visible=False)
            lows[0].set_ylabel("offset")
            plotting.picture([top, *tops])
            figure.colorbar(scale, ax=lows, label="Dice")
            handles = [Patch(color=plotting.COLOURS[n], label=n) for n in plotting.OUTCOMES[1:]]
            figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return figure

    @traitlets.validate("gain", "offset")
    def _valid_setting(self, proposal):
        known = getattr(self, f"{proposal['trait'].name}s")
        if not np.isfinite(proposal["value"]):
            raise StateError(
                f"{proposal['trait'].name} is {proposal['value']}; expected a number from {known[0]:g} to {known[-1]:g}"
            )
        return min(known, key=lambda v: abs(v - proposal["value"]))


def _check_rising(numbers: Sequence[float], what: str) -> list[float]:
    """Return rising numbers as floats."""
    numbers = [float(v) for v in numbers]
    if not numbers or not np.isfinite(numbers).all() or (np.diff(numbers) <= 0).any():
        raise ValueError(f"{what} are {numbers}; expected one finite number or several, each larger than the one before")
    return numbers
