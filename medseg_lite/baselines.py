"""Methods without learning worth the name. A network that loses to one of them has not been trained, so they belong in every table.

All of them answer one question, "which voxels are the object?", and all get the same care as a network: their thresholds are chosen on
the same validation cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor

from . import metrics
from .volume import Case, bounding_box

Target = Callable[[np.ndarray], np.ndarray]
Method = Callable[[Case], np.ndarray]
GRID = 32  # cells of the prior along each axis
BLURS = (0.5, 1.0, 2.0, 4.0)  # voxels
SMALLEST = (0, 10, 30, 100, 300, 1000)  # voxels


def foreground(label: np.ndarray) -> np.ndarray:
    """Return where any class but the background is."""
    return label > 0


def nothing(case: Case) -> np.ndarray:
    """Call every voxel background."""
    return np.zeros(case.shape, bool)


def everything(case: Case) -> np.ndarray:
    """Call every voxel inside the mask the object."""
    return _mask(case).copy()


class Prior:
    """The share of training cases that have the object at the same relative place in their mask: a segmentation without the image.

    Args:
        cases: labelled training cases.
        target: function that returns where the object is, from a label.
    """

    def __init__(self, cases: Sequence[Case], target: Target = foreground):
        self.share = np.mean(
            [_resized(target(case.label)[_box(case)].astype(np.float32), (GRID,) * 3) for case in cases], axis=0
        )

    def scores(self, case: Case) -> np.ndarray:
        """Return the share at each voxel, `(D, H, W)`."""
        result = np.zeros(case.shape, np.float32)
        box = _box(case)
        result[box] = _resized(self.share, result[box].shape)
        return result * _mask(case)


def blurred(case: Case, channel: str, sd: float, *, dark: bool = False) -> np.ndarray:
    """Return the intensity of one channel as a score, blurred by a Gaussian, with the lowest score outside the mask.

    Args:
        case: case whose intensities are comparable with those of other cases, such as standardised ones.
        channel: name of the channel.
        sd: standard deviation of the Gaussian in voxels; 0 blurs nothing.
        dark: whether the object is dark.
    """
    image = np.asarray(case.image[case.channels.index(channel)], np.float32) * (-1 if dark else 1)
    # A slice that stands alone, as of electron microscopy, is not mixed with its neighbours.
    score = ndimage.gaussian_filter(image, [sd if n > 1 else 0 for n in image.shape]) if sd else image.copy()
    inside = _mask(case)
    score[~inside] = score[inside].min() if inside.any() else 0
    return score


def without_small_components(mask: np.ndarray, voxels: int) -> np.ndarray:
    """Remove the components, connected by faces, with fewer voxels."""
    pieces, _ = ndimage.label(mask)
    return mask & (np.bincount(pieces.ravel()) >= voxels)[pieces]


def fit(train: Sequence[Case], validation: Sequence[Case], *, target: Target = foreground) -> dict[str, Method]:
    """Return every baseline by name, with what it needs to know from training and validation cases.

    * "nothing" and "everything".
    * "prior": the place alone, above a threshold.
    * "threshold": the channel, bright or dark, and the threshold with the highest Dice.
    * "blur + threshold": the same after the best of several Gaussians.
    * "rule": the same, without components smaller than the best of several sizes.

    Args:
        train: labelled training cases, from which the prior comes.
        validation: labelled cases, on which thresholds, channel, Gaussian and size are chosen by mean Dice.
        target: function that returns where the object is, from a label; by default all classes but the background.

    Returns:
        Functions that segment a case: `(D, H, W)` bool.
    """
    truths = [target(case.label) for case in validation]
    prior = Prior(train, target)
    above = metrics.best_threshold([prior.scores(case) for case in validation], truths)
    plain = _best_blur(validation, truths, blurs=(0.0,))
    smooth = _best_blur(validation, truths, blurs=(0.0, *BLURS))
    found = [smooth(case) for case in validation]
    size = max(
        SMALLEST, key=lambda n: np.mean([metrics.dice(without_small_components(f, n), t) for f, t in zip(found, truths)])
    )
    return {
        "nothing": nothing,
        "everything": everything,
        "prior": lambda case: prior.scores(case) > above,
        "threshold": plain,
        "blur + threshold": smooth,
        "rule": lambda case: without_small_components(smooth(case), size),
    }


def table(methods: dict[str, Method], cases: Sequence[Case], *, target: Target = foreground) -> pd.DataFrame:
    """Return Dice, precision and sensitivity of every method in every case, as rows of `method`, `case` and the scores."""
    rows = []
    for name, method in methods.items():
        for case in cases:
            found, truth = method(case), target(case.label)
            scores = {
                metric.__name__: metric(found, truth) for metric in (metrics.dice, metrics.precision, metrics.sensitivity)
            }
            rows.append({"method": name, "case": case.name, **scores})
    return pd.DataFrame(rows)


def constant_loss(loss: Callable[[Tensor, Tensor], Tensor], labels: Tensor, classes: int, *, steps: int = 200) -> float:
    """Return the lowest loss that one and the same prediction for all voxels reaches. A network above it has learned nothing.

    Args:
        loss: function of logits `(B, K, *n)` and labels `(B, *n)`.
        labels: labels `(B, *n)` as the network meets them in training, such as a batch of its sampler.
        classes: number of classes, K.
        steps: number of steps of the search, which follows the gradient from the classes' frequencies.
    """
    counts = torch.bincount(labels.flatten().long(), minlength=classes).float()
    logits = ((counts + 1) / (counts + 1).sum()).log().requires_grad_()
    optimizer, lowest = torch.optim.Adam([logits], lr=0.1), float("inf")
    for _ in range(steps):
        everywhere = logits.view(1, -1, *[1] * (labels.ndim - 1)).expand(len(labels), classes, *labels.shape[1:])
        value = loss(everywhere, labels)
        lowest = min(lowest, float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return lowest


def _best_blur(cases: Sequence[Case], truths: Sequence[np.ndarray], *, blurs: Sequence[float]) -> Method:
    """Return the method of the channel, its sign, the Gaussian and the threshold that give the highest mean Dice."""
    best = (-1.0, None)
    for channel in cases[0].channels:
        for sd in blurs:
            for dark in (False, True):
                scores = [blurred(case, channel, sd, dark=dark) for case in cases]
                above = metrics.best_threshold(scores, truths)
                dice = float(np.mean([metrics.dice(s > above, t) for s, t in zip(scores, truths)]))
                if dice > best[0]:
                    best = (dice, (channel, sd, dark, above))
    channel, sd, dark, above = best[1]
    return lambda case: blurred(case, channel, sd, dark=dark) > above


def _mask(case: Case) -> np.ndarray:
    return np.ones(case.shape, bool) if case.mask is None else case.mask


def _box(case: Case) -> tuple[slice, ...]:
    return tuple(bounding_box(_mask(case)))


def _resized(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return an array on another grid of the same extent, linearly interpolated between the middles of its cells."""
    x = torch.from_numpy(np.ascontiguousarray(array))[None, None]
    return torch.nn.functional.interpolate(x, tuple(shape), mode="trilinear", align_corners=False)[0, 0].numpy()
