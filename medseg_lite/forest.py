"""A context-sensitive random forest: DeepMedic's baseline, and a common method before there were CNNs.

The features of a voxel are means over boxes near it, and differences between two such means, in any two channels. A forest of
decision trees then classifies each voxel separately. Box means are computed from integral volumes: running sums along all three
axes. The sum over any box, however large, is a signed sum of the integral volume at its eight corners.

Source: Kamnitsas et al. 2017, section 4.1.2 (50 trees, depth 30, 200 features, 20 mm), which follows Zikic et al., "Decision
forests for tissue-specific segmentation of high-grade gliomas in multi-channel MR", MICCAI 2012, without its tissue priors.
Taught in notebooks 06 and 07.
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

from .arrays import as_array
from .volume import Case, bounding_box

SLAB = 2**17  # voxels of a volume that are computed at a time, few enough for the processor's cache
WORKSPACE = 64e6  # bytes of features that a thread holds at a time

Region = tuple[slice, slice, slice]


class Box(NamedTuple):
    """A box of one channel, placed relative to the voxel that it describes.

    Attributes:
        channel: number of the channel that is averaged.
        offset: offset from the voxel to the middle of the box, in mm along (D, H, W).
        size: side lengths in mm. On a grid a side is at least one voxel.
    """

    channel: int
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Feature(NamedTuple):
    """The mean of `box`, minus the mean of `minus` if there is one."""

    box: Box
    minus: Box | None = None


class Integrals:
    """The running sums of a case's channels, from which the mean of any box is read.

    A box that extends beyond the volume is averaged over the voxels that exist. A box that lies completely outside is moved to
    the border, so that it has at least one layer of voxels.

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
        if not np.isfinite(self.sums[:, -1, -1, -1]).all():  # one such voxel spoils all sums after it
            raise ValueError(f"{case.name} has NaN or infinite intensities; correct the image first")

    def mean(self, box: Box, region: Region) -> np.ndarray:
        """Return the mean of `box` around every voxel of `region`, float64 of the region's shape.

        The differences are taken along one axis after the other, on contiguous views.
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
        """Return the mean of `box` around each of some voxels: from indices `(3, N)` to means `(N,)`, float64."""
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
        """Return the first voxel of the box, counted from the voxel that it describes, and its number of voxels, per axis."""
        count = [max(1, round(size / mm)) for size, mm in zip(box.size, self.spacing)]
        first = [round(offset / mm - (n - 1) / 2) for offset, n, mm in zip(box.offset, count, self.spacing)]
        return first, count


class BoxFeatures:
    """Randomly drawn cross-channel box features.

    The first features are the voxel's own intensities, one for each channel. The others are drawn with equal probability from
    three kinds: the mean of a box around the voxel; the mean of a box nearby minus the voxel itself, in the same or another
    channel; the difference between the means of two boxes nearby. Offsets are uniform in ±`reach_mm` along each axis, side
    lengths in 0 to `reach_mm`.

    The authors evaluate two hundred random features at each node of each tree. scikit-learn needs one table for all nodes, so
    here two hundred features are drawn once, and each node looks at a random part of them (`max_features` of `RandomForest`).

    Args:
        channels: number of channels of the cases.
        count: number of features.
        reach_mm: largest offset and largest side in mm. The spacing of each case turns it into voxels.
        seed: seed of the draw.
    """

    def __init__(self, channels: int = 4, *, count: int = 200, reach_mm: float = 20.0, seed: int = 0):
        if channels < 1 or count < 1:
            raise ValueError(f"channels={channels}, count={count}; both must be at least 1")
        if not 0 < reach_mm < np.inf:
            raise ValueError(f"reach_mm={reach_mm}; expected a positive number of mm, 20 in the paper")
        channels, count, seed = int(channels), int(count), int(seed)
        self.channels, self.reach_mm = channels, float(reach_mm)
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
        """Compute all features of some voxels.

        Args:
            case: case, normalised as the training cases are.
            voxels: indices (d, h, w) of the voxels, `(N, 3)`.

        Returns:
            A table `(N, count)`, float32.
        """
        integrals = self._integrals(case)
        voxels = as_array(voxels, "voxels")
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
        """Return one feature of every voxel as a picture, `(D, H, W)` float32; `index` is the feature's number."""
        if not 0 <= index < len(self):
            raise ValueError(f"index={index}; expected 0 to {len(self) - 1}")
        return next(self._volumes(case, self.drawn[index : index + 1]))

    def volumes(self, case: Case) -> Iterator[np.ndarray]:
        """Yield the `volume` of each feature in turn; the running sums are computed once for all of them."""
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
    `max_features` randomly chosen features. A voxel ends in one leaf of each tree. The prediction is the mean over all trees of
    the class shares in these leaves.

    Args:
        features: features of a voxel; by default 200 features for the channels of the training cases, drawn with `seed`.
        trees: number of trees, 50 in the paper.
        depth: largest depth of a tree, 30 in the paper.
        max_features: features tried at each node: a number, a share, "sqrt", or None for all of them.
        seed: seed of the training points and the trees. The same seed gives the same forest and the same bytes.
        jobs: number of threads, by default as many as PyTorch uses. The result does not depend on it.
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
        self.features, self.seed = features, int(seed)
        self.jobs = int(jobs or 0) or torch.get_num_threads()
        self.classifier = RandomForestClassifier(
            int(trees), max_depth=int(depth), max_features=max_features, random_state=self.seed
        )
        self.channels: tuple[str, ...] = ()
        self.classes = 0

    def fit(self, cases: Sequence[Case], *, points_per_case: int = 2000, balance: float = 0.5) -> RandomForest:
        """Train on labelled cases, normalised as they will be at prediction.

        Args:
            cases: labelled cases, all with the same channels. A case without lesion adds background points only.
            points_per_case: number of voxels drawn from each case.
            balance: share of these voxels drawn from the lesion (any class but 0); the others come from the mask's background. The
                paper draws about equally from both and tunes the balance. The larger it is, the more voxels are predicted as lesion.

        Returns:
            The forest itself.

        Raises:
            ValueError: if a case has no label, other channels, an empty mask or NaN, or if no case has a lesion.
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
            groups = (case.label > 0, _mask(case) & (case.label == 0))
            counts = (lesion_points, points_per_case - lesion_points)
            points = np.concatenate([_draw_points(group, count, rng) for group, count in zip(groups, counts)])
            table.append(features.at(case, points))
            classes.append(case.label[tuple(points.T)])
        classes = np.concatenate(classes)
        for what, some in (("labelled voxel", classes > 0), ("background voxel inside its mask", classes == 0)):
            if not some.any():
                raise ValueError(f"none of the {len(cases)} cases has a {what}; the forest needs lesion and background")
        self.classifier.set_params(n_jobs=self.jobs).fit(np.concatenate(table), classes)
        # `predict` deals out voxels to the threads, not trees, so that trees are always summed in the same order.
        self.classifier.set_params(n_jobs=1)
        self.features, self.channels = features, cases[0].channels
        self.classes = 1 + max(int(c.label.max()) for c in cases)
        return self

    def predict(self, case: Case, *, inside_mask: bool = True, progress: bool = True) -> np.ndarray:
        """Predict the probability of every class in every voxel, as `inference.predict(..., output="probabilities")` does.

        Args:
            case: case, normalised as the training cases were.
            inside_mask: whether to predict only inside `case.mask`; voxels outside are then background. It has no effect if the
                case has no mask.
            progress: whether to show a bar.

        Returns:
            Probabilities `(K, D, H, W)`, float32, where K is one more than the largest class of the training cases. `.argmax(0)`
            is the segmentation.

        Raises:
            RuntimeError: if the forest is not trained.
            ValueError: if the case has other channels, an empty mask or NaN.
        """
        if not self.classes:
            raise RuntimeError("this forest is not trained; call fit(cases) first")
        if case.channels != self.channels:
            raise ValueError(
                f"{case.name} has channels {', '.join(case.channels)} but the forest was trained on {', '.join(self.channels)}; "
                f"use case.select({list(self.channels)})"
            )
        mask = _mask(case) if inside_mask else np.ones(case.shape, bool)
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
        # One row per feature: a tree reads the same few features of neighbouring voxels, which then lie side by side.
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
    """Return start and stop of the window of every voxel `i` along an axis of `n` voxels, cut off at its ends."""
    return np.clip(i + first, 0, n - 1), np.clip(i + (first + count), 1, n)


def _window_sums(sums: np.ndarray, axis: int, first: int, count: int, low: int, high: int):
    """Return the sums over the windows of voxels `low` to `high` along an axis, and 1 / length of each window.

    The axis is parted where a window's start or stop meets an end of the axis. Within a part, starts and stops either move along
    with the voxel or stand still, so each part is one subtraction of two views.
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
    """Yield the box in slabs of whole planes, each of about this number of voxels."""
    d, h, w = box
    planes = max(1, voxels // ((h.stop - h.start) * (w.stop - w.start)))
    for start in range(d.start, d.stop, planes):
        yield slice(start, min(start + planes, d.stop)), h, w


def _mask(case: Case) -> np.ndarray:
    if case.mask is None:
        return np.ones(case.shape, bool)
    if not case.mask.any():
        raise ValueError(f"{case.name}: the mask is empty, so there is no voxel to look at; correct it or leave it out")
    return case.mask


def _draw_points(group: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` voxels of a group, `(count, 3)`. Voxels repeat if the group has fewer; an empty group gives none."""
    voxels = np.flatnonzero(group)
    if len(voxels):
        voxels = rng.choice(voxels, count, replace=len(voxels) < count)
    return np.stack(np.unravel_index(voxels, group.shape), axis=1)
