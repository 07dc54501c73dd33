"""Liver phantoms: CT of the abdomen after contrast agent, with the liver and the lesions in it labelled.

After the LiTS challenge (Bilic et al. 2023, Medical Image Analysis 84:102680), whose data Drozdzal et al. 2017, section 4.2,
use in part: Hounsfield units, a different field of view and slice distance for every patient, and values far below air
outside the circle that the scanner reconstructs. Spleen, stomach, kidneys, heart and muscle have grey values near the liver's.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from ..volume import Case
from .anatomy import stream
from .mri import blur_matrix
from .noise import along, bspline_noise
from .shapes import EVERYWHERE, Scene, carve, ellipsoid, join

CLASSES = ("background", "liver", "lesion")
LESIONS = ("hypodense", "rim", "subtle")
EXTENT = ((-330.0, 330.0), (-330.0, 330.0), (-130.0, 130.0))  # mm that random fields span, whatever the grid
LENGTH = 220.0  # mm along W
PADDING = (-3024, -2048, -1024)  # what scanners write where they did not measure


def liver(
    seed: int, *, size: int = 128, slice_mm: float | None = 5.0, lesions: int | None = None, kind: str | None = None
) -> Case:
    """One patient.

    Args:
        seed: which patient, 0 or more. The same seed gives the same bytes, and the same patient on every grid.
        size: pixels along D and H of a field of view of 271 to 640 mm: 512, the scanners' own, has pixels of 0.53 to 1.25 mm;
            the default is a quarter of that, which costs a fraction of a second.
        slice_mm: distance of the slices, 0.5 to 10; None for the patient's own, 0.7 to 5.
        lesions: how many, 0 to 20; None for a random number.
        kind: "hypodense" (clearly darker than the liver), "rim" (with a bright edge) or "subtle"; None for a random kind.

    Returns:
        A case of one channel, "ct", in whole Hounsfield units, with values of -3024, -2048 or -1024 outside the circle that the
        scanner reconstructs, which is the `mask`. Labels are 1 liver, 2 lesion. `info` has the seed, "lesions", their "kind", "liver_ml",
        "lesion_ml", the "padding" and the names of the "classes".
    """
    _check(seed, size, slice_mm, lesions, kind)
    rng = stream(seed, "abdomen")
    width = rng.uniform(152, 182)  # half of the body's
    field = float(np.clip(2 * width * np.clip(np.exp(rng.normal(0.14, 0.12)), 1.02, 1.8), 512 * 0.53, 512 * 1.25))
    own = float(rng.choice([0.7, 1.0, 1.25, 2.0, 2.5, 3.0, 5.0]))
    slice_mm = own if slice_mm is None else float(slice_mm)
    pixel = field / size
    counts = (size, size, round(LENGTH / slice_mm))
    axes = [((np.arange(n) - (n - 1) / 2) * s).astype(np.float32) for n, s in zip(counts, (pixel, pixel, slice_mm))]

    scene, organ, body, density = _abdomen(rng, axes, width)
    label = (organ < 0).astype(np.uint8)
    drawn = int(np.clip(rng.lognormal(1.3, 0.8), 0, 12))
    which = str(rng.choice(LESIONS, p=[0.5, 0.25, 0.25]))
    lesions, kind = drawn if lesions is None else lesions, which if kind is None else kind
    placed = _lesions(stream(seed, "liver lesions"), scene, organ, label, lesions, kind, density)

    scan = stream(seed, "abdomen scan")
    padding, sd = int(scan.choice(PADDING)), scan.uniform(6, 14)
    image = scene.image
    blur = blur_matrix(size, 0.5) if pixel > 1.5 else blur_matrix(size, 0.8 / pixel)
    image = along(along(image, 0, blur), 1, blur)
    # Quantum noise, correlated by the reconstruction; more where much tissue lies around.
    grain = scan.standard_normal(image.shape, dtype=np.float32)
    grain = along(along(grain, 0, blur_matrix(size, 0.7)), 1, blur_matrix(size, 0.7)) / 0.40
    image += sd * grain * np.clip(0.5 - body / 90, 0.4, 1.3)
    image = np.clip(image, -1024, 3071)
    mask = np.repeat((np.hypot(axes[0][:, None], axes[1]) <= field / 2)[..., None], counts[2], axis=2)
    image[~mask], label[~mask] = padding, 0

    affine = np.diag([pixel, pixel, slice_mm, 1.0])
    affine[:3, 3] = [a[0] for a in axes]
    ml = pixel**2 * slice_mm / 1000
    return Case(
        image=np.rint(image)[None],
        channels=("ct",),
        label=label,
        mask=mask,
        affine=affine,
        name=f"liver-{seed:04d}",
        info={
            "seed": seed,
            "lesions": placed,
            "kind": kind if placed else None,
            "padding": padding,
            "classes": CLASSES,
            "liver_ml": round(float((label > 0).sum()) * ml),
            "lesion_ml": round(float((label == 2).sum()) * ml, 1),
        },
    )


def liver_cohort(count: int, *, first_seed: int = 0, progress: bool = False, **options) -> list[Case]:
    """`count` patients with consecutive seeds; `options` as for `liver`."""
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one case")
    steps = tqdm(range(first_seed, first_seed + count), desc="phantoms", unit="case", disable=not progress)
    return [liver(seed, **options) for seed in steps]


def _check(seed, size, slice_mm, lesions, kind) -> None:
    for name, value, least, most in (("seed", seed, 0, None), ("size", size, 32, 512), ("lesions", lesions, 0, 20)):
        if name == "lesions" and value is None:
            continue
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            raise ValueError(f"{name} is {value!r}; expected a whole number, {least} {f'to {most}' if most else 'or more'}")
    if slice_mm is not None and not 0.5 <= slice_mm <= 10:
        raise ValueError(f"slice_mm is {slice_mm!r}; expected 0.5 to 10 mm, or None for the patient's own")
    if kind is not None and kind not in LESIONS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(map(repr, LESIONS))}, or None for a random one")


def _abdomen(rng: np.random.Generator, axes, bx: float):
    """The ideal picture in HU, distances to liver and skin, and the liver's own density.

    x grows to the patient's right, y to the front, z upwards.
    """

    def noise(scale, count: int | None = None) -> np.ndarray:
        return bspline_noise(rng, axes, scale, extent=EXTENT, count=count)

    scene = Scene(axes, noise(70, 3) * np.array([3, 3, 4], np.float32)[:, None, None, None], -1000)
    x, y, z = scene.points
    bend, lumps, fine = noise(26), noise(13), noise(6)
    phase = rng.uniform(0.8, 1.2)  # of the contrast agent
    density = float(np.clip(108 * phase + rng.normal(0, 8), 70, 140))

    # Skin, fat under it, the muscular wall, and fat around the organs.
    fat = 6 + 0.9 * (bx - 152) * rng.uniform(0.6, 1.1)  # thicker in wider people
    by = bx * rng.uniform(0.64, 0.74)
    body = ellipsoid((x, y, 0 * z), (0, 0, 0), (bx, by, 1e4)) + 2 * bend
    muscle = ellipsoid((x, y + 0.2 * fat, 0 * z), (0, 0, 0), (bx - fat, by - 0.85 * fat, 1e4)) + 1.5 * bend
    cavity = muscle + 15
    scene.paint(EVERYWHERE, body, -20)
    scene.paint(EVERYWHERE, body + 1.8, -104 + 4 * fine)
    scene.paint(EVERYWHERE, muscle, 58 + 3 * fine)
    scene.paint(EVERYWHERE, np.abs(muscle + 7.5) - 0.9, -60)  # fat between the layers of muscle
    strands = np.exp(-((lumps / 0.08) ** 2))
    scene.paint(EVERYWHERE, cavity, -102 + 4 * fine + 45 * strands)

    # Diaphragm: lungs above two domes, the heart between them.
    top = rng.uniform(48, 68)
    right = top - ((x - 68) ** 2 / 110 + (y - 8) ** 2 / 135) * 0.75
    left = top - 12 - ((x + 72) ** 2 / 100 + (y - 2) ** 2 / 130) * 0.75
    dome = np.maximum(right, left) + 2 * bend
    air = np.maximum(0.72 * (dome - z), cavity + 1.5)
    mediastinum = np.abs(x + 8) - 26 + 0.25 * np.maximum(-y, 0)
    lung = np.maximum(air, -mediastinum)
    branches = 260 * np.clip(1.3 - 9 * np.abs(lumps), 0, 1) * (fine > 0)
    scene.paint(EVERYWHERE, np.maximum(air, mediastinum), -95 + 4 * fine)
    scene.paint(EVERYWHERE, lung, -855 + 18 * fine + branches)
    back = 0.65 * fat - by  # y of the muscles' outer surface behind
    heart = ellipsoid(scene.points, (-28, 32, top + 38), (58, 46, 44), 0.5) + bend
    scene.paint(EVERYWHERE, np.maximum(heart, cavity + 2), 135 * phase + 20 * (lumps > 0.3), 2.5)

    _skeleton(rng, scene, muscle, by, back, fine, lumps)

    # Bowel, low in front; kidneys behind; spleen and stomach on the left (x < 0).
    for n in range(44):
        p = rng.uniform((-105, -10, -125), (95, 70, -35)) if n < 30 else rng.uniform((-120, -25, -60), (-30, 50, 0))
        content = float(rng.choice([22, 45, 70, -650, 150], p=[0.3, 0.25, 0.2, 0.15, 0.1]))
        box, d = scene.tube(p, p + rng.normal(0, 18, 3) * [1, 1, 0.5], *rng.uniform(8, 15, 2))
        d = np.maximum(d + 1.5 * lumps[box], cavity[box] + 3)
        scene.paint(box, d, 75)
        scene.paint(box, d + 2.4, content + 8 * fine[box])
    for sign, height in ((1, -52), (-1, -38)):
        box, d = scene.ellipsoid((sign * 60, back + 50, height), (26, 23, 52), turn=-sign * 0.5)
        d = d + 1.2 * bend[box]
        scene.paint(box, d - 6, -108)
        scene.paint(box, d, 165 * phase + 4 * fine[box])
        scene.paint(box, d + 8, (125 + 22 * np.sign(lumps[box])) * phase, 2.5)
        box, d = scene.ellipsoid((sign * 51, back + 55, height), (11, 9, 24), turn=-sign * 0.5)
        scene.paint(box, d + lumps[box], -60)
    box, d = scene.ellipsoid((-rng.uniform(92, 100), back + 58, rng.uniform(0, 14)), (26, 42, 50), turn=0.45)
    spleen = np.maximum(d + 2.5 * bend[box], np.maximum(cavity[box] + 2, 3 - air[box]))
    scene.paint(box, spleen, density + rng.uniform(4, 18) + 2 * fine[box])

    stomach_at, stomach_size = np.array([-68, 22, top - 50]), np.array([38, 34, 48]) * rng.uniform(0.85, 1.1)
    box, d = scene.ellipsoid(stomach_at, stomach_size, turn=-0.3)
    stomach = np.maximum(d + 2.5 * bend[box], np.maximum(cavity[box] + 3, 4 - air[box]))
    scene.paint(box, stomach, 78)
    level = stomach_at[1] + rng.uniform(-5, 18)  # gas rises to the front of a patient who lies on the back
    scene.paint(box, stomach + 3.5, np.where(scene.points[1][box] > level, -920, 28 + 9 * lumps[box]))

    # Great vessels, pancreas.
    for centre, radius, value in (((-9, back + 78), 10.5, 158), ((22, back + 82), 12.0, 138)):
        box, d = scene.tube((*centre, -140), (*centre, 140), radius, radius)
        scene.paint(box, d, value * phase)
    p = np.array([[30, 14, -32], [5, 22, -22], [-25, 8, -12], [-60, -8, -4]]) + rng.normal(0, 2, (4, 3)) + [0, back + 84, 0]
    for a, b in pairwise(p):
        box, d = scene.tube(a, b, 9.5, 8)
        scene.paint(box, d + 1.8 * lumps[box], 92 * phase)

    organ = _liver(scene, cavity, air, bend, back, top, (stomach_at, stomach_size))
    scene.paint(EVERYWHERE, organ, density + 2.5 * fine)
    _vessels(rng, scene, organ, density + 48 * phase, back, top)
    box, d = scene.ellipsoid((40, 40, top - 104), (13, 20, 17), turn=0.4)  # gallbladder
    scene.paint(box, d + bend[box] - 1.5, 60)
    scene.paint(box, d + bend[box], 9)
    organ[box] = np.maximum(organ[box], 1.5 - (d + bend[box]))

    # The table.
    raw_x, raw_y = axes[0][:, None], axes[1]
    table = np.abs(raw_y + by + 10 - 0.0007 * raw_x**2)
    scene.image[(table < max(1.5, 0.5 * float(axes[1][1] - axes[1][0]))) & (np.abs(raw_x) < 200)] = -180
    return scene, organ, body, density


def _skeleton(rng: np.random.Generator, scene: Scene, muscle, by: float, back: float, fine, lumps) -> None:
    """Spine, the muscles along it, and ribs."""
    x, y, z = scene.points
    for sign in (-1, 1):
        box, d = scene.ellipsoid((sign * 30, back + 17, 0), (29, 17, 1e3))
        scene.paint(box, d, 58 + 4 * fine[box])
        box, d = scene.tube((sign * 30, back + 48, 10), (sign * 42, back + 50, -150), 8, 17)
        scene.paint(box, d, 60 + 3 * fine[box])

    offset = rng.uniform(0, 34)
    box = scene.box((-75, back - 4, -999), (75, back + 74, 999))
    u, v, w = scene.at(box)
    height = np.abs((w + offset) % 34 - 17)  # from the middle of the disc
    shape = ellipsoid((u, v - back - 54, 0 * w), (0, 0, 0), (23, 17, 1e3))
    scene.paint(box, shape + 0.5, 85)  # discs
    vertebra = np.maximum(shape + 1.5 * np.cos((height - 4) / 13 * np.pi), 4.0 - height)
    arch = np.maximum(ellipsoid((u, v - back - 31, 0 * w), (0, 0, 0), (15, 14, 1e3)), np.abs(height - 12) - 9)
    spine = np.maximum(np.maximum(np.abs(u) - 3.2, np.abs(v - back - 13) - 13), np.abs(height - 8) - 7)
    wings = np.maximum(np.abs(v - back - 33 + 0.18 * np.abs(u)) - 4, np.maximum(np.abs(u) - 40, np.abs(height - 12) - 5))
    bone = join(vertebra, join(join(arch, spine, 4), wings, 4), 3)
    scene.paint(box, bone, 520)
    scene.paint(box, bone + 2.2, 190 + 22 * fine[box] + 15 * lumps[box])
    canal = ellipsoid((u, v - back - 32, 0 * w), (0, 0, 0), (9.5, 8, 1e3))
    scene.paint(box, canal, 30)

    # Ribs run down and forward in the muscular wall; in front they end in cartilage.
    angle = np.arctan2(np.abs(x), -y)  # 0 at the spine
    step = 27.0
    level = (z + 30 * angle + rng.uniform(0, step)) % step - step / 2
    rib = np.hypot((muscle + 7.5) / 4.2, level / 6.8)
    rib = np.maximum(4.2 * (rib - 1), 14 * np.maximum(0.42 - angle, angle - 2.45))
    rib = np.maximum(rib, 0.6 * (-55 - z - 25 * np.cos(angle)))
    front = angle > 2.05
    scene.paint(EVERYWHERE, rib, np.where(front, 105, 560))
    scene.paint(EVERYWHERE, rib + 1.9, np.where(front, 110, 190 + 25 * fine))


def _liver(scene: Scene, cavity, air, bend, back: float, top: float, stomach) -> np.ndarray:
    """Distance to the liver, which fills what diaphragm, ribs and its neighbours leave it."""
    points = scene.points
    right = ellipsoid(points, (70, 0, top - 88), (76, 88, 88))
    left = ellipsoid(points, (8, 42, top - 52), (70, 30, 44), -0.15)
    organ = join(right, left, 24) + 3 * bend
    organ = carve(organ, ellipsoid(points, (4, -8, top - 128), (62, 58, 62)), 16)  # the lower, hollow side
    organ = carve(organ, ellipsoid(points, (16, 62, top - 80), (3.5, 26, 34), -0.2), 3)  # the fissure
    organ = carve(organ, ellipsoid(points, (60, back + 48, -52), (34, 30, 58), -0.5), 6)
    organ = carve(organ, ellipsoid(points, (0, back + 58, 0), (40, 36, 1e3)), 8)
    organ = carve(organ, ellipsoid(points, (0, back + 17, 0), (66, 26, 1e3)), 6)
    organ = carve(organ, ellipsoid(points, stomach[0], stomach[1] + 3, -0.3), 5)
    organ = np.maximum(organ, np.maximum(cavity + 3.5, 3.5 - air))
    pieces, count = ndimage.label(organ < 0)
    if count > 1:  # the neighbours may cut off a sliver
        main = np.bincount(pieces.ravel())[1:].argmax() + 1
        organ[(pieces > 0) & (pieces != main)] = 1
    return organ


def _vessels(rng: np.random.Generator, scene: Scene, organ, value: float, back: float, top: float) -> None:
    """Paint the portal vein, which branches from the liver's gate, and the hepatic veins, which run to the vena cava."""

    def segment(a, b, ra: float, rb: float) -> None:
        box, d = scene.tube(a, b, ra, rb)
        scene.paint(box, np.maximum(d, organ[box] + 3), value)

    def grow(start, way, length: float, radius: float, level: int) -> None:
        end = start + way * length
        segment(start, end, radius, 0.85 * radius)
        if level:
            axis = np.cross(way, rng.normal(size=3))
            axis /= np.linalg.norm(axis)
            for sign in (-1, 1):
                next_way = way + sign * axis * rng.uniform(0.5, 0.9)
                grow(end, next_way / np.linalg.norm(next_way), length * rng.uniform(0.72, 0.92), 0.74 * radius, level - 1)

    gate = np.array([26.0, 22.0, top - 84])
    segment(gate - (24, 18, 22), gate, 7, 7)
    for way, length in (((0.95, 0.1, 0.1), 32), ((-0.35, 0.75, 0.5), 26)):
        grow(gate, np.array(way) / np.linalg.norm(way), length, 6.0, 4)
    root = np.array([22.0, back + 84, top - 26])
    for tip in ((112, 5, top - 85), (58, 52, top - 78), (-18, 52, top - 56)):
        middle = (root + tip) / 2 + rng.normal(0, 4, 3) + [0, 0, 6]
        segment(root, middle, 5.5, 4.2)
        segment(middle, np.array(tip), 4.2, 1.6)
        for _ in range(3):
            p = root + (tip - root) * rng.uniform(0.4, 0.85)
            segment(p, p + rng.normal(0, 18, 3), 2.4, 1.0)


def _lesions(rng: np.random.Generator, scene: Scene, organ, label, count: int, kind: str, density: float) -> int:
    """Paint and label up to `count` lesions of one kind and return how many there are."""
    axes, placed = scene.axes, 0
    bump = bspline_noise(rng, axes, 7, extent=EXTENT)
    contrast = {"hypodense": -48, "rim": -42, "subtle": -18}[kind] * rng.uniform(0.8, 1.2)
    radii = np.clip(np.exp(rng.normal(np.log(11), 0.55, count)), 4, 40)
    places = rng.uniform([-70, -90, -110], [140, 90, 110], (count, 60, 3))
    shapes = np.exp(rng.normal(0, 0.16, (count, 3)))
    for radius, tries, shape in zip(radii, places, shapes):
        for place in tries:
            index = tuple(int(np.clip(np.searchsorted(a, p), 0, len(a) - 1)) for a, p in zip(axes, place))
            if organ[index] < -min(0.6 * radius, 12) and label[index] == 1:
                break
        else:
            continue
        centre = [p + q[index] - a[i] for p, q, a, i in zip(place, scene.points, axes, index)]
        box, d = scene.ellipsoid(centre, radius * shape, turn=place[0], reach=0.6 * radius)
        d = np.maximum(d + 0.12 * radius * bump[box], organ[box] + 1)
        soft = scene.soft + (0.16 if kind == "subtle" else 0.05) * radius
        if kind == "rim":
            scene.paint(box, d - 0.5, density + 24)
            scene.paint(box, d + max(1.6, 0.13 * radius), density + contrast + 4 * bump[box], soft)
            scene.paint(box, d + 0.55 * radius, density + 1.5 * contrast, soft)
        else:
            scene.paint(box, d, density + contrast + 4 * bump[box], soft)
        region = label[box]
        found = (d < 0) & (region > 0)
        region[found] = 2
        placed += bool(found.any())
    return placed
