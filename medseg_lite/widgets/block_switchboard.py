"""A switch for each residual block of an FC-ResNet, and what the network predicts without the blocks that are off."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn

from .. import attribution, inference, metrics, plotting
from ..models import Network
from ..models.drozdzal import FCResNet
from ..volume import Case
from ._base import StateError, Widget, check_images, find_limits, list_names, pack, script, styles, to_bytes


class BlockSwitchboard(Widget):
    """The residual blocks of an FC-ResNet as switches along its U, beside its prediction of a slice and the Dice score.

        board = BlockSwitchboard(model, case)
        board.off = ["down.2.3", "up.0.1"]    # or names from board.blocks
        board.dice, board.prediction          # of the class, with these blocks off
        board.read_after(12)                  # the first twelve blocks are on, all later ones off
        board.table                           # Dice without each block alone, and after each block

    A block that is off hands on its input through its shortcut, as in `attribution.without`. To read the head after a block is to
    switch all later blocks off: their shortcuts, the long skips and the last layers stay, so the estimate so far becomes a
    prediction. Batch normalisation keeps its statistics, which are those of the whole network.

    The predictions without each block and after each block are computed at the start, so they need no kernel. Any other combination
    is computed when it is asked for, in a tenth of a second for a slice of 256² pixels and a quarter of the paper's maps.

    Args:
        model: FC-ResNet, or a network that has one, such as `models.fcn_fc_resnet`. It stays as it is.
        case: case with a label, prepared as the network's training cases were.
        index: slice along W; by default the one with most of the class.
        label: class whose prediction is shown.

    Attributes:
        off: names of the blocks that are off, in the order of the network. Synchronised with the browser.
        blocks: names of all blocks.

    Raises:
        ValueError: for a network without FC-ResNet, a case without label, an unknown block, a slice or a class that is not there.

    Source: Drozdzal et al. 2018, sections 1 and 3.2 and table II; Veit, Wilber and Belongie 2016, section 4.1.
    Taught in notebook 10.
    """

    _esm = script("block_switchboard.js")
    _css = styles("block_switchboard.css", "medseg-blocks")

    off = traitlets.List(traitlets.Unicode()).tag(sync=True)
    _image = traitlets.Bytes().tag(sync=True)
    _truth = traitlets.Bytes().tag(sync=True)
    _pictures = traitlets.List().tag(sync=True)  # without each block, then after none, one, … all
    _answer = traitlets.Dict().tag(sync=True)  # the last other combination: off, picture, dice
    _kernel = traitlets.Bool(True).tag(sync=True)

    def __init__(self, model: Network, case: Case, *, index: int | None = None, label: int = 1):
        parts = {name: part for name, part in model.named_modules() if isinstance(part, FCResNet)}
        if len(parts) != 1:
            found = f"{type(model).__name__} has {len(parts) or 'no'} FC-ResNet"
            raise ValueError(f"{found}; expected models.fc_resnet, models.fcn_fc_resnet or another network with one")
        check_images(case)
        if case.label is None:
            raise ValueError(f"{case.name} has no label to compare with")
        if not 0 < label < max(2, model.classes):
            raise ValueError(f"there is no class {label}; the network has classes 1 to {max(2, model.classes) - 1}")
        index = plotting.busiest_position(case.label == label, case.shape)[2] if index is None else index
        if not 0 <= index < case.shape[2]:
            raise ValueError(f"there is no slice {index}; there are 0 to {case.shape[2] - 1}")
        self._model, self._label, self._index = model, label, index
        self._case = case.crop((slice(None), slice(None), slice(index, index + 1)))
        ((prefix, part),) = parts.items()
        self._rows = _lay_out(prefix, part)
        names = [name for name, module in model.named_modules() if isinstance(module, attribution.RESIDUAL_BLOCKS)]
        self.blocks = [name for name in names if any(name in of_row for of_row in self._rows.values())]
        self._known: dict[frozenset, tuple[np.ndarray, float]] = {}
        self._alone = [self._run([name]) for name in self.blocks]
        self._after = [self._run(self.blocks[n:]) for n in range(len(self.blocks) + 1)]
        pictures = [pack(levels) for levels, _ in (*self._alone, *self._after)]
        image, ends = self._case.image[0], find_limits(self._case.image[0])
        super().__init__(_image=pack(to_bytes(image, *ends)), _truth=pack(self._case.label == label), _pictures=pictures)
        self._scene = {
            "title": f"{case.name}, slice {index}",
            "shape": self._case.shape,
            "aspect": case.voxel_size[1] / case.voxel_size[0],
            "plane": plotting.find_plane("axial")._asdict(),
            "window": plotting.default_window(image),
            "low": ends[0],
            "high": ends[1],
            "rows": list(self._rows.items()),
            "blocks": self.blocks,
            "plain": [model.get_submodule(name).hands_on for name in self.blocks],
            "alone": [dice for _, dice in self._alone],
            "after": [dice for _, dice in self._after],
            "colours": {name: plotting.COLOURS[name] for name in (*plotting.OUTCOMES[1:], "probability")},
        }

    def __repr__(self) -> str:
        return f"BlockSwitchboard({self._case.name!r}, slice {self._index}, {len(self.off)} of {len(self.blocks)} blocks off, Dice {self.dice:.3f})"

    def read_after(self, count: int) -> None:
        """Switch on the first `count` blocks, and all later ones off."""
        if not 0 <= count <= len(self.blocks):
            raise StateError(f"count is {count}; expected 0 to {len(self.blocks)} blocks")
        self.off = self.blocks[count:]

    @property
    def dice(self) -> float:
        """Dice score of the class in the slice, with the blocks in `off` off."""
        return self._run(self.off)[1]

    @property
    def prediction(self) -> np.ndarray:
        """Pixels predicted as the class with the blocks in `off` off, bool `(D, H)`."""
        return self._run(self.off)[0] % 2 == 1

    @property
    def table(self) -> pd.DataFrame:
        """Dice without each block alone and after each block, a row for each block; row 0 has no block at all."""
        without, after = ([np.nan, *(d for _, d in self._alone)], [d for _, d in self._after])
        shortcut = ["", *("identity" if plain else "changes" for plain in self._scene["plain"])]
        return pd.DataFrame({"block": ["none", *self.blocks], "shortcut": shortcut, "without": without, "after": after})

    def _run(self, off: Iterable[str]) -> tuple[np.ndarray, float]:
        """Return the byte of each pixel, twice the probability in 127ths plus whether the class is predicted, and the Dice score."""
        key = frozenset(off)
        if key not in self._known:
            with attribution.without(self._model, [name for name in self.blocks if name in key]):
                logits = inference.predict(self._model, self._case, output="logits", progress=False)
            if len(logits) == 1:  # a sigmoid's; the background has the logit 0
                logits = np.concatenate([np.zeros_like(logits), logits])
            predicted = logits.argmax(axis=0) == self._label
            probability = torch.softmax(torch.from_numpy(logits), dim=0)[self._label].numpy()
            levels = (2 * np.rint(127 * probability) + predicted).astype(np.uint8)[:, :, 0]
            self._known[key] = levels, metrics.dice(predicted, self._case.label == self._label)
        return self._known[key]

    @traitlets.observe("off")
    def _compute(self, change) -> None:
        off = self.blocks[len(self.blocks) - len(self.off) :]
        if len(self.off) > 1 and self.off != off:
            levels, dice = self._run(self.off)
            self._answer = {"off": self.off, "picture": pack(levels), "dice": dice}

    # --------------------------------------------------------------------------------------------------- static forms

    def _page_state(self) -> dict[str, object]:
        return super()._page_state() | {"_kernel": False}

    def _title(self) -> str:
        return "Residual blocks, switched off"

    def _alt(self) -> str:
        off = f"{len(self.off)} off ({', '.join(self.off[:6])}{', …' if len(self.off) > 6 else ''})" if self.off else "all on"
        return (
            f"{self._case.name}, slice {self._index}: pixels found, missed and made up, and the probability, by a network of "
            f"{len(self.blocks)} residual blocks, {off}: Dice {self.dice:.3f}, of the whole network {self._after[-1][1]:.3f}. Below, Dice "
            f"after each block, from {self._after[0][1]:.3f} with none, and Dice without each block alone, {min(d for _, d in self._alone):.3f} at least."
        )

    def _draw(self) -> Figure:
        """Draw image and probability, and below them Dice after each block and without each block."""
        plane, (levels, dice) = plotting.find_plane("axial"), self._run(self.off)
        truth, levels = (plotting.cut(a, plane, 0) for a in (self._case.label == self._label, levels[:, :, None]))
        outcomes = plotting.Overlay("outcomes", plotting.outcomes(truth, levels % 2 == 1), "area")
        painted = plotting.paint(
            plotting.cut(self._case.image[0], plane, 0), self._scene["window"], [outcomes], 0.65, plotting.OUTCOMES
        )
        count, after, alone = len(self.blocks), np.array(self._scene["after"]), np.array(self._scene["alone"])
        low, high = np.floor(10 * after.min()) / 10, np.ceil(10 * max(after.max(), alone.max())) / 10
        with plotting.style():
            figure = Figure(figsize=(9.4, 3.4), dpi=100, layout="constrained")
            left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
            left.imshow(painted, aspect=self._scene["aspect"])
            middle.imshow(levels // 2 / 127, cmap=plotting.PROBABILITY, vmin=0, vmax=1, aspect=self._scene["aspect"])
            plotting.picture([left, middle])
            left.set_title(f"{len(self.off)} of {count} blocks off: Dice {dice:.3f}")
            middle.set_title("probability")
            right.plot(after, color="#222222", label="after this block")
            for some, mark in ((alone >= low, "s"), (alone < low, "v")):
                text = "without it alone" if mark == "s" else "the same, below the scale"
                places = np.flatnonzero(some)
                right.plot(
                    places + 1,
                    np.maximum(alone[places], low),
                    mark,
                    color="#222222",
                    clip_on=False,
                    ms=3 if mark == "s" else 7,
                    label=text,
                )
            if self.off == self.blocks[count - len(self.off) :]:
                right.plot(count - len(self.off), dice, "o", color=plotting.COLOURS["probability"])
            right.set(xlabel="residual block", ylabel="Dice", ylim=(low, high), title="all blocks")
            handles = [Patch(color=plotting.COLOURS[n], label=n) for n in plotting.OUTCOMES[1:]]
            figure.legend(handles=[*handles, *right.get_legend_handles_labels()[0]], loc="outside lower center", ncols=6)
        return figure

    @traitlets.validate("off")
    def _valid_off(self, proposal):
        if unknown := [name for name in proposal["value"] if name not in self.blocks]:
            raise StateError(
                f"there is no block {list_names(unknown)}; board.blocks has their names, such as {self.blocks[0]!r}"
            )
        return [name for name in self.blocks if name in proposal["value"]]


def _lay_out(prefix: str, part: FCResNet) -> dict[str, list[str]]:
    """Return the names of the blocks of each stage: "down.0", …, "across", "up.0", …"""
    modules = {id(m): n for n, m in part.named_modules()}
    rows = {}
    for stage in (*part.down, part.across, *part.up):
        blocks = stage if isinstance(stage, nn.Sequential) else [stage]
        rows[modules[id(stage)]] = [f"{prefix}.{modules[id(b)]}".lstrip(".") for b in blocks]
    return rows
