"""Signed distances to organs, painted one over the other; the CT and prostate phantoms are drawn with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .noise import Axes

Box = tuple[slice, slice, slice]
EVERYWHERE: Box = (slice(None),) * 3


class Scene:
    """A picture under construction, in mm. Each shape covers what was painted before it.

    A shape is a distance to its surface (mm, negative inside) on a box of voxels, so that small shapes cost little. Space is
    warped: `points` holds, for every voxel, its position in the ideal anatomy.

    Args:
        axes: positions of the voxels along D, H, W.
        shift: displacement of each voxel by the warp, `(3, D, H, W)` in mm.
        background: value of the empty picture.
    """

    def __init__(self, axes: Axes, shift: np.ndarray, background: float):
        self.axes = axes
        self.points = [s + a.reshape([-1 if k == i else 1 for k in range(3)]) for i, (a, s) in enumerate(zip(axes, shift))]
        self.image = np.full(shift.shape[1:], background, np.float32)
        self.margin = float(np.abs(shift).max()) + 3
        self.soft = 0.3 * float(axes[0][1] - axes[0][0])  # mm; imitates the partial volume effect at edges

    def box(self, low: Sequence[float], high: Sequence[float]) -> Box:
        """Return the voxels that may lie between two corners of the ideal anatomy."""
        limits = [
            np.searchsorted(a, (u - self.margin, v + self.margin))
            for a, u, v in zip(self.axes, np.minimum(low, high), np.maximum(low, high))
        ]
        return tuple(slice(int(u), int(v)) for u, v in limits)

    def points_in(self, box: Box) -> list[np.ndarray]:
        """Return the ideal positions of the voxels in a box, one array per axis."""
        return [p[box] for p in self.points]

    def ellipsoid(self, centre, radii, *, turn: float = 0.0, reach: float = 3.0) -> tuple[Box, np.ndarray]:
        """Return box and distance of an ellipsoid that is turned about W by `turn` radians; the box extends `reach` mm beyond."""
        centre, radii = np.asarray(centre, float), np.asarray(radii, float)
        if turn:
            c, s = abs(np.cos(turn)), abs(np.sin(turn))
            half = np.array([c * radii[0] + s * radii[1], s * radii[0] + c * radii[1], radii[2]]) + reach
        else:
            half = radii + reach
        box = self.box(centre - half, centre + half)
        return box, ellipsoid(self.points_in(box), centre, radii, turn)

    def tube(self, a, b, radius_a: float, radius_b: float) -> tuple[Box, np.ndarray]:
        """Return box and distance of a rod from `a` to `b` with round ends."""
        a, b = np.asarray(a, float), np.asarray(b, float)
        r = max(radius_a, radius_b) + 2
        box = self.box(np.minimum(a, b) - r, np.maximum(a, b) + r)
        offsets = [p - np.float32(u) for p, u in zip(self.points_in(box), a)]
        d = (b - a).astype(np.float32)
        t = np.clip(sum(o * n for o, n in zip(offsets, d)) / max(float(d @ d), 1e-6), 0, 1)
        return box, np.sqrt(sum((o - t * n) ** 2 for o, n in zip(offsets, d))) - (radius_a + (radius_b - radius_a) * t)

    def paint(self, box: Box, distance: np.ndarray, value, soft: float | None = None) -> None:
        """Cover the inside of a shape with `value`, a number or an array on the box."""
        part = self.image[box]
        part += coverage(distance, self.soft if soft is None else soft) * (value - part)


def ellipsoid(points: Sequence[np.ndarray], centre, radii, turn: float = 0.0) -> np.ndarray:
    """Return the distance to an ellipsoid in mm; near its surface the error is of second order."""
    x, y, z = (p - np.float32(c) for p, c in zip(points, centre))
    if turn:
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        x, y = c * x + s * y, c * y - s * x
    a, b, c = (np.float32(1 / r) for r in radii)
    x, y, z = x * a, y * b, z * c
    # The small constants avoid 0 / 0 at the very centre, where the result is minus the largest radius.
    q = np.sqrt(x * x + y * y + z * z + np.float32(1e-8))
    slope = np.sqrt((x * a) ** 2 + (y * b) ** 2 + (z * c) ** 2 + np.float32(1e-8) * min(a, b, c) ** 2)
    return q * (q - 1) / slope


def coverage(distance: np.ndarray, soft: float) -> np.ndarray:
    """Return the share of each voxel that lies inside a shape: linear from 1 at 2 `soft` mm inside to 0 at 2 `soft` outside."""
    return np.clip(np.float32(0.5) - distance * np.float32(0.25 / soft), 0, 1)


def join(a: np.ndarray, b: np.ndarray, blend: float) -> np.ndarray:
    """Return the distance to the union of two shapes, with the crease between them rounded over `blend` mm."""
    h = np.clip(0.5 + 0.5 * (b - a) / np.float32(blend), 0, 1)
    return b + (a - b) * h - np.float32(blend) * h * (1 - h)


def carve(a: np.ndarray, b: np.ndarray, blend: float) -> np.ndarray:
    """Return the distance to the first shape without the second, with the edge between them rounded over `blend` mm."""
    return -join(-a, b, blend)
