"""Segmenting whole volumes: dense, in tiles that fit the memory at hand, with a result that does not depend on the tiling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .devices import is_out_of_memory, release_memory
from .engine.gradients import compiled as through_compiler
from .engine.precision import autocast, number_type
from .engine.tiles import Tile, Tiling, check_fits, cut_output, load_patch, plan
from .engine.tracing import evaluating
from .models.network import Network
from .paths import say, say_once
from .volume import Case, bounding_box, size_text

OUTPUTS = ("labels", "probabilities", "logits")
OVERFLOWN = 255  # label of a voxel whose logits are not finite, until it is computed again


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
        precision: "float32", "float16", "bfloat16", or "auto": bfloat16 on GPUs that compute in it, float16 on older ones, float32
            elsewhere. In float16 the logits of every tile are checked. Where some overflow, this tile and the following ones are
            computed in float32, and a line says so, once for a case.
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
    start, stop = zip(*((s.start, s.stop) for s in bounding_box(mask)))
    if model.halo is not None:  # it sees where the volume ends, so what it sees must not be cut to the mask
        start = (*[0] * model.spatial_dims, *start[model.spatial_dims :])
        stop = (*case.shape[: model.spatial_dims], *stop[model.spatial_dims :])
    dtype = _find_number_type(precision, model, device)
    result = _background(output, model.classes, case.shape)
    with evaluating(model):
        network = _rearranged(model, device, compiled)
        runs = model if compiled else network
        tiling = plan(model, start, stop, case.shape, device, tile=tile, runs=runs, dtype=dtype)
        work = _Work(network, model, device, output, dtype, case.name)
        while True:
            try:
                for inside, answer in _predict_tiles(work, image, mask, tiling, progress):
                    np.copyto(result[(..., *inside)], answer, where=mask[inside])
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


@dataclass
class _Work:
    """The computation of one case, tile by tile.

    Attributes:
        network: module that computes the logits.
        model: network whose contract holds for it.
        device, output, name: device that the network lies on, kind of answer, and name of the case.
        dtype: number type; float32 after the first overflow.
    """

    network: nn.Module
    model: Network
    device: torch.device
    output: str
    dtype: torch.dtype
    name: str

    def answer(self, image: np.ndarray, tile: Tile) -> np.ndarray:
        """Compute the answer for one tile: labels `(*n)`, or scores `(K, *n)` with K at least 2."""
        patch = load_patch(image, tile, self.model, self.device)
        if self.dtype == torch.float16:
            answer = self._finished(self._logits(patch, tile, image.shape[1:]), checked=True)
            if not (answer == OVERFLOWN if self.output == "labels" else np.isnan(answer[0])).any():
                return answer
            say_once(f"{self.name}: numbers too large for float16 (beyond 65504); going on in float32")
            self.dtype = torch.float32
        return self._finished(self._logits(patch, tile, image.shape[1:]))

    def _logits(self, patch: Tensor, tile: Tile, shape: Sequence[int]) -> Tensor:
        with autocast(self.dtype, self.device):
            logits = self.network(patch)
        logits = cut_output(logits, tile, self.model, shape).float()
        return torch.cat([torch.zeros_like(logits), logits]) if len(logits) == 1 else logits

    def _finished(self, logits: Tensor, *, checked: bool = False) -> np.ndarray:
        """Return the answer of the kind that was asked for. `checked` marks it where a logit is not finite.

        The mark is a part of the answer, so that the GPU is waited for once.
        """
        overflown = ~logits.isfinite().all(0) if checked else None
        if self.output == "labels":
            answer = logits.argmax(0).to(torch.uint8)
            return (answer.masked_fill_(overflown, OVERFLOWN) if checked else answer).cpu().numpy()
        answer = logits.softmax(0) if self.output == "probabilities" else logits
        return (answer.masked_fill(overflown, torch.nan) if checked else answer).cpu().numpy()


def _predict_tiles(
    work: _Work, image: np.ndarray, mask: np.ndarray, tiling: Tiling, progress: bool
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yield the place and the answer of each tile that the mask reaches."""
    tiles = tiling.tiles()
    quiet = not progress or len(tiles) == 1
    for tile in tqdm(tiles, desc=f"segmenting {work.name}", disable=quiet, dynamic_ncols=True):
        inside = tile.inside(mask.shape)
        if mask[inside].any():
            yield inside, work.answer(image, tile)


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
