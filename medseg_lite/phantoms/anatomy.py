"""The brain of one person, made from the ICBM152 average by a random warp, sharper tissues and cortical folds of its own.

The average of 152 brains knows where cortex is but has lost the folds, which differ between people. A random labyrinth
puts them back. It is drawn on the surface of each hemisphere and continues straight down into it. Where the average is in
doubt, the labyrinth decides which voxels become sulcus, which cortex and which white matter. Where the average is sure,
the labyrinth has no say.

World positions are mm from the middle of the field of view, template positions are MNI mm. Both grow to the right, front
and top. The template is symmetric and its plane x = 0 is the falx.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from scipy import ndimage

from .. import paths
from .noise import Axes, bspline_noise, stream

CENTRE = np.array([0.0, -17.0, 11.0], np.float32)  # template position of the middle of the field of view
SHRINK = 0.84  # the ICBM152 average is larger than the people in it
EXTENT = ((-80.0, 80.0), (-88.0, 88.0), (-72.0, 72.0))  # mm that random fields span, on any grid

# Arteries, veins and sinuses as polylines of template positions. Those that start at x > 0 exist on both sides.
VESSELS = (
    [(0, -46, 12), (0, -66, -1), (0, -88, -14)],  # straight sinus
    [(2, -8, 17), (2, -30, 15), (0, -46, 12)],  # internal cerebral veins
    [(0, -16, -18), (0, -20, -42)],  # basilar artery
    [(6, -15, -14), (21, -28, -11), (20, -42, -4)],  # posterior cerebral artery
    [(4, 3, -14), (24, 3, -16), (41, 6, -9), (45, -8, 4)],  # middle cerebral artery
    [(2, 6, -13), (2, 30, -5), (2, 37, 10), (2, 20, 31)],  # anterior cerebral artery
)


def sample(table: torch.Tensor, first: np.ndarray, step: float, points: np.ndarray) -> np.ndarray:
    """Interpolate maps stored channels last, `(X, Y, Z, C)`, linearly at points `(3, N)` mm; returns `(C, N)`.

    With channels last, the eight corners of a point are eight rows of memory, whatever the number of maps, and
    `embedding_bag` sums weighted rows. Points outside take the value at the nearest edge.
    """
    flat = table.flatten(0, 2)
    out = np.empty((flat.shape[1], points.shape[1]), np.float32)
    for start in range(0, points.shape[1], 1 << 15):  # pieces that fit the processor's cache
        piece = slice(start, start + (1 << 15))
        corner, weight = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
        for x, origin, size in zip(points[:, piece], first, table.shape):
            t = np.clip((x - np.float32(origin)) * np.float32(1 / step), 0, size - 1.001)
            part, cell = np.modf(t, dtype=np.float32)
            corner = np.concatenate([corner * size + cell.astype(np.int32), corner * size + cell.astype(np.int32) + 1])
            weight = np.concatenate([weight * (1 - part), weight * part])
        rows = torch.nn.functional.embedding_bag(
            torch.from_numpy(corner.T.copy()), flat, per_sample_weights=torch.from_numpy(weight.T.copy()), mode="sum"
        )
        out[:, piece] = rows.numpy().T
    return out


class Template:
    """The maps of the average brain on its 1.5 mm grid; `template()` makes them once."""

    def __init__(self):
        with np.load(paths.shipped("anatomy", "icbm152_2009a.npz"), allow_pickle=False) as file:
            t1, gm, wm = (file[name] / np.float32(255) for name in ("t1", "gm", "wm"))
            affine = file["affine"]
        self.first = affine[:3, 3].astype(np.float32)
        self.step = float(affine[0, 0])
        axes = [f + self.step * np.arange(n) for f, n in zip(self.first, t1.shape)]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)

        def blur(array, mm):
            return ndimage.gaussian_filter(array, mm / self.step, truncate=3)

        mask = ndimage.binary_fill_holes(t1 > 0)
        csf = np.clip(mask - gm - wm, 0, 1)
        depth = self._distance(mask)[0].astype(np.float32)
        ventricle = np.clip((csf - 0.45) * 4, 0, 1) * (depth > 18)
        # Between ventricle and white matter the average shows a ring of "grey matter": partial volume, not cortex.
        ring = (blur(ventricle, 2.5) > 0.08) & (blur(gm, 4.5) < 0.55)
        wm, gm = np.where(ring, wm + 0.8 * gm, wm), np.where(ring, 0.2 * gm, gm)
        # A voxel that is darker on T1 than its surroundings is the bottom of a sulcus.
        sulcus = np.clip(blur(t1, 4) - t1 - 0.02, 0, None) * mask
        # The fissures between the cerebellum's folia are finer than the average can show. They are drawn as sheets that
        # fan out from the middle of the cerebellum.
        behind = (y < -32) & (z < -19 - 0.12 * (y + 60))
        cerebellum = blur(np.broadcast_to(behind, mask.shape).astype(np.float32), 2)
        fan = np.arctan2(z + 33, -(y + 42)) + 0.004 * np.abs(x)
        sulcus += cerebellum * gm * np.clip(np.cos(30 * fan) - 0.35, 0, None) * 0.22 * np.clip(depth / 3, 0, 1)
        # The surface that folds: the outside of the brain and its medial wall.
        cortex = mask & ~((np.abs(x) < 1) & (csf > 0.3) & (ventricle < 0.1))
        reach, nearest = self._distance(cortex)
        hull = [blur(f + self.step * n.astype(np.float32), 2) for f, n in zip(self.first, nearest)]
        deep = ((x / 36) ** 2 + ((y + 12) / 48) ** 2 + ((z - 6) / 27) ** 2 < 1) | ((z < -20) & (np.abs(x) < 16) & (y < 0))
        folding = blur((~deep).astype(np.float32), 4) * (1 - cerebellum) * np.clip((26 - reach) / 10, 0, 1)
        # The part of T1 that the three tissues leave unexplained: pallidum, thalamic nuclei, fibre tracts.
        typical = [np.median(t1[p > 0.95]) for p in (csf, gm, wm)]
        detail = t1 - csf * typical[0] - gm * typical[1] - wm * typical[2]
        detail = np.clip(detail, -0.2, 0.2) * (gm + wm) * (depth > 3)
        callosum = (wm > 0.6) & (np.abs(x) < 8) & (z > 2) & (y > -46)
        vessel = self._draw_vessels(axes, depth, ventricle) * mask
        maps = {"gm": gm, "wm": wm, "csf": csf, "sulcus": sulcus, "depth": depth, "ventricle": ventricle}
        maps |= {"near_ventricle": blur(ventricle, 3), "callosum": callosum, "cerebellum": cerebellum, "detail": detail}
        maps |= {"vessel": vessel, "folding": folding, "reach": reach, **dict(zip(("hull_x", "hull_y", "hull_z"), hull))}
        self.names = tuple(maps)
        table = np.empty((*mask.shape, len(maps)), np.float32)
        for out, *parts in zip(table, *maps.values()):  # slab by slab, which fit the processor's cache
            np.stack(parts, -1, out=out, casting="same_kind")
        self.table = torch.from_numpy(table)
        self.depth = self.table[..., [self.names.index("depth")]].contiguous()

    def _distance(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the distance in mm from each voxel to the nearest one outside a mask, and the indices of that voxel.

        `distance_transform_edt` itself would hold all three offsets at once; axis by axis takes a third of its time.
        """
        nearest = ndimage.distance_transform_edt(mask, self.step, return_distances=False, return_indices=True)
        squared = np.zeros(mask.shape)
        for index, own in zip(nearest, np.indices(mask.shape, np.int32, sparse=True)):
            offset = (index - own) * self.step
            squared += np.multiply(offset, offset, out=offset)
        return np.sqrt(squared, out=squared), nearest

    def _draw_vessels(self, axes: Axes, depth: np.ndarray, ventricle: np.ndarray) -> np.ndarray:
        """Draw what takes up contrast agent in a healthy brain: sagittal sinus, large vessels, choroid plexus."""
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        sinus = np.exp(-((x / 2.2) ** 2)) * np.clip((5 - depth) / 3, 0, 1) * (z > -15) * (y < 62)
        plexus = np.exp(-((np.abs(x) - 25) ** 2 + (y + 43) ** 2 + (z - 12) ** 2) / 5**2) * ventricle
        vessel = np.maximum(sinus, plexus)
        for line in VESSELS:
            for side in (1, -1) if line[0][0] else (1,):
                points = np.array(line, np.float32) * (side, 1, 1)
                for a, b in pairwise(points):
                    low = ((np.minimum(a, b) - 5 - self.first) / self.step).astype(int).clip(0)
                    high = ((np.maximum(a, b) + 5 - self.first) / self.step).astype(int) + 1
                    box = tuple(map(slice, low, high))
                    p = np.stack(np.meshgrid(*(axis[part] for axis, part in zip(axes, box)), indexing="ij"), -1) - a
                    share = np.clip(p @ (b - a) / np.sum((b - a) ** 2), 0, 1)  # of the way from a to b
                    distance = np.linalg.norm(p - share[..., None] * (b - a), axis=-1)
                    vessel[box] = np.maximum(vessel[box], np.exp(-((distance / 1.6) ** 2)))
        return vessel

    def look_up(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """Return all maps at template points `(3, N)`, each `(N,)`."""
        return dict(zip(self.names, sample(self.table, self.first, self.step, points)))

    def depth_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the distance from the brain's surface in template mm, 0 outside, at positions `(3, D, H, W)`."""
        return sample(self.depth, self.first, self.step, positions.reshape(3, -1)).reshape(positions.shape[1:])


@lru_cache(maxsize=1)
def template() -> Template:
    """Return the template; it is made at the first call."""
    return Template()


class Person:
    """The anatomy that belongs to a seed: the same on any grid, at any site, with or without a lesion.

    Attributes:
        atrophy: 0 (young, narrow sulci) to 1 (old: wide sulci and ventricles, white-matter lesions).
        age: age in years. It grows with atrophy and is only a label for tables.
    """

    def __init__(self, seed: int):
        self.seed = seed
        rng = stream(seed, "person")
        self.atrophy = float(rng.random())
        self.age = round(28 + 50 * self.atrophy)
        angles = rng.normal(0, np.deg2rad(2), 3)
        rotation = np.eye(3)
        for (i, j), angle in zip(((1, 2), (0, 2), (0, 1)), angles):
            turn = np.eye(3)
            turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
            rotation = rotation @ turn
        self.matrix = (rotation * np.exp(rng.normal(0, 0.03, 3)) / SHRINK).astype(np.float32)
        self.offset = CENTRE + rng.normal(0, 1, 3).astype(np.float32)

    def positions(self, axes: Axes) -> np.ndarray:
        """Return the template position `(3, D, H, W)` of every voxel, before any lesion pushes tissue aside."""
        rng = stream(self.seed, "warp")
        grid = np.meshgrid(*axes, indexing="ij", sparse=True)
        warp = sum(
            sd * bspline_noise(rng, axes, scale, extent=EXTENT, count=3) for scale, sd in ((40, 2.7), (18, 1.5), (9, 0.9))
        )
        for i in range(3):
            warp[i] += sum(self.matrix[i, j] * grid[j] for j in range(3)) + self.offset[i]
        return warp

    def look(self, positions: np.ndarray, effaced: np.ndarray | float = 0.0) -> dict[str, np.ndarray]:
        """Return this person's maps at template positions: those of `Template`, with their own `csf`, `gm` and `wm`.

        Args:
            positions: template positions `(3, D, H, W)`.
            effaced: how far, 0 to 1, a lesion's pressure has closed the sulci, one number or `(D, H, W)`.
        """
        depth = template().depth_at(positions)
        inside = depth > 0.1
        maps = template().look_up(positions[:, inside])
        # A 2.5 mm table of the labyrinth, looked up at the surface point that is nearest to each voxel.
        first, last, step = np.array([-85.0, -120.0, -80.0]), np.array([85.0, 90.0, 95.0]), 2.5
        table = bspline_noise(stream(self.seed, "folds"), [np.arange(a, b, step) for a, b in zip(first, last)], 6.0)
        hull = np.stack([maps.pop("hull_x"), maps.pop("hull_y"), maps.pop("hull_z")])
        labyrinth = sample(torch.from_numpy(table)[..., None], first, step, hull)[0]
        labyrinth = 1.6 * np.abs(labyrinth) - 1.2  # lowest along the bottom of sulci
        folding, reach = maps.pop("folding"), maps.pop("reach")
        sway = 2 * folding * labyrinth
        if not np.isscalar(effaced):
            effaced = effaced[inside]

        wide = np.clip((maps["near_ventricle"] - 0.60 + 0.33 * self.atrophy) * 6, 0, 1) * (folding < 0.3)
        csf = maps["csf"] + (1.2 + 2.2 * self.atrophy) * maps.pop("sulcus") + wide
        # Sharper than the average (power 1.8), swayed by the labyrinth, and with a ribbon of cortex on every crown.
        crown = 3 * np.clip((4.5 - reach) / 2, 0, 2) * folding
        csf = np.clip(csf, 1e-3, 1) ** 1.8 * np.exp(-sway) * (1 - effaced * np.clip(2 * folding, 0, 1))
        gm = np.clip(maps["gm"], 1e-3, 1) ** 1.8
        wm = np.clip(maps["wm"], 1e-3, 1) ** 1.8 * np.exp(sway - crown)
        total = csf + gm + wm
        maps.update(csf=csf / total, gm=gm / total, wm=wm / total)

        out = {}
        for name, values in maps.items():
            out[name] = np.full(depth.shape, 1 if name == "csf" else 0, np.float32)  # fluid surrounds the brain
            out[name][inside] = values
        out["depth"] = depth
        return out
