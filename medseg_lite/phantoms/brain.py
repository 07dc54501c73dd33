"""Brain phantoms: four MRI sequences of people with a glioma, contusions, a stroke, or nothing at all.

The anatomy is the ICBM152 average turned into an individual (`anatomy`), lesions grow in it (`lesions`), and a scanner
at one of four sites takes the pictures (`mri`). Everything follows from the seed: the person, the lesion and the scan
draw their random numbers from separate streams, so a seed is the same patient at every site and on every grid, and
`lesion=None` shows that patient before falling ill.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from ..transforms import mirror_hemisphere
from ..volume import BRATS_CLASSES, Case, bounding_box
from . import lesions
from .anatomy import EXTENT, SHRINK, Axes, Person, stream
from .mri import SITES, TISSUES, acquire, signals
from .noise import along, bspline_noise

CHANNELS = ("flair", "t1", "t1c", "t2")
LESIONS = ("glioma", "contusions", "stroke", None)
FIELD_OF_VIEW = (144.0, 160.0, 128.0)  # mm

# Label numbers behind the volumes in `Case.info`.
VOLUMES = {
    "glioma": {"core_ml": (1, 3, 4), "oedema_ml": (2,), "enhancing_ml": (4,)},
    "contusions": {"lesion_ml": (1,)},
    "stroke": {"lesion_ml": (1,)},
}

# How softly, in mm, each lesion tissue passes into its surroundings.
SOFTNESS = {"oedema": 1.5, "necrosis": 0.9, "nonenhancing": 1.3, "enhancing": 0.7, "blood": 1.0, "infarct": 1.5}


def brain(
    seed: int,
    *,
    site: str = "A",
    spacing: float = 2.0,
    lesion: str | None = "glioma",
    grade: str | None = None,
    mirrored: bool = False,
    missing: Collection[str] = (),
    motion: float = 0.0,
    cut: float = 0.0,
    shape: Sequence[int] | None = None,
) -> Case:
    """One phantom patient.

    Args:
        seed: which patient, 0 or more. The same seed gives the same bytes.
        site: where the scan is made: "A", "B", "C", or "D", which is meant to be held out (see `SITES`).
        spacing: voxel size in mm: 2 (72×80×64 voxels), 1.5 or 1 (144×160×128).
        lesion: "glioma" (labels as in BRATS 2015: 1 necrosis, 2 oedema, 3 non-enhancing, 4 enhancing), "contusions"
            (label 1), "stroke" (label 1, with a fifth channel "dwi"), or None for a healthy brain.
        grade: of a glioma: "high", "low", or None for a random 80 : 20.
        mirrored: make a healthy brain of a glioma or stroke case by mirroring the hemisphere without lesion, which is
            how Kayalibay et al. (2017, section 4.2) measure false positives. The oedema of a mirrored glioma never
            crosses the corpus callosum.
        missing: channels that were not acquired.
        motion: how far the head jumps during each scan, a standard deviation in mm; ghosts appear from about 1.
        cut: share of the brain (0 to 0.9) that the scan leaves out, behind or below an oblique plane. There, image, label and mask are 0.
        shape: voxels of the grid, if other than the 144×160×128 mm field of view; its middle stays where it was.

    Returns:
        A case in RAS order. `image` holds whole non-negative numbers on the scanner's own scale, exactly 0 outside
        `mask` and at least 1 inside. `extra` holds, as float16, the share of "csf", "gm" and "wm" in every voxel before
        the lesion replaced them (their sum is 1 inside the mask), and "midline", the distance from the falx in mm,
        positive on the patient's right. `info` holds seed, site, age, lesion, grade, side, volumes in ml and the names of the "classes".
    """
    _check(seed, site, spacing, lesion, grade, mirrored, missing, motion, cut, shape)
    if shape is None:
        shape = tuple(max(1, round(mm / spacing)) for mm in FIELD_OF_VIEW)
    axes = tuple(((np.arange(n) - (n - 1) / 2) * spacing).astype(np.float32) for n in shape)
    person = Person(seed)
    disease = None
    if lesion == "glioma":
        disease = lesions.glioma(person, grade=grade, crossing=not mirrored)
    elif lesion is not None:
        disease = {"contusions": lesions.contusions, "stroke": lesions.stroke}[lesion](person)
    if disease is None:
        positions = person.positions(axes)
        maps = person.look(positions)
    else:
        positions, maps = disease.view(person, axes)
    mask = _skull_strip(person, maps, axes)
    masks = {tissue: m & mask for tissue, m in disease.paint(axes).items()} if disease else {}
    label = np.zeros(shape, np.uint8)
    for tissue, m in masks.items():
        label[m] = disease.labels[tissue]

    channels = (*CHANNELS, "dwi") if lesion == "stroke" else CHANNELS
    visit = stream(seed, f"scan at {site}")
    table = signals(SITES[site], channels, stream(seed, "relaxation"), visit)
    fractions = _fractions(person, disease, maps, masks, axes)
    image = along(fractions, 0, table)
    _add_texture(image, channels, person, maps, fractions, axes)
    image = acquire(image, SITES[site], channels, axes, visit, extent=EXTENT, motion=motion)

    midline = positions[0] * np.float32(SHRINK)
    extra = {name: np.where(mask, maps[name], 0).astype(np.float16) for name in ("csf", "gm", "wm")}
    arrays = [*image, label, mask, *extra.values()]
    if mirrored:
        arrays = [mirror_hemisphere(a, midline, disease.side) for a in arrays]
        arrays[len(channels)] = np.zeros_like(label)
    *image, label, mask, csf, gm, wm = arrays
    if cut:
        mask = mask & ~_beyond_cut(mask, axes, cut, visit)
        label = np.where(mask, label, 0).astype(np.uint8)
    image = np.where(mask, np.maximum(np.rint(image), 1), 0).astype(np.float32)

    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = [a[0] for a in axes]
    info = {"seed": seed, "site": site, "age": person.age, "lesion": None if mirrored else lesion, "mirrored": mirrored}
    info["classes"] = {"contusions": ("background", "contusion"), "stroke": ("background", "stroke")}.get(lesion, BRATS_CLASSES)
    ml = spacing**3 / 1000
    if disease and not mirrored:
        info |= disease.info
        if disease.side:
            info["side"] = "right" if disease.side > 0 else "left"
        volumes = {k: round(float(np.count_nonzero(np.isin(label, v)) * ml), 2) for k, v in VOLUMES[lesion].items()}
        info |= volumes
    kind = "mirrored" if mirrored else {"glioma": None, None: "healthy"}.get(lesion, lesion)
    case = Case(
        image=image,
        channels=channels,
        label=label,
        mask=mask,
        affine=affine,
        info=info,
        name="-".join(["brain", site, f"{seed:04d}"] + [kind] * (kind is not None)),
        extra={"csf": csf, "gm": gm, "wm": wm, "midline": midline.astype(np.float16)},
    )
    return case.select([c for c in channels if c not in missing]) if missing else case


def brain_cohort(
    count: int, *, sites: Sequence[str] = "ABC", first_seed: int = 0, progress: bool = False, **options
) -> list[Case]:
    """`count` patients with consecutive seeds, the sites taking turns; `options` as for `brain`.

    What matters most about a glioma (grade, volumes, shares of its parts) is spread evenly over consecutive seeds, so
    that a small cohort resembles a large one.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one case")
    if not len(sites):
        raise ValueError("sites is empty; name at least one of " + ", ".join(SITES))
    seeds = range(first_seed, first_seed + count)
    steps = tqdm(seeds, desc="phantoms", unit="case", disable=not progress)
    return [brain(seed, site=sites[i % len(sites)], **options) for i, seed in enumerate(steps)]


def _check(seed, site, spacing, lesion, grade, mirrored, missing, motion, cut, shape) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}; expected a whole number, 0 or more")
    if site not in SITES:
        raise ValueError(f"site is {site!r}; expected one of {', '.join(SITES)}")
    if not 0.5 <= spacing <= 8:
        raise ValueError(f"spacing is {spacing!r} mm; expected 0.5 to 8, usually 2, 1.5 or 1")
    if lesion not in LESIONS:
        raise ValueError(f"lesion is {lesion!r}; expected one of {', '.join(map(repr, LESIONS))}")
    if grade not in ("high", "low", None):
        raise ValueError(f"grade is {grade!r}; expected 'high', 'low' or None for a random one")
    if grade and lesion != "glioma":
        raise ValueError(f"grade is {grade!r} but lesion is {lesion!r}; only a glioma has a grade")
    if mirrored and lesion not in ("glioma", "stroke"):
        raise ValueError(f"mirrored needs a lesion in one hemisphere (glioma or stroke); lesion is {lesion!r}")
    channels = (*CHANNELS, "dwi") if lesion == "stroke" else CHANNELS
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
    if shape is not None and (len(shape) != 3 or any(int(n) != n or n < 8 for n in shape)):
        raise ValueError(f"shape is {tuple(shape)}; expected three whole numbers (D, H, W) of at least 8 voxels")


def _skull_strip(person: Person, maps: dict[str, np.ndarray], axes: Axes) -> np.ndarray:
    """The brain mask, a little ragged, as skull stripping leaves it; one piece."""
    ragged = bspline_noise(stream(person.seed, "skull stripping"), axes, 7, extent=EXTENT)
    mask = (maps["depth"] + 0.8 * ragged > 0.9) & (maps["depth"] > 0.3)
    pieces, count = ndimage.label(mask)
    if count > 1:
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        mask = pieces == sizes.argmax()
    return mask


def _fractions(person, disease, maps, masks, axes) -> np.ndarray:
    """Share of every tissue in every voxel, `(tissues, D, H, W)` in the order of `TISSUES`; they sum to 1."""
    spacing = float(axes[0][1] - axes[0][0])
    rng = stream(person.seed, "variants")
    f = {name: np.zeros(maps["wm"].shape, np.float32) for name in TISSUES}
    f["csf"], f["gm"], f["wm"] = maps["csf"], maps["gm"], maps["wm"]

    # White-matter hyperintensities of age: caps around the ventricles, and scattered spots.
    spots, broad, curve, other = bspline_noise(rng, axes, 8, extent=EXTENT, count=4)
    caps = np.clip(2.4 * maps["near_ventricle"], 0, 1) + 0.25 * spots - (1.15 - 0.70 * person.atrophy)
    scattered = spots - (3.4 - 1.0 * person.atrophy)
    f["hyperintensity"] = 0.85 * np.clip(3 * np.maximum(caps, scattered), 0, 1) * np.clip(4 * maps["wm"] - 2, 0, 1)

    # What takes up contrast agent in everybody: sinuses, arteries, choroid plexus, dura, and vessels in the sulci,
    # which run along the curves where two random fields vanish together.
    sulcal = np.exp(-(curve**2 + other**2) / (2 * 0.20**2)) * np.clip(2.5 * maps["csf"] - 0.2, 0, 1)
    dura = np.clip(1.2 * broad - 1.1, 0, 1) * np.clip(1.3 - maps["depth"] / 2, 0, 1)
    large = maps["vessel"] * np.clip(0.85 + 0.35 * broad, 0.2, 1.1)
    f["vessel"] = np.clip(np.maximum.reduce([large, 0.8 * dura, 0.9 * sulcal]), 0, 0.95)
    _displace(f, ("csf", "gm", "wm"), f["hyperintensity"] + f["vessel"])

    if masks:
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
    return np.stack([f[name] for name in TISSUES])


def _soften(mask: np.ndarray, sd: float) -> np.ndarray:
    """Gaussian blur of a mask, worked out only where it matters."""
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
    """Multiply the ideal image by what uniform tissues lack: nuclei, fibre tracts, grain, lesions' uneven insides."""
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


def _beyond_cut(mask: np.ndarray, axes: Axes, share: float, rng: np.random.Generator) -> np.ndarray:
    """True beyond an oblique plane that leaves out `share` of the brain, below or behind."""
    below = rng.random() < 0.5
    normal = np.array([0, 0.3, 1.0] if below else [0, 1.0, 0.15]) + rng.normal(0, 0.08, 3)
    height = sum(n * a for n, a in zip(normal, np.meshgrid(*axes, indexing="ij", sparse=True)))
    return height < np.quantile(height[mask], share)
