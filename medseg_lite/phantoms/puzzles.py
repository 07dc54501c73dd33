"""Puzzles: small tasks by construction, in which a single property tells the classes apart.

Anatomy mixes everything. A puzzle asks whether a mechanism works. It does not say how often brains need it. Each puzzle has a dial,
`needed`, from 1 (nothing else tells the classes apart) to 0 (something simpler does too). Where the property is needed, both classes
of a pair have as many voxels on average, so a network that cannot see the difference gains nothing by guessing the frequent one.

What networks make of the puzzles is in experiments/puzzles.md. `textures` does not tell Havaei's pathways apart: each of them sees
33 pixels, and the global one alone learns all four classes.

| puzzle | what tells the classes apart | meant for |
|---|---|---|
| `ring` | a shell around a ball, beyond a small receptive field | two scales (DeepMedic, section 2.3) |
| `tube` | the height of a disc, which no axial slice shows | 3-D convolutions (DeepMedic, section 1) |
| `far_plate` | the shape of an object in 3-D, and a plate far away in its slice | 2-D context for a 3-D net (Mlynarski, section 2) |
| `textures` | fine stripes of two discs, and a frame around another, eleven pixels from its middle | two pathways (Havaei, section 3) |
| `rare` | brightness, in one voxel of five thousand | losses for rare classes (Kayalibay, section 4) |
| `decoys` | a bright spot without a twin in the other half of the brain | far context, comparison of the halves |

Intensities are on one scale for all cases, around 0 with noise of about 0.5. Do not standardise each case: its mean tells what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from ..volume import Case
from .noise import make_cohort, stream

BRIGHT = 3.0  # of objects, above the noise


def ring(seed: int, *, needed: float = 1.0) -> Case:
    """Generate balls whose class depends on a shell around them.

    Of two bright balls, one lies in a thin bright shell (class 1) and one does not (class 2). At `needed=1` the shell's radius is 12
    voxels, so that no voxel of a ball has it within the 17 voxels that eight 3³ convolutions see. At 0 it is 5.

    Args:
        seed: seed of the case.
        needed: dial from 0 to 1.

    Source: Kamnitsas et al. 2017, section 2.3 (local and larger contextual information). The puzzle is ours.
    """
    rng, image, label, grid = _start("ring", seed, needed, (56, 56, 56))
    radius = 5 + 7 * needed
    inside = _place(rng, image.shape, [], margin=radius + 3, apart=0)
    outside = _place(rng, image.shape, [inside], margin=5, apart=radius + 11)
    for number, centre in enumerate((inside, outside), 1):
        distance = _distance(grid, centre)
        _paint(image, label, distance <= 3.2, number)
        if number == 1:
            image[np.abs(distance - radius) < 1] += 0.8 * BRIGHT
    return _case("ring", seed, image, label, {1: "ball in a shell", 2: "bare ball"})


def tube(seed: int, *, needed: float = 1.0) -> Case:
    """Generate flat coins and long tubes that look alike in every axial slice.

    Six coins of height 5 (class 1) and a tube of height 30 (class 2) show the same disc in a slice. At `needed=0` the tube's disc is
    half as wide again.

    Args:
        seed: seed of the case.
        needed: dial from 0 to 1.

    Source: Kamnitsas et al. 2017, sections 1 and 3.2 (3-D against 2-D). The puzzle is ours.
    """
    rng, image, label, grid = _start("tube", seed, needed, (56, 56, 56))
    columns: list[np.ndarray] = []
    for number, height in ((2, 30), *[(1, 5)] * 6):
        radius = 3 + 1.5 * (1 - needed) * (number == 2)
        centre = _place(rng, image.shape, columns, margin=8, apart=11, axes=(0, 1))
        centre[2] = rng.uniform(height / 2 + 1, image.shape[2] - height / 2 - 1)
        columns.append(centre)
        # Tubes and coins both lean a little, so that a leaning stack does not betray the tube's neighbours.
        lean = rng.uniform(-0.08, 0.08, 2)
        along = grid[2] - centre[2]
        across = np.hypot(grid[0] - centre[0] - lean[0] * along, grid[1] - centre[1] - lean[1] * along)
        _paint(image, label, (across <= radius) & (np.abs(along) <= height / 2), number)
    return _case("tube", seed, image, label, {1: "coin", 2: "tube"})


def far_plate(seed: int, *, needed: float = 1.0) -> Case:
    """Generate balls whose class depends on a bright plate far away in the same axial slices, among tubes that are background.

    Whether a plate stands at the left border decides between class 1 (no plate) and class 2 (plate). The plate is 30 voxels or more
    away from the balls, beyond what a small 3-D network sees, but a network of slices sees it. Only 3-D tells a ball from a tube. At
    `needed=0` balls of class 2 are also half as bright again, so that the plate is not needed.

    Args:
        seed: seed of the case.
        needed: dial from 0 to 1.

    Source: Mlynarski et al. 2019, section 2.1 (long-range 2D context for a 3D network). The puzzle is ours.
    Taught in notebook 12.
    """
    rng, image, label, grid = _start("far_plate", seed, needed, (64, 64, 64))
    marks = rng.permutation([True, False, bool(rng.random() < 0.5)])
    for middle, marked in zip((11, 32, 53), marks):
        first = rng.uniform(44, 56)
        if marked:
            image[:9, :, middle - 9 : middle + 10] += 0.8 * BRIGHT
        rows = rng.permutation([14.0, 32.0, 50.0]) + rng.uniform(-3, 3, 3)
        for kind, row in zip(("ball", "tube"), rows):
            centre = np.array([first + rng.uniform(-2, 2), row, middle + rng.uniform(-2, 2)])
            if kind == "ball":
                bright = (1 + 0.5 * (1 - needed) * marked) * BRIGHT
                _paint(image, label, _distance(grid, centre) <= rng.uniform(3.5, 5), 2 if marked else 1, bright=bright)
            else:
                across = np.hypot(grid[0] - centre[0], grid[1] - centre[1])
                _paint(image, label, (across <= rng.uniform(2.5, 4.5)) & (np.abs(grid[2] - middle) <= 9), 0)
    return _case("far_plate", seed, image, label, {1: "ball, no plate", 2: "ball, plate"})


def textures(seed: int, *, needed: float = 1.0) -> Case:
    """Generate a slice of discs: two classes differ in fine stripes, two in a frame around them.

    Stripes of two pixels run along (class 1) or across (class 2) a disc. A smooth disc has a bright frame eleven pixels from its middle
    (class 3) or none (class 4). At `needed=0` the stripes are twice as wide and the frame touches the disc.

    Args:
        seed: seed of the case.
        needed: dial from 0 to 1.

    Source: Havaei et al. 2017, section 3.1 (a local and a global pathway). The puzzle is ours.
    """
    rng, image, label, grid = _start("textures", seed, needed, (96, 96, 1))
    x, y = grid[0], grid[1]
    half, frame = 5.0, 6 + 5 * needed
    period = 2 if needed > 0.5 else 4
    centres: list[np.ndarray] = []
    for number in rng.permutation([1, 1, 2, 2, 3, 4]):
        centre = _place(rng, image.shape, centres, margin=frame + 2, apart=2 * frame + 4, axes=(0, 1))
        centres.append(centre)
        across = np.hypot(x - centre[0], y - centre[1])
        inside = across <= half
        _paint(image, label, inside, int(number), bright=0.5 * BRIGHT)
        if number < 3:
            stripes = np.where(((x if number == 1 else y) // (period / 2)) % 2 == 0, 1.0, -1.0)
            image[inside] += 0.4 * BRIGHT * stripes[inside]
        if number == 3:
            image[np.abs(across - frame) < 1] += 0.8 * BRIGHT
    return _case("textures", seed, image, label, {1: "stripes along", 2: "stripes across", 3: "framed", 4: "plain"})


def rare(seed: int, *, needed: float = 1.0) -> Case:
    """Generate a ball that is one voxel in five thousand, beside a large common object of another brightness.

    At `needed=0` the small ball is a fiftieth of the volume.

    Args:
        seed: seed of the case.
        needed: dial from 0 to 1.

    Source: Kayalibay et al. 2017, section 4.3 (the Jaccard loss and rare classes). The puzzle is ours.
    """
    rng, image, label, grid = _start("rare", seed, needed, (56, 56, 56))
    share = 1 / (50 ** (1 - needed) * 5000**needed)
    radius = (share * image.size * 3 / (4 * np.pi)) ** (1 / 3)
    large = _place(rng, image.shape, [], margin=16, apart=0)
    small = _place(rng, image.shape, [large], margin=radius + 1, apart=14 + radius)
    _paint(image, label, _distance(grid, large) <= 11, 1, bright=BRIGHT)
    _paint(image, label, _distance(grid, small) <= radius, 2, bright=0.6 * BRIGHT)
    return _case("rare", seed, image, label, {1: "common", 2: "rare"})


def decoys(seed: int, *, needed: float = 1.0) -> Case:
    """Generate a brain-shaped volume with bright spots. A spot with a twin in the other half is normal; one without is a lesion.

    Twins lie left and right of the middle plane. At `needed=1` they are 22 to 40 voxels apart, at 0.5 they are 15 to 24. At 0 all
    spots lie close to that plane, so that twins nearly touch.

    Args:
        seed: seed of the case.
        needed: dial from 0 to 1.

    Source: the symmetry of the halves is a cue in Kamnitsas et al. 2017, section 4.1. The puzzle is ours.
    """
    shape = (64, 64, 32)
    rng, image, label, grid = _start("decoys", seed, needed, shape)
    middle = (shape[0] - 1) / 2
    mask = sum(((g - (n - 1) / 2) / (0.48 * n)) ** 2 for g, n in zip(grid, shape)) <= 1
    spots: list[np.ndarray] = []
    side = rng.choice([-1, 1], 4)
    for number in range(4):  # two pairs of twins, and two lesions
        spot = _place(rng, shape, spots, margin=8, apart=10, axes=(1, 2))
        spot[0] = rng.uniform(4 + 7 * needed, 4 + 16 * needed)
        spots.append(spot)
        for turn in (1, -1) if number < 2 else (1,):
            centre = np.array([middle + turn * side[number] * spot[0], *spot[1:]])
            # The twins of a pair differ by a voxel or so, as the halves of a brain do.
            distance = _distance(grid, centre + rng.uniform(-1, 1, 3))
            _paint(image, label, (distance <= 3.2) & mask, int(number >= 2))
    image[~mask] = 0
    return _case("decoys", seed, image, label, {1: "lesion"}, mask)


PUZZLES: dict[str, Callable[..., Case]] = {
    "ring": ring,
    "tube": tube,
    "far_plate": far_plate,
    "textures": textures,
    "rare": rare,
    "decoys": decoys,
}


def puzzle_cohort(name: str, count: int, *, first_seed: int = 0, needed: float = 1.0) -> list[Case]:
    """Generate cases of one puzzle with consecutive seeds.

    Args:
        name: "ring", "tube", "far_plate", "textures", "rare" or "decoys".
        count: number of cases.
        first_seed: seed of the first case.
        needed: dial from 0 to 1.
    """
    if name not in PUZZLES:
        raise ValueError(f"no puzzle {name!r}; expected one of {', '.join(PUZZLES)}")
    return make_cohort(PUZZLES[name], count, first_seed=first_seed, progress=False, needed=needed)


def _start(name: str, seed: int, needed: float, shape: Sequence[int]):
    """Return the random generator, an image of noise, an empty label and the coordinates of the voxels."""
    if not 0 <= needed <= 1:
        raise ValueError(f"needed is {needed}; expected a number from 0 (a simpler method suffices) to 1")
    rng = stream(seed, f"puzzle {name}")
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), [3 if n > 1 else 0 for n in shape])
    image = 0.4 * smooth / smooth.std() + 0.35 * rng.normal(size=shape)
    return rng, image, np.zeros(shape, np.uint8), np.indices(shape).astype(float)


def _place(rng, shape, others, *, margin: float, apart: float, axes: Sequence[int] = (0, 1, 2)) -> np.ndarray:
    """Return a random place that is `margin` from the border and `apart` from other places, both along `axes`."""
    for _ in range(10_000):
        place = np.array([rng.uniform(margin, n - 1 - margin) if k in axes else 0.0 for k, n in enumerate(shape)])
        if all(np.linalg.norm((place - other)[list(axes)]) >= apart for other in others):
            return place
    raise RuntimeError(f"no room for {len(others) + 1} objects that are {apart:.0f} voxels apart in {tuple(shape)}")


def _distance(grid: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre)))


def _paint(image: np.ndarray, label: np.ndarray, inside: np.ndarray, value: int, *, bright: float = BRIGHT) -> None:
    image[inside] += bright
    label[inside] = value


def _case(name: str, seed: int, image, label, classes: dict[int, str], mask: np.ndarray | None = None) -> Case:
    return Case(
        image=image[None].astype(np.float32),
        channels=("x",),
        name=f"{name}-{seed:04d}",
        label=label,
        mask=np.ones(label.shape, bool) if mask is None else mask,
        info={"classes": classes},
    )
