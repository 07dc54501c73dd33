"""The class scores of 2D networks in three planes, kept on disk and joined to the image of a 3D network.

A 2D network sees a whole slice, and a 3D network a small cube. Slices are cut along each of three axes, and a 2D network is trained
for each axis. The scores of all three become further channels of the image that the 3D network is trained on.

Source: Mlynarski et al. 2019, section 2.3.
Taught in notebook 12.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from . import inference
from .arrays import as_array, as_tensor
from .models.network import Network
from .paths import atomic_write, file_for
from .volume import Case, mirrored

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the axis across the slices, in RAS+ order


def facing(case: Case, plane: str) -> Case:
    """Return the same case with the axis across the plane's slices last, where 2D samplers and `inference.predict` take slices.

    Args:
        case: case in RAS+ order.
        plane: "axial", "coronal" or "sagittal".
    """
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
    """Return an array that was made for `facing(case, plane)` on the case's own axes `(..., D, H, W)`."""
    array = as_array(array)
    return np.moveaxis(array, -1, array.ndim - 3 + _axis(plane))


def extract_scores(
    networks: Mapping[str, Network], cases: Iterable[Case], folder: str | Path, *, progress: bool = True
) -> None:
    """Write every 2D network's class scores (logits) of every case to disk, one file for each case and plane.

    One case is in memory at a time, so `cases` may be a lazy sequence of any length. A file that exists already is left as it is if
    the same weights made it from the same image. So an extraction that was interrupted goes on where it stopped.

    Args:
        networks: a trained 2D network for each plane, `{"axial": …, "coronal": …, "sagittal": …}`.
        cases: cases that are normalised as in the networks' training. Their names must differ, for they name the files.
        folder: folder of the files `<case>_<plane>.safetensors`.
        progress: whether to show a bar.
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


def with_scores(case: Case, folder: str | Path, *, planes: Sequence[str] = tuple(PLANES), scale: float = 1.0) -> Case:
    """Return the case with the scores of `extract_scores` as further channels, "axial 0", "axial 1", … after those of the image.

    Args:
        case: case whose scores were extracted.
        folder: folder of the scores.
        planes: planes whose scores are joined, in the order of the new channels.
        scale: factor for the scores. The paper asks that image and scores have about the same range; beside an image of variance 1,
            a factor of 1/4 does that for our networks.

    Raises:
        FileNotFoundError: when the case's scores are not there yet.
        ValueError: when they were made from another image of that name.
    """
    parts, names = [case.image], list(case.channels)
    for plane in planes:
        path = _path(Path(folder), case, plane)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; call extract_scores with {case.name} and the {plane} network")
        origin = _origin(path)
        if origin is None or origin["case"] != _identity(case):
            raise ValueError(f"{path} was not made from this image of {case.name}; call extract_scores again")
        with safe_open(path, framework="np") as file:
            scores = file.get_tensor("scores")
        parts.append(scale * scores.astype(np.float32))
        names += [f"{plane} {k}" for k in range(len(scores))]
    return case.replace(image=np.concatenate(parts), channels=tuple(names))


def influence(
    networks: Mapping[str, Network], model: Network, case: Case, voxel: Sequence[int], *, class_number: int, scale: float = 1.0
) -> np.ndarray:
    """Measure the influence of every voxel of the image on one prediction of a 3D network, directly and through the 2D networks.

    The influence is the gradient of one class score with respect to the image, in absolute value and added up over channels. Without
    2D networks it fills the 3D network's cube. With them it also fills the slices, in all three planes, that pass through the cube.

    Args:
        networks: 2D networks that made the scores, in the order of their channels; `{}` for a 3D network without scores. They are in
            evaluation mode, and so is `model`.
        model: the 3D network.
        case: normalised case, of the image alone, without scores.
        voxel: (d, h, w), far enough from the border for the 3D network's patch to lie inside the volume.
        class_number: number of the class whose score counts.
        scale: factor for the 2D scores, as in `with_scores`.

    Returns:
        `(D, H, W)` float32.

    Raises:
        ValueError: when the patch leaves the volume, a network is in training mode, or the networks are on different devices.

    Source: Mlynarski et al. 2019, figure 5, measured.
    Taught in notebook 12.
    """
    if any(network.training for network in (model, *networks.values())):
        raise ValueError("a network is in training mode, where slices act on each other; call its eval() first")
    start = [v // model.multiple * model.multiple - model.margin for v in voxel]
    patch = tuple(slice(a, a + 2 * model.margin + model.multiple) for a in start)
    for s, n, what in zip(patch, case.shape, "DHW"):
        if s.start < 0 or s.stop > n:
            raise ValueError(
                f"the patch around {tuple(voxel)} reaches from {s.start} to {s.stop} along {what}, out of {case.name} of {n} voxels; "
                "choose a voxel nearer to the middle"
            )
    image = as_tensor(case.image).to(_common_device(networks, model), torch.float32)
    with torch.no_grad():
        scores = [scale * _scores(net, plane, image, patch) for plane, net in networks.items()]
    x = torch.cat([image[(slice(None), *patch)], *scores])[None].requires_grad_()
    place = tuple(v - s.start - model.margin for v, s in zip(voxel, patch))
    (direct,) = torch.autograd.grad(model(x)[(0, class_number, *place)], x)
    parts = list(direct[0].split([len(image), *map(len, scores)]))
    total = torch.zeros_like(image)
    total[(slice(None), *patch)] = parts.pop(0)
    for (plane, net), part in zip(networks.items(), parts):  # the chain rule, plane by plane
        axis = _axis(plane)
        for one, share in zip(_slices(plane, patch), part.split(1, dim=axis + 1)):
            found, leaf = _slice_scores(net, plane, image, one)
            (gradient,) = torch.autograd.grad(found, leaf, scale * share)
            total.narrow(axis + 1, one[axis].start, 1).add_(gradient)
    return total.abs().sum(0).cpu().numpy()


def _common_device(networks: Mapping[str, Network], model: Network) -> torch.device:
    device = next(model.parameters()).device
    for plane, network in networks.items():
        other = next(network.parameters()).device
        if other != device:
            raise ValueError(
                f"the {plane} network is on {other}, and the 3D network is on {device}; expected one device for all: "
                f"use network.to({str(device)!r})"
            )
    return device


def _scores(network: Network, plane: str, image: torch.Tensor, patch: tuple[slice, ...]) -> torch.Tensor:
    """Return the scores `(K, *patch)` of `_slice_scores`, one slice after the other, which takes less memory."""
    return torch.cat([_slice_scores(network, plane, image, one)[0] for one in _slices(plane, patch)], dim=_axis(plane) + 1)


def _slices(plane: str, patch: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield the parts of a patch that lie in one slice each."""
    axis = _axis(plane)
    for k in range(patch[axis].start, patch[axis].stop):
        yield (*patch[:axis], slice(k, k + 1), *patch[axis + 1 :])


def _slice_scores(
    network: Network, plane: str, image: torch.Tensor, patch: tuple[slice, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores `(K, *patch)` of the whole slices that cross a patch, as `inference.predict` has them, and those slices."""
    axis = _axis(plane)
    leaf = image.narrow(axis + 1, patch[axis].start, patch[axis].stop - patch[axis].start).detach().requires_grad_()
    slices = leaf.movedim(axis + 1, 0)
    for dim in (2, 3):  # mirrored to fill up the last multiple
        n = slices.shape[dim]
        index = torch.from_numpy(mirrored(0, n + -n % network.multiple, n)).to(image.device)
        slices = slices.index_select(dim, index)
    scores = network(slices)[(..., *(patch[other] for other in _others(plane)))]
    return scores.movedim(0, 1).movedim(1, axis + 1), leaf


def _axis(plane: str) -> int:
    if plane not in PLANES:
        raise ValueError(f"plane={plane!r}; expected one of {', '.join(PLANES)}")
    return PLANES[plane]


def _others(plane: str) -> list[int]:
    return [axis for axis in range(3) if axis != _axis(plane)]


def _path(folder: Path, case: Case, plane: str) -> Path:
    return file_for(folder, case.name, f"_{plane}.safetensors")


def _origin(path: Path) -> dict[str, str] | None:
    """Return the network and the case that a file was made from, or None where there is no whole file."""
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {}).get("origin", "null"))
    except (OSError, SafetensorError, ValueError):
        return None


def _fingerprint(network: Network) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _identity(case: Case) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(case.image)):08x} {'x'.join(map(str, case.image.shape))}"
