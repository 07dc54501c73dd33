"""Lesions that grow in a person's brain: glioma, contusions and stroke.

A lesion is computed once, on a fixed 2 mm lattice, as smooth fields that are positive inside it. The fields are then
interpolated to the grid that the caller wants, so that a seed has the same lesion on every grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import ndtri

from .anatomy import EXTENT, SHRINK, Person, sample, template
from .noise import Axes, bspline_noise, centred_axes, stream

STEP = 2.0  # mm
LATTICE = centred_axes((72, 80, 64), (STEP,) * 3)

# Spread of a glioma's cells and water per 2 mm voxel and time step: diffusion in white and in grey matter, growth, time steps.
DIFFUSION_WM, DIFFUSION_GM, GROWTH, STEPS = 0.165, 0.006, 0.10, 70


@dataclass
class Lesion:
    """A lesion on `LATTICE`; one without fields stands for a healthy brain.

    Attributes:
        fields: tissue -> field, positive where that tissue has replaced the brain. Later tissues cover earlier ones.
        labels: tissue -> class number.
        side: +1 if the lesion lies right of the falx, -1 left, 0 on both sides.
        looks: tissue -> {other tissue: share}, the tissues that are mixed into it, for example fluid into a necrosis.
        centre, radius: centre and radius of the mass effect in world mm.
        strength: strength of the mass effect, 0 for none.
        info: facts for `Case.info`.
        seen: template positions and maps of the person on `LATTICE`, with the lesion's pressure; None if not computed.
    """

    fields: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    side: int = 0
    looks: dict[str, dict[str, float]] = field(default_factory=dict)
    centre: np.ndarray | None = None
    radius: float = 0.0
    strength: float = 0.0
    info: dict[str, object] = field(default_factory=dict)
    seen: tuple[np.ndarray, dict[str, np.ndarray]] | None = None

    def view(self, person: Person, axes: Axes) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return template positions and maps of the person on a grid, as the lesion has pushed them aside."""
        if self.seen and same_axes(axes, LATTICE):
            return self.seen
        positions, effaced = person.positions(axes), 0.0
        if self.strength:
            positions, effaced = push_aside(positions, axes, self.centre, self.radius, self.strength)
        return positions, person.look(positions, effaced)

    def masks(self, axes: Axes) -> dict[str, np.ndarray]:
        """Return the voxels of a grid that each tissue takes, as masks that do not overlap."""
        if not self.fields:
            return {}
        fields = np.stack(list(self.fields.values())).astype(np.float32)
        if not same_axes(axes, LATTICE):
            world = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
            table = torch.from_numpy(np.ascontiguousarray(np.moveaxis(fields, 0, -1)))
            fields = sample(table, [a[0] for a in LATTICE], STEP, world).reshape(-1, *map(len, axes))
        free = np.ones(fields.shape[1:], bool)
        masks = {}
        for tissue, values in reversed(list(zip(self.fields, fields))):
            masks[tissue] = (values > 0) & free
            free &= ~masks[tissue]
        return masks


def same_axes(a: Axes, b: Axes) -> bool:
    """Return whether two grids have the same voxels."""
    return all(len(x) == len(y) and np.allclose(x, y) for x, y in zip(a, b))


def push_aside(
    positions: np.ndarray, axes: Axes, centre: np.ndarray, radius: float, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Apply a mass effect: tissue moves radially away from `centre`, by `strength r exp(-(r / 1.25 radius)^2 / 2)` mm.

    The skull does not give way: the shift tapers to 0 over the outer 12 mm of the brain.

    Returns:
        The template positions of the tissue that ends up in every voxel, `(3, D, H, W)`, and how far, 0 to 1, the
        pressure has closed the sulci there, `(D, H, W)`.
    """
    offset = offsets_from(centre, axes, sparse=True)
    squared = offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2
    taper = np.clip(template().depth_at(positions) / 12, 0, 1)
    pull = strength / SHRINK * np.exp(squared * (-0.5 / (1.25 * radius) ** 2)) * taper
    positions = np.stack([p - pull * o for p, o in zip(positions, offset)])
    effaced = min(1.0, 2.5 * strength) * 0.7 * np.exp(squared * (-0.5 / (1.4 * radius) ** 2))
    return positions, effaced


def offsets_from(centre: np.ndarray, axes: Axes, *, sparse: bool = False) -> list[np.ndarray]:
    """Return the offset in mm of every voxel from a point, one array per axis."""
    return np.meshgrid(*(a - c for a, c in zip(axes, centre)), indexing="ij", sparse=sparse)


def quasirandom(seed: int) -> list[float]:
    """Return five numbers in 0..1 that fill the unit cube evenly as the seed counts up (Kronecker sequence on Roberts' R5).

    The main properties of a glioma are drawn from these numbers, so that even a small cohort of consecutive seeds holds its
    share of low grades and of small and large tumours.
    """
    ratio = 1.1347241384015194  # root of g**6 = g + 1
    strides = [int(2**64 / ratio**k) for k in range(1, 6)]
    return [(2**63 + (seed + 1) * stride) % 2**64 / 2**64 for stride in strides]


def threshold(values: np.ndarray, count: float) -> float:
    """Return the value below which the `count` smallest values lie."""
    if count < 1 or not values.size:
        return -np.inf
    k = min(int(count), values.size) - 1
    return float(np.partition(values.ravel(), k)[k]) + 1e-6


def ball_radius(ml: float) -> float:
    """Return the radius in mm of a ball of this volume in ml."""
    return (ml * 1000 * 3 / 4 / np.pi) ** (1 / 3)


# ------------------------------------------------------------------------------------------------------------- glioma


def glioma(person: Person, *, grade: str | None = None, crossing: bool = True) -> Lesion:
    """Grow a tumour core in one hemisphere's white matter, and the oedema around it.

    The core is a lumpy ball that stops at falx, ventricles, skull and tentorium. Its volume is lognormal (median 35 ml,
    sigma 0.7, 3 to 95 ml). High-grade cores hold necrosis inside, an enhancing rim and non-enhancing patches; every
    fifth is a thin-walled cyst. Low-grade cores are non-enhancing with a few enhancing spots. Oedema spreads from the
    core by the Fisher-Kolmogorov equation (as in Swanson et al., Cell Proliferation 33, 2000): fast in white matter,
    slowly in grey matter, not through fluid, and to the other hemisphere only through the corpus callosum.

    Args:
        person: the brain in which it grows.
        grade: "high", "low", or None for a random 80 : 20.
        crossing: whether oedema may cross the corpus callosum.
    """
    u_volume, u_grade, u_oedema, u_necrosis, u_rim = quasirandom(person.seed)
    rng = stream(person.seed, "glioma")
    grade = grade or ("high" if u_grade < 0.8 else "low")
    high = grade == "high"
    cystic = high and u_rim < 0.2
    core_ml = float(np.clip(np.exp(np.log(35) + 0.7 * ndtri(u_volume)), 3, 95))
    radius = ball_radius(core_ml)

    positions = person.positions(LATTICE)
    index = _choose_place(rng, positions)
    centre = np.array([a[i] for a, i in zip(LATTICE, index)])
    side = 1 if positions[(0, *index)] > 0 else -1
    strength = float(rng.uniform(0.15, 0.6)) * (1 if high else 0.6)
    positions, effaced = push_aside(positions, LATTICE, centre, radius, strength)
    maps = person.look(positions, effaced)

    noises = [bspline_noise(rng, LATTICE, scale, extent=EXTENT) for scale in (22, 9, 5)]
    distance = _lumpy_distance(rng, centre, radius, noises)
    # Room for the core, in mm beyond the nearest barrier (template mm).
    barriers = [side * positions[0] - 1.5, maps["depth"] - 2, 5 * (0.4 - maps["ventricle"]), 5 * (0.3 - maps["cerebellum"])]
    room = np.minimum.reduce(barriers)
    edge = threshold(distance[room > 0], core_ml * 1000 / STEP**3)
    core = np.minimum(edge - distance, room)

    # Shares of the core. A thin-walled cyst is nearly all necrosis, a thin rim, and nothing else.
    if cystic:
        shares = 0.45 + 0.30 * u_necrosis, 0.9
    elif high:
        shares = 0.03 + 0.25 * u_necrosis, 0.42 + 0.40 * (u_rim - 0.2) / 0.8
    else:
        shares = 0.0, max(0.0, 0.12 * (u_rim - 0.5))
    necrosis, rim = _part_core(core, distance / edge, noises, shares, rng.uniform(0.1, 0.35) if high else 1.0)

    ratio = float(np.clip(np.exp(np.log(1.9 if high else 0.9) + 0.6 * ndtri(u_oedema)), 0.2, 6))
    favour = np.exp(noises[0] + 0.5 * noises[1] - 0.4)
    water = _spread(maps, positions[0], core > 0, centre, radius + 45, favour, crossing)
    oedema = _limit_oedema(water, ratio, core, maps, positions[0], side, crossing)

    fluid = float(rng.uniform(0.5, 0.9) if cystic else rng.uniform(0, 0.45))
    bleeding = float(rng.uniform(0.2, 0.6)) if high and rng.random() < 0.15 else 0.0
    return Lesion(
        fields={"oedema": oedema, "nonenhancing": core, "enhancing": rim, "necrosis": necrosis},
        labels={"necrosis": 1, "oedema": 2, "nonenhancing": 3, "enhancing": 4},
        side=side,
        looks={"necrosis": {"csf": fluid * (1 - bleeding), "blood": bleeding}},
        centre=centre,
        radius=radius,
        strength=strength,
        info={"grade": grade},
        seen=(positions, maps),
    )


def _choose_place(rng: np.random.Generator, positions: np.ndarray) -> np.ndarray:
    """Return the lattice index of a random voxel deep in the white matter of either hemisphere."""
    coarse = positions[:, ::2, ::2, ::2]
    maps = template().look_up(coarse.reshape(3, -1))
    maps = {name: values.reshape(coarse.shape[1:]) for name, values in maps.items()}
    seeds = (maps["wm"] > 0.6) & (maps["depth"] > 12) & (np.abs(coarse[0]) > 12) & (maps["cerebellum"] < 0.1)
    seeds &= LATTICE[2][::2] > -25
    places = np.argwhere(seeds) * 2
    return places[rng.integers(len(places))]


def _lumpy_distance(rng: np.random.Generator, centre: np.ndarray, radius: float, noises: list[np.ndarray]) -> np.ndarray:
    """Return a lumpy distance from the centre, in mm: one to three lobes, stretched along a random direction."""
    coarse_noise, noise, fine_noise = noises
    x = np.stack(offsets_from(centre, LATTICE))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    stretch = np.exp(rng.normal(0, 0.15, 3))
    x = np.tensordot(((rotation * stretch) @ rotation.T).astype(np.float32), x, 1)
    lobes = int(rng.integers(1, 4))
    offsets = rng.normal(0, 0.4 * radius, (lobes, 3)) * (np.arange(lobes) > 0)[:, None]
    sizes = rng.uniform(0.55, 0.9, lobes) ** (np.arange(lobes) > 0)
    inverse = sum(
        (np.sum((x - o[:, None, None, None].astype(np.float32)) ** 2, 0) / s**2 + 0.1) ** -2 for o, s in zip(offsets, sizes)
    )
    return inverse**-0.25 * (1 + 0.15 * coarse_noise) + 1.4 * noise + 0.9 * fine_noise


def _part_core(
    core: np.ndarray, relative: np.ndarray, noises: list[np.ndarray], shares: tuple[float, float], patchy: float
) -> tuple[np.ndarray, np.ndarray]:
    """Part the core into necrosis and rim.

    Args:
        core: field that is positive in the core.
        relative: distance from the centre as a share of the core's edge.
        noises: coarse, medium and fine noise.
        shares: share of the core that is necrotic, and share of the remainder that enhances.
        patchy: strength of the patches in the rim.

    Returns:
        The fields of the necrosis and of the enhancing rim.
    """
    (coarse_noise, noise, fine_noise), (necrotic, enhancing), inside = noises, shares, core > 0
    depth_score = relative + 0.16 * noise + 0.08 * fine_noise
    necrosis = threshold(depth_score[inside], necrotic * inside.sum()) - depth_score
    necrosis = np.minimum(core, np.maximum(necrosis, -5))
    rim_score = relative + 0.10 * noise + 0.06 * fine_noise + patchy * coarse_noise
    rest = inside & (necrosis <= 0)
    rim = threshold(rim_score[rest], enhancing * rest.sum()) - rim_score
    return necrosis, np.minimum(core, np.maximum(rim, -5))


def _spread(maps, x, core, centre: np.ndarray, reach: float, favour: np.ndarray, crossing: bool) -> np.ndarray:
    """Solve Fisher-Kolmogorov growth u_t = div(D grad u) + rho u (1 - u) from the core, within `reach` mm of `centre`.

    `x` is the distance from the falx, and `favour` a factor of the diffusion, both `(D, H, W)`.
    """
    box = tuple(slice(*np.searchsorted(a, (c - reach, c + reach))) for a, c in zip(LATTICE, centre))
    wm, gm = maps["wm"][box], maps["gm"][box]
    diffusion = DIFFUSION_WM * np.clip(1.6 * wm - 0.6, 0, 1) + DIFFUSION_GM * gm
    diffusion *= np.clip(favour[box], 0.06, 1) * (maps["csf"][box] < 0.5) * (maps["depth"][box] > 1)
    diffusion = np.where(core[box], DIFFUSION_WM, diffusion).astype(np.float32)
    right = x[box] > 0
    bridge = (maps["callosum"][box] > 0.5) & crossing

    low, high = [], []  # index tuples of the two voxels beside every face, per axis
    for axis in range(3):
        low.append(tuple(slice(None, -1) if a == axis else slice(None) for a in range(3)))
        high.append(tuple(slice(1, None) if a == axis else slice(None) for a in range(3)))
    conduct = [
        np.minimum(diffusion[a], diffusion[b]) * ((right[a] == right[b]) | (bridge[a] & bridge[b])) for a, b in zip(low, high)
    ]
    u = core[box].astype(np.float32)
    for _ in range(STEPS):
        change = GROWTH * u * (1 - u)
        for a, b, c in zip(low, high, conduct):
            flow = u[b] - u[a]
            flow *= c
            change[a] += flow
            change[b] -= flow
        u += change
    out = np.zeros(core.shape, np.float32)
    out[box] = u * np.clip(1.3 * wm - 0.15, 0.03, 1)  # cortex takes up water last
    return out


def _limit_oedema(water: np.ndarray, ratio: float, core, maps, x, side: int, crossing: bool) -> np.ndarray:
    """Return the field of the oedema: the wettest voxels around the core, about `ratio` times as many as the core has."""
    inside = core > 0
    water = water * (~inside & (maps["csf"] < 0.5) & (maps["depth"] > 1))
    near = (core > -1.5) & (side * x > 1.5) & (maps["csf"] < 0.5)
    water = np.where(near & ~inside, np.maximum(water, 1), water)
    wanted = min(ratio * inside.sum(), 150e3 / STEP**3, 0.95 * (water > 1e-3).sum())
    oedema = np.where(inside, 1, water - max(1e-3, -threshold(-water, wanted)))
    # Outside the corpus callosum the field is negative on the falx, so that interpolation does not carry oedema over it.
    falx = 0.2 * (np.abs(x) - 1.4)
    return np.where(maps["callosum"] * crossing > 0.5, oedema, np.minimum(oedema, falx))


# --------------------------------------------------------------------------------------------- contusions and strokes


def contusions(person: Person) -> Lesion:
    """Place two to seven bruises where the brain strikes the skull: frontal pole and base, temporal pole and side.

    Each has 0.5 to 12 ml and is flat against the surface. Most have blood in the middle.
    """
    rng = stream(person.seed, "contusions")
    positions = person.positions(LATTICE)
    maps = person.look(positions)
    depth, (x, y, z) = maps["depth"], positions
    frontal = (y > 28) & (z < 38)
    temporal = (np.abs(x) > 34) & (y > -45) & (z < 6)
    places = np.argwhere((depth > 3) & (depth < 11) & (frontal | temporal) & (maps["cerebellum"] < 0.1))
    noise, fine_noise = (bspline_noise(rng, LATTICE, s, extent=EXTENT) for s in (9, 5))
    swelling = np.full(depth.shape, -9, np.float32)
    blood = swelling.copy()
    for _ in range(rng.integers(2, 8)):
        index = tuple(places[rng.integers(len(places))])
        radius = ball_radius(rng.uniform(0.5**0.5, 12**0.5) ** 2)
        offset = offsets_from(np.array([a[n] for a, n in zip(LATTICE, index)]), LATTICE, sparse=True)
        r = np.sqrt(offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2 + (0.8 * (depth - depth[index])) ** 2) / 1.15
        r += 0.9 * noise + 0.6 * fine_noise
        swelling = np.maximum(swelling, radius - r)
        blood = np.maximum(blood, radius * rng.uniform(-0.1, 0.65) - r - 0.6 * fine_noise)
    room = np.minimum(depth - 1, 8 * (0.6 - maps["csf"]))
    return Lesion(
        fields={"oedema": np.minimum(swelling, room), "blood": np.minimum(blood, room)},
        labels={"oedema": 1, "blood": 1},
        looks={"blood": {"oedema": 0.35}},
        seen=(positions, maps),
    )


def stroke(person: Person) -> Lesion:
    """Block one artery: the infarct is the wedge that it feeds, with its tip deep and its base at the cortex, 4 to 120 ml."""
    rng = stream(person.seed, "stroke")
    positions = person.positions(LATTICE)
    maps = person.look(positions)
    side = int(rng.choice((-1, 1)))
    # Template positions of wedge tips, and directions of the wedges: middle, anterior, posterior cerebral artery.
    artery = str(rng.choice(("middle", "anterior", "posterior"), p=(0.72, 0.10, 0.18)))
    tip, aim = {
        "middle": ((22, -2, 2), (1.0, rng.uniform(-0.9, 0.6), rng.uniform(-0.15, 0.8))),
        "anterior": ((3, 18, 8), (0.25, rng.uniform(0.2, 1.0), 0.8)),
        "posterior": ((14, -46, 0), (0.35, -1.0, rng.uniform(-0.3, 0.3))),
    }[artery]
    aim = np.array(aim) / np.linalg.norm(aim)
    ray = np.stack([side * positions[0] - tip[0], positions[1] - tip[1], positions[2] - tip[2]])
    length = np.sqrt(np.sum(ray**2, 0)) + 1e-3
    angle = np.arccos(np.clip(np.tensordot(aim.astype(np.float32), ray, 1) / length, -1, 1))
    noise, fine_noise = (bspline_noise(rng, LATTICE, s, extent=EXTENT) for s in (9, 5))
    angle = angle + (1.8 * noise + 1.0 * fine_noise) / (length + 5)
    barriers = [side * positions[0] - 1.5, maps["depth"] - 0.8, 8 * (0.55 - maps["csf"]), length - rng.uniform(4, 16)]
    room = np.minimum.reduce([*barriers, 5 * (0.4 - maps["ventricle"]), 5 * (0.3 - maps["cerebellum"])])
    wanted = np.clip(np.exp(rng.normal(np.log(28), 0.8)), 4, 120) * 1000 / STEP**3
    wedge = threshold(angle[room > 0], wanted) - angle
    return Lesion(
        fields={"infarct": np.minimum(wedge * (length + 5), room)},
        labels={"infarct": 1},
        side=side,
        info={"artery": artery},
        seen=(positions, maps),
    )
