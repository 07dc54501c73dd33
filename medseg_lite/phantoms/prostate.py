"""Prostate phantoms: T2-weighted MRI of the pelvis, with the prostate labelled.

After the PROMISE12 challenge (Litjens et al. 2014, Medical Image Analysis 18:359), on which Drozdzal et al. 2017, section 4.3,
train: four sites whose voxels, intensity scales and coils differ. The prostate has a bright peripheral zone, a transition zone
with nodules, and the muscle, fat, veins and organs around it that make its outline hard to find, above all at its two ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..volume import Case
from .anatomy import stream
from .mri import blur_matrix
from .noise import along, bspline_noise
from .shapes import EVERYWHERE, Scene, carve, ellipsoid, join

CLASSES = ("background", "prostate")
EXTENT = ((-90.0, 90.0), (-90.0, 90.0), (-60.0, 60.0))  # mm that random fields span, whatever the grid


@dataclass(frozen=True)
class Scanner:
    """How a site images a prostate.

    Attributes:
        size: pixels along D and H.
        pixel_mm, slice_mm: their size, and the distance of the slices.
        slices: how many.
        level: intensity that urine has about, in the scanner's arbitrary units.
        noise: standard deviation of the Rician noise as a fraction of it.
        coil: endorectal: it fills the rectum, and what lies near it is far brighter.
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
    "D": Scanner(
        144, 0.9, 4.0, 18, 1100, 0.065
    ),  # held out: thick noisy slices, with an endorectal coil in every other patient
}


def prostate(seed: int, *, site: str = "A", size: int | None = None) -> Case:
    """One patient.

    Args:
        seed: which patient, 0 or more. The same seed gives the same bytes, and the same patient at every site and size.
        site: "A", "B" (endorectal coil) or "C"; "D" is meant to be held out, to see how a network generalises.
        size: pixels along D and H, if other than the site's 128, 160, 112 or 144; the field of view stays.

    Returns:
        A case of one channel, "t2", slices along W. `image` holds whole numbers; `label` is 1 in the prostate. `info` has the
        seed, the site, whether there is a "coil", "prostate_ml" and the names of the "classes".
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}; expected a whole number, 0 or more")
    if site not in PROSTATE_SITES:
        raise ValueError(f"site is {site!r}; expected one of {', '.join(PROSTATE_SITES)}")
    scanner = PROSTATE_SITES[site]
    size = scanner.size if size is None else size
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 32 <= size <= 512:
        raise ValueError(f"size is {size!r}; expected a whole number, 32 to 512")
    pixel = scanner.pixel_mm * scanner.size / size
    spacing = (pixel, pixel, scanner.slice_mm)
    axes = [((np.arange(n) - (n - 1) / 2) * s).astype(np.float32) for n, s in zip((size, size, scanner.slices), spacing)]

    coil = scanner.coil or (site == "D" and seed % 2 == 1)
    scene, gland, rectum = _pelvis(seed, axes, coil)
    label = (gland < 0).astype(np.uint8)

    rng = stream(seed, f"prostate scan at {site}")
    sd, level = np.float32(scanner.noise * rng.uniform(0.7, 1.3)), scanner.level * np.exp(rng.normal(0, 0.15))
    image = scene.image.clip(0)
    blur = blur_matrix(size, 0.55 / pixel) if pixel < 1.8 else None
    if blur is not None:
        image = along(along(image, 0, blur), 1, blur)
    shading = 0.12 * bspline_noise(rng, axes, 80, extent=EXTENT)
    if coil:
        image *= 0.4 + 2.6 * np.exp(-np.maximum(rectum, 0) / 17)
    image *= np.exp(shading)
    real, imaginary = sd * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + real, imaginary) * level

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [a[0] for a in axes]
    ml = float(np.prod(spacing)) / 1000
    return Case(
        image=np.rint(image).astype(np.float32)[None],
        channels=("t2",),
        label=label,
        affine=affine,
        name=f"prostate-{site}-{seed:04d}",
        info={"seed": seed, "site": site, "coil": coil, "prostate_ml": round(float(label.sum()) * ml, 1), "classes": CLASSES},
    )


def prostate_cohort(
    count: int, *, sites: Sequence[str] = "ABC", first_seed: int = 0, progress: bool = False, **options
) -> list[Case]:
    """`count` patients with consecutive seeds, the sites taking turns; `options` as for `prostate`."""
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one case")
    if not len(sites):
        raise ValueError("sites is empty; name at least one of " + ", ".join(PROSTATE_SITES))
    steps = tqdm(range(first_seed, first_seed + count), desc="phantoms", unit="case", disable=not progress)
    return [prostate(seed, site=sites[i % len(sites)], **options) for i, seed in enumerate(steps)]


def _pelvis(seed: int, axes, coil: bool) -> tuple[Scene, np.ndarray, np.ndarray]:
    """The ideal picture, urine about 1.2, and distances to prostate and rectum."""
    rng = stream(seed, "pelvis")

    def noise(scale, count: int | None = None) -> np.ndarray:
        return bspline_noise(rng, axes, scale, extent=EXTENT, count=count)

    scene = Scene(axes, noise(38, 3) * np.array([1.8, 1.8, 1.2], np.float32)[:, None, None, None], 0.62)
    x, y, z = scene.points
    bend, lumps, fine = noise(16), noise(8), noise(3.2)
    ridge, other = noise(7), noise(7)

    # Fat, with septa: thin dark sheets where a random field changes sign.
    septum = np.exp(-((ridge / 0.13) ** 2)) * np.clip(0.7 + 0.5 * bend, 0, 1)
    scene.image += 0.035 * lumps + 0.03 * fine - 0.17 * septum

    volume = float(np.exp(np.clip(rng.normal(np.log(45), 0.38), np.log(20), np.log(110))))
    r = (volume * 750 / np.pi) ** (1 / 3)
    radii = np.array([1.20, 0.86, 0.98]) * r * np.exp(rng.normal(0, 0.05, 3))
    rw, rh, rl = radii
    side = np.abs(x)

    # Beside: pelvic bones, the obturator muscle on them, the levator muscle close to the prostate.
    bone = rw + 27 + 2.5 * rng.normal()
    grain = 0.045 * fine + 0.03 * lumps
    curve = 0.005 * (y - 8) ** 2
    hip = ellipsoid((side - bone - 19 + 0.4 * curve, y - 6, z), (0, 0, 0), (20, 34, 90)) + 1.6 * bend
    obturator = ellipsoid((side - bone + 6 + curve, y - 1, z + 4), (0, 0, 0), (8.5, 37, 70)) + 1.2 * bend
    fibres = 0.5 * grain + 0.06 * np.clip(ridge - 1.2, 0, 1)
    scene.paint(EVERYWHERE, join(obturator, hip, 6.0) - 0.5, 0.17 + fibres)
    scene.paint(EVERYWHERE, hip, 0.06)
    scene.paint(EVERYWHERE, hip + 1.8, 0.46 + grain)
    sheet = side - (rw + 6 + 0.10 * (z + 10) - 0.006 * (y + 8) ** 2 * (y < -8))
    ends = np.maximum(y - rh * 0.55, -y - rh - 30)
    levator = np.abs(sheet) - 1.9 - 0.5 * lumps + 0.12 * np.maximum(ends + 14, 0)
    scene.paint(EVERYWHERE, levator, 0.19)
    for sign in (-1, 1):  # buttocks
        box, d = scene.ellipsoid((sign * 46, -66, 0), (38, 24, 70), turn=-sign * 0.5)
        stripes = 0.10 * np.clip(ridge[box] - 1.0, 0, 1.5)
        scene.paint(box, d + bend[box], 0.19 + 0.5 * grain[box] + stripes)

    # In front: pubic bones and their symphysis, veins behind them.
    front = rh + 17 + rng.uniform(-2, 3)
    box = scene.box((-34, front - 12, -30), (34, front + 26, 22))
    u, v, w = scene.at(box)
    pubis = ellipsoid((np.abs(u) - 13, v - front - 9 + 0.25 * np.abs(u), w + 4), (0, 0, 0), (15, 9.5, 22)) + 0.8 * bend[box]
    scene.paint(box, pubis, 0.07)
    scene.paint(box, pubis + 1.7, 0.44 + grain[box])
    box, d = scene.ellipsoid((0, front + 8, -4), (2.6, 9, 18))
    scene.paint(box, d, 0.30)
    box, veins = scene.ellipsoid((0, 0.35 * rh, -2), (rw + 5.5, 0.65 * rh + 9, rl + 2))
    worms = np.clip(1.7 - 4.0 * np.abs(other[box]), 0, 1)
    scene.paint(box, veins + 1.5 * lumps[box], 0.40 + 0.55 * worms, 1.2)

    # Above: the bladder. Behind: seminal vesicles and rectum.
    box, d = scene.ellipsoid(
        (0, 7 + rng.normal(0, 3), rl + rng.uniform(12, 20)), (rng.uniform(28, 40), rng.uniform(22, 30), 21)
    )
    d = d + 1.3 * bend[box]
    scene.paint(box, d - 3.2, 0.24 + 0.03 * lumps[box])
    scene.paint(box, d, 1.22)
    for sign in (-1, 1):
        box, d = scene.ellipsoid((sign * 13, -0.62 * rh, rl * 0.95), (15, 5.5, 9), turn=sign * 0.25)
        tubules = np.clip(1.5 - 3.2 * np.abs(ridge[box]), 0, 1)
        scene.paint(box, d + 1.0 * bend[box], 0.28 + 0.85 * tubules)
    bore = rng.uniform(19, 24) if coil else rng.uniform(9, 15)
    centre = -rh - bore - (3.0 if coil else 5.0)
    drift, gas = rng.normal(0, 3), rng.random() < 0.4
    if coil:
        drift, gas = 0, True
    rectum = (
        ellipsoid((x - drift, y - centre - 0.06 * z, 0 * z), (0, 0, 0), (bore * 1.08, bore, 1e3))
        + (0.5 if coil else 1.4) * bend
    )
    box = scene.box((-bore - 14, centre - bore - 14, -99), (bore + 14, centre + bore + 14, 99))
    tube = rectum[box]
    scene.paint(box, tube - 4.0, 0.20)
    scene.paint(box, tube - 2.0, 0.55 + 0.10 * lumps[box])
    scene.paint(box, tube, 0.03 if gas else 0.36 + 0.12 * lumps[box] + 0.05 * fine[box])

    gland = _gland(rng, scene, radii, rectum, bend, lumps, fine, ridge)
    return scene, gland, rectum


def _gland(rng, scene: Scene, radii, rectum, bend, lumps, fine, ridge) -> np.ndarray:
    """Paint the prostate and return the distance to it."""
    rw, rh, rl = radii
    around = scene.box(-1.2 * radii - 6, 1.2 * radii + 6)
    whole = np.full(scene.image.shape, 99, np.float32)
    x, y, z = scene.at(around)
    # Narrower towards the apex, flat behind, and dented by the rectum.
    taper = 1 - 0.22 * np.clip(-z / rl, -0.3, 1)
    gland = ellipsoid((x / taper, y / taper, z), (0, 0, 0), radii) + 0.9 * bend[around]
    gland = -join(-gland, y + 0.80 * rh - 0.10 * np.abs(x), 4.0)
    whole[around] = gland = carve(gland, rectum[around] - 4.5, 2.0)
    for sign in (-1, 1):  # bundles of nerves and vessels
        for _ in range(5):
            p = np.array([sign * rw * rng.uniform(0.66, 0.86), -rh * rng.uniform(0.80, 1.0), rng.uniform(-0.6, 0.6) * rl])
            box, d = scene.tube(p, p - (0, 0, 9), 1.0, 1.0)
            scene.paint(box, d, rng.choice([0.12, 0.95]))
    scene.paint(around, gland - 0.9, 0.17)
    septa = np.exp(-((ridge[around] / 0.14) ** 2))
    scene.paint(around, gland, 0.90 + 0.06 * lumps[around] + 0.05 * fine[around] - 0.20 * septa)
    gland = whole

    zone = radii * np.array([0.76, 0.70, 0.80])
    middle = np.array([0, 0.24 * rh, 0.10 * rl])
    box, transition = scene.ellipsoid(middle, zone)
    transition = np.maximum(transition + 0.8 * bend[box], gland[box] + 1.0)
    scene.paint(box, transition - 0.8, 0.20)
    scene.paint(box, transition, 0.44 + 0.05 * lumps[box] + 0.05 * fine[box] + 0.06 * ridge[box])
    for _ in range(int(rng.integers(7, 15))):  # nodules of hyperplasia: glandular ones bright, stromal ones dark, each in a rim
        q = rng.uniform(-1, 1, 3)
        q = middle + zone * 0.66 * q / max(1, np.linalg.norm(q))
        radius = zone.min() * rng.uniform(0.14, 0.36)
        part, d = scene.ellipsoid(q, radius * np.exp(rng.normal(0, 0.15, 3)))
        d = np.maximum(d + 0.4 * bend[part], ellipsoid(scene.at(part), middle, zone) + 1.2 + 0.8 * bend[part])
        d = np.maximum(d, gland[part] + 2)
        grey = rng.uniform(0.28, 0.42) if rng.random() < 0.45 else rng.uniform(0.5, 0.85)
        scene.paint(part, d - 0.7, 0.19)
        scene.paint(part, d, grey + (0.05 + 0.10 * (grey > 0.5)) * ridge[part] + 0.04 * fine[part])
    box, stroma = scene.ellipsoid((0, 0.80 * rh, 0), (0.5 * rw, 0.22 * rh, 0.8 * rl))
    scene.paint(box, np.maximum(stroma, gland[box] + 0.3), 0.20 + 0.02 * fine[box], 1.2)
    box, d = scene.tube((0, 0.1 * rh, rl * 0.9), (0, -0.05 * rh, -rl), 1.6, 1.6)
    scene.paint(box, d - 1.5, 0.30, 0.8)
    scene.paint(box, d, 0.9, 0.8)
    if rng.random() < 0.5:  # cancer, not labelled: a dark focus in the peripheral zone
        angle = rng.uniform(-2.5, -0.65)
        p = np.array([np.cos(angle) * rw * 0.78, np.sin(angle) * rh * 0.70, rng.uniform(-0.4, 0.4) * rl])
        box, d = scene.ellipsoid(p, rng.uniform(3.5, 7, 3))
        scene.paint(box, np.maximum(d + 0.8 * lumps[box], gland[box] + 0.5), 0.36 + 0.03 * fine[box], 0.9)
    return gland
