"""A training segment over a lesion: what it sees, what it predicts, what that costs, and how much lesion it captures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage

from .. import plotting
from ..receptive_field import output_size, receptive_field_recursion
from ..volume import Case, bounding_box
from ._base import CaseWidget, StateError, check_images, script, styles

LARGEST_OUTPUT, LARGEST_RADIUS = 29, 12  # voxels
COLOURS = {
    "seen": plotting.COLOURS["field"],
    "predicted, background": plotting.COLOURS["prediction"],
    "predicted, lesion": plotting.class_colour("lesion"),
    "lesion": plotting.COLOURS["truth"],
}


class SegmentDial(CaseWidget):
    """Sliders for the side of a segment's output and for a lesion's radius, and the segment itself, to be dragged over a brain.

        dial = SegmentDial(case)
        dial.output = 9          # the paper's S-25: 9 voxels and 8 of context on each side
        dial.radius = 4
        dial.position            # the segment's middle
        dial.numbers             # what is shown beside the slice

    The lesion is a ball that is drawn into the slice; it and the segment are three-dimensional. The cost is that of a forward pass.

    Args:
        case: case whose first channel is shown, better one without a lesion of its own.
        centre: voxel in the middle of the ball; by default one at a third of the brain's width.
        kernels: side of each layer's kernel.
        maps: numbers of feature maps, those of the input first. By default both are those of the paper's Shallow.

    Attributes:
        output: odd side of the predicted cube, in voxels.
        radius: radius of the ball, in voxels.
        position: voxel in the middle of the segment.

    All attributes are synchronised with the browser, which computes all numbers itself.

    Raises:
        ValueError: for an output that is even or out of range, such a radius or position, or numbers of maps that do not fit.

    Source: Kamnitsas et al. 2017, sections 2.1 and 2.2 and figure 3.
    Taught in notebook 04.
    """

    _esm = script("segment_dial.js")
    _css = styles("segment_dial.css", "medseg-segment")

    output = traitlets.Int(9).tag(sync=True)
    radius = traitlets.Int(4).tag(sync=True)
    plane = traitlets.Unicode("axial", read_only=True).tag(sync=True)

    def __init__(
        self,
        case: Case,
        *,
        centre: Sequence[int] | None = None,
        kernels: Sequence[int] = (5, 5, 5, 5, 1),
        maps: Sequence[int] = (4, 30, 40, 40, 50, 2),
        **state: int,
    ):
        check_images(case)
        if len(maps) != len(kernels) + 1:
            raise ValueError(f"{len(maps)} numbers of maps for {len(kernels)} kernels; expected one more, the input's first")
        self._case, self._box = case, bounding_box(case.whole_mask(), border=3)
        self._kernels, self._maps, self._field = kernels, maps, receptive_field_recursion(kernels)[-1]
        middle = [(s.start + s.stop) // 2 for s in self._box]
        middle[0] -= (self._box[0].stop - self._box[0].start) // 6
        self._centre = plotting.check_position(middle if centre is None else centre, case.shape)
        super().__init__(position=self._centre, **state)
        scene = self._describe_case()
        sequence = scene["sequences"][0]
        self._volumes = self._pack_volumes([(sequence["low"], sequence["high"])])
        outputs = range(1, LARGEST_OUTPUT + 1, 2)
        shares = [[captured_share(radius, output) for output in outputs] for radius in range(1, LARGEST_RADIUS + 1)]
        look = {"field": self._field, "largest": [LARGEST_OUTPUT, LARGEST_RADIUS], "colours": COLOURS, "centre": self._centre}
        self._scene = scene | look | {"costs": [self.multiplications(output) for output in outputs], "shares": shares}

    def __repr__(self) -> str:
        return f"SegmentDial({self._case.name!r}, output {self.output}³, lesion of radius {self.radius}, at {self.position})"

    def multiplications(self, output: int) -> int:
        """Return the multiplications of a forward pass that predicts a cube of this side: Σ δ_l³ κ_l³ C_(l-1) C_l."""
        seen = output + self._field - 1
        sides = [output_size(seen, self._kernels[: n + 1]) for n in range(len(self._kernels))]
        return sum(s**3 * k**3 * a * b for s, k, a, b in zip(sides, self._kernels, self._maps, self._maps[1:]))

    @property
    def numbers(self) -> dict[str, float]:
        """Sizes, cost for each predicted voxel, and the share of lesion: here, and over all segments centred on it."""
        predicted, cost = self.output**3, self.multiplications(self.output)
        offsets = np.indices((self.output,) * 3) - self.output // 2
        away = offsets + np.subtract(self.position, self._centre).reshape(3, 1, 1, 1)
        return {
            "seen": self.output + self._field - 1,
            "predicted": predicted,
            "multiplications": cost / predicted,
            "cheaper": self.multiplications(1) * predicted / cost,
            "share": float(((away**2).sum(axis=0) <= self.radius**2).mean()),
            "mean share": captured_share(self.radius, self.output),
        }

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "A training segment over a lesion"

    def _alt(self) -> str:
        n = self.numbers
        return (
            f"Axial slice of {self._case.name} with a ball of radius {self.radius}, and a segment of {n['seen']}³ voxels that predicts "
            f"{n['predicted']} of them: {100 * n['share']:.0f} % of these are lesion, and a voxel costs {n['cheaper']:.0f} times less "
            "than a patch. Beside it two curves against the side of the output: the lesion's share falls, and so does the cost."
        )

    def _draw(self) -> Figure:
        """Draw the slice with the segment, and share and cost against the side of the output."""
        plane, n, case = plotting.find_plane("axial"), self.numbers, self._case
        planes = [case.image[0], *np.indices(case.shape)]
        image, *place = (plotting.cut(a[self._box], plane, self.position[2] - self._box[2].start) for a in planes)
        away = np.max([abs(p - q) for p, q in zip(place, self.position)], axis=0)
        ball = sum((p - q) ** 2 for p, q in zip(place, self._centre)) <= self.radius**2
        painted, half = plotting.paint(image, self._scene["sequences"][0]["window"]), self.output // 2
        for name, area in {"predicted, background": ~ball, "predicted, lesion": ball}.items():
            painted = plotting.blend(painted, plotting.rgb(COLOURS[name]), 0.6 * (area & (away <= half)))
        with plotting.style():
            figure = Figure(figsize=(9.4, 4), dpi=100, layout="constrained")
            left, *right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
            left.imshow(np.rint(painted).astype(np.uint8), aspect=case.voxel_size[plane.y] / case.voxel_size[plane.x])
            for name, area in {"lesion": ball, "seen": away <= half + self._field // 2}.items():
                plotting.outline(left, area, colour=COLOURS[name])
            plotting.picture(left)
            left.set_title(f"sees {n['seen']}³, predicts {n['predicted']} voxels")
            sides, shares = np.arange(1, LARGEST_OUTPUT + 1, 2), 100 * np.array(self._scene["shares"][self.radius - 1])
            cost = np.array(self._scene["costs"]) / sides**3 / 1e6
            for axes, values, title in zip(right, (shares, cost), ("lesion, mean (%)", "million multiplications a voxel")):
                axes.plot(sides, values, color="#444444")
                axes.plot(self.output, values[self.output // 2], "o", color=COLOURS["predicted, lesion"])
                axes.set(title=title, xlabel="side of the output")
            right[1].set_yscale("log")
            lines = [plotting.outline_handle(n, colour=COLOURS[n]) for n in ("seen", "lesion")]
            patches = [Patch(color=c, label=n) for n, c in COLOURS.items() if n.startswith("predicted")]
            figure.legend(handles=lines + patches, loc="outside lower center", ncols=4)
        return figure

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("output", "radius")
    def _valid_number(self, proposal):
        name, value = proposal["trait"].name, proposal["value"]
        largest = {"output": LARGEST_OUTPUT, "radius": LARGEST_RADIUS}[name]
        if not 1 <= value <= largest or (name == "output" and value % 2 == 0):
            raise StateError(f"{name} is {value}; expected {'an odd' if name == 'output' else 'a'} number from 1 to {largest}")
        return value


def captured_share(radius: int, output: int) -> float:
    """Return the lesion's share of a predicted cube, mean over all voxels of a ball that it can be centred on."""
    reach = radius + output // 2
    ball = (np.mgrid[[slice(-reach, reach + 1)] * 3] ** 2).sum(axis=0) <= radius**2
    return float(ndimage.uniform_filter(ball.astype(float), output, mode="constant")[ball].mean())
