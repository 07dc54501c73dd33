"""Hand phantoms: MRI of one right hand in many postures, with its nineteen finger bones labelled.

After the data of Kayalibay et al. 2017, section 3.1: 30 volumes of a hand, brought to 120×120×64 voxels, in which metacarpals,
proximal, middle and distal phalanges are classes. Bones are dumb-bells on chains of joints, the skin is a smooth union of
tapered capsules around them, and the picture follows from the distances to both: bright marrow, dark cortex, fat under the
skin, tendons along the bones. The bones of the wrist and forearm look like the others and are not labelled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from ..volume import Case
from .anatomy import stream
from .mri import blur_matrix
from .noise import along, bspline_noise

CLASSES = ("background", "metacarpal", "proximal", "middle", "distal")
FIELD_OF_VIEW = (206.4, 206.4, 110.08)  # mm: 120×120×64 voxels of 1.72
EXTENT = tuple((-mm / 2, mm / 2) for mm in FIELD_OF_VIEW)

# Where each finger's metacarpal begins and points, in mm, and the lengths of its bones; the thumb has no middle phalanx.
FINGERS = {
    "thumb": ((-17, -42, -8), (-0.80, 0.62, -0.28), (44, 32, 0, 22)),
    "index": ((-13, -38, 0), (-0.16, 1, 0), (65, 40, 23, 17)),
    "middle": ((-3, -37, 1), (-0.02, 1, 0), (62, 44, 27, 18)),
    "ring": ((7, -38, 0), (0.13, 1, 0), (56, 41, 26, 18)),
    "little": ((15, -41, -2), (0.27, 1, 0), (51, 33, 19, 16)),
}
SHAFT, END, FLESH = (4.3, 3.45, 2.45, 1.85), (6.7, 5.05, 3.65, 2.9), (11, 8.6, 7.6, 6.8)  # radii in mm, by class
FLEXION = (0.0, 1.1, 1.3, 0.8)  # radians at each joint of a fully curled finger
WRIST = ((-14, -50), (-5, -49), (4, -49), (12, -51), (-11, -59), (-2, -60), (8, -59))
SUNK = 3.2  # mm of fat under the skin


def hand(seed: int, *, spacing: float = 1.72, curl: float | None = None, spread: float | None = None, shape=None) -> Case:
    """One volume of the hand.

    Args:
        seed: which posture and scan, 0 or more. The same seed gives the same bytes, and the same hand on every grid.
        spacing: voxel size in mm; 1.72 makes 120×120×64 voxels, the size of the paper's images, 3.44 half of that.
        curl: 0 for straight fingers to 1 for a fist, or None for a random posture.
        spread: 0 for parallel fingers to 1 for spread ones, or None.
        shape: voxels of the grid, if other than the whole field of view; its middle stays where it was.

    Returns:
        A case of one channel, "t1". W is the axis from palm to back of the hand, fingers point along H. `image` holds whole
        numbers, air included (there is noise in it); labels are 1 metacarpal, 2 proximal, 3 middle, 4 distal phalanx.
        `info` has seed, curl, spread and the names of the "classes".
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}; expected a whole number, 0 or more")
    if not 0.5 <= spacing <= 8:
        raise ValueError(f"spacing is {spacing!r} mm; expected 0.5 to 8, usually 1.72 or 3.44")
    for name, value in (("curl", curl), ("spread", spread)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; expected 0 to 1, or None for a random one")
    if shape is None:
        shape = tuple(round(mm / spacing) for mm in FIELD_OF_VIEW)
    elif len(shape) != 3 or any(int(n) != n or n < 8 for n in shape):
        raise ValueError(f"shape is {tuple(shape)}; expected three whole numbers (D, H, W) of at least 8 voxels")
    axes = [((np.arange(n) - (n - 1) / 2) * spacing).astype(np.float32) for n in shape]

    rng = stream(seed, "hand posture")
    drawn = rng.uniform(0, 1, 2)
    curl, spread = (float(d if v is None else v) for v, d in zip((curl, spread), drawn))
    bones, others, flesh = _skeleton(rng, curl, spread)

    skin = np.full(shape, 99, np.float32)  # distances in mm, negative inside
    for a, b, ra, rb, blend in flesh:
        _unite(skin, axes, a, b, ra, rb, blend=blend)
    bone, label = np.full(shape, 99, np.float32), np.zeros(shape, np.uint8)
    for number, a, b, shaft, end in bones:
        box, nearer = _unite(bone, axes, a, b, shaft, end, knobs=True)
        if box is not None:
            label[box][nearer & (bone[box] < 0)] = number
    for a, b, shaft, end in others:
        box, nearer = _unite(bone, axes, a, b, shaft, end, knobs=True)
        if box is not None:
            label[box][nearer & (bone[box] < 0)] = 0

    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = [a[0] for a in axes]
    return Case(
        image=_scan(stream(seed, "hand scan"), axes, spacing, skin, bone)[None],
        channels=("t1",),
        label=label,
        affine=affine,
        name=f"hand-{seed:04d}",
        info={"seed": seed, "curl": curl, "spread": spread, "classes": CLASSES},
    )


def hand_cohort(count: int, *, first_seed: int = 0, progress: bool = False, **options) -> list[Case]:
    """`count` volumes with consecutive seeds, their curl and spread evenly mixed; `options` as for `hand`.

    A small cohort so has open hands, fists and all between, as a large one does.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one case")
    seeds = range(first_seed, first_seed + count)
    steps = tqdm(seeds, desc="phantoms", unit="case", disable=not progress)
    # Multiples of the golden ratio's and of the plastic number's inverse fill the interval evenly, from any first seed on.
    mix = {name: ratio for name, ratio in (("curl", 0.6180340), ("spread", 0.7548777)) if name not in options}
    return [hand(seed, **{name: (0.5 + seed * r) % 1 for name, r in mix.items()}, **options) for seed in steps]


def _rotation(axis: Sequence[float], angle: float) -> np.ndarray:
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _skeleton(rng: np.random.Generator, curl: float, spread: float):
    """Ends and radii, in mm, of labelled bones, of the other bones, and of the flesh around them."""
    person = stream(0, "whose hand")  # always the same one
    bones, flesh = [], []
    for finger, (name, (base, direction, lengths)) in enumerate(FINGERS.items()):
        p, d = np.array(base, float), np.array(direction, float)
        d /= np.linalg.norm(d)
        sideways = np.cross(d, [0, 0, 1.0])
        sideways /= np.linalg.norm(sideways)
        own = np.clip(curl + rng.normal(0, 0.18), 0, 1)
        bends, sway = np.array(FLEXION) * own, rng.normal(0, 0.04)
        if name == "thumb":
            bends, sway = np.array([0, *rng.uniform(0, 0.5, 2), 0])[[0, 1, 3, 2]], 0.0
            d = _rotation((0, 1, 0), rng.normal(0, 0.3)) @ d
        for joint, (length, bend) in enumerate(zip(lengths, bends)):
            if not length:
                continue
            if joint == 1 and name != "thumb":
                d = _rotation((0, 0, 1), -0.10 * (finger - 2.3) * spread + sway) @ d
            d = _rotation(sideways, -bend) @ d
            length, end = length * np.exp(person.normal(0, 0.02)), END[joint] * np.exp(person.normal(0, 0.03))
            q = p + d * length
            bones.append((joint + 1, p + d * end * 0.6, q - d * end * 0.6, SHAFT[joint], end))
            flesh.append((p, q, FLESH[joint], FLESH[min(joint + 1, 3)] if joint else FLESH[1] + 1, 5.0))
            p = q + d * 1.4
    others = []
    for x, y in WRIST:
        a, b = np.array([x, y, -1]) + rng.normal(0, 0.7, 3), np.array([x + 2.5, y - 1, 1]) + rng.normal(0, 0.7, 3)
        others.append((a, b, 4.6, 5.0))
    others.append((np.array([-7, -72, 0.0]), np.array([-6, -125, 0.0]), 8.0, 10.0))  # radius
    others.append((np.array([12, -71, 0.0]), np.array([12, -125, 0.0]), 5.5, 7.0))  # ulna
    for x in (-12, -4, 4, 12):
        flesh.append((np.array([x, -30, -2.0]), np.array([0.9 * x, 10, -3.0]), 12.5, 11.5, 8.0))  # palm
        flesh.append((np.array([x, -30, -2.0]), np.array([x, -125, 0.0]), 13.5, 15.0, 8.0))  # wrist and forearm

    turn = _rotation(rng.normal(size=3), rng.normal(0, 0.15)) @ _rotation((0, 0, 1), rng.normal(0, 0.22))
    size = np.exp(rng.normal(0, 0.02))
    shift = np.array([2.0, -20.0, 18.0]) + rng.normal(0, 4, 3)

    def place(point):
        return turn @ (point * size) + shift

    return (
        [(n, place(a), place(b), ra * size, rb * size) for n, a, b, ra, rb in bones],
        [(place(a), place(b), ra * size, rb * size) for a, b, ra, rb in others],
        [(place(a), place(b), ra * size, rb * size, blend) for a, b, ra, rb, blend in flesh],
    )


def _unite(field, axes, a, b, ra, rb, *, knobs: bool = False, blend: float = 0.0):
    """Lower `field` to the distance from one more shape, where that is nearer: a capsule from `a` to `b`.

    Its radius goes from `ra` to `rb` along the way, or with `knobs` it is `ra` in the middle and `rb` at both ends. `blend`
    rounds the crease between the shapes, mm. Returns the box that was looked at and where in it the new shape is nearer.
    """
    reach = max(ra, rb) + 9
    box = tuple(slice(*np.searchsorted(x, [min(u, v) - reach, max(u, v) + reach])) for x, u, v in zip(axes, a, b))
    if any(s.start >= s.stop for s in box):
        return None, None
    offsets = [(x[s] - u).reshape([-1 if k == i else 1 for k in range(3)]) for i, (x, s, u) in enumerate(zip(axes, box, a))]
    d, length = (b - a).astype(np.float32), np.float32(np.linalg.norm(b - a))
    t = np.clip(sum(o * n for o, n in zip(offsets, d)) / length**2, 0, 1)
    distance = np.sqrt(sum((o - t * n) ** 2 for o, n in zip(offsets, d)))
    if knobs:
        distance -= ra + (rb - ra) * (np.exp(-((t * length / 7) ** 2)) + np.exp(-(((1 - t) * length / 7) ** 2)))
    else:
        distance -= ra + (rb - ra) * t
    old = field[box]
    nearer = distance < old
    if blend:
        h = np.clip(0.5 + 0.5 * (old - distance) / blend, 0, 1)
        field[box] = old * (1 - h) + distance * h - blend * h * (1 - h)
    else:
        field[box] = np.minimum(old, distance)
    return box, nearer


def _scan(rng: np.random.Generator, axes, spacing: float, skin: np.ndarray, bone: np.ndarray) -> np.ndarray:
    """A T1-weighted picture of tissues that lie where the distances to skin and bone say."""

    def noise(scale: float, count: int | None = None) -> np.ndarray:
        return bspline_noise(rng, axes, scale, extent=EXTENT, count=count)

    coarse, other, fine, coil = noise(7), noise(12), noise(3), noise(90)
    soft = max(0.6, 0.35 * spacing)  # how soft edges are, mm: partial volume
    inside, fat = _step(-skin, soft), _step(skin + SUNK, soft)
    image = 0.42 + 0.05 * coarse + 0.04 * fine + fat * (0.38 + 0.06 * coarse)
    image -= 0.25 * np.exp(-(((bone - 2.4) / 1.2) ** 2)) * (other > 0.4)  # tendons
    image += 0.25 * ((np.abs(coarse) < 0.06) & (other > 0.2) & (bone > 3) & (skin < -4))  # vessels
    marrow = _step(-(bone + 1.0), soft)
    image += marrow * (0.80 + 0.05 * fine + 0.05 * other - image)
    image -= 0.45 * np.exp(-((bone / 0.9) ** 2)) * np.clip(0.85 + 0.2 * other, 0.4, 1)  # cortex
    image *= inside
    blur = 0.8 / spacing
    if blur > 0.3:
        for axis, n in enumerate(image.shape):
            image = along(image, axis, blur_matrix(n, blur))
    image = image.clip(0) * np.exp(0.22 * coil)
    image *= _step(92 - np.abs(axes[1]), 5)[:, None]  # the coil ends
    sd = np.float32(rng.uniform(0.02, 0.05))
    real, imaginary = sd * rng.standard_normal((2, *image.shape), dtype=np.float32)
    return np.rint(700 * np.hypot(image + real, imaginary)).astype(np.float32)


def _step(x: np.ndarray, width: float) -> np.ndarray:
    """From 0 to 1 around x = 0, `width` mm softly."""
    return 1 / (1 + np.exp(-np.clip(x / np.float32(width), -30, 30)))
