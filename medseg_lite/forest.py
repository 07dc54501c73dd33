"""A context-sensitive random forest: what DeepMedic was measured against, and what many used before there were CNNs.

Each voxel is described by means over boxes near it, and differences between such means, in any two sequences; a forest of
decision trees then classifies it on its own. Box means come out of integral volumes: running sums along all three axes, from
which the sum over any box, however large, is a difference of its eight corners.

Sources: Kamnitsas et al. 2017, section 4.1.2 (50 trees, depth 30, 200 features, 20 mm), which follows Zikic et al., "Decision
forests for tissue-specific segmentation of high-grade gliomas in multi-channel MR", MICCAI 2012, without its tissue priors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from tqdm import tqdm

from .volume import Case, bounding_box

SLAB = 2**17  # voxels of a volume at a time: what is computed for them stays in the processor's cache
WORKSPACE = 64e6  # bytes of features that a thread holds at a time

Region = tuple[slice, slice, slice]


class Box(NamedTuple):
    """A box of one channel, placed relative to the voxel that it describes.

    Attributes:
        channel: number of the channel that is averaged.
        offset: mm from the voxel to the middle of the box, along (D, H, W).
        size: side lengths in mm; on a grid never less than one voxel.
    """

    channel: int
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Feature(NamedTuple):
    """Mean of `box`, less the mean of `minus` where there is one."""

    box: Box
    minus: Box | None = None


class Integrals:
    """Running sums of a case's channels, and the mean of any box read off them.

    A box that reaches beyond the volume is averaged over the voxels that exist; one that lies beyond it altogether is moved
    to the border: at least one layer of voxels stays.

    Attributes:
        sums: `(C, D + 1, H + 1, W + 1)` float64; `sums[c, i, j, k]` is the sum of `image[c, :i, :j, :k]`.
    """

    def __init__(self, case: Case):
        self.name, self.channels, self.shape, self.spacing = case.name, case.channels, case.shape, case.spacing
        self.sums = np.zeros((len(case.channels), *(n + 1 for n in case.shape)))
        inside = self.sums[:, 1:, 1:, 1:]
        np.cumsum(case.image, axis=1, dtype=np.float64, out=inside)
        for axis in (2, 3):
            np.cumsum(inside, axis=axis, out=inside)
        if not np.isfinite(self.sums[:, -1, -1, -1]).all():  # one such voxel spoils every sum after it
            raise ValueError(f"{case.name} has NaN or infinite intensities; correct the image first")

    def mean(self, box: Box, region: Region) -> np.ndarray:
        """Mean of `box` around every voxel of `region`, float64 of the region's shape.

        Takes the difference along one axis after the other, on contiguous views.
        """
        values = self.sums[box.channel]
        weights = []
        for axis, (first, count, inside) in enumerate(zip(*self._in_voxels(box), region)):
            values, weight = _window_sums(values, axis, first, count, inside.start, inside.stop)
            weights.append(weight)
        values *= (weights[0][:, None] * weights[1])[:, :, None]
        values *= weights[2]
        return values

    def mean_at(self, box: Box, voxels: np.ndarray) -> np.ndarray:
        """Mean of `box` around each of some voxels: `(3, N)` indices to `(N,)` float64."""
        ends, voxels_inside = [], 1
        step = self.sums[0].size
        for v, first, count, n in zip(voxels, *self._in_voxels(box), self.shape):
            start, stop = _window(v, first, count, n)
            voxels_inside = voxels_inside * (stop - start)
            step //= n + 1
            ends.append((start * step, stop * step))
        (d0, d1), (h0, h1), (w0, w1) = ends
        values = self.sums[box.channel].reshape(-1)
        total = np.zeros(len(w0))
        for plus, minus in ((d1 + h1, d1 + h0), (d0 + h0, d0 + h1)):
            total += values.take(plus + w1) - values.take(plus + w0) - values.take(minus + w1) + values.take(minus + w0)
        return total / voxels_inside

    def _in_voxels(self, box: Box) -> tuple[list[int], list[int]]:
        """First voxel of the box, counted from the voxel that it describes, and voxels, along each axis."""
        count = [max(1, round(size / mm)) for size, mm in zip(box.size, self.spacing)]
        first = [round(offset / mm - (n - 1) / 2) for offset, n, mm in zip(box.offset, count, self.spacing)]
        return first, count


class BoxFeatures:
    """Randomly drawn cross-channel box features.

    The first ones are the voxel's own intensities, one for each channel. The others are drawn with equal probability among: the mean
    of a box around the voxel; the mean of a box nearby less the voxel itself, in the same or another channel; the
    difference between the means of two boxes nearby. Offsets are uniform in ±`reach_mm` along each axis, side lengths in 0
    to `reach_mm`.

    The authors evaluate two hundred random features at each node of each tree. scikit-learn wants one table, so we read this as
    two hundred features drawn once by seed, of which each node looks at a random part (`max_features` of `RandomForest`).

    Args:
        channels: of the cases.
        count: number of features.
        reach_mm: largest offset and largest side, in mm; it becomes voxels by each case's spacing.
        seed: of the draw.
    """

    def __init__(self, channels: int = 4, *, count: int = 200, reach_mm: float = 20.0, seed: int = 0):
        if channels < 1 or count < 1:
            raise ValueError(f"channels={channels}, count={count}; both must be at least 1")
        if not 0 < reach_mm < np.inf:
            raise ValueError(f"reach_mm={reach_mm}; expected a positive number of mm, 20 in the paper")
        self.channels, self.reach_mm = channels, reach_mm
        rng = np.random.default_rng(seed)
        own = [Feature(Box(c)) for c in range(channels)]
        self.drawn = tuple((own + [self._draw(rng) for _ in range(count - channels)])[:count])

    def _draw(self, rng: np.random.Generator) -> Feature:
        kind = rng.integers(3)
        here = (0.0, 0.0, 0.0)
        channel, other = rng.integers(self.channels, size=2).tolist()
        offset, other_offset = (tuple(v) for v in rng.uniform(-self.reach_mm, self.reach_mm, (2, 3)).tolist())
        size, other_size = (tuple(v) for v in rng.uniform(0, self.reach_mm, (2, 3)).tolist())
        if kind == 0:
            return Feature(Box(channel, here, size))
        return Feature(Box(channel, offset, size), Box(other) if kind == 1 else Box(other, other_offset, other_size))

    def __len__(self) -> int:
        return len(self.drawn)

    def at(self, case: Case, voxels: np.ndarray) -> np.ndarray:
        """All features of some voxels.

        Args:
            case: normalised as the forest is to see it.
            voxels: `(N, 3)` indices (d, h, w).

        Returns:
            `(N, count)` float32.
        """
        integrals = self._integrals(case)
        voxels = np.asarray(voxels)
        if voxels.ndim != 2 or voxels.shape[1] != 3 or voxels.dtype.kind not in "iu":
            raise ValueError(
                f"voxels has shape {voxels.shape} and type {voxels.dtype}; expected whole numbers (N, 3), as np.argwhere gives"
            )
        if voxels.size and (voxels.min() < 0 or (voxels >= case.shape).any()):
            raise ValueError(f"voxels holds indices outside {case.name}, which has {case.shape} voxels")
        table = np.empty((len(self), len(voxels)), np.float32)
        columns = np.ascontiguousarray(voxels.T, np.intp)
        for row, (box, minus) in zip(table, self.drawn):
            values = integrals.mean_at(box, columns)
            row[:] = values if minus is None else values - integrals.mean_at(minus, columns)
        return np.ascontiguousarray(table.T)

    def volume(self, case: Case, index: int) -> np.ndarray:
        """Feature number `index` of every voxel, `(D, H, W)` float32: what it looks at, as a picture."""
        if not 0 <= index < len(self):
            raise ValueError(f"index={index}; expected 0 to {len(self) - 1}")
        return next(self._volumes(case, self.drawn[index : index + 1]))

    def volumes(self, case: Case) -> Iterator[np.ndarray]:
        """`volume` of each feature in turn; the running sums are made once for all of them."""
        return self._volumes(case, self.drawn)

    def _volumes(self, case: Case, features: Sequence[Feature]) -> Iterator[np.ndarray]:
        integrals = self._integrals(case)
        whole = tuple(slice(0, n) for n in case.shape)
        for feature in features:
            result = np.empty(case.shape, np.float32)
            for slab in _slabs(whole, SLAB):
                result[slab] = _evaluate(feature, integrals, slab)
            yield result

    def _integrals(self, case: Case) -> Integrals:
        if len(case.channels) != self.channels:
            raise ValueError(
                f"{case.name} has {len(case.channels)} channels ({', '.join(case.channels)}) but the features were drawn for "
                f"{self.channels}; choose channels with case.select([...]) or draw features for {len(case.channels)}"
            )
        return Integrals(case)


class RandomForest:
    """A random forest that classifies voxels by box features.

    A tree is grown on points that `fit` draws from the cases, and each of its nodes looks for the best threshold among
    `max_features` randomly chosen features. The prediction is the mean over all trees of the class shares in the leaf that a voxel
    ends in.

    Args:
        features: what to look at; by default 200 features for the channels of the training cases, drawn by `seed`.
        trees: number of trees, 50 in the paper.
        depth: largest depth of a tree, 30 in the paper.
        max_features: features tried at each node: a number, a share, "sqrt", or None for all of them.
        seed: of the training points and the trees. The same seed gives the same forest and the same bytes.
        jobs: threads; by default as many as PyTorch uses. The result does not depend on it.
    """

    def __init__(
        self,
        features: BoxFeatures | None = None,
        *,
        trees: int = 50,
        depth: int = 30,
        max_features: int | float | str | None = "sqrt",
        seed: int = 0,
        jobs: int | None = None,
    ):
        if trees < 1 or depth < 1:
            raise ValueError(f"trees={trees}, depth={depth}; both must be at least 1")
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs={jobs}; expected 1 or more threads, or None")
        self.features, self.seed = features, seed
        self.jobs = jobs or torch.get_num_threads()
        self.classifier = RandomForestClassifier(trees, max_depth=depth, max_features=max_features, random_state=seed)
        self.channels: tuple[str, ...] = ()
        self.classes = 0

    def fit(self, cases: Sequence[Case], *, points_per_case: int = 2000, balance: float = 0.5) -> RandomForest:
        """Train on labelled cases, normalised as they will be at prediction.

        Args:
            cases: all with the same channels. A case without lesion adds background points only.
            points_per_case: voxels drawn from each case.
            balance: share of them drawn from the lesion (any class but 0), the rest from the mask's background. The paper samples
                about equally and tunes the balance; the larger it is, the more voxels are called lesion.

        Returns:
            The forest itself.

        Raises:
            ValueError: when a case has no label, other channels, an empty mask or NaN, or when no case has a lesion.
        """
        if not cases:
            raise ValueError("no cases to train on; give at least one labelled case")
        if not 0 < balance < 1:
            raise ValueError(f"balance={balance}; expected a share between 0 and 1, for example 0.5")
        lesion_points = round(points_per_case * balance)
        if not 0 < lesion_points < points_per_case:
            raise ValueError(
                f"points_per_case={points_per_case} with balance={balance} leaves one class without points; draw more points"
            )
        for case in cases:
            if case.label is None:
                raise ValueError(f"{case.name} has no label; training needs one")
            if case.channels != cases[0].channels:
                raise ValueError(f"{case.name} has channels {case.channels} but {cases[0].name} has {cases[0].channels}")
        features = self.features or BoxFeatures(len(cases[0].channels), seed=self.seed)
        table, classes = [], []
        for number, case in enumerate(cases):
            rng = np.random.default_rng([self.seed, number])
            groups = (case.label > 0, _inside(case) & (case.label == 0))
            counts = (lesion_points, points_per_case - lesion_points)
            points = np.concatenate([_draw_points(group, count, rng) for group, count in zip(groups, counts)])
            table.append(features.at(case, points))
            classes.append(case.label[tuple(points.T)])
        classes = np.concatenate(classes)
        for what, some in (("labelled voxel", classes > 0), ("background voxel inside its mask", classes == 0)):
            if not some.any():
                raise ValueError(f"none of the {len(cases)} cases has a {what}; the forest needs lesion and background")
        self.classifier.set_params(n_jobs=self.jobs).fit(np.concatenate(table), classes)
        # `predict` deals out voxels to the threads, not trees: then the order in which trees are summed is always the same.
        self.classifier.set_params(n_jobs=1)
        self.features, self.channels = features, cases[0].channels
        self.classes = 1 + max(int(c.label.max()) for c in cases)
        return self

    def predict(self, case: Case, *, inside_mask: bool = True, progress: bool = True) -> np.ndarray:
        """Probability of every class in every voxel, as `inference.predict(..., output="probabilities")` returns it.

        Args:
            case: normalised as the training cases were.
            inside_mask: predict inside `case.mask` only and call everything outside background. Without effect when the case
                has no mask.
            progress: whether to show a bar.

        Returns:
            `(K, D, H, W)` float32, where K is one more than the largest class of the training cases; `.argmax(0)` is the
            segmentation.

        Raises:
            RuntimeError: when the forest is not trained.
            ValueError: when the case has other channels, an empty mask or NaN.
        """
        if not self.classes:
            raise RuntimeError("this forest is not trained; call fit(cases) first")
        if case.channels != self.channels:
            raise ValueError(
                f"{case.name} has channels {', '.join(case.channels)} but the forest was trained on {', '.join(self.channels)}; "
                f"use case.select({list(self.channels)})"
            )
        mask = _inside(case) if inside_mask else np.ones(case.shape, bool)
        integrals = Integrals(case)
        result = np.zeros((self.classes, *case.shape), np.float32)
        result[0] = 1
        slabs = list(_slabs(bounding_box(mask), min(SLAB, int(WORKSPACE / (4 * len(self.features))))))
        with ThreadPoolExecutor(self.jobs) as pool:
            done = pool.map(partial(self._predict_slab, integrals, mask, result), slabs)
            for _ in tqdm(done, desc=f"segmenting {case.name}", total=len(slabs), disable=not progress, dynamic_ncols=True):
                pass
        return result

    def _predict_slab(self, integrals: Integrals, mask: np.ndarray, result: np.ndarray, slab: Region) -> None:
        inside = np.flatnonzero(mask[slab])
        if not len(inside):
            return
        # One row per feature: a tree asks neighbouring voxels for the same few features, which lie side by side then.
        table = np.empty((len(self.features), len(inside)), np.float32)
        for row, feature in zip(table, self.features.drawn):
            row[:] = _evaluate(feature, integrals, slab).reshape(-1)[inside]
        probabilities = self.classifier.predict_proba(table.T)
        for k, values in zip(self.classifier.classes_, probabilities.T):
            result[k][slab][mask[slab]] = values


def _evaluate(feature: Feature, integrals: Integrals, region: Region) -> np.ndarray:
    values = integrals.mean(feature.box, region)
    if feature.minus is not None:
        values -= integrals.mean(feature.minus, region)
    return values


def _window(i: np.ndarray, first: int, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and stop of the window of every voxel `i` along an axis of `n` voxels, cut off at its ends."""
    return np.clip(i + first, 0, n - 1), np.clip(i + (first + count), 1, n)


def _window_sums(sums: np.ndarray, axis: int, first: int, count: int, low: int, high: int):
    """Sums over the windows of voxels `low` to `high` along an axis, and one over the length of each window.

    Between the places where a window's start or stop meets an end of the axis, starts and stops either move along or stand still:
    each such piece is one subtraction of two views.
    """
    n = sums.shape[axis] - 1
    shape = list(sums.shape)
    shape[axis] = high - low
    result = np.empty(shape)
    start, stop = _window(np.arange(low, high), first, count, n)
    meet = (-first, n - 1 - first, 1 - first - count, n - first - count)
    cuts = sorted({0, high - low, *(c - low for c in meet if low < c < high)})
    before = (slice(None),) * axis
    for i, j in pairwise(cuts):
        minuend, subtrahend = (sums[(*before, slice(ends[i], ends[j - 1] + 1))] for ends in (stop, start))
        np.subtract(minuend, subtrahend, out=result[(*before, slice(i, j))])
    return result, 1 / (stop - start)


def _slabs(box: Region, voxels: int) -> Iterator[Region]:
    """The box in slabs of whole planes, of about so many voxels each."""
    d, h, w = box
    planes = max(1, voxels // ((h.stop - h.start) * (w.stop - w.start)))
    for start in range(d.start, d.stop, planes):
        yield slice(start, min(start + planes, d.stop)), h, w


def _inside(case: Case) -> np.ndarray:
    if case.mask is None:
        return np.ones(case.shape, bool)
    if not case.mask.any():
        raise ValueError(f"{case.name}: the mask is empty, so there is no voxel to look at; correct it or leave it out")
    return case.mask


def _draw_points(group: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`(count, 3)` voxels of a group; repeated where it has fewer, none where it is empty."""
    voxels = np.flatnonzero(group)
    if len(voxels):
        voxels = rng.choice(voxels, count, replace=len(voxels) < count)
    return np.stack(np.unravel_index(voxels, group.shape), axis=1)
