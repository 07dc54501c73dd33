"""Segmenting whole volumes: dense, in tiles that fit the memory at hand, with a result that does not depend on the tiling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .devices import is_out_of_memory, release_memory
from .engine.gradients import compiled as through_compiler
from .engine.precision import autocast, number_type
from .engine.tiles import Tiling, check_fits, cut_output, load_patch, plan
from .engine.tracing import evaluating
from .models.network import Network
from .paths import say
from .volume import Case, bounding_box, size_text

OUTPUTS = ("labels", "probabilities", "logits")


@torch.no_grad()
def predict(
    model: Network,
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

    The volume is mirrored beyond its border, so every voxel gets a prediction. Tiles lie on one grid of the volume, and each of them
    is given the whole context that the network sees. So their size changes memory and time, not the result.

    A network of padded convolutions (one with a `halo`) gets the volume as it is, mirrored only to fill up the last
    `multiple`, and pads the border itself, as in training. A tile has `halo` voxels around it and is cut at the border.

    Where a tile turns out too large for the memory, smaller ones are tried, and a line says so.

    Args:
        model: any `Network`. Other modules become one in `models.Adapter`.
        case: case that is normalised as the training cases were.
        output: "labels" `(D, H, W)` uint8, "probabilities" or "logits" `(K, D, H, W)` float32. A network with a single output
            (for a sigmoid) counts as one of two classes, whose background has the logit 0.
        inside_mask: whether to predict inside `case.mask` only. Everything outside is background (class 0) then; with "logits" it is
            zero. Without effect when the case has no mask.
        tile: side of the part that is predicted at a time, or one for each axis. By default tiles are chosen for the memory at hand.
        precision: "float32", "float16", "bfloat16", or "auto" (float16 on CUDA, else float32).
        compiled: whether to run the network through `torch.compile`. It runs as it is where that fails. Worthwhile for many cases of
            one size.
        progress: whether to show a bar.

    Raises:
        TypeError: when the model is no `Network`.
        ValueError: when the case does not fit the network.
        MemoryError: when the memory does not even suffice for the smallest tile.
    """
    if not isinstance(model, Network):
        raise TypeError(
            f"{type(model).__name__} is no Network, so its margin, multiple and halo are not known; "
            "wrap it: models.Adapter(module, in_channels=..., classes=...)"
        )
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r}; expected one of {', '.join(OUTPUTS)}")
    check_fits(model, case)
    device = next(model.parameters()).device
    image, mask = case.image, case.mask if inside_mask else None  # a stored case is read here and not again
    mask = np.ones(case.shape, bool) if mask is None else mask
    if not mask.any():
        raise ValueError(f"{case.name}: the mask is empty; there is nothing to segment. Use inside_mask=False")
    # A network that pads sees where the volume ends, so the volume must not be cut to its mask.
    box = bounding_box(mask) if model.halo is None else [slice(0, n) for n in case.shape]
    tiling = plan(model, [s.start for s in box], [s.stop for s in box], case.shape, device, tile=tile)
    dtype = _find_number_type(precision, model, device)
    result = _background(output, model.classes, case.shape)
    with evaluating(model):
        network = _rearranged(model, device, compiled)
        while True:
            try:
                parts = _predict_tiles(network, model, image, mask, tiling, dtype, case.name if progress else None)
                for inside, keep, logits in parts:
                    np.copyto(result[(..., *inside)], _finished(logits, output), where=keep)
                return result
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                found = str(error).split("\n")[0]
            # Out here the failed attempt's memory is no longer held.
            tiling = _smaller(tiling, case.name, found)
            release_memory(device)


def _find_number_type(precision: str, model: Network, device: torch.device) -> torch.dtype:
    dtype = number_type(precision, device, spatial_dims=model.spatial_dims, guarded=True)
    if dtype != torch.float32 and device.type != "cuda":
        raise ValueError(f"{precision} is for CUDA devices; on the {device.type} use float32, which is faster there")
    return dtype


def _background(output: str, classes: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return an answer that says background everywhere."""
    if output == "labels":
        return np.zeros(shape, np.uint8)
    result = np.zeros((max(classes, 2), *shape), np.float32)
    if output == "probabilities":
        result[0] = 1
    return result


def _rearranged(model: Network, device: torch.device, compiled: bool) -> nn.Module:
    """Return the network in its fastest form, with the same results."""
    if not compiled:
        return model.for_inference() if device.type == "cpu" else model
    # The compiled form is kept with the network from case to case, but not as a part of it with parameters.
    kept = vars(model)
    if "_through_compiler" not in kept:
        kept["_through_compiler"] = through_compiler(model)
    return kept["_through_compiler"]


def _predict_tiles(
    network: nn.Module,
    model: Network,
    image: np.ndarray,
    mask: np.ndarray,
    tiling: Tiling,
    dtype: torch.dtype,
    name: str | None,
) -> Iterator[tuple[tuple[slice, ...], np.ndarray, Tensor]]:
    """Yield the place of each tile that the mask reaches, the mask there, and its logits `(K, *n)` with K at least 2."""
    tiles, device = tiling.tiles(), next(model.parameters()).device
    quiet = name is None or len(tiles) == 1
    for tile in tqdm(tiles, desc=f"segmenting {name}", disable=quiet, dynamic_ncols=True):
        inside = tile.inside(mask.shape)
        if not mask[inside].any():
            continue
        with autocast(dtype, device):
            logits = network(load_patch(image, tile, model, device))
        logits = cut_output(logits, tile, model, mask.shape).float()
        if len(logits) == 1:
            logits = torch.cat([torch.zeros_like(logits), logits])
        yield inside, mask[inside], logits


def _finished(logits: Tensor, output: str) -> np.ndarray:
    """Return the answer of the kind that was asked for."""
    if output == "labels":
        return logits.argmax(0).to(torch.uint8).cpu().numpy()
    return (logits.softmax(0) if output == "probabilities" else logits).cpu().numpy()


def _smaller(tiling: Tiling, name: str, found: str) -> Tiling:
    """Return the tiling with half the longest side of a tile, and say so."""
    smaller = tiling.smaller()
    if smaller is None:
        raise MemoryError(
            f"{name}: out of memory ({found}) even with the smallest tile, {size_text(tiling.size)} voxels; free memory, or use "
            "float16 on a GPU"
        )
    say(
        f"{name}: out of memory with tiles of {size_text(tiling.size)} voxels; trying {size_text(smaller.size)}, at the same result"
    )
    return smaller
