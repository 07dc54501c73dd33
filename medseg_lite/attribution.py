"""The purpose of feature maps: take them away, find what excites them most, and see which places speak for a class.

with ablate(model, "normal.7", 12):
    ablated = inference.predict(model, case)
ablation_table(model, case, "low.7")                     # Dice of every region without each channel
strongest_patches(model, cases, "normal.7", 12)          # the patches of a cohort that excite the channel most
grad_cam(model, case, "low.7", target=4)                 # the places where the layer speaks for class 4
position_explained(maps, case.mask)                      # the share of each map that is mere position
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import inference, metrics
from .arrays import as_mask, as_tensor
from .engine.tiles import Tile, cut_output, find_region, load_patch, plan
from .engine.tracing import contract, evaluating
from .features import FeatureMaps, capture, find_context, list_layers
from .models.drozdzal import Bottleneck, SimpleBlock
from .models.network import Network
from .volume import Case, bounding_box, padded_region

RESIDUAL_BLOCKS = (Bottleneck, SimpleBlock)


@contextmanager
def ablate(model: nn.Module, layer: str, channels: int | Sequence[int], *, value: float = 0.0) -> Iterator[nn.Module]:
    """Set some of a layer's channels to one value everywhere, within the block; afterwards the network is what it was.

    Blocks may be nested, also for one layer. They work with `inference.predict` and with training.

    Args:
        model: any network; the same object is handed to the block.
        layer: name as in `model.named_modules()`.
        channels: one channel, or several.
        value: value that they are set to, 0 by default.

    Raises:
        ValueError: when there is no such layer or channel, or the layer does not put out one tensor.
    """
    wanted = [int(c) for c in (channels if isinstance(channels, (Sequence, np.ndarray)) else [channels])]
    with _changed(model, layer, wanted, lambda maps: torch.full_like(maps, value)):
        yield model


@contextmanager
def scaled(model: nn.Module, layer: str, factors: Mapping[int, float]) -> Iterator[nn.Module]:
    """Multiply some of a layer's channels by a factor each, within the block, as `ablate` sets them to one value.

        with attribution.scaled(model, "normal.7", {12: 0.5, 30: 2}):
            other = inference.predict(model, case)

    Args:
        model, layer: the same as in `ablate`.
        factors: factor of each channel that is changed.
    """
    by = torch.tensor(list(factors.values()), dtype=torch.float32)
    with _changed(model, layer, list(factors), lambda maps: maps * by.to(maps).view(-1, *[1] * (maps.ndim - 2))):
        yield model


@contextmanager
def _changed(model: nn.Module, layer: str, channels: list[int], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `change` replace some channels `(B, channels, *space)` of a layer's output, within the block."""
    modules = dict(model.named_modules())
    if layer not in modules:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"this network has no layer {layer!r}; its parts are {parts}, see model.named_modules()")

    def hook(module, inputs, output):
        if not isinstance(output, Tensor) or output.ndim < 3:
            raise ValueError(f"layer {layer!r} does not put out feature maps; choose a convolution")
        if any(not 0 <= c < output.shape[1] for c in channels):
            raise ValueError(f"channels={channels}; layer {layer!r} has channels 0 to {output.shape[1] - 1}")
        return output.index_copy(1, torch.tensor(channels, device=output.device), change(output[:, channels]))

    handle = modules[layer].register_forward_hook(hook)
    # A copy rearranged for inference would not know of the hook.
    own = {name: value for name, value in vars(model).items() if name == "for_inference"}
    vars(model)["for_inference"] = lambda: model
    try:
        yield
    finally:
        handle.remove()
        del vars(model)["for_inference"]
        vars(model).update(own)


def removable(model: nn.Module) -> list[str]:
    """List the layers that `without` can take out of a network, in the order in which they were built.

    They are residual blocks, and elsewhere convolutions that give as many maps, of the same size, as they take.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, RESIDUAL_BLOCKS)]
    inside = tuple(f"{name}." for name in blocks)
    return [
        name
        for name, module in model.named_modules()
        if name in blocks or (_keeps_shape(module) and not name.startswith(inside))
    ]


@contextmanager
def without(model: nn.Module, names: str | Sequence[str]) -> Iterator[nn.Module]:
    """Leave some layers of a trained network out, within the block; afterwards it is what it was.

        with attribution.without(model, "across.1"):
            worse = inference.predict(model, case)

    The shortcut of a residual block stays: it is the input itself, sub-sampled, repeated or projected to the new number of maps
    where necessary. A plain convolution hands on its input.

    Args:
        model: any network with such layers; the same object is handed to the block.
        names: one of `removable(model)`, or several.

    Source: Drozdzal et al. 2018, section 1; Veit, Wilber and Belongie 2016, "Residual networks behave like ensembles of relatively shallow
    networks", section 4.1.
    Taught in notebook 10.
    """
    names = [names] if isinstance(names, str) else list(names)
    there = removable(model)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} cannot be taken out of this network; expected some of {', '.join(there) or 'none'}"
        )
    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for name in names:
            hooks.callback(modules[name].register_forward_hook(_pass_on).remove)
        yield model


@contextmanager
def exchanged(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> Iterator[nn.Module]:
    """Let layers of a trained network change places, pair after pair, within the block; afterwards the network is what it was.

        with attribution.exchanged(model, [("up.0.2", "up.0.5")]):
            other = inference.predict(model, case)

    Args:
        model: any network; the same object is handed to the block.
        pairs: names of two layers each, as in `model.named_modules()`, which take and give as many maps of the same size.

    Raises:
        ValueError: there is no such layer, or the two have weights of different shapes.

    Source: Drozdzal et al. 2018, section 1; Veit, Wilber and Belongie 2016, section 4.3.
    Taught in notebook 10.
    """
    modules = dict(model.named_modules())
    for pair in pairs:
        if unknown := [name for name in pair if name not in modules]:
            raise ValueError(f"this network has no layer {unknown[0]!r}, see model.named_modules()")
        shapes = [[p.shape for p in modules[name].parameters()] for name in pair]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{' and '.join(pair)} have weights of different shapes, so they cannot change places")

    def exchange(first: str, second: str) -> None:
        places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in (first, second)]
        layers = [getattr(parent, name) for parent, name in places]
        for (parent, name), layer in zip(places, reversed(layers)):
            setattr(parent, name, layer)

    done: list[tuple[str, str]] = []
    try:
        for pair in pairs:
            exchange(*pair)
            done.append(pair)
        yield model
    finally:
        for pair in reversed(done):
            exchange(*pair)


def _keeps_shape(module: nn.Module) -> bool:
    return (
        isinstance(module, (nn.Conv2d, nn.Conv3d))
        and module.in_channels == module.out_channels
        and set(module.stride) == {1}
        and all(k == 2 * p + 1 for k, p in zip(module.kernel_size, module.padding))
    )


def _pass_on(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return module.shortcut(*inputs) if isinstance(module, RESIDUAL_BLOCKS) else inputs[0]


def ablation_table(
    model: nn.Module,
    case: Case,
    layer: str,
    *,
    channels: Sequence[int] | None = None,
    regions="brats2015",
    value: float = 0.0,
    progress: bool = True,
    **options,
) -> pd.DataFrame:
    """Measure the Dice of each region with each channel of a layer taken away, one channel at a time.

    Every row is a segmentation of the whole case; `case.crop(...)` around the lesion saves time.

    Args:
        model: network to be examined.
        case: labelled case, normalised as for `inference.predict`.
        layer: name of the layer.
        channels: channels to take away; all by default.
        regions: regions to score, as in `metrics.evaluate`.
        value: value that a channel is set to.
        progress: whether to show a bar.
        options: further options of `inference.predict`.

    Returns:
        A table indexed by channel: `dice_<region>`, and `change_<region>` against the whole network. The Dice of the whole network is in
        `attrs["dice"]`.
    """
    if case.label is None:
        raise ValueError(f"{case.name} has no label to compare with")

    def score() -> dict[str, float]:
        prediction = inference.predict(model, case, progress=False, **options)
        table = metrics.evaluate(prediction, case.label, regions=regions, metrics=["dice"])
        return dict(zip(table["region"], table["dice"]))

    if channels is None:
        (info,) = list_layers(model, layer).values()
        channels = range(info.channels)
    whole, rows = score(), {}
    for channel in tqdm(channels, desc=f"without channels of {layer}", disable=not progress, dynamic_ncols=True):
        with ablate(model, layer, channel, value=value):
            found = score()
        rows[int(channel)] = {f"dice_{r}": d for r, d in found.items()} | {
            f"change_{r}": d - whole[r] for r, d in found.items()
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("channel")
    table.attrs["dice"] = whole
    return table


class Patch(NamedTuple):
    """A part of a case that excites a channel.

    Attributes:
        case: name of the case.
        value: value of the channel there.
        position: input voxel (d, h, w) that the layer's voxel is centred on, rounded.
        start: first voxel of the patch. It is outside the case where the patch is mirrored.
        image: `(C, D, H, W)`, as large as the layer's receptive field.
        label: `(D, H, W)`, or None.
    """

    case: str
    value: float
    position: tuple[int, int, int]
    start: tuple[int, int, int]
    image: np.ndarray
    label: np.ndarray | None


def strongest_patches(
    model: nn.Module,
    cases: Sequence[Case],
    layer: str,
    channel: int,
    *,
    count: int = 9,
    per_case: int = 3,
    size: int | Sequence[int] | None = None,
    inside_mask: bool = True,
    progress: bool = True,
) -> list[Patch]:
    """Find the patches of a cohort that excite one channel most, the strongest first.

    Within a case, patches whose centres are less than half a patch apart along every axis count as one.

    Args:
        model: network to be examined.
        cases: cases that are normalised as for `inference.predict`. They are read one after the other.
        layer: name of the layer.
        channel: number of the channel in the layer.
        count: number of patches in all.
        per_case: largest number of patches from one case.
        size: side of the patches, or one for each axis; by default the layer's receptive field.
        inside_mask: whether centres must lie inside the cases' masks.
        progress: whether to show a bar.
    """
    found: list[Patch] = []
    for case in tqdm(cases, desc=f"{layer}, channel {channel}", disable=not progress, dynamic_ncols=True):
        (maps,) = capture(model, case, layer, progress=False).values()
        if not 0 <= channel < len(maps.data):
            raise ValueError(f"channel={channel}; layer {layer!r} has channels 0 to {len(maps.data) - 1}")
        if size is not None:
            side = [int(n) for n in ([size] * 3 if np.ndim(size) == 0 else size)]
        else:
            field = maps.field.side if maps.field else (33,) * contract(model).spatial_dims
            side = [*field, *[1] * (3 - len(field))]
        values = maps.data[channel].astype(np.float32)
        if inside_mask and case.mask is not None:
            values = np.where(maps.sampled(case.mask), values, -np.inf)
        for _ in range(per_case):
            index = np.unravel_index(values.argmax(), values.shape)
            if not np.isfinite(values[index]):
                break
            position = tuple(math.floor(p + 0.5) for p in maps.position(index))
            start = tuple(p - s // 2 for p, s in zip(position, side))
            stop = [a + s for a, s in zip(start, side)]
            label = None if case.label is None else padded_region(case.label, start, stop)
            image = np.array(padded_region(case.image, start, stop))
            found.append(Patch(case.name, float(values[index]), position, start, image, label))
            near = (
                slice(max(0, math.ceil(i - s / 2 / t)), int(i + s / 2 / t) + 1) for i, s, t in zip(index, side, maps.stride)
            )
            values[tuple(near)] = -np.inf
    return sorted(found, key=lambda patch: -patch.value)[:count]


def grad_cam(
    model: nn.Module,
    case: Case,
    layer: str,
    target: int,
    *,
    where: np.ndarray | None = None,
    region: Sequence[slice | int] | None = None,
) -> FeatureMaps:
    """Find the places where a layer speaks for a class, by Seg-Grad-CAM.

    The sum of the class's logits over `where` is differentiated with respect to the layer's maps A_k. The mean of the gradient
    over the layer's voxels, α_k, is the weight of map k, and the answer is max(0, Σ_k α_k A_k).

    Args:
        model: network to be examined.
        case: case that is normalised as for `inference.predict`.
        layer: name of a layer before the output.
        target: number of the class.
        where: `(D, H, W)` bool, the voxels whose logits count; by default those that are predicted as `target`. One voxel makes
            the map of a single decision.
        region: part of the case to look at, as in `capture`; by default the box of `where` with 8 voxels around it.

    Returns:
        One map, laid over the case like those of `capture`. `laid_over(case.shape, 0)` brings it to the case's grid.

    Raises:
        ValueError: when there is no such class or layer, or `where` is empty.

    Source: Vinogradova, Dibrov and Myers, "Towards interpretable semantic segmentation via gradient-weighted class activation
    mapping", AAAI 2020; Selvaraju et al. 2017.
    """
    if where is None:
        where = inference.predict(model, case, progress=False) == target
    where = as_mask(where, "where")
    if where.shape != case.shape:
        raise ValueError(f"where has shape {where.shape}; expected {case.shape}, that of {case.name}")
    if not where.any():
        raise ValueError(f"no voxel of {case.name} is predicted as class {target}; say with where= which voxels count")
    start, stop = find_region(bounding_box(where, border=8) if region is None else region, case)
    outside = where.copy()
    outside[tuple(slice(a, b) for a, b in zip(start, stop))] = False
    if outside.any():
        raise ValueError(f"{int(outside.sum())} voxels of where lie outside the region; enlarge the region")
    (name,) = list_layers(model, layer)
    total = _sum_gradients(model, case, name, target, where)
    (maps,) = capture(model, case, layer, region=tuple(slice(a, b) for a, b in zip(start, stop)), progress=False).values()
    weights = total / maps.data[0].size
    cam = np.maximum(np.tensordot(weights, maps.data.astype(np.float32), axes=1), 0)[None]
    # Weights are means over many voxels, far below what half precision can tell from zero.
    return FeatureMaps(f"{name} for class {target}", cam.astype(np.float32), maps.offset, maps.stride, maps.every, maps.field)


def _sum_gradients(model: nn.Module, case: Case, layer: str, target: int, where: np.ndarray) -> np.ndarray:
    """Return the gradient of a class's logits over `where`, added up over the voxels of each map of a layer."""
    network, device, box = contract(model), next(model.parameters()).device, bounding_box(where)
    context = find_context(network, list_layers(model, "").values(), case.shape)
    ends = [b.start for b in box], [b.stop for b in box]
    total = 0.0
    with evaluating(model), torch.enable_grad():
        for tile in plan(network, *ends, case.shape, device, context=context, gradients=True).tiles():
            counted = where[tile.inside(case.shape)]
            if counted.any():
                gradient = _gradient(model, network, case, layer, target, tile, as_tensor(counted).to(device))
                total = total + gradient.sum(dim=[0, *range(2, gradient.ndim)]).cpu().double().numpy()
    return total


def _gradient(model: nn.Module, network: Network, case: Case, layer: str, target: int, tile: Tile, counted: Tensor) -> Tensor:
    """Differentiate the sum of a class's logits over some voxels of a tile with respect to the maps of a layer."""
    x = load_patch(case.image, tile, network, next(model.parameters()).device).requires_grad_()
    caught: list[Tensor] = []

    def keep(module, inputs, output):
        caught.append(output)
        return output.clone()  # what follows may work in place

    name, _, call = layer.partition("#")
    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        logits = cut_output(model(x), tile, network, case.shape)
    finally:
        handle.remove()
    if not 0 <= target < len(logits):
        raise ValueError(f"target={target}; the network has classes 0 to {len(logits) - 1}")
    maps = caught[int(call or 1) - 1]
    (gradient,) = torch.autograd.grad(logits[target][counted].sum(), maps, allow_unused=True)
    if gradient is None:
        raise ValueError(f"the output does not depend on layer {layer!r}; choose a layer before it")
    return gradient


def position_explained(maps: FeatureMaps, mask: np.ndarray | None = None, *, degree: int = 2) -> np.ndarray:
    """Return the share of each map's variance (R²) that a polynomial of the position explains.

    A channel near 0 tells what is there, and one near 1 where in the head (or the image) it is. Coarse pathways, which see far, can
    know much about the place (Kamnitsas et al. 2017, section 2.4 and Figure 14, on the low-resolution pathway).

    Args:
        maps: maps from `features.capture`.
        mask: `(D, H, W)`, the voxels of the case that count; all by default.
        degree: degree of the polynomial in (d, h, w).

    Returns:
        `(C,)`, 0 to 1. A constant channel gets 0.
    """
    size = maps.data.shape[1:]
    inside = np.ones(size, bool) if mask is None else maps.sampled(as_mask(mask))
    if not inside.any():
        raise ValueError("the mask holds no voxel of these maps")
    place = np.argwhere(inside).astype(np.float64)
    place = (place - place.mean(0)) / np.maximum(place.std(0), 1e-9)
    powers = (p for p in itertools.product(range(degree + 1), repeat=3) if sum(p) <= degree)
    terms = np.stack([np.prod(place**p, axis=1) for p in powers], axis=1)
    values = maps.data[:, inside].astype(np.float64).T
    values = values - values.mean(0)
    basis, spread, _ = np.linalg.svd(terms, full_matrices=False)
    basis = basis[:, spread > 1e-9 * spread[0]]
    variance = (values**2).sum(0)
    explained = ((basis.T @ values) ** 2).sum(0)
    return np.divide(explained, variance, out=np.zeros_like(variance), where=variance > 1e-9 * len(place))
