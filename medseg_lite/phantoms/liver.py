"""Liver phantoms: CT of the abdomen after contrast agent, with the liver and its lesions labelled.

The phantoms follow the LiTS challenge (Bilic et al. 2023, Medical Image Analysis 84:102680), whose data Drozdzal et al. 2018,
section 4.2, use in part: Hounsfield units, a different field of view and slice distance for every patient, and values far below
air outside the circle that the scanner reconstructs. Spleen, stomach, kidneys, heart and muscle have grey values near the liver's.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..postprocess import largest_component
from ..volume import Case
from .noise import Axes, blur, bspline_noise, centred_axes, check_whole, make_affine, make_cohort, stream
from .shapes import EVERYWHERE, Scene, carve, ellipsoid, join

CLASSES = ("background", "liver", "lesion")
LESIONS = ("hypodense", "rim", "subtle")
EXTENT = ((-330.0, 330.0), (-330.0, 330.0), (-130.0, 130.0))  # mm that random fields span, on any grid
LENGTH = 220.0  # mm along W
PADDING = (-3024, -2048, -1024)  # values that scanners write where they did not measure


def liver(
    seed: int, *, size: int = 128, slice_mm: float | None = 5.0, lesions: int | None = None, kind: str | None = None
) -> Case:
    """Generate one patient.

    Args:
        seed: number of the patient, 0 or more. The same seed gives the same bytes, and the same patient on every grid.
        size: number of pixels along D and H of a field of view of 271 to 640 mm. The scanners' own size, 512, has pixels of 0.53
            to 1.25 mm. The default is a quarter of that, which costs a fraction of a second.
        slice_mm: distance of the slices, 0.5 to 10; None for the patient's own, 0.7 to 5.
        lesions: number of lesions, 0 to 20; None for a random number.
        kind: "hypodense" (clearly darker than the liver), "rim" (with a bright edge) or "subtle"; None for a random kind.

    Returns:
        A case of one channel, "ct", in whole Hounsfield units. Outside the circle that the scanner reconstructs, which is the
        `mask`, the values are -3024, -2048 or -1024. Labels are 1 liver, 2 lesion. `info` has the seed, "lesions", their "kind",
        "liver_ml", "lesion_ml", the "padding" and the names of the "classes".
    """
    _check(seed, size, slice_mm, lesions, kind)
    seed, size = int(seed), int(size)
    rng = stream(seed, "abdomen")
    width = rng.uniform(152, 182)  # half of the body's width
    field = float(np.clip(2 * width * np.clip(np.exp(rng.normal(0.14, 0.12)), 1.02, 1.8), 512 * 0.53, 512 * 1.25))
    own = float(rng.choice([0.7, 1.0, 1.25, 2.0, 2.5, 3.0, 5.0]))
    slice_mm = own if slice_mm is None else float(slice_mm)
    spacing = (field / size, field / size, slice_mm)
    axes = centred_axes((size, size, round(LENGTH / slice_mm)), spacing)

    scene, organ, body, density = _abdomen(rng, axes, width)
    label = (organ < 0).astype(np.uint8)
    drawn = int(np.clip(rng.lognormal(1.3, 0.8), 0, 12))
    which = str(rng.choice(LESIONS, p=[0.5, 0.25, 0.25]))
    lesions, kind = drawn if lesions is None else lesions, which if kind is None else kind
    placed = _paint_lesions(stream(seed, "liver lesions"), scene, organ, label, lesions, kind, density)

    scan = stream(seed, "abdomen scan")
    padding = int(scan.choice(PADDING))
    image = _scan(scan, scene.image, spacing[0], body)
    mask = np.repeat((np.hypot(axes[0][:, None], axes[1]) <= field / 2)[..., None], image.shape[2], axis=2)
    image[~mask], label[~mask] = padding, 0

    ml = spacing[0] ** 2 * slice_mm / 1000
    return Case(
        image=np.rint(image)[None],
        channels=("ct",),
        label=label,
        mask=mask,
        affine=make_affine(axes, spacing),
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
    """Generate `count` patients with consecutive seeds; `options` are those of `liver`."""
    return make_cohort(liver, count, first_seed=first_seed, progress=progress, **options)


def _check(seed, size, slice_mm, lesions, kind) -> None:
    check_whole("seed", seed, 0)
    check_whole("size", size, 32, 512)
    if lesions is not None:
        check_whole("lesions", lesions, 0, 20)
    if slice_mm is not None and not 0.5 <= slice_mm <= 10:
        raise ValueError(f"slice_mm is {slice_mm!r}; expected 0.5 to 10 mm, or None for the patient's own")
    if kind is not None and kind not in LESIONS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(map(repr, LESIONS))}, or None for a random one")


def _scan(rng: np.random.Generator, image: np.ndarray, pixel: float, body: np.ndarray) -> np.ndarray:
    """Add the scanner's blur and quantum noise to an ideal picture."""
    sd = rng.uniform(6, 14)
    image = blur(image, 0.5 if pixel > 1.5 else 0.8 / pixel)
    # The reconstruction correlates the noise. There is more of it where much tissue lies around.
    grain = blur(rng.standard_normal(image.shape, dtype=np.float32), 0.7) / 0.40
    image += sd * grain * np.clip(0.5 - body / 90, 0.4, 1.3)
    return np.clip(image, -1024, 3071)


# ------------------------------------------------------------------------------------------------------------ anatomy


class Noise(NamedTuple):
    """The random fields that shape one abdomen; features of `bend` are longest, those of `fine` shortest."""

    bend: np.ndarray
    lumps: np.ndarray
    fine: np.ndarray


def _abdomen(rng: np.random.Generator, axes: Axes, width: float):
    """Paint one abdomen: the ideal picture in HU, distances to liver and skin, and the liver's own density.

    x grows to the patient's right, y to the front, z upwards. `width` is half of the body's width in mm.
    """
    draw = partial(bspline_noise, rng, axes, extent=EXTENT)
    scene = Scene(axes, draw(70, count=3) * np.array([3, 3, 4], np.float32)[:, None, None, None], -1000)
    noise = Noise(draw(26), draw(13), draw(6))
    phase = rng.uniform(0.8, 1.2)  # of the contrast agent
    density = float(np.clip(108 * phase + rng.normal(0, 8), 70, 140))

    fat = 6 + 0.9 * (width - 152) * rng.uniform(0.6, 1.1)  # thicker in wider people
    height = width * rng.uniform(0.64, 0.74)  # half of the body's extent from back to front
    back = 0.65 * fat - height  # y of the muscles' outer surface behind
    top = rng.uniform(48, 68)  # z of the diaphragm's right dome
    body, muscle = _paint_wall(scene, noise, width, height, fat)
    cavity = muscle + 15
    air = _paint_chest(scene, noise, cavity, top, phase)
    _paint_skeleton(rng, scene, noise, muscle, back)
    _paint_bowel(rng, scene, noise, cavity)
    _paint_kidneys(scene, noise, back, phase)
    _paint_spleen(rng, scene, noise, cavity, air, back, density)
    stomach = _paint_stomach(rng, scene, noise, cavity, air, top)
    _paint_great_vessels(rng, scene, noise, back, phase)

    organ = _shape_liver(scene, noise, cavity, air, back, top, stomach)
    scene.paint(EVERYWHERE, organ, density + 2.5 * noise.fine)
    _paint_liver_vessels(rng, scene, organ, density + 48 * phase, back, top)
    box, d = scene.ellipsoid((40, 40, top - 104), (13, 20, 17), turn=0.4)  # gallbladder
    d = d + noise.bend[box]
    scene.paint(box, d - 1.5, 60)
    scene.paint(box, d, 9)
    organ[box] = np.maximum(organ[box], 1.5 - d)

    _paint_table(scene, height)
    return scene, organ, body, density


def _paint_wall(scene: Scene, noise: Noise, width: float, height: float, fat: float) -> tuple[np.ndarray, np.ndarray]:
    """Paint skin, the fat under it, the muscular wall, and the fat around the organs; return distances to skin and muscle."""
    x, y, z = scene.points
    body = ellipsoid((x, y, 0 * z), (0, 0, 0), (width, height, 1e4)) + 2 * noise.bend
    radii = (width - fat, height - 0.85 * fat, 1e4)
    muscle = ellipsoid((x, y + 0.2 * fat, 0 * z), (0, 0, 0), radii) + 1.5 * noise.bend
    scene.paint(EVERYWHERE, body, -20)
    scene.paint(EVERYWHERE, body + 1.8, -104 + 4 * noise.fine)
    scene.paint(EVERYWHERE, muscle, 58 + 3 * noise.fine)
    scene.paint(EVERYWHERE, np.abs(muscle + 7.5) - 0.9, -60)  # fat between the layers of muscle
    strands = np.exp(-((noise.lumps / 0.08) ** 2))
    scene.paint(EVERYWHERE, muscle + 15, -102 + 4 * noise.fine + 45 * strands)
    return body, muscle


def _paint_chest(scene: Scene, noise: Noise, cavity: np.ndarray, top: float, phase: float) -> np.ndarray:
    """Paint the lungs above the two domes of the diaphragm, and the heart between them; return the distance to the space above."""
    x, y, z = scene.points
    right = top - ((x - 68) ** 2 / 110 + (y - 8) ** 2 / 135) * 0.75
    left = top - 12 - ((x + 72) ** 2 / 100 + (y - 2) ** 2 / 130) * 0.75
    dome = np.maximum(right, left) + 2 * noise.bend
    air = np.maximum(0.72 * (dome - z), cavity + 1.5)
    mediastinum = np.abs(x + 8) - 26 + 0.25 * np.maximum(-y, 0)
    lung = np.maximum(air, -mediastinum)
    branches = 260 * np.clip(1.3 - 9 * np.abs(noise.lumps), 0, 1) * (noise.fine > 0)
    scene.paint(EVERYWHERE, np.maximum(air, mediastinum), -95 + 4 * noise.fine)
    scene.paint(EVERYWHERE, lung, -855 + 18 * noise.fine + branches)
    heart = ellipsoid(scene.points, (-28, 32, top + 38), (58, 46, 44), 0.5) + noise.bend
    scene.paint(EVERYWHERE, np.maximum(heart, cavity + 2), 135 * phase + 20 * (noise.lumps > 0.3), 2.5)
    return air


def _paint_skeleton(rng: np.random.Generator, scene: Scene, noise: Noise, muscle: np.ndarray, back: float) -> None:
    """Paint the spine, the muscles along it, and the ribs."""
    x, y, z = scene.points
    for sign in (-1, 1):
        box, d = scene.ellipsoid((sign * 30, back + 17, 0), (29, 17, 1e3))
        scene.paint(box, d, 58 + 4 * noise.fine[box])
        box, d = scene.tube((sign * 30, back + 48, 10), (sign * 42, back + 50, -150), 8, 17)
        scene.paint(box, d, 60 + 3 * noise.fine[box])

    offset = rng.uniform(0, 34)
    box = scene.box((-75, back - 4, -999), (75, back + 74, 999))
    u, v, w = scene.points_in(box)
    height = np.abs((w + offset) % 34 - 17)  # from the middle of the disc
    shape = ellipsoid((u, v - back - 54, 0 * w), (0, 0, 0), (23, 17, 1e3))
    scene.paint(box, shape + 0.5, 85)  # discs
    vertebra = np.maximum(shape + 1.5 * np.cos((height - 4) / 13 * np.pi), 4.0 - height)
    arch = np.maximum(ellipsoid((u, v - back - 31, 0 * w), (0, 0, 0), (15, 14, 1e3)), np.abs(height - 12) - 9)
    spine = np.maximum(np.maximum(np.abs(u) - 3.2, np.abs(v - back - 13) - 13), np.abs(height - 8) - 7)
    wings = np.maximum(np.abs(v - back - 33 + 0.18 * np.abs(u)) - 4, np.maximum(np.abs(u) - 40, np.abs(height - 12) - 5))
    bone = join(vertebra, join(join(arch, spine, 4), wings, 4), 3)
    scene.paint(box, bone, 520)
    scene.paint(box, bone + 2.2, 190 + 22 * noise.fine[box] + 15 * noise.lumps[box])
    canal = ellipsoid((u, v - back - 32, 0 * w), (0, 0, 0), (9.5, 8, 1e3))
    scene.paint(box, canal, 30)

    # Ribs run down and forward in the muscular wall. In front they end in cartilage.
    angle = np.arctan2(np.abs(x), -y)  # 0 at the spine
    step = 27.0
    level = (z + 30 * angle + rng.uniform(0, step)) % step - step / 2
    rib = np.hypot((muscle + 7.5) / 4.2, level / 6.8)
    rib = np.maximum(4.2 * (rib - 1), 14 * np.maximum(0.42 - angle, angle - 2.45))
    rib = np.maximum(rib, 0.6 * (-55 - z - 25 * np.cos(angle)))
    front = angle > 2.05
    scene.paint(EVERYWHERE, rib, np.where(front, 105, 560))
    scene.paint(EVERYWHERE, rib + 1.9, np.where(front, 110, 190 + 25 * noise.fine))


def _paint_bowel(rng: np.random.Generator, scene: Scene, noise: Noise, cavity: np.ndarray) -> None:
    """Paint loops of bowel: thirty low in front, the others higher and on the left."""
    for n in range(44):
        p = rng.uniform((-105, -10, -125), (95, 70, -35)) if n < 30 else rng.uniform((-120, -25, -60), (-30, 50, 0))
        content = float(rng.choice([22, 45, 70, -650, 150], p=[0.3, 0.25, 0.2, 0.15, 0.1]))
        box, d = scene.tube(p, p + rng.normal(0, 18, 3) * [1, 1, 0.5], *rng.uniform(8, 15, 2))
        d = np.maximum(d + 1.5 * noise.lumps[box], cavity[box] + 3)
        scene.paint(box, d, 75)
        scene.paint(box, d + 2.4, content + 8 * noise.fine[box])


def _paint_kidneys(scene: Scene, noise: Noise, back: float, phase: float) -> None:
    """Paint both kidneys, each in its fat: cortex, medulla, and fat in the middle."""
    for sign, height in ((1, -52), (-1, -38)):
        box, d = scene.ellipsoid((sign * 60, back + 50, height), (26, 23, 52), turn=-sign * 0.5)
        d = d + 1.2 * noise.bend[box]
        scene.paint(box, d - 6, -108)
        scene.paint(box, d, 165 * phase + 4 * noise.fine[box])
        scene.paint(box, d + 8, (125 + 22 * np.sign(noise.lumps[box])) * phase, 2.5)
        box, d = scene.ellipsoid((sign * 51, back + 55, height), (11, 9, 24), turn=-sign * 0.5)
        scene.paint(box, d + noise.lumps[box], -60)


def _paint_spleen(rng: np.random.Generator, scene: Scene, noise: Noise, cavity, air, back: float, density: float) -> None:
    """Paint the spleen on the left (x < 0), a little denser than the liver."""
    box, d = scene.ellipsoid((-rng.uniform(92, 100), back + 58, rng.uniform(0, 14)), (26, 42, 50), turn=0.45)
    spleen = np.maximum(d + 2.5 * noise.bend[box], np.maximum(cavity[box] + 2, 3 - air[box]))
    scene.paint(box, spleen, density + rng.uniform(4, 18) + 2 * noise.fine[box])


def _paint_stomach(
    rng: np.random.Generator, scene: Scene, noise: Noise, cavity, air, top: float
) -> tuple[np.ndarray, np.ndarray]:
    """Paint the stomach on the left, with gas over fluid; return its centre and its radii."""
    centre, radii = np.array([-68, 22, top - 50]), np.array([38, 34, 48]) * rng.uniform(0.85, 1.1)
    box, d = scene.ellipsoid(centre, radii, turn=-0.3)
    stomach = np.maximum(d + 2.5 * noise.bend[box], np.maximum(cavity[box] + 3, 4 - air[box]))
    scene.paint(box, stomach, 78)
    level = centre[1] + rng.uniform(-5, 18)  # gas rises to the front of a patient who lies on the back
    scene.paint(box, stomach + 3.5, np.where(scene.points[1][box] > level, -920, 28 + 9 * noise.lumps[box]))
    return centre, radii


def _paint_great_vessels(rng: np.random.Generator, scene: Scene, noise: Noise, back: float, phase: float) -> None:
    """Paint aorta and vena cava in front of the spine, and the pancreas."""
    for centre, radius, value in (((-9, back + 78), 10.5, 158), ((22, back + 82), 12.0, 138)):
        box, d = scene.tube((*centre, -140), (*centre, 140), radius, radius)
        scene.paint(box, d, value * phase)
    p = np.array([[30, 14, -32], [5, 22, -22], [-25, 8, -12], [-60, -8, -4]]) + rng.normal(0, 2, (4, 3)) + [0, back + 84, 0]
    for a, b in pairwise(p):
        box, d = scene.tube(a, b, 9.5, 8)
        scene.paint(box, d + 1.8 * noise.lumps[box], 92 * phase)


def _paint_table(scene: Scene, height: float) -> None:
    """Paint the table under the patient; the warp does not bend it."""
    x, y = scene.axes[0][:, None], scene.axes[1]
    table = np.abs(y + height + 10 - 0.0007 * x**2)
    scene.image[(table < max(1.5, 0.5 * float(y[1] - y[0]))) & (np.abs(x) < 200)] = -180


def _shape_liver(scene: Scene, noise: Noise, cavity, air, back: float, top: float, stomach) -> np.ndarray:
    """Return the distance to the liver, which fills the space that diaphragm, ribs and its neighbours leave."""
    points = scene.points
    right = ellipsoid(points, (70, 0, top - 88), (76, 88, 88))
    left = ellipsoid(points, (8, 42, top - 52), (70, 30, 44), -0.15)
    organ = join(right, left, 24) + 3 * noise.bend
    organ = carve(organ, ellipsoid(points, (4, -8, top - 128), (62, 58, 62)), 16)  # the lower, hollow side
    organ = carve(organ, ellipsoid(points, (16, 62, top - 80), (3.5, 26, 34), -0.2), 3)  # the fissure
    organ = carve(organ, ellipsoid(points, (60, back + 48, -52), (34, 30, 58), -0.5), 6)
    organ = carve(organ, ellipsoid(points, (0, back + 58, 0), (40, 36, 1e3)), 8)
    organ = carve(organ, ellipsoid(points, (0, back + 17, 0), (66, 26, 1e3)), 6)
    organ = carve(organ, ellipsoid(points, stomach[0], stomach[1] + 3, -0.3), 5)
    organ = np.maximum(organ, np.maximum(cavity + 3.5, 3.5 - air))
    inside = organ < 0
    organ[inside & ~largest_component(inside)] = 1  # the neighbours may cut off a sliver
    return organ


def _paint_liver_vessels(rng: np.random.Generator, scene: Scene, organ, value: float, back: float, top: float) -> None:
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


def _paint_lesions(rng: np.random.Generator, scene: Scene, organ, label, count: int, kind: str, density: float) -> int:
    """Paint and label up to `count` lesions of one kind, and return their number."""
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
