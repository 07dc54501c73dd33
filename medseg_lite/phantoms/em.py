"""Electron-microscopy phantoms: stacks of slices through nerve tissue, with the membranes between cells labelled.

The phantoms follow the data of the ISBI 2012 challenge (Arganda-Carreras et al. 2015, Frontiers in Neuroanatomy 9:142), on which
Drozdzal et al. 2018, section 4.1, train: 512×512 pixels of 4 nm, slices of 50 nm, one number from 0 to 255 per pixel.

Cells are an anisotropic power diagram: pixel x belongs to the cell with the lowest (x-c)ᵀA(x-c) - r², where A stretches the
cell along the bundle in which it lies. Where all of these exceed a limit, the pixel belongs to the glia, which fills gaps. Centres
move from slice to slice, as neurites do that run askew. So the diagram tells two more things about every membrane: its distance
from a pixel, and how far it moves within the thickness of a slice. A membrane that moves far is cut obliquely and shows as a broad
grey smear. The rest makes the task hard and is not labelled: vesicles, mitochondria with their cristae, reticulum, and the grain of
the cytoplasm.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ..volume import Case
from .noise import blur, bspline_noise, check_whole, make_cohort, soft_step, stream

CLASSES = ("cell", "membrane")
PIXEL, THICKNESS = 4e-6, 5e-5  # mm
FIELD = 512  # pixels; the densities below are per square of this side
MARGIN = 60  # pixels around the picture that hold cells too
BIG, SMALL = 13, 235  # cells per field, before the small ones give way to the big ones
GLIA = 28.0**2  # limit of the power in square pixels: pixels that no cell reaches with less belong to the glia


def em(seed: int, *, slices: int = 3, size: int = 512, counts: bool = False) -> Case:
    """Generate one stack of slices.

    Args:
        seed: number of the tissue, 0 or more. The same seed gives the same bytes, and its first slices do not depend on the number
            of slices.
        slices: number of slices, 1 to 64. Neighbouring slices correlate, but weakly (0.25), as in the real stack.
        size: number of pixels along D and H, 64 to 1024, of 4 nm each.
        counts: whether the intensities are those of a detector instead of 0 to 255. Each stack then has its own gain (4 to 24)
            and its own offset (0 to 2000).

    Returns:
        A case of one channel, "em", `(1, size, size, slices)`: whole numbers, slices along W. `label` is 0 in cells and 1 on
        membranes (the challenge's own files hold 255 and 0). `info` has the seed and the names of the "classes".
    """
    seed, slices = check_whole("seed", seed, 0), check_whole("slices", slices, 1, 64)
    size = check_whole("size", size, 64, 1024)
    tissue = _Tissue(seed, size)
    image = np.empty((1, size, size, slices), np.float32)
    label = np.empty((size, size, slices), np.uint8)
    for number in range(slices):
        image[0, ..., number], label[..., number] = _draw_slice(tissue, seed, number)
    if counts:
        rng = stream(seed, "em detector")
        gain, offset = np.exp(rng.uniform(np.log(4), np.log(24))), rng.uniform(0, 2000)
        image = np.rint(gain * image + offset).astype(np.float32)
    return Case(
        image=image,
        channels=("em",),
        label=label,
        affine=np.diag([PIXEL, PIXEL, THICKNESS, 1]),
        name=f"em-{seed:04d}",
        info={"seed": seed, "classes": CLASSES},
    )


def em_cohort(count: int, *, first_seed: int = 0, progress: bool = False, **options) -> list[Case]:
    """Generate `count` stacks with consecutive seeds; `options` are those of `em`."""
    return make_cohort(em, count, first_seed=first_seed, progress=progress, **options)


class _Tissue:
    """The cells, organelles and synapses of one stack; positions are in pixels, times in slices."""

    def __init__(self, seed: int, size: int):
        rng = stream(seed, "em tissue")
        low, high = -MARGIN, size + MARGIN
        share = ((high - low) / FIELD) ** 2
        self.axes = (np.arange(size, dtype=np.float32),) * 2
        self.extent = ((low, high),) * 2

        # Big cells, and small cells where those leave room.
        count = max(2, round(BIG * share))
        big = _place_apart(rng, count, low, high, 75)
        small = rng.uniform(low, high, (round(SMALL * share), 2))
        radius = np.exp(rng.normal(np.log(50), 0.35, len(big)))
        gap = np.linalg.norm(small[:, None] - big, axis=2) - 0.95 * radius
        small = small[(gap > 0).all(1)]
        self.centre = np.concatenate([big, small])
        self.radius = np.concatenate([radius, np.exp(rng.normal(np.log(19), 0.40, len(small)))])
        n = len(self.centre)

        # Bundles: smooth fields give the direction and the strength in which cells are stretched.
        along_x, along_y, strength = self._sample(bspline_noise(rng, (np.arange(low, high, 4.0),) * 2, 260, count=3), low)
        angle = np.arctan2(along_y, along_x) / 2 + rng.normal(0, 0.35, n)
        stretch = np.exp(np.clip(0.18 + 0.45 * strength, 0, 0.9) + rng.normal(0, 0.08, n))
        c, s = np.cos(angle), np.sin(angle)
        a, b = 1 / stretch, stretch  # squares of the axes' inverse lengths; their product is 1
        self.metric = np.stack([a * c * c + b * s * s, (a - b) * c * s, a * s * s + b * c * c])  # dd, dh, hh
        self.angle, self.stretch = angle, stretch

        # Most neurites cross the slices steeply, some lie almost in them.
        lean = np.where(rng.random(n) < 0.2, 7.0, 2.6)
        self.velocity = rng.normal(0, 1, (n, 2)) * lean[:, None]
        self.swing, self.phase = rng.uniform(0.15, 0.3, n), rng.uniform(0, 2 * np.pi, n)
        # The glia is one more cell, the last.
        self.shade = np.append(np.where(rng.random(n) < 0.12, rng.uniform(-40, -15, n), rng.normal(2, 6, n)), -14)
        self.vesicles = np.append(np.clip(rng.normal(0.42, 0.45, n), 0.12, 1.2), 0.2)
        self.angle = np.append(self.angle, 0)
        self.mitochondria = [
            (i, rng.normal(0, 0.3, 2), rng.uniform(-0.5, 0.5), rng.uniform(0.5, 0.85), rng.normal(0, 4), rng.random())
            for i in range(n)
            for _ in range(2 if self.radius[i] > 60 else 1)
            if self.radius[i] > 18 and rng.random() < 0.5
        ]
        # Synapses: places and moments; they darken the membranes that pass by.
        count = round(90 * share)
        places, moments, widths = rng.uniform(low, high, (count, 2)), rng.uniform(-3, 67, count), rng.uniform(9, 26, count)
        self.synapses = np.column_stack([places, moments, widths])

        warp = partial(bspline_noise, rng, self.axes, extent=self.extent, count=2)
        self.jitter = rng.normal(0, 2.5, (64, 2))  # slices are not perfectly aligned
        self.bend = 10 * warp(50)
        self.wobble = [4.4 * warp(20) + 1.3 * warp(9) for _ in range(2)]

    def _sample(self, fields: np.ndarray, low: int) -> np.ndarray:
        """Return the values at the cells' centres of fields on a grid of 4 pixels that starts at `low`."""
        index = np.clip(((self.centre - low) / 4).astype(int), 0, fields.shape[1] - 1)
        return fields[:, index[:, 0], index[:, 1]]

    def motion(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Return centres and speeds of the cells. Cells sway, so that none leaves the field for good."""
        sway = (np.sin(self.swing * time + self.phase) - np.sin(self.phase)) / self.swing
        speed = self.velocity * np.cos(self.swing * time + self.phase)[:, None]
        return self.centre + self.velocity * sway[:, None], speed

    def cells(self, time: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the cell of each pixel, its distance to the membrane, and how far that membrane moves in a slice (pixels)."""
        turn = 0.7 * time
        mix = [np.cos(turn), np.sin(turn)]
        shift = self.bend + sum(np.float32(m) * w for m, w in zip(mix, self.wobble))
        shift += self.jitter[time].astype(np.float32)[:, None, None]
        place = self.axes[0][:, None] + shift[0], self.axes[1] + shift[1]
        centre, speed = (np.float32(v) for v in self.motion(time))
        (first, nearest), (second, runner_up) = self._two_nearest(place, shift, centre)

        # Near the membrane f = second - first is 0. Its distance is f over the slope of f, its speed the change of f over that slope.
        # The glia's limit is the same everywhere and always: it has no slope and no change.
        slope_d = slope_h = change = np.float32(0)
        centre, speed = (np.pad(v, ((0, 1), (0, 0))) for v in (centre, speed))
        metric = np.pad(np.float32(self.metric), ((0, 0), (0, 1)))
        for sign, cell in ((-1, nearest), (1, runner_up)):
            x, y = (p - centre[cell, i] for i, p in enumerate(place))
            gd = 2 * sign * (metric[0][cell] * x + metric[1][cell] * y)
            gh = 2 * sign * (metric[1][cell] * x + metric[2][cell] * y)
            slope_d, slope_h = slope_d + gd, slope_h + gh
            change = change - gd * speed[cell, 0] - gh * speed[cell, 1]
        slope = np.sqrt(slope_d**2 + slope_h**2) + 1e-3
        return nearest, (second - first) / slope, np.abs(change) / slope

    def _two_nearest(self, place: tuple[np.ndarray, np.ndarray], shift: np.ndarray, centre: np.ndarray):
        """Return the lowest and the second lowest power of each pixel, each with the number of its cell."""
        d, h = place
        shape = d.shape
        radius2, metric = np.float32(self.radius**2), np.float32(self.metric)
        # Pixels that a cell may own: around the place that the warp sends to its centre, with room for the warp's changes.
        index = tuple(np.clip(centre, 0, len(d) - 1).astype(int).T)
        middle = centre - shift[:, index[0], index[1]].T
        reach = np.sqrt((self.radius**2 + GLIA) * self.stretch) + 32

        first, second = np.full(shape, GLIA, np.float32), np.full(shape, 1e9, np.float32)
        nearest, runner_up = (np.full(shape, len(centre), np.int32) for _ in range(2))
        for i in range(len(centre)):
            lo = np.clip(middle[i] - reach[i], 0, shape).astype(int)
            hi = np.clip(middle[i] + reach[i], 0, shape).astype(int)
            if (lo >= hi).any():
                continue
            box = tuple(slice(a, b) for a, b in zip(lo, hi))
            x, y = d[box] - centre[i, 0], h[box] - centre[i, 1]
            power = x * (metric[0, i] * x + 2 * metric[1, i] * y) + metric[2, i] * y * y - radius2[i]
            one, two = first[box], second[box]
            wins = power < one
            second_place = ~wins & (power < two)
            np.copyto(two, one, where=wins)
            np.copyto(runner_up[box], nearest[box], where=wins)
            np.copyto(two, power, where=second_place)
            runner_up[box][second_place] = i
            np.copyto(one, power, where=wins)
            nearest[box][wins] = i
        return (first, nearest), (second, runner_up)


def _place_apart(rng: np.random.Generator, count: int, low: float, high: float, distance: float) -> np.ndarray:
    """Return up to `count` random points, none closer than `distance` to another."""
    points: list[np.ndarray] = []
    for point in rng.uniform(low, high, (6 * count, 2)):
        if len(points) < count and all(np.hypot(*(point - other)) > distance for other in points):
            points.append(point)
    return np.array(points)


def _draw_slice(tissue: _Tissue, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return image and label `(size, size)` of one slice."""
    rng = stream(seed, f"em slice {number}")
    axes, extent = tissue.axes, tissue.extent

    noise = partial(bspline_noise, rng, axes, extent=extent)
    cell, distance, move = tissue.cells(number)
    size = len(axes[0])
    synapse = np.zeros((size, size), np.float32)
    for d, h, moment, width in tissue.synapses[np.abs(tissue.synapses[:, 2] - number) < 2.5]:
        fade = np.exp(-(((moment - number) / 1.3) ** 2))
        near = [np.exp(-(((x - c) / width) ** 2)) for x, c in zip(axes, (d, h))]
        synapse += np.float32(fade) * np.outer(*near).astype(np.float32)
    synapse = np.minimum(synapse, 1)

    # Membranes. The two sheets and the stain between them take about 2 pixels on each side; oblique ones are broader and paler.
    smear = np.clip(0.5 * np.maximum(move - 4.0, 0), 0, 9)
    half = np.clip(2.65 + 0.4 * noise(30) + 0.3 * noise(9), 1.6, 4.2)
    width = np.hypot(half, 0.9 * smear)
    edge = 0.6 + 0.2 * smear
    profile = soft_step(width - distance, edge) * (half / width) ** 0.55
    dark = 106 * (1 + 0.14 * noise(14)) * profile
    dark += 75 * synapse * np.exp(-((distance / 9) ** 2)) * np.clip(1 + 0.35 * noise(6), 0.3, 2)
    label = distance < np.clip(1.05 * width + 0.2, 2.2, 8.5) + 1.5 * synapse

    # Cytoplasm: a mottled grey of its own in each cell.
    inner = soft_step(distance - 4.5, 1.2)
    rough = 0.75 * noise(3.2) + 0.65 * noise(5)
    image = 162 + tissue.shade[cell] + 8 * noise(11) + (15 + 4 * (tissue.shade[cell] < -12)) * rough
    image = image.astype(np.float32) - dark
    image += _draw_organelles(tissue, rng, number, cell, distance, synapse) * inner

    # The microscope: a little blur, shot noise, uneven illumination.
    image += 43 * rng.standard_normal((size, size), dtype=np.float32)
    image = blur(image, 0.85)
    image = 126 + (image - 126) * rng.uniform(0.93, 1.07) + rng.normal(0, 7) + 5 * noise(170)
    return np.clip(np.rint(image), 0, 255), label.astype(np.uint8)


def _draw_organelles(tissue: _Tissue, rng, number: int, cell, distance, synapse) -> np.ndarray:
    """Return what vesicles, dots, reticulum and mitochondria add to the cytoplasm's grey."""
    size = len(tissue.axes[0])
    out = np.zeros((size, size), np.float32)
    area = (size / FIELD) ** 2

    # Vesicles: dark rings around a bright lumen, crowded in some cells and near synapses; some have a dense core.
    place = rng.integers(0, size, (2, round(5200 * area)))
    crowd = tissue.vesicles[cell[tuple(place)]] * 0.36 + 0.9 * synapse[tuple(place)]
    keep = (rng.random(place.shape[1]) < crowd) & (distance[tuple(place)] > 6)
    n = int(keep.sum())
    radius = rng.normal(3.5, 0.6, n).clip(2.2, 6)
    lumen = np.where(rng.random(n) < 0.08, rng.uniform(-60, -30, n), rng.uniform(5, 30, n))
    _stamp(out, place[:, keep], radius, rng.uniform(28, 85, n), lumen, rng.uniform(1, 1.4, n), rng.uniform(0, np.pi, n), 9)

    # Microtubules and ribosomes: dark dots.
    place = rng.integers(0, size, (2, round(2600 * area)))
    n = place.shape[1]
    zero = np.zeros(n)
    _stamp(out, place, zero + 0.2, rng.uniform(20, 110, n), zero, rng.uniform(1, 1.8, n), rng.uniform(0, np.pi, n), 6)

    # Reticulum: long narrow sacs that follow their cell.
    place = rng.integers(0, size, (2, round(150 * area)))
    place = place[:, distance[tuple(place)] > 9]
    n = place.shape[1]
    here = cell[tuple(place)]
    radius, ring, lumen, stretch = (rng.uniform(a, b, n) for a, b in ((3.4, 6.5), (25, 55), (5, 25), (1.6, 3.2)))
    _stamp(out, place, radius, ring, lumen, stretch, tissue.angle[here] + rng.normal(0, 0.5, n), 20)

    out = np.clip(1.2 * out, -80, 30)  # where organelles overlap, stain does not add up
    for i, offset, turn, length, start, phase in tissue.mitochondria:
        _draw_mitochondrion(out, tissue, number, cell, i, offset, turn, length, start, phase)
    return out


def _stamp(image, place, radius, ring, lumen, stretch, angle, reach: int) -> None:
    """Add a dark ring around a bright (or dark) inside at each place `(2, n)`; each ring has properties of its own, `(n,)`."""
    offsets = np.arange(-reach, reach + 1, dtype=np.float32)
    x, y = offsets[:, None], offsets[None, :]
    c, s, stretch, radius, ring, lumen = (
        np.asarray(v, np.float32)[:, None, None] for v in (np.cos(angle), np.sin(angle), stretch, radius, ring, lumen)
    )
    q = np.sqrt(((x * c + y * s) / stretch) ** 2 + (y * c - x * s) ** 2)
    value = lumen * np.exp(-((q / (0.75 * radius)) ** 2)) - ring * np.exp(-(((q - radius) / 1.25) ** 2))
    d, h = place[0][:, None, None] + offsets.astype(int)[:, None], place[1][:, None, None] + offsets.astype(int)
    inside = (d >= 0) & (h >= 0) & (d < image.shape[0]) & (h < image.shape[1])
    d, h = np.broadcast_arrays(d, h)
    total = np.bincount(d[inside] * image.shape[1] + h[inside], value[inside], image.size)
    image += total.reshape(image.shape).astype(np.float32)


def _draw_mitochondrion(out, tissue: _Tissue, number: int, cell, i: int, offset, turn, length, start, phase) -> None:
    """Draw one mitochondrion over `out`, where it lies in its cell: a dark ellipse with cristae."""
    centre = tissue.motion(number)[0][i] + offset * tissue.radius[i] * 0.5
    swell = np.sqrt(max(0.0, 1 - ((number - 4 * phase * 3 - start) / 9) ** 2))  # it ends after some slices
    major = float(np.clip(length * tissue.radius[i] * tissue.stretch[i] ** 0.5, 11, 42)) * swell
    minor = min(major * 0.66, 0.55 * tissue.radius[i])
    if minor < 7:
        return
    lo, hi = (np.clip(centre + k * (major + 4), 0, out.shape[0]).astype(int) for k in (-1, 1))
    if (lo >= hi).any():
        return
    box = tuple(slice(a, b) for a, b in zip(lo, hi))
    x, y = np.meshgrid(*(np.arange(a, b, dtype=np.float32) - c for a, b, c in zip(lo, hi, centre)), indexing="ij")
    angle = tissue.angle[i] + turn
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    lumpy = 1 + 0.05 * np.sin(3 * np.arctan2(v, u) + 6 * phase)
    depth = (1 - np.hypot(u / major, v / minor) * lumpy) * minor  # pixels inside, roughly
    wave = v + 1.6 * np.sin(u / 8 + 6 * phase) + 0.25 * u * (phase - 0.5)
    cristae = np.cos(wave * 2 * np.pi / 6.2) * np.clip(0.6 + 0.8 * np.sin(u / 5 + v / 3 + 20 * phase), 0, 1.2)
    body = -62 + 34 * cristae * soft_step(depth - 3.5, 0.8)
    rim = -38 * np.exp(-(((depth - 1) / 1.3) ** 2))
    inside = soft_step(depth, 0.7) * (cell[box] == i)
    out[box] += inside * (body + rim - 0.75 * out[box])
