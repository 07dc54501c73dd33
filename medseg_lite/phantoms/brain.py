"""Brain phantoms: four MRI sequences of people with a glioma, contusions, a stroke, or a healthy brain.

The anatomy is the ICBM152 average turned into an individual (`anatomy`), lesions grow in it (`lesions`), and a scanner
at one of four sites takes the pictures (`mri`). The seed determines everything: the person, the lesion and the scan
draw their random numbers from separate streams. So a seed is the same patient at every site and on every grid, and
`lesion=None` shows that patient before the illness.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from scipy import ndimage

from ..postprocess import largest_component
from ..transforms import mirror_hemisphere
from ..volume import BRATS_CLASSES, Case, bounding_box
from . import lesions
from .anatomy import EXTENT, SHRINK, Person
from .mri import SITES, TISSUES, Site, acquire, signals
from .noise import Axes, bspline_noise, centred_axes, check_grid, check_whole, make_affine, make_cohort, multiply_axis, stream

CHANNELS = ("flair", "t1", "t1c", "t2")
LESIONS = ("glioma", "contusions", "stroke", None)
FIELD_OF_VIEW = (144.0, 160.0, 128.0)  # mm

CLASSES = {"contusions": ("background", "contusion"), "stroke": ("background", "stroke")}  # of the others: `BRATS_CLASSES`

# Volumes in `Case.info`, and the label numbers that each counts.
VOLUMES = {
    "glioma": {"core_ml": (1, 3, 4), "oedema_ml": (2,), "enhancing_ml": (4,)},
    "contusions": {"lesion_ml": (1,)},
    "stroke": {"lesion_ml": (1,)},
    None: {},
}

# Width in mm over which each lesion tissue passes into its surroundings, a standard deviation.
SOFTNESS = {"oedema": 1.5, "necrosis": 0.9, "nonenhancing": 1.3, "enhancing": 0.7, "blood": 1.0, "infarct": 1.5}


def brain(
    seed: int,
    *,
    site: str | Site = "A",
    spacing: float = 2.0,
    lesion: str | None = "glioma",
    grade: str | None = None,
    mirrored: bool = False,
    missing: Collection[str] = (),
    motion: float = 0.0,
    cut: float = 0.0,
    shape: Sequence[int] | None = None,
    spots: float = 0.0,
) -> Case:
    """Generate one brain phantom.

    Args:
        seed: number of the patient, 0 or more. The same seed gives the same bytes.
        site: site of the scanner: "A", "B", "C", or "D", which is meant to be held out (see `SITES`); or a `Site` of your own, such as
            one from `random_site`, which is called "own".
        spacing: voxel size in mm: 2 (72×80×64 voxels), 1.5 or 1 (144×160×128).
        lesion: "glioma" (labels as in BRATS 2015: 1 necrosis, 2 oedema, 3 non-enhancing, 4 enhancing), "contusions"
            (label 1), "stroke" (label 1, with a fifth channel "dwi"), or None for a healthy brain.
        grade: grade of a glioma: "high", "low", or None for a random 80 : 20.
        mirrored: whether to make a healthy brain of a glioma or stroke case by mirroring the hemisphere without lesion.
            Kayalibay et al. (2017, section 4.2) measure false positives on such brains. The oedema of a mirrored glioma
            never crosses the corpus callosum.
        missing: names of channels that were not acquired.
        motion: size of the head's sudden shifts during each scan, a standard deviation in mm. Ghosts appear from about 1.
        cut: share of the brain (0 to 0.9) that the scan leaves out, behind or below an oblique plane. Image, label and
            mask are 0 there.
        shape: number of voxels along D, H, W, by default those of a field of view of 144×160×128 mm. The middle of the
            grid stays where it was.
        spots: how many more white-matter hyperintensities than the person's age alone brings, 0 to 2, at every site. They are
            bright on FLAIR and T2 as oedema is, ill and healthy people have them, and they belong to the background. With 1
            they grow together around the ventricles.

    Returns:
        A case in RAS order. `image` holds whole non-negative numbers on the scanner's own scale, exactly 0 outside
        `mask` and at least 1 inside. `extra` holds, as float16, the share of "csf", "gm" and "wm" in every voxel before
        the lesion replaced them (their sum is 1 inside the mask), and "midline", the distance from the falx in mm,
        positive on the patient's right. `info` holds seed, site, age, lesion, grade, side, volumes in ml and the names
        of the "classes".
    """
    _check(seed, site, spacing, lesion, grade, mirrored, missing, motion, cut, shape, spots)
    seed, spacing = int(seed), float(spacing)
    if shape is None:
        shape = tuple(max(1, round(mm / spacing)) for mm in FIELD_OF_VIEW)
    axes = centred_axes(shape, (spacing,) * 3)
    channels = _channels(lesion)

    person = Person(seed)
    disease = _draw_lesion(person, lesion, grade, crossing=not mirrored)
    positions, maps = disease.view(person, axes)
    mask = _strip_skull(person, maps, axes)
    masks = {tissue: m & mask for tissue, m in disease.masks(axes).items()}
    label = np.zeros(shape, np.uint8)
    for tissue, m in masks.items():
        label[m] = disease.labels[tissue]

    visit = stream(seed, f"scan at {site}")
    scanner, site = (site, "own") if isinstance(site, Site) else (SITES[site], site)
    table = signals(scanner, channels, stream(seed, "relaxation"), visit)
    fractions = _fractions(person, disease, maps, masks, axes, spots)
    image = multiply_axis(fractions, 0, table)
    _add_texture(image, channels, person, maps, fractions, axes)
    image = acquire(image, scanner, channels, axes, visit, extent=EXTENT, motion=motion)

    extra = {name: np.where(mask, maps[name], 0).astype(np.float16) for name in ("csf", "gm", "wm")}
    midline = positions[0] * np.float32(SHRINK)
    if mirrored:
        image = np.stack([mirror_hemisphere(a, midline, disease.side) for a in image])
        mask = mirror_hemisphere(mask, midline, disease.side)
        extra = {name: mirror_hemisphere(a, midline, disease.side) for name, a in extra.items()}
        label = np.zeros_like(label)
    if cut:
        mask = mask & ~_find_cut(mask, axes, cut, visit)
        label = np.where(mask, label, 0).astype(np.uint8)

    ending = "-mirrored" if mirrored else {"glioma": "", None: "-healthy"}.get(lesion, f"-{lesion}")
    case = Case(
        image=np.where(mask, np.maximum(np.rint(image), 1), 0).astype(np.float32),
        channels=channels,
        label=label,
        mask=mask,
        affine=make_affine(axes, (spacing,) * 3),
        info=_describe(person, disease, label, site, lesion, mirrored, ml=spacing**3 / 1000),
        name=f"brain-{site}-{seed:04d}{ending}",
        extra=extra | {"midline": midline.astype(np.float16)},
    )
    return case.select([c for c in channels if c not in missing]) if missing else case


def brain_cohort(
    count: int, *, sites: Sequence[str] = "ABC", first_seed: int = 0, progress: bool = False, **options
) -> list[Case]:
    """Generate `count` patients with consecutive seeds; the sites take turns, and `options` are those of `brain`.

    The main properties of a glioma (grade, volumes, shares of its parts) are spread evenly over consecutive seeds, so
    that a small cohort resembles a large one.
    """
    return make_cohort(brain, count, sites=sites, first_seed=first_seed, progress=progress, **options)


def _channels(lesion: str | None) -> tuple[str, ...]:
    return (*CHANNELS, "dwi") if lesion == "stroke" else CHANNELS


def _check(seed, site, spacing, lesion, grade, mirrored, missing, motion, cut, shape, spots) -> None:
    check_whole("seed", seed, 0)
    check_grid(spacing, shape, "2, 1.5 or 1")
    if not isinstance(site, Site) and site not in SITES:
        raise ValueError(f"site is {site!r}; expected one of {', '.join(SITES)}, or a Site")
    if lesion not in LESIONS:
        raise ValueError(f"lesion is {lesion!r}; expected one of {', '.join(map(repr, LESIONS))}")
    if grade not in ("high", "low", None):
        raise ValueError(f"grade is {grade!r}; expected 'high', 'low' or None for a random one")
    if grade and lesion != "glioma":
        raise ValueError(f"grade is {grade!r} but lesion is {lesion!r}; only a glioma has a grade")
    if mirrored and lesion not in ("glioma", "stroke"):
        raise ValueError(f"mirrored needs a lesion in one hemisphere (glioma or stroke); lesion is {lesion!r}")
    channels = _channels(lesion)
    if isinstance(missing, str):
        raise ValueError(f"missing is {missing!r}; expected a collection of channel names, such as ({missing!r},)")
    unknown = [c for c in missing if c not in channels]
    if unknown:
        raise ValueError(f"missing names {', '.join(map(repr, unknown))}; this case has {', '.join(channels)}")
    if len(set(missing)) == len(channels):
        raise ValueError("missing names every channel; leave at least one")
    if not 0 <= motion <= 20:
        raise ValueError(f"motion is {motion!r} mm; expected 0 to 20")
    if not 0 <= cut <= 0.9:
        raise ValueError(f"cut is {cut!r}; expected a share of the brain, 0 to 0.9")
    if not 0 <= spots <= 2:
        raise ValueError(f"spots is {spots!r}; expected 0 to 2")


def _draw_lesion(person: Person, lesion: str | None, grade: str | None, *, crossing: bool) -> lesions.Lesion:
    if lesion == "glioma":
        return lesions.glioma(person, grade=grade, crossing=crossing)
    if lesion is None:
        return lesions.Lesion()
    return {"contusions": lesions.contusions, "stroke": lesions.stroke}[lesion](person)


def _strip_skull(person: Person, maps: dict[str, np.ndarray], axes: Axes) -> np.ndarray:
    """Return the brain mask, in one piece and a little ragged, as skull stripping leaves it."""
    ragged = bspline_noise(stream(person.seed, "skull stripping"), axes, 7, extent=EXTENT)
    return largest_component((maps["depth"] + 0.8 * ragged > 0.9) & (maps["depth"] > 0.3))


def _fractions(person, disease, maps, masks, axes, burden) -> np.ndarray:
    """Return the share of every tissue in every voxel, `(tissues, D, H, W)` in the order of `TISSUES`; they sum to 1."""
    rng = stream(person.seed, "variants")
    f = {name: np.zeros(maps["wm"].shape, np.float32) for name in TISSUES}
    f["csf"], f["gm"], f["wm"] = maps["csf"], maps["gm"], maps["wm"]

    # White-matter hyperintensities of age: caps around the ventricles, and scattered spots.
    spots, broad, curve, other = bspline_noise(rng, axes, 8, extent=EXTENT, count=4)
    caps = np.clip(2.4 * maps["near_ventricle"], 0, 1) + 0.25 * spots - (1.15 - 0.70 * person.atrophy - 0.35 * burden)
    scattered = spots - (3.4 - 1.0 * person.atrophy - 1.2 * burden)
    f["hyperintensity"] = 0.85 * np.clip(3 * np.maximum(caps, scattered), 0, 1) * np.clip(4 * maps["wm"] - 2, 0, 1)

    # Tissues that take up contrast agent in everybody: sinuses, arteries, choroid plexus, dura, and vessels in the sulci,
    # which run along the curves where two random fields vanish together.
    sulcal = np.exp(-(curve**2 + other**2) / (2 * 0.20**2)) * np.clip(2.5 * maps["csf"] - 0.2, 0, 1)
    dura = np.clip(1.2 * broad - 1.1, 0, 1) * np.clip(1.3 - maps["depth"] / 2, 0, 1)
    large = maps["vessel"] * np.clip(0.85 + 0.35 * broad, 0.2, 1.1)
    f["vessel"] = np.clip(np.maximum.reduce([large, 0.8 * dura, 0.9 * sulcal]), 0, 0.95)
    _displace(f, ("csf", "gm", "wm"), f["hyperintensity"] + f["vessel"])

    if masks:
        _add_lesion(f, disease, maps, masks, axes, broad, spots, rng)
    return np.stack([f[name] for name in TISSUES])


def _add_lesion(f, disease, maps, masks, axes, broad, spots, rng) -> None:
    """Let the lesion's tissues displace the others."""
    spacing = float(axes[0][1] - axes[0][0])
    soft = {tissue: _soften(m, SOFTNESS[tissue] / spacing) for tissue, m in masks.items()}
    if "oedema" in soft:  # cortex holds less water than white matter
        soft["oedema"] *= np.clip(0.85 + 0.12 * broad, 0.5, 1) * np.clip(0.45 + 0.7 * maps["wm"], 0, 1)
    if "enhancing" in soft:  # no wall enhances evenly
        fine = bspline_noise(rng, axes, 4, extent=EXTENT)
        quiet = soft["enhancing"] * np.clip(0.28 - 0.25 * spots - 0.30 * fine, 0, 0.85)
        soft["enhancing"] -= quiet
        soft["nonenhancing"] += quiet
    total = sum(soft.values())
    _displace(f, ("csf", "gm", "wm", "hyperintensity", "vessel"), total)
    for tissue, share in soft.items():
        f[tissue] = f[tissue] + share / np.maximum(total, 1)
    for tissue, look in disease.looks.items():
        whole = f[tissue].copy()
        for other, share in look.items():
            f[other] = f[other] + share * whole
            f[tissue] = f[tissue] - share * whole


def _soften(mask: np.ndarray, sd: float) -> np.ndarray:
    """Blur a mask with a Gaussian of `sd` voxels; only its surroundings are computed."""
    out = np.zeros(mask.shape, np.float32)
    if mask.any():
        box = bounding_box(mask, border=int(3 * sd) + 1)
        out[box] = ndimage.gaussian_filter(mask[box].astype(np.float32), sd, truncate=3)
    return out


def _displace(fractions: dict[str, np.ndarray], names: Sequence[str], taken: np.ndarray) -> None:
    """Shrink the named tissues to make room for `taken`, the share (0 to 1) of what replaces them."""
    left = 1 - np.clip(taken, 0, 1)
    for name in names:
        fractions[name] = fractions[name] * left


def _add_texture(image, channels, person, maps, fractions, axes) -> None:
    """Multiply the ideal image by what uniform tissues lack: nuclei, fibre tracts, grain, uneven lesions."""
    rng = stream(person.seed, "texture")
    grain = 0.018 * bspline_noise(rng, axes, 4, extent=EXTENT) + 0.018 * bspline_noise(rng, axes, 11, extent=EXTENT)
    lumps = bspline_noise(rng, axes, 5, extent=EXTENT) + bspline_noise(rng, axes, 10, extent=EXTENT)
    order = list(TISSUES)
    ill = sum(fractions[order.index(t)] for t in SOFTNESS)
    for i, channel in enumerate(channels):
        detail = 0.6 if channel in ("t1", "t1c") else -0.35  # iron and myelin: bright on T1, dark on T2
        rough = 0.6 if channel in ("t1", "t1c") else 1.0
        uneven = 0.07 if channel == "t1c" else 0.04
        image[i] *= 1 + detail * maps["detail"] * (1 - ill) + rough * grain + uneven * lumps * ill


def _find_cut(mask: np.ndarray, axes: Axes, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return the voxels beyond an oblique plane that leaves out `share` of the brain, below or behind."""
    below = rng.random() < 0.5
    normal = np.array([0, 0.3, 1.0] if below else [0, 1.0, 0.15]) + rng.normal(0, 0.08, 3)
    height = sum(n * a for n, a in zip(normal, np.meshgrid(*axes, indexing="ij", sparse=True)))
    return height < np.quantile(height[mask], share)


def _describe(person, disease, label, site: str, lesion: str | None, mirrored: bool, ml: float) -> dict[str, object]:
    """Return the facts of a case for `Case.info`; `ml` is the volume of a voxel."""
    info = {"seed": person.seed, "site": site, "age": person.age, "lesion": None if mirrored else lesion, "mirrored": mirrored}
    info["classes"] = CLASSES.get(lesion, BRATS_CLASSES)
    if mirrored:
        return info
    info |= disease.info
    if disease.side:
        info["side"] = "right" if disease.side > 0 else "left"
    volumes = VOLUMES[lesion].items()
    return info | {name: round(float(np.count_nonzero(np.isin(label, v)) * ml), 2) for name, v in volumes}
