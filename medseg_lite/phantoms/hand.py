"""Hand phantoms: MRI of one right hand in many postures, with its nineteen finger bones labelled.

The phantoms follow the data of Kayalibay et al. 2017, section 3.1: 30 volumes of a hand, resampled to 120×120×64 voxels, in which
metacarpals, proximal, middle and distal phalanges are classes. Bones are dumb-bells on chains of joints, the skin is a smooth
union of tapered capsules around them, and the picture follows from the distances to both: bright marrow, dark cortex, fat under
the skin, tendons along the bones. The bones of the wrist and forearm look like the others and are not labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..volume import Case
from .noise import Axes, blur, bspline_noise, centred_axes, check_grid, check_whole, make_affine, make_cohort, soft_step, stream

CLASSES = ("background", "metacarpal", "proximal", "middle", "distal")
FIELD_OF_VIEW = (206.4, 206.4, 110.08)  # mm: 120×120×64 voxels of 1.72
EXTENT = tuple((-mm / 2, mm / 2) for mm in FIELD_OF_VIEW)

# For each finger: start and direction of its metacarpal, and the lengths of its bones, in mm. The thumb has no middle phalanx.
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
FAT = 3.2  # mm of fat under the skin


def hand(seed: int, *, spacing: float = 1.72, curl: float | None = None, spread: float | None = None, shape=None) -> Case:
    """Generate one volume of the hand.

    Args:
        seed: number of the posture and scan, 0 or more. The same seed gives the same bytes, and the same hand on every grid.
        spacing: voxel size in mm; 1.72 makes 120×120×64 voxels, the size of the paper's images, 3.44 half of that.
        curl: posture of the fingers, from 0 (straight) to 1 (a fist), or None for a random one.
        spread: spread of the fingers, from 0 (parallel) to 1 (spread), or None for a random one.
        shape: number of voxels along D, H, W, by default those of the whole field of view. The middle of the grid stays where
            it was.

    Returns:
        A case of one channel, "t1". W is the axis from palm to back of the hand, fingers point along H. `image` holds whole
        numbers; air is not 0, because it holds noise. Labels are 1 metacarpal, 2 proximal, 3 middle, 4 distal phalanx.
        `info` has seed, curl, spread and the names of the "classes".
    """
    seed = check_whole("seed", seed, 0)
    check_grid(spacing, shape, "1.72 or 3.44")
    for name, value in (("curl", curl), ("spread", spread)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; expected 0 to 1, or None for a random one")
    if shape is None:
        shape = tuple(round(mm / spacing) for mm in FIELD_OF_VIEW)
    axes = centred_axes(shape, (spacing,) * 3)

    rng = stream(seed, "hand posture")
    drawn = rng.uniform(0, 1, 2)
    curl, spread = (float(d if v is None else v) for v, d in zip((curl, spread), drawn))
    bones, flesh = _pose(rng, curl, spread)

    skin = np.full(shape, 99, np.float32)  # distances in mm, negative inside
    for a, b, ra, rb, blend in flesh:
        _unite(skin, axes, a, b, ra, rb, blend=blend)
    bone, label = np.full(shape, 99, np.float32), np.zeros(shape, np.uint8)
    for number, a, b, shaft, end in bones:
        box, nearer = _unite(bone, axes, a, b, shaft, end, knobs=True)
        if box is not None:
            label[box][nearer & (bone[box] < 0)] = number

    return Case(
        image=_scan(stream(seed, "hand scan"), axes, spacing, skin, bone)[None],
        channels=("t1",),
        label=label,
        affine=make_affine(axes, (spacing,) * 3),
        name=f"hand-{seed:04d}",
        info={"seed": seed, "curl": curl, "spread": spread, "classes": CLASSES},
    )


def hand_cohort(count: int, *, first_seed: int = 0, progress: bool = False, **options) -> list[Case]:
    """Generate `count` volumes with consecutive seeds; `options` are those of `hand`.

    Curl and spread are mixed evenly, so that a small cohort has open hands, fists and everything between, as a large one does.
    """
    # Multiples of the inverses of the golden ratio and of the plastic number fill the interval evenly, from any first seed on.
    mix = {name: ratio for name, ratio in (("curl", 0.6180340), ("spread", 0.7548777)) if name not in options}

    def make(seed: int, **options) -> Case:
        return hand(seed, **{name: (0.5 + seed * ratio) % 1 for name, ratio in mix.items()}, **options)

    return make_cohort(make, count, first_seed=first_seed, progress=progress, **options)


def _rotation(axis: Sequence[float], angle: float) -> np.ndarray:
    """Return the matrix of a rotation about an axis (Rodrigues' formula)."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _pose(rng: np.random.Generator, curl: float, spread: float) -> tuple[list, list]:
    """Pose the bones of the hand, and the flesh around them, in mm.

    Returns:
        Bones as (class, end, end, radius in the middle, radius at the ends), class 0 for those that are not labelled; then
        flesh as (end, end, radius, radius, blend).
    """
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
    for x, y in WRIST:
        a, b = np.array([x, y, -1]) + rng.normal(0, 0.7, 3), np.array([x + 2.5, y - 1, 1]) + rng.normal(0, 0.7, 3)
        bones.append((0, a, b, 4.6, 5.0))
    bones.append((0, np.array([-7, -72, 0.0]), np.array([-6, -125, 0.0]), 8.0, 10.0))  # radius
    bones.append((0, np.array([12, -71, 0.0]), np.array([12, -125, 0.0]), 5.5, 7.0))  # ulna
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
        [(place(a), place(b), ra * size, rb * size, blend) for a, b, ra, rb, blend in flesh],
    )


def _unite(field, axes, a, b, ra, rb, *, knobs: bool = False, blend: float = 0.0):
    """Unite the shapes in `field` with a capsule from `a` to `b`: where the capsule is nearer, `field` becomes its distance.

    Args:
        field: distance to the nearest shape so far, in mm; it is changed in place.
        axes: positions of the voxels in mm.
        a, b: ends of the capsule.
        ra, rb: radii at `a` and `b`. With `knobs` they are the radius in the middle and the radius at both ends.
        knobs: whether the capsule is a dumb-bell.
        blend: width in mm over which the crease between the shapes is rounded.

    Returns:
        The box of voxels that was changed, and where in it the capsule is nearer; None twice if it lies outside the grid.
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


def _scan(rng: np.random.Generator, axes: Axes, spacing: float, skin: np.ndarray, bone: np.ndarray) -> np.ndarray:
    """Take a T1-weighted picture of the tissues, which follow from the distances to skin and bone."""
    noise = partial(bspline_noise, rng, axes, extent=EXTENT)
    coarse, other, fine, coil = noise(7), noise(12), noise(3), noise(90)
    soft = max(0.6, 0.35 * float(spacing))  # softness of edges in mm: the partial volume effect
    inside, fat = soft_step(-skin, soft), soft_step(skin + FAT, soft)
    image = 0.42 + 0.05 * coarse + 0.04 * fine + fat * (0.38 + 0.06 * coarse)
    image -= 0.25 * np.exp(-(((bone - 2.4) / 1.2) ** 2)) * (other > 0.4)  # tendons
    image += 0.25 * ((np.abs(coarse) < 0.06) & (other > 0.2) & (bone > 3) & (skin < -4))  # vessels
    marrow = soft_step(-(bone + 1.0), soft)
    image += marrow * (0.80 + 0.05 * fine + 0.05 * other - image)
    image -= 0.45 * np.exp(-((bone / 0.9) ** 2)) * np.clip(0.85 + 0.2 * other, 0.4, 1)  # cortex
    image *= inside
    if 0.8 / spacing > 0.3:
        image = blur(image, 0.8 / spacing, axes=(0, 1, 2))
    image = image.clip(0) * np.exp(0.22 * coil)
    image *= soft_step(92 - np.abs(axes[1]), 5)[:, None]  # the coil ends
    sd = np.float32(rng.uniform(0.02, 0.05))
    real, imaginary = sd * rng.standard_normal((2, *image.shape), dtype=np.float32)
    return np.rint(700 * np.hypot(image + real, imaginary)).astype(np.float32)
