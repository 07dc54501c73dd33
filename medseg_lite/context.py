"""2D networks as the eyes of a 3D network: their class scores in three planes, kept on disk and joined to the image.

A 2D network sees a whole slice, a 3D network a small cube. Slices are cut along each of three axes, a 2D network is trained for
each, and the scores of all three become further channels of the image that the 3D network is trained on.

Source: Mlynarski et al. 2019, section 2.3.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from tqdm import tqdm

from . import inference
from .paths import atomic_write
from .volume import Case

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the axis across the slices, in RAS+ order


def facing(case: Case, plane: str) -> Case:
    """The same case with the axis across the plane's slices last, where 2D samplers and `inference.predict` take slices from."""
    order = [*_others(plane), _axis(plane)]

    def turned(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.ascontiguousarray(array.transpose(order))

    return case.replace(
        image=np.ascontiguousarray(case.image.transpose(0, *(a + 1 for a in order))),
        label=turned(case.label),
        mask=turned(case.mask),
        affine=case.affine[:, [*order, 3]],
        extra={name: turned(array) for name, array in case.extra.items()},
    )


def facing_back(array: np.ndarray, plane: str) -> np.ndarray:
    """An array `(..., *turned)` that was made for `facing(case, plane)`, on the case's own axes `(..., D, H, W)`."""
    return np.moveaxis(array, -1, array.ndim - 3 + _axis(plane))


def extract_scores(
    networks: Mapping[str, nn.Module], cases: Iterable[Case], folder: str | Path, *, progress: bool = True
) -> None:
    """Write every 2D network's class scores (logits) of every case to disk, one file for each case and plane.

    One case is in memory at a time, so `cases` may be a lazy sequence of any length. Files that exist already, made by the same
    weights from the same image, are left as they are: an extraction that was interrupted goes on where it stopped.

    Args:
        networks: a trained 2D network for each plane, `{"axial": …, "coronal": …, "sagittal": …}`.
        cases: normalised as the networks were trained. Their names must differ, for they name the files.
        folder: where the files `<case>_<plane>.safetensors` go.
    """
    folder, seen = Path(folder), set()
    made_by = {plane: _fingerprint(network) for plane, network in networks.items()}
    for plane in networks:
        _axis(plane)
    for case in tqdm(cases, desc="2D scores", disable=not progress, dynamic_ncols=True):
        if case.name in seen:
            raise ValueError(f"two cases are called {case.name}; their scores would overwrite each other: rename one")
        seen.add(case.name)
        made_from = _identity(case)
        for plane, network in networks.items():
            path = _path(folder, case, plane)
            origin = {"network": made_by[plane], "case": made_from}
            if _origin(path) == origin:
                continue
            scores = inference.predict(network, facing(case, plane), output="logits", inside_mask=False, progress=False)
            scores = np.ascontiguousarray(facing_back(scores, plane)).clip(-6e4, 6e4).astype(np.float16)
            with atomic_write(path) as temporary:
                save_file({"scores": scores}, temporary, metadata={"origin": json.dumps(origin)})


def with_scores(case: Case, folder: str | Path, *, planes: Sequence[str] = tuple(PLANES)) -> Case:
    """The case with the scores of `extract_scores` as further channels, "axial 0", "axial 1", … after those of the image.

    Raises:
        FileNotFoundError: where a case's scores are not there yet.
        ValueError: where they are of another image of that name.
    """
    parts, names = [case.image], list(case.channels)
    for plane in planes:
        path = _path(Path(folder), case, plane)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; call extract_scores with {case.name} and the {plane} network"
            )
        origin = _origin(path)
        if origin is None or origin["case"] != _identity(case):
            raise ValueError(f"{path} was not made from this image of {case.name}; call extract_scores again")
        with safe_open(path, framework="np") as file:
            scores = file.get_tensor("scores")
        parts.append(scores.astype(np.float32))
        names += [f"{plane} {k}" for k in range(len(scores))]
    return case.replace(image=np.concatenate(parts), channels=tuple(names))


def _axis(plane: str) -> int:
    if plane not in PLANES:
        raise ValueError(f"plane={plane!r}; expected one of {', '.join(PLANES)}")
    return PLANES[plane]


def _others(plane: str) -> list[int]:
    return [axis for axis in range(3) if axis != _axis(plane)]


def _path(folder: Path, case: Case, plane: str) -> Path:
    if case.name != Path(case.name).name:
        raise ValueError(f"the case is called {case.name!r}; a name that becomes a file must have no slashes")
    return folder / f"{case.name}_{plane}.safetensors"


def _origin(path: Path) -> dict[str, str] | None:
    """What a file was made from, or None where there is no whole file."""
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {}).get("origin", "null"))
    except (OSError, SafetensorError, ValueError):
        return None


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _identity(case: Case) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(case.image)):08x} {'x'.join(map(str, case.image.shape))}"
