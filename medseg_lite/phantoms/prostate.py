"""Prostate phantoms: T2-weighted MRI of the pelvis, with the prostate labelled.

The phantoms follow the PROMISE12 challenge (Litjens et al. 2014, Medical Image Analysis 18:359), on which Drozdzal et al. 2018,
section 4.3, train: four sites whose voxels, intensity scales and coils differ. The prostate has a bright peripheral zone and a
transition zone with nodules. Muscle, fat, veins and organs around it make its outline hard to find, above all at its two ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ..volume import Case
from .noise import Axes, blur, bspline_noise, centred_axes, check_whole, make_affine, make_cohort, stream
from .shapes import EVERYWHERE, Scene, carve, ellipsoid, join

CLASSES = ("background", "prostate")
EXTENT = ((-90.0, 90.0), (-90.0, 90.0), (-60.0, 60.0))  # mm that random fields span, on any grid
WIDE = ((-120.0, 120.0), (-120.0, 120.0), (-60.0, 60.0))  # the same where patients lie anywhere
SHIFT, ZOOM = 24.0, 0.15  # with `vary`: most mm along D and H, a fifth of the smallest field of view; most change of size


@dataclass(frozen=True)
class Scanner:
    """The scanner of one site, and its settings.

    Attributes:
        size: number of pixels along D and H.
        pixel_mm: side of a pixel in mm.
        slice_mm: distance of the slices in mm.
        slices: number of slices.
        level: intensity of urine, about, in the scanner's arbitrary units.
        noise: standard deviation of the Rician noise as a fraction of `level`.
        coil: whether there is an endorectal coil. It fills the rectum, and tissue near it is far brighter.
    """

    size: int
    pixel_mm: float
    slice_mm: float
    slices: int
    level: float
    noise: float
    coil: bool = False


PROSTATE_SITES = {
    "A": Scanner(128, 1.0, 3.6, 20, 700, 0.035),
    "B": Scanner(160, 0.75, 2.6, 24, 1600, 0.04, coil=True),
    "C": Scanner(112, 1.25, 3.0, 24, 260, 0.045),
    # Held out: thick noisy slices, with an endorectal coil in every other patient.
    "D": Scanner(144, 0.9, 4.0, 18, 1100, 0.065),
}


def prostate(seed: int, *, site: str = "A", size: int | None = None, vary: bool = False) -> Case:
    """Generate one patient.

    Args:
        seed: number of the patient, 0 or more. The same seed gives the same bytes, and the same patient at every site and size.
        site: "A", "B" (endorectal coil) or "C"; "D" is meant to be held out, to see how a network generalises.
        size: number of pixels along D and H, by default the site's 128, 160, 112 or 144. The field of view stays the same.
        vary: whether patients lie up to 24 mm from the middle of the field of view, along D and H, and are up to 15 % larger or
            smaller. Without it the prostate is near the middle, so that a guess without the image finds most of it.

    Returns:
        A case of one channel, "t2", slices along W. `image` holds whole numbers; `label` is 1 in the prostate. `info` has the
        seed, the site, whether there is a "coil", "prostate_ml" and the names of the "classes".
    """
    seed = check_whole("seed", seed, 0)
    if site not in PROSTATE_SITES:
        raise ValueError(f"site is {site!r}; expected one of {', '.join(PROSTATE_SITES)}")
    scanner = PROSTATE_SITES[site]
    size = scanner.size if size is None else size
    size = check_whole("size", size, 32, 512)
    pixel = scanner.pixel_mm * scanner.size / size
    spacing = (pixel, pixel, scanner.slice_mm)
    axes = centred_axes((size, size, scanner.slices), spacing)

    coil = scanner.coil or (site == "D" and seed % 2 == 1)
    shift, zoom = _place(seed) if vary else (np.zeros(3), 1.0)
    inside = [((a - s) / zoom).astype(np.float32) for a, s in zip(axes, shift)]  # mm from the middle of the prostate
    extent = WIDE if vary else EXTENT
    scene, gland, rectum = _pelvis(seed, inside, coil, extent)
    label = (gland < 0).astype(np.uint8)
    image = _scan(stream(seed, f"prostate scan at {site}"), scanner, scene, pixel, rectum if coil else None, extent)

    ml = float(np.prod(spacing)) / 1000
    return Case(
        image=np.rint(image).astype(np.float32)[None],
        channels=("t2",),
        label=label,
        affine=make_affine(axes, spacing),
        name=f"prostate-{site}-{seed:04d}",
        info={"seed": seed, "site": site, "coil": coil, "prostate_ml": round(float(label.sum()) * ml, 1), "classes": CLASSES},
    )


def prostate_cohort(
    count: int, *, sites: Sequence[str] = "ABC", first_seed: int = 0, progress: bool = False, **options
) -> list[Case]:
    """Generate `count` patients with consecutive seeds; the sites take turns, and `options` are those of `prostate`."""
    return make_cohort(prostate, count, sites=sites, first_seed=first_seed, progress=progress, **options)


def _place(seed: int) -> tuple[np.ndarray, float]:
    """Draw where a patient lies, in mm, and the factor of the size."""
    rng = stream(seed, "place")
    return np.array([*rng.uniform(-SHIFT, SHIFT, 2), 0.0]), 1 + rng.uniform(-ZOOM, ZOOM)


def _scan(
    rng: np.random.Generator, scanner: Scanner, scene: Scene, pixel: float, rectum: np.ndarray | None, extent=EXTENT
) -> np.ndarray:
    """Add the scanner's blur, shading and noise to an ideal picture; a coil in the `rectum` brightens its surroundings."""
    sd, level = np.float32(scanner.noise * rng.uniform(0.7, 1.3)), scanner.level * np.exp(rng.normal(0, 0.15))
    image = scene.image.clip(0)
    if pixel < 1.8:
        image = blur(image, 0.55 / pixel)
    shading = 0.12 * bspline_noise(rng, scene.axes, 80, extent=extent)
    if rectum is not None:
        image *= 0.4 + 2.6 * np.exp(-np.maximum(rectum, 0) / 17)
    image *= np.exp(shading)
    real, imaginary = sd * rng.standard_normal((2, *image.shape), dtype=np.float32)
    return np.hypot(image + real, imaginary) * level


# ------------------------------------------------------------------------------------------------------------ anatomy


class Noise(NamedTuple):
    """The random fields that shape one pelvis: `bend` has the longest features, `ridge` and `other` are alike."""

    bend: np.ndarray
    lumps: np.ndarray
    fine: np.ndarray
    ridge: np.ndarray
    other: np.ndarray


def _pelvis(seed: int, axes: Axes, coil: bool, extent=EXTENT) -> tuple[Scene, np.ndarray, np.ndarray]:
    """Paint the ideal picture, in which urine is about 1.2; return it with the distances to prostate and rectum."""
    rng = stream(seed, "pelvis")
    draw = partial(bspline_noise, rng, axes, extent=extent)
    scene = Scene(axes, draw(38, count=3) * np.array([1.8, 1.8, 1.2], np.float32)[:, None, None, None], 0.62)
    noise = Noise(draw(16), draw(8), draw(3.2), draw(7), draw(7))

    # Fat, with septa: thin dark sheets where a random field changes sign.
    septum = np.exp(-((noise.ridge / 0.13) ** 2)) * np.clip(0.7 + 0.5 * noise.bend, 0, 1)
    scene.image += 0.035 * noise.lumps + 0.03 * noise.fine - 0.17 * septum

    volume = float(np.exp(np.clip(rng.normal(np.log(45), 0.38), np.log(20), np.log(110))))
    r = (volume * 750 / np.pi) ** (1 / 3)
    radii = np.array([1.20, 0.86, 0.98]) * r * np.exp(rng.normal(0, 0.05, 3))
    _paint_sides(rng, scene, noise, radii)
    _paint_front(rng, scene, noise, radii)
    _paint_bladder(rng, scene, noise, radii)
    rectum = _paint_rectum(rng, scene, noise, radii, coil)
    gland = _paint_gland(rng, scene, noise, radii, rectum)
    return scene, gland, rectum


def _paint_sides(rng: np.random.Generator, scene: Scene, noise: Noise, radii: np.ndarray) -> None:
    """Paint the pelvic bones, the obturator muscles on them, the levator muscles close to the prostate, and the buttocks."""
    x, y, z = scene.points
    rw, rh, _ = radii
    side = np.abs(x)
    bone = rw + 27 + 2.5 * rng.normal()
    grain = 0.045 * noise.fine + 0.03 * noise.lumps
    curve = 0.005 * (y - 8) ** 2
    hip = ellipsoid((side - bone - 19 + 0.4 * curve, y - 6, z), (0, 0, 0), (20, 34, 90)) + 1.6 * noise.bend
    obturator = ellipsoid((side - bone + 6 + curve, y - 1, z + 4), (0, 0, 0), (8.5, 37, 70)) + 1.2 * noise.bend
    fibres = 0.5 * grain + 0.06 * np.clip(noise.ridge - 1.2, 0, 1)
    scene.paint(EVERYWHERE, join(obturator, hip, 6.0) - 0.5, 0.17 + fibres)
    scene.paint(EVERYWHERE, hip, 0.06)
    scene.paint(EVERYWHERE, hip + 1.8, 0.46 + grain)
    sheet = side - (rw + 6 + 0.10 * (z + 10) - 0.006 * (y + 8) ** 2 * (y < -8))
    ends = np.maximum(y - rh * 0.55, -y - rh - 30)
    levator = np.abs(sheet) - 1.9 - 0.5 * noise.lumps + 0.12 * np.maximum(ends + 14, 0)
    scene.paint(EVERYWHERE, levator, 0.19)
    for sign in (-1, 1):  # buttocks
        box, d = scene.ellipsoid((sign * 46, -66, 0), (38, 24, 70), turn=-sign * 0.5)
        stripes = 0.10 * np.clip(noise.ridge[box] - 1.0, 0, 1.5)
        scene.paint(box, d + noise.bend[box], 0.19 + 0.5 * grain[box] + stripes)


def _paint_front(rng: np.random.Generator, scene: Scene, noise: Noise, radii: np.ndarray) -> None:
    """Paint the pubic bones and their symphysis, and the veins behind them."""
    rw, rh, rl = radii
    front = rh + 17 + rng.uniform(-2, 3)
    box = scene.box((-34, front - 12, -30), (34, front + 26, 22))
    u, v, w = scene.points_in(box)
    pubis = (
        ellipsoid((np.abs(u) - 13, v - front - 9 + 0.25 * np.abs(u), w + 4), (0, 0, 0), (15, 9.5, 22)) + 0.8 * noise.bend[box]
    )
    scene.paint(box, pubis, 0.07)
    scene.paint(box, pubis + 1.7, 0.44 + 0.045 * noise.fine[box] + 0.03 * noise.lumps[box])
    box, d = scene.ellipsoid((0, front + 8, -4), (2.6, 9, 18))
    scene.paint(box, d, 0.30)
    box, veins = scene.ellipsoid((0, 0.35 * rh, -2), (rw + 5.5, 0.65 * rh + 9, rl + 2))
    worms = np.clip(1.7 - 4.0 * np.abs(noise.other[box]), 0, 1)
    scene.paint(box, veins + 1.5 * noise.lumps[box], 0.40 + 0.55 * worms, 1.2)


def _paint_bladder(rng: np.random.Generator, scene: Scene, noise: Noise, radii: np.ndarray) -> None:
    """Paint the bladder above the prostate, and the seminal vesicles behind it."""
    _, rh, rl = radii
    centre = (0, 7 + rng.normal(0, 3), rl + rng.uniform(12, 20))
    box, d = scene.ellipsoid(centre, (rng.uniform(28, 40), rng.uniform(22, 30), 21))
    d = d + 1.3 * noise.bend[box]
    scene.paint(box, d - 3.2, 0.24 + 0.03 * noise.lumps[box])
    scene.paint(box, d, 1.22)
    for sign in (-1, 1):
        box, d = scene.ellipsoid((sign * 13, -0.62 * rh, rl * 0.95), (15, 5.5, 9), turn=sign * 0.25)
        tubules = np.clip(1.5 - 3.2 * np.abs(noise.ridge[box]), 0, 1)
        scene.paint(box, d + 1.0 * noise.bend[box], 0.28 + 0.85 * tubules)


def _paint_rectum(rng: np.random.Generator, scene: Scene, noise: Noise, radii: np.ndarray, coil: bool) -> np.ndarray:
    """Paint the rectum behind the prostate, wider and dark with a coil in it; return the distance to it."""
    x, y, z = scene.points
    bore = rng.uniform(19, 24) if coil else rng.uniform(9, 15)
    centre = -radii[1] - bore - (3.0 if coil else 5.0)
    drift, gas = rng.normal(0, 3), rng.random() < 0.4
    if coil:
        drift, gas = 0, True
    tube = ellipsoid((x - drift, y - centre - 0.06 * z, 0 * z), (0, 0, 0), (bore * 1.08, bore, 1e3))
    rectum = tube + (0.5 if coil else 1.4) * noise.bend
    box = scene.box((-bore - 14, centre - bore - 14, -99), (bore + 14, centre + bore + 14, 99))
    d = rectum[box]
    scene.paint(box, d - 4.0, 0.20)
    scene.paint(box, d - 2.0, 0.55 + 0.10 * noise.lumps[box])
    scene.paint(box, d, 0.03 if gas else 0.36 + 0.12 * noise.lumps[box] + 0.05 * noise.fine[box])
    return rectum


def _paint_gland(rng: np.random.Generator, scene: Scene, noise: Noise, radii: np.ndarray, rectum: np.ndarray) -> np.ndarray:
    """Paint the prostate; return the distance to it."""
    rw, rh, rl = radii
    around = scene.box(-1.2 * radii - 6, 1.2 * radii + 6)
    x, y, z = scene.points_in(around)
    # Narrower towards the apex, flat behind, and dented by the rectum.
    taper = 1 - 0.22 * np.clip(-z / rl, -0.3, 1)
    shape = ellipsoid((x / taper, y / taper, z), (0, 0, 0), radii) + 0.9 * noise.bend[around]
    shape = carve(shape, y + 0.80 * rh - 0.10 * np.abs(x), 4.0)
    gland = np.full(scene.image.shape, 99, np.float32)
    gland[around] = shape = carve(shape, rectum[around] - 4.5, 2.0)
    for sign in (-1, 1):  # bundles of nerves and vessels
        for _ in range(5):
            p = np.array([sign * rw * rng.uniform(0.66, 0.86), -rh * rng.uniform(0.80, 1.0), rng.uniform(-0.6, 0.6) * rl])
            box, d = scene.tube(p, p - (0, 0, 9), 1.0, 1.0)
            scene.paint(box, d, rng.choice([0.12, 0.95]))
    scene.paint(around, shape - 0.9, 0.17)
    septa = np.exp(-((noise.ridge[around] / 0.14) ** 2))
    scene.paint(around, shape, 0.90 + 0.06 * noise.lumps[around] + 0.05 * noise.fine[around] - 0.20 * septa)

    _paint_transition_zone(rng, scene, noise, radii, gland)
    box, stroma = scene.ellipsoid((0, 0.80 * rh, 0), (0.5 * rw, 0.22 * rh, 0.8 * rl))
    scene.paint(box, np.maximum(stroma, gland[box] + 0.3), 0.20 + 0.02 * noise.fine[box], 1.2)
    box, d = scene.tube((0, 0.1 * rh, rl * 0.9), (0, -0.05 * rh, -rl), 1.6, 1.6)  # urethra
    scene.paint(box, d - 1.5, 0.30, 0.8)
    scene.paint(box, d, 0.9, 0.8)
    if rng.random() < 0.5:  # cancer, not labelled: a dark focus in the peripheral zone
        angle = rng.uniform(-2.5, -0.65)
        p = np.array([np.cos(angle) * rw * 0.78, np.sin(angle) * rh * 0.70, rng.uniform(-0.4, 0.4) * rl])
        box, d = scene.ellipsoid(p, rng.uniform(3.5, 7, 3))
        scene.paint(box, np.maximum(d + 0.8 * noise.lumps[box], gland[box] + 0.5), 0.36 + 0.03 * noise.fine[box], 0.9)
    return gland


def _paint_transition_zone(rng: np.random.Generator, scene: Scene, noise: Noise, radii: np.ndarray, gland: np.ndarray) -> None:
    """Paint the transition zone with its nodules of hyperplasia: glandular ones bright, stromal ones dark, each with a rim."""
    zone = radii * np.array([0.76, 0.70, 0.80])
    middle = np.array([0, 0.24 * radii[1], 0.10 * radii[2]])
    box, d = scene.ellipsoid(middle, zone)
    d = np.maximum(d + 0.8 * noise.bend[box], gland[box] + 1.0)
    scene.paint(box, d - 0.8, 0.20)
    scene.paint(box, d, 0.44 + 0.05 * noise.lumps[box] + 0.05 * noise.fine[box] + 0.06 * noise.ridge[box])
    for _ in range(int(rng.integers(7, 15))):
        q = rng.uniform(-1, 1, 3)
        q = middle + zone * 0.66 * q / max(1, np.linalg.norm(q))
        radius = zone.min() * rng.uniform(0.14, 0.36)
        box, d = scene.ellipsoid(q, radius * np.exp(rng.normal(0, 0.15, 3)))
        around = ellipsoid(scene.points_in(box), middle, zone) + 1.2 + 0.8 * noise.bend[box]
        d = np.maximum(np.maximum(d + 0.4 * noise.bend[box], around), gland[box] + 2)
        grey = rng.uniform(0.28, 0.42) if rng.random() < 0.45 else rng.uniform(0.5, 0.85)
        scene.paint(box, d - 0.7, 0.19)
        scene.paint(box, d, grey + (0.05 + 0.10 * (grey > 0.5)) * noise.ridge[box] + 0.04 * noise.fine[box])
