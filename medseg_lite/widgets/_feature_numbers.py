"""Feature maps as bytes, and the numbers by which their channels are coloured, sorted and judged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import plotting
from ..features import FeatureMaps, LayerInfo, ReceptiveField
from ._base import pack

LEVELS = 255


def quantise(data: np.ndarray, inside: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return maps `(C, ...)` as bytes, with `low` and `step` of each channel: a value is `low + step * byte`.

    Zero is a level of its own if it is within the range. The extreme 0.1 % of a channel are cut off, counted everywhere and
    among the voxels `inside`, unless they are all that there is.
    """
    flat = data.reshape(len(data), -1)
    thin = flat[:, :: max(1, flat.shape[1] // 100_000)].astype(np.float32)
    low, high = np.percentile(thin, (0.1, 99.9), axis=1)
    if inside is not None:
        part = flat[:, inside.reshape(-1)]
        part = part[:, :: max(1, part.shape[1] // 50_000)].astype(np.float32)
        ends = np.percentile(part, (0.1, 99.9), axis=1)
        low, high = np.minimum(low, ends[0]), np.maximum(high, ends[1])
    narrow = high - low < 0.3 * (thin.max(1) - thin.min(1))  # a rare but strong channel
    low, high = np.where(narrow, thin.min(1), low), np.where(narrow, thin.max(1), high)
    step = np.maximum(high - low, 1e-6 * np.maximum(np.abs(high), 1e-6)) / (LEVELS - 1)
    low = np.floor(low / step) * step
    levels = np.empty(data.shape, np.uint8)
    for one, out, a, s in zip(data, levels, low, step):
        scaled = (one.astype(np.float32) - np.float32(a)) * np.float32(1 / s)
        np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled)
        out[...] = scaled
    return levels, low, step


def shrink(about: dict, levels: np.ndarray, size: float) -> tuple[dict, bytes]:
    """Return what the browser needs to know about maps (C, D, H, W) of bytes, and the maps packed into at most `size` bytes.

    Every second, third, … voxel is kept, along the longest axes first. The numbers in `about` stay those of all voxels.
    """
    packed, kept, step = pack(levels), levels, np.ones(3, int)
    while len(packed) > size and max(kept.shape[1:]) > 8:
        enough = kept.size * size / len(packed)
        while kept.size > enough and max(kept.shape[1:]) > 8:
            step[np.argmax(kept.shape[1:])] += 1
            kept = levels[:, :: step[0], :: step[1], :: step[2]]
        packed = pack(kept)
    thinned = {
        "shape": kept.shape,
        "stride": [float(s * k) for s, k in zip(about["stride"], step)],
        "every": [int(e * k) for e, k in zip(about["every"], step)],
    }
    return about | thinned, packed


def is_signed(data: np.ndarray) -> bool:
    """Tell whether negative values matter. The small ones behind a leaky rectifier do not."""
    flat = data.reshape(-1)
    values = plotting.draw_sample(flat, 500_000).astype(np.float32)
    return bool(-values[values < 0].sum() > 0.1 * values[values > 0].sum())


def offsets(field: ReceptiveField) -> tuple[list[int], list[int]]:
    """Return the first and last offset of a receptive field along all three axes. A 2-D field is one slice thick."""
    first, last = ([*side, *[0] * (3 - len(side))] for side in (field.first, field.last))
    return first, last


def describe_layer(info: LayerInfo) -> dict[str, object]:
    """Return the facts about a layer that its button in the browser tells."""
    stride = None if info.stride is None else [*info.stride, *[1.0] * (3 - len(info.stride))]
    side = None if info.field is None else info.field.side
    return {
        "name": info.name,
        "kind": info.kind,
        "channels": info.channels,
        "parameters": info.parameters,
        "stride": stride,
        "side": side,
    }


def describe_maps(
    maps: FeatureMaps, inside: np.ndarray | None, classes: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray]
) -> tuple[dict, dict, np.ndarray]:
    """Return facts about maps that the browser needs, the numbers of each channel, and the maps as bytes."""
    levels, low, step = quantise(maps.data, inside)
    facts = {
        "shape": maps.data.shape,
        "offset": maps.offset,
        "stride": maps.stride,
        "every": maps.every,
        "field": None if maps.field is None else offsets(maps.field),
        "low": low.tolist(),
        "step": step.tolist(),
        "signed": is_signed(maps.data),
    }
    return facts, describe_channels(maps.data, levels, inside, classes, targets), levels


def describe_channels(
    data: np.ndarray,
    levels: np.ndarray,
    inside: np.ndarray | None,
    classes: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
) -> dict[str, object]:
    """Return numbers of each channel as lists, by name. They count the voxels inside the mask.

    Args:
        data: maps `(C, D, H, W)`.
        levels: the maps as bytes, from `quantise`.
        inside: mask `(D, H, W)`, or None to count all voxels.
        classes: voxels `(D, H, W)` of each class, for the selectivity.
        targets: tissue maps `(D, H, W)`, for the correlation.
    """
    part = slice(None) if inside is None else inside.reshape(-1)
    values = data.reshape(len(data), -1)[:, part].astype(np.float32)
    levels = levels.reshape(len(levels), -1)[:, part]
    mean, deviation = values.mean(1), values.std(1)
    # The ends of the colours leave out 0.1 %, so that a rim of stray values does not pale the rest.
    bottom, p1, p99, top = np.percentile(values[:, :: max(1, values.shape[1] // 50_000)], (0.1, 1, 99, 99.9), axis=1)
    numbers = {
        "mean": mean,
        "deviation": deviation,
        "activity": np.abs(values).mean(1),
        "minimum": values.min(1),
        "maximum": values.max(1),
        "p1": p1,
        "p99": p99,
        "inactive": (values <= 0).mean(1),
        "dead": values.max(1) == values.min(1),
        "bottom": bottom,
        "top": top,
    }
    centred, norm = values - mean[:, None], np.sqrt(values.shape[1]) * deviation
    return {
        **{name: _round(column) for name, column in numbers.items()},
        "selectivity": {name: _round(_selectivity(levels, where.reshape(-1)[part])) for name, where in classes.items()},
        "correlation": {name: _round(_correlate(centred, norm, v.reshape(-1)[part])) for name, v in targets.items()},
        "histogram": [np.bincount(channel >> 2, minlength=64).tolist() for channel in levels],
    }


def _selectivity(levels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return 2 AUC - 1 of each channel (of bytes) as a detector of a class. Ties count half."""
    result = np.zeros(len(levels))
    if not inside.any() or inside.all():
        return result
    for c, channel in enumerate(levels):
        positive = np.bincount(channel[inside], minlength=256).astype(float)
        negative = np.bincount(channel[~inside], minlength=256).astype(float)
        below = np.cumsum(negative) - negative / 2
        result[c] = 2 * (positive @ below) / (positive.sum() * negative.sum()) - 1
    return result


def _correlate(centred: np.ndarray, norm: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return Pearson's r of each channel with a target; 0 for a constant one."""
    target = target.astype(np.float32)
    target = target - target.mean()
    spread = np.sqrt((target**2).sum()) * norm
    return np.divide(centred @ target, spread, out=np.zeros_like(spread), where=spread > 1e-12)


def _round(column: np.ndarray) -> list:
    return column.tolist() if column.dtype == bool else [float(f"{v:.5g}") for v in column]
