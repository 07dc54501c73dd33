"""Segmenting whole volumes: dense, in tiles that fit the memory at hand, with a result that does not depend on the tiling."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .engine.gradients import compiled as through_compiler
from .engine.gradients import out_of_memory
from .models.layers import convolutions
from .volume import Case, bounding_box, padded_region

OUTPUTS = ("labels", "probabilities", "logits")
CPU_WORKSPACE = 400e6  # bytes of feature maps at a time: larger tiles save little halo and cost memory
PADDED_WORKSPACE = 2e9  # the same for networks that pad: their halo is large, so most volumes should go through whole


@torch.no_grad()
def predict(
    model: nn.Module,
    case: Case,
    *,
    output: str = "labels",
    inside_mask: bool = True,
    tile: int | Sequence[int] | None = None,
    precision: str = "auto",
    compiled: bool = False,
    progress: bool = True,
) -> np.ndarray:
    """Segment one case on the device that the network lies on.

    The volume is mirrored beyond its border, so every voxel gets a prediction. Tiles are laid on one grid of the volume and
    each is given the whole context that the network sees, so their size changes memory and time, not the result.

    A network of padded convolutions (one with a `halo`) gets the volume as it is, mirrored only to fill up the last
    `multiple`, and pads the border itself, as in training. A tile has `halo` voxels around it and is cut at the border.

    Where a tile turns out too large for the memory, smaller ones are tried, and a line says so.

    Args:
        model: a network with `margin`, `multiple` and `spatial_dims`, as all of this package have; `halo` if it pads.
        case: normalised as the training cases were.
        output: "labels" `(D, H, W)` uint8, "probabilities" or "logits" `(K, D, H, W)` float32. A network with a single output
            (a sigmoid's) counts as one of two classes, whose background has the logit 0.
        inside_mask: predict inside `case.mask` only and call everything outside background (class 0); with "logits" the
            outside is zero. Without effect when the case has no mask.
        tile: side of the predicted block at a time, or one for each axis; by default as large as the memory at hand allows.
        precision: "float32", "float16", "bfloat16", or "auto" (float16 on CUDA, else float32).
        compiled: run the network through `torch.compile`, or as it is where that fails; for many cases of one size.
        progress: whether to show a bar.

    Raises:
        ValueError: when the case does not fit the network.
        MemoryError: when the memory does not even do for the smallest tile.
    """
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r}; expected one of {', '.join(OUTPUTS)}")
    _check_fits(model, case)
    device = next(model.parameters()).device
    image, mask = case.image, case.mask if inside_mask else None  # of a stored case, read here and not again
    mask = np.ones(case.shape, bool) if mask is None else mask
    if not mask.any():
        raise ValueError(f"{case.name}: the mask is empty; there is nothing to segment. Use inside_mask=False")
    # A network that pads sees where the volume ends, so the volume must not be cut to its mask.
    start, stop = _region(np.ones(case.shape, bool) if getattr(model, "halo", None) is not None else mask, model)
    size = _tile_size(model, start, stop, tile, device)
    autocast = _autocast(precision, device)
    if output == "labels":
        result = np.zeros(case.shape, np.uint8)
    else:
        result = np.zeros((max(model.classes, 2), *case.shape), np.float32)
        if output == "probabilities":
            result[0] = 1
    was_training = model.training
    try:
        network = model.eval()
        if compiled:
            network = _compiled(model)
        elif device.type == "cpu" and hasattr(model, "for_inference"):
            network = model.for_inference()
        while True:
            try:
                for inside, keep, logits in _predicted(
                    network, model, image, mask, start, stop, size, autocast, case.name if progress else None
                ):
                    if output == "labels":
                        result[inside] = np.where(keep, logits.argmax(0).to(torch.uint8).cpu().numpy(), 0)
                    else:
                        block = (logits.softmax(0) if output == "probabilities" else logits).cpu().numpy()
                        np.copyto(result[(slice(None), *inside)], block, where=keep)
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                found = str(error).split("\n")[0]
            size = _smaller(size, model, found, case)  # out here, where the failed attempt's memory is no longer held
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        model.train(was_training)
    return result


class SameSize(nn.Module):
    """A network of valid convolutions whose output is put back into an array of the input's size, zero at the rim.

    For inference engines that expect as many voxels out as in. The rim of `margin` voxels holds no prediction: give the
    engine windows that overlap by at least twice the margin and a weight map that is zero there, and see to it that windows
    start on the network's grid: the volume and the step between windows must be multiples of `model.multiple`. With MONAI:

        roi = 96 + 2 * model.margin
        weight = torch.zeros(1, 1, roi, roi, roi)
        weight[..., model.margin:-model.margin, model.margin:-model.margin, model.margin:-model.margin] = 1
        sliding_window_inference(padded, roi, 1, SameSize(model), overlap=.5, roi_weight_map=weight)
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *n) -> (B, K, *n)`."""
        m = self.model.margin
        return nn.functional.pad(self.model(x), (m,) * (2 * self.model.spatial_dims))


def _predicted(network, model, image, mask, start, stop, size, autocast, name: str | None) -> Iterator[tuple]:
    """The place of each tile that the mask reaches, the mask there, and its logits `(K, *n)` with K at least 2."""
    tiles = list(_tiles(start, stop, size, mask.shape))
    device = next(model.parameters()).device
    quiet = name is None or len(tiles) == 1
    for a, b in tqdm(tiles, desc=f"segmenting {name}", disable=quiet, dynamic_ncols=True):
        inside = tuple(slice(i, min(j, n)) for i, j, n in zip(a, b, mask.shape))
        keep = mask[inside]
        if not keep.any():
            continue
        with autocast:
            logits = _run(network, image, a, b, model, device, stop)
        if len(logits) == 1:
            logits = torch.cat([torch.zeros_like(logits), logits])
        yield inside, keep, logits[(slice(None), *(slice(s.stop - s.start) for s in inside))].float()


def _smaller(size: list[int], model: nn.Module, found: str, case: Case) -> list[int]:
    """Half the longest side of a tile, on the network's grid."""
    grid = [model.multiple] * model.spatial_dims + [1] * (3 - model.spatial_dims)
    axis = int(np.argmax([s / g if s > g else 0 for s, g in zip(size, grid)]))
    if size[axis] <= grid[axis]:
        raise MemoryError(
            f"{case.name}: out of memory ({found}) even with the smallest tile, {'×'.join(map(str, size))} voxels; free "
            "memory, or use float16 on a GPU"
        )
    half = math.ceil(size[axis] / 2 / grid[axis]) * grid[axis]
    smaller = [half if n == axis else s for n, s in enumerate(size)]
    print(
        f"{case.name}: out of memory with tiles of {'×'.join(map(str, size))} voxels; trying {'×'.join(map(str, smaller))}, "
        "at the same result"
    )
    return smaller


def _compiled(model: nn.Module) -> nn.Module:
    """The network through the compiler, kept with the network from case to case; not as a part of it, with parameters."""
    if "_through_compiler" not in model.__dict__:
        model.__dict__["_through_compiler"] = through_compiler(model)
    return model.__dict__["_through_compiler"]


def _check_fits(model: nn.Module, case: Case) -> None:
    channels = getattr(model, "in_channels", len(case.channels))
    if channels != len(case.channels):
        raise ValueError(
            f"{case.name} has {len(case.channels)} channels ({', '.join(case.channels)}) but the network expects {channels}; "
            "choose channels with case.select([...])"
        )
    trained = getattr(model, "card", {}).get("channels")
    if trained and tuple(trained) != case.channels:
        raise ValueError(
            f"{case.name} has channels {', '.join(case.channels)} but the network was trained on {', '.join(trained)}; "
            f"use case.select({list(trained)})"
        )


def _region(mask: np.ndarray, model: nn.Module) -> tuple[list[int], list[int]]:
    """Where to predict: the mask's bounding box, its ends moved outwards to the network's grid."""
    grid = [model.multiple] * model.spatial_dims + [1] * (3 - model.spatial_dims)
    box = bounding_box(mask)
    start = [s.start // g * g for s, g in zip(box, grid)]
    return start, [a + math.ceil((s.stop - a) / g) * g for a, s, g in zip(start, box, grid)]


def _tile_size(model, start, stop, tile, device) -> list[int]:
    size = [b - a for a, b in zip(start, stop)]
    grid = [model.multiple] * model.spatial_dims + [1] * (3 - model.spatial_dims)
    if tile is not None:
        wanted = [tile] * 3 if isinstance(tile, int) else list(tile)
        if len(wanted) != 3 or min(wanted) < 1:
            raise ValueError(f"tile={tile}; expected a positive number of voxels, or three of them")
        return [min(max(w // g, 1) * g, s) for w, g, s in zip(wanted, grid, size)]
    widest = max(c.in_channels + c.out_channels for c in convolutions(model) if max(c.kernel_size) > 1)
    halo = getattr(model, "halo", None)
    workspace = _workspace(device) if halo is None else _workspace(device, PADDED_WORKSPACE)
    voxels = workspace / (4 * 1.5 * widest)
    pieces = [1, 1, 1]
    # Full-resolution feature maps start `reach` voxels outside the tile; what lies further out is only seen sub-sampled.
    reach = getattr(model, "reach", model.margin) if halo is None else halo
    margin = [2 * reach] * model.spatial_dims + [0] * (3 - model.spatial_dims)

    def cost() -> int:
        sides = [math.ceil(s / p) + m for s, p, m in zip(size, pieces, margin)]
        return math.prod(sides if halo is None else map(min, sides, size))  # a halo ends where the volume does

    while cost() > voxels:
        axis = int(np.argmax([s / p if s / p > 4 * g else 0 for s, p, g in zip(size, pieces, grid)]))
        if size[axis] / pieces[axis] <= 4 * grid[axis]:
            break  # the halo is all that is left: smaller tiles would not need less
        pieces[axis] += 1
    return [math.ceil(math.ceil(s / p) / g) * g for s, p, g in zip(size, pieces, grid)]


def _workspace(device: torch.device, most: float = CPU_WORKSPACE) -> float:
    if device.type == "cuda":
        return 0.5 * torch.cuda.mem_get_info(device)[0]
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on macOS or Windows
        return most
    return min(most, 0.5 * free)


def _tiles(start, stop, tile, shape) -> Iterator[tuple[list[int], list[int]]]:
    for corner in itertools.product(*(range(a, b, t) for a, b, t in zip(start, stop, tile))):
        if all(c < n for c, n in zip(corner, shape)):
            yield list(corner), [min(c + t, b) for c, t, b in zip(corner, tile, stop)]


def _run(network: nn.Module, image: np.ndarray, a, b, model: nn.Module, device, stop: list[int]) -> Tensor:
    """Logits `(K, *(b - a))` of one tile of the region that ends at `stop`."""
    halo = getattr(model, "halo", None)
    around = [model.margin if halo is None else halo] * model.spatial_dims + [0] * (3 - model.spatial_dims)
    first, last = [i - m for i, m in zip(a, around)], [j + m for j, m in zip(b, around)]
    if halo is not None:
        first, last = [max(i, 0) for i in first], [min(j, n) for j, n in zip(last, stop)]
    patch = padded_region(image, first, last)
    x = torch.from_numpy(np.ascontiguousarray(patch, np.float32)).to(device)
    if model.spatial_dims == 2:  # axial slices become the batch
        logits = network(x.permute(3, 0, 1, 2)).permute(1, 2, 3, 0)
    else:
        logits = network(x[None])[0]
    if halo is not None:
        logits = logits[(slice(None), *(slice(i - f, j - f) for i, j, f in zip(a, b, first)))]
    return logits


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if precision == "auto":
        precision = "float16" if device.type == "cuda" else "float32"
    if precision not in types:
        raise ValueError(f"precision={precision!r}; expected auto, {', '.join(types)}")
    dtype = types[precision]
    if device.type != "cuda":
        if dtype != torch.float32:
            raise ValueError(f"{precision} is for CUDA devices; on the {device.type} use float32, which is faster there")
        return torch.autocast("cpu", enabled=False)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
