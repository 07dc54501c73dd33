"""The MRI scanner that takes pictures of tissues: signal equations, four sites, and everything that degrades an image.

Signals follow the textbook equations of the steady state (for example Bernstein, King and Zhou, Handbook of MRI Pulse
Sequences, 2004, chapters 14 and 16), with TR, TE, TI and relaxation times in ms:

    spin echo   PD (1 - exp(-TR/T1)) exp(-TE/T2)
    mprage      PD |1 - 2 exp(-TI/T1) / (1 + exp(-TR/T1))| exp(-TE/T2)
    flair       PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2), TI chosen so that cerebrospinal fluid vanishes
    dwi         PD exp(-TE/T2) exp(-b D), b = 1000 s/mm2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .noise import Axes, blur, bspline_noise, multiply_axis

# At 3 T: T1 and T2 in ms, proton density, diffusion in 1e-3 mm2/s, and the increase of 1/T1 by a dose of gadolinium, in 1/s.
TISSUES = {
    "csf": (4200, 900, 1.00, 3.00, 0.0),
    "gm": (1400, 97, 0.82, 0.85, 0.012),
    "wm": (860, 73, 0.71, 0.75, 0.006),
    "oedema": (1500, 175, 0.86, 1.40, 0.015),
    "necrosis": (2600, 260, 0.94, 2.00, 0.0),
    "nonenhancing": (1750, 140, 0.87, 1.20, 0.03),
    "enhancing": (1500, 120, 0.85, 1.00, 1.05),
    "vessel": (1600, 55, 0.75, 1.50, 4.0),
    "hyperintensity": (1350, 130, 0.80, 1.10, 0.0),
    "blood": (650, 60, 0.82, 0.70, 0.0),
    "infarct": (1650, 135, 0.86, 0.40, 0.01),
}


@dataclass(frozen=True)
class Protocol:
    """The way in which a site acquires one channel.

    Attributes:
        kind: name of the signal equation: "spin echo", "mprage", "flair" or "dwi".
        tr, te, ti: times in ms. For a FLAIR, TI is computed instead.
        level: intensity of white matter in the scanner's arbitrary units.
        slice_mm: thickness of the slices, which are stacked along W.
        blur_mm: standard deviation of the in-plane blur.
    """

    kind: str
    tr: float
    te: float
    ti: float = 0.0
    level: float = 500.0
    slice_mm: float = 1.0
    blur_mm: float = 0.5


@dataclass(frozen=True)
class Site:
    """The scanner of one hospital, and its settings.

    Attributes:
        tesla: field strength. T1 times grow with its cube root.
        noise: standard deviation of the Rician noise in one voxel, as a fraction of white matter.
        bias: strength of the coil's smooth shading.
        gamma: exponent of the intensity scale, 1 for a linear one.
        protocols: `Protocol` of each channel.
    """

    tesla: float
    noise: float
    bias: float
    gamma: float
    protocols: Mapping[str, Protocol]


def _dwi(level: float) -> Protocol:
    return Protocol("dwi", 6000, 90, level=level, slice_mm=5, blur_mm=1.3)


PROTOCOLS = {
    "A": {
        "flair": Protocol("flair", 9000, 118, level=430, slice_mm=3, blur_mm=0.8),
        "t1": Protocol("spin echo", 600, 12, level=480),
        "t1c": Protocol("spin echo", 600, 12, level=520),
        "t2": Protocol("spin echo", 4500, 95, level=700, slice_mm=3),
        "dwi": _dwi(300),
    },
    "B": {
        "flair": Protocol("flair", 8500, 125, level=190, slice_mm=5, blur_mm=1.0),
        "t1": Protocol("spin echo", 520, 14, level=210, slice_mm=5),
        "t1c": Protocol("mprage", 1900, 3.5, 950, level=1500),
        "t2": Protocol("spin echo", 3800, 105, level=330, slice_mm=5, blur_mm=0.7),
        "dwi": _dwi(180),
    },
    "C": {
        "flair": Protocol("flair", 6000, 125, level=900, blur_mm=0.6),
        "t1": Protocol("mprage", 2000, 3, 1150, level=900),
        "t1c": Protocol("mprage", 2000, 3, 1150, level=1100),
        "t2": Protocol("spin echo", 3200, 110, level=1300),
        "dwi": _dwi(600),
    },
    "D": {
        "flair": Protocol("flair", 10000, 95, level=1700, slice_mm=5, blur_mm=1.2),
        "t1": Protocol("spin echo", 400, 16, level=1200, slice_mm=5, blur_mm=0.8),
        "t1c": Protocol("spin echo", 450, 16, level=1300, slice_mm=5, blur_mm=0.8),
        "t2": Protocol("spin echo", 5500, 80, level=2500, slice_mm=5, blur_mm=0.9),
        "dwi": _dwi(900),
    },
}

SITES = {
    # 3 T research protocol, low noise: spin-echo T1, T2 and FLAIR of 3 mm
    "A": Site(tesla=3.0, noise=0.020, bias=0.12, gamma=1.0, protocols=PROTOCOLS["A"]),
    # 1.5 T clinical routine: 5 mm slices, except for a 3D T1 after contrast agent
    "B": Site(tesla=1.5, noise=0.028, bias=0.20, gamma=1.0, protocols=PROTOCOLS["B"]),
    # 3 T, all sequences 3D at 1 mm, strong shading
    "C": Site(tesla=3.0, noise=0.030, bias=0.28, gamma=1.0, protocols=PROTOCOLS["C"]),
    # held out: an old 1.5 T scanner with thick noisy slices, shading, and a curved intensity scale
    "D": Site(tesla=1.5, noise=0.042, bias=0.30, gamma=1.15, protocols=PROTOCOLS["D"]),
}


def random_site(seed: int) -> Site:
    """Draw a scanner and its settings at random: a generative model of how images are acquired.

    Field strength, noise, shading, intensity scale, and for each channel the sequence, its times, level, slices and blur are drawn one
    by one, from ranges of clinical practice that hold the four `SITES`. So patients can be scanned by scanners that exist nowhere.

    Args:
        seed: seed of the draw.

    Returns:
        A site for `phantoms.brain(..., site=...)`.

    Source: Kamnitsas et al. 2017, section 5, propose such a model for the augmentation of training data. The ranges are ours.
    Taught in notebook 06.
    """
    rng = np.random.default_rng([int(seed), 1])

    def protocol(kind: str, tr: tuple[float, float], te: tuple[float, float], ti: tuple[float, float] = (0, 0)) -> Protocol:
        times = [float(rng.uniform(*limits)) for limits in (tr, te, ti)]
        level, slice_mm, blur = np.exp(rng.uniform(5.2, 7.8)), rng.choice([1.0, 3.0, 5.0]), rng.uniform(0.5, 1.2)
        return Protocol(kind, *times, level=float(level), slice_mm=float(slice_mm), blur_mm=float(blur))

    def t1() -> Protocol:
        if rng.random() < 0.5:
            return protocol("spin echo", (400, 700), (8, 18))
        return protocol("mprage", (1800, 2300), (2.5, 4), (900, 1200))

    protocols = {
        "flair": protocol("flair", (6000, 11000), (90, 140)),
        "t1": t1(),
        "t1c": t1(),
        "t2": protocol("spin echo", (3000, 6000), (80, 120)),
        "dwi": protocol("dwi", (4000, 8000), (70, 110)),
    }
    tesla, noise, bias, gamma = (
        rng.choice([1.5, 3.0]),
        rng.uniform(0.015, 0.045),
        rng.uniform(0.1, 0.35),
        rng.uniform(0.85, 1.2),
    )
    return Site(float(tesla), float(noise), float(bias), float(gamma), protocols)


def signals(site: Site, channels: Sequence[str], person: np.random.Generator, visit: np.random.Generator) -> np.ndarray:
    """Compute the signal of every tissue in every channel, `(channels, tissues)` in the order of `TISSUES`, white matter = 1.

    Args:
        site: scanner and its settings.
        channels: names of the channels.
        person: random generator for T1 and T2, which differ by 4 % (standard deviation) between people.
        visit: random generator for the dose of contrast agent, and for how well FLAIR nulls cerebrospinal fluid.
    """
    t1, t2, pd, diffusion, uptake = np.array(list(TISSUES.values())).T
    wobble = person.normal(0, (0.04, 0.04, 0.01), (len(TISSUES), 3)).T
    t1 = t1 * np.exp(wobble[0]) * (site.tesla / 3) ** (1 / 3)
    t2, pd = t2 * np.exp(wobble[1]), pd * np.exp(wobble[2])
    dose, null = visit.uniform(0.7, 1.3), visit.uniform(0.94, 0.99)
    order = list(TISSUES)
    table = np.empty((len(channels), len(TISSUES)))
    for row, channel in zip(table, channels):
        p = site.protocols[channel]
        longitudinal = 1 / (1 / t1 + 1e-3 * dose * uptake) if channel == "t1c" else t1
        if p.kind == "spin echo":
            row[:] = 1 - np.exp(-p.tr / longitudinal)
        elif p.kind == "mprage":
            row[:] = np.abs(1 - 2 * np.exp(-p.ti / longitudinal) / (1 + np.exp(-p.tr / longitudinal)))
        elif p.kind == "flair":
            fluid = longitudinal[order.index("csf")]
            ti = -fluid * np.log((1 + np.exp(-p.tr / fluid)) / 2) * null
            row[:] = np.abs(1 - 2 * np.exp(-ti / longitudinal) + np.exp(-p.tr / longitudinal))
        else:
            row[:] = np.exp(-1000 * 1e-3 * diffusion)
        row *= pd * np.exp(-p.te / t2)
        row /= row[order.index("wm")]
    return table.astype(np.float32)


def acquire(
    image: np.ndarray,
    site: Site,
    channels: Sequence[str],
    axes: Axes,
    rng: np.random.Generator,
    *,
    extent: Sequence[tuple[float, float]],
    motion: float = 0.0,
) -> np.ndarray:
    """Scan ideal images: add shading, motion, blur, thick slices, noise and the scanner's intensity scale.

    Args:
        image: ideal images `(C, D, H, W)`, white matter = 1.
        site: scanner and its settings.
        channels: names of the channels.
        axes: positions of the voxels in mm.
        rng: random generator of this scan.
        extent: (first, last) position in mm that the shading spans along each axis, see `bspline_noise`.
        motion: size of the head's sudden shifts during each scan, a standard deviation in mm.
    """
    spacing = float(axes[0][1] - axes[0][0]) if len(axes[0]) > 1 else 1.0
    coil = bspline_noise(rng, axes, 90, extent=extent, count=len(channels) + 1)
    out = np.empty_like(image)
    for i, channel in enumerate(channels):
        p = site.protocols[channel]
        x = image[i] * np.exp(site.bias * (0.36 * coil[-1] + 0.24 * coil[i]))
        if motion:
            x = shake(x, motion / spacing, rng)
        if p.blur_mm > 0.3 * spacing:
            x = blur(x, p.blur_mm / spacing)
        thin = p.slice_mm <= spacing
        if not thin:
            to_slices, to_voxels = slice_matrices(x.shape[2], spacing, p.slice_mm)
            x = multiply_axis(x, 2, to_slices)
        sd = site.noise * rng.uniform(0.7, 1.3) * (1.0 if p.kind in ("spin echo", "mprage") else 1.2)
        real, imaginary = np.float32(sd) * rng.standard_normal((2, *x.shape), dtype=np.float32)
        x = np.sqrt((x + real) ** 2 + imaginary**2)
        if not thin:
            x = multiply_axis(x, 2, to_voxels)
        if site.gamma != 1:
            x **= np.float32(site.gamma)
        out[i] = x * np.float32(p.level * np.exp(rng.normal(0, 0.12)))
    return out


def slice_matrices(voxels: int, spacing: float, thickness: float) -> tuple[np.ndarray, np.ndarray]:
    """Return two matrices: one averages voxels into slices, one interpolates slices back to voxels.

    Their shapes are `(slices, voxels)` and `(voxels, slices)`; `spacing` and `thickness` are in mm.
    """
    slices = int(np.ceil(voxels * spacing / thickness))
    p = (np.arange(voxels) - (voxels - 1) / 2) * spacing
    q = (np.arange(slices) - (slices - 1) / 2) * thickness
    overlap = np.minimum(q[:, None] + thickness / 2, p + spacing / 2) - np.maximum(q[:, None] - thickness / 2, p - spacing / 2)
    overlap = np.clip(overlap, 0, None)
    back = np.clip(1 - np.abs(p[:, None] - q) / thickness, 0, None)
    return (
        (overlap / overlap.sum(1, keepdims=True)).astype(np.float32),
        (back / back.sum(1, keepdims=True)).astype(np.float32),
    )


def shake(image: np.ndarray, sd: float, rng: np.random.Generator) -> np.ndarray:
    """Add the ghosts of a head that jumps by `sd` voxels between phase-encoding lines.

    Phase encoding runs along H. The head does not move while the centre of k-space is acquired.
    """
    lines = np.fft.fftfreq(image.shape[1])
    jumps = np.sort(rng.uniform(0.04, 0.5, 6))  # |frequency| at which the head jumps; each sign has shifts of its own
    places = rng.normal(0, sd, (2, 7, 3))
    places[:, 0] = 0
    shift = places[(lines < 0).astype(int), np.searchsorted(jumps, np.abs(lines))]  # (H, 3)
    spectrum = np.fft.fftn(image)
    kd, kw = np.fft.fftfreq(image.shape[0]), np.fft.fftfreq(image.shape[2])
    phase = kd[:, None, None] * shift[:, 0, None] + (lines * shift[:, 1])[:, None] + kw * shift[:, 2, None]
    return np.abs(np.fft.ifftn(spectrum * np.exp(-2j * np.pi * phase))).astype(np.float32)
