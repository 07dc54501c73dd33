"""Trained networks as single safetensors files: the weights, and a card that says what they are and how they came to be."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..paths import atomic_write

# The batches that inference statistics were averaged over are needed to go on training, not to use the network.
_TRAINING_ONLY = ("recent", "batches")


def save(path: str | Path, model: nn.Module, card: dict, *, half: bool = False) -> Path:
    """Write the weights of a network that one of the builders made.

    Args:
        path: a `.safetensors` file; it appears only when complete.
        model: a network from `medseg_lite.models`.
        card: what a user must know: channels, classes, normalisation, data, steps, seed, command, scores. JSON values.
        half: whether kernels are written as float16, for a file of half the size. All else (statistics of batch normalisation may
            exceed what float16 holds) stays as it is, and `load` gives float32 all the same.
    """
    path = Path(path)
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} was not made by a builder of medseg_lite.models, so it cannot be rebuilt")
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not _training_only(k)}
    if half:
        tensors = {k: v.half() if v.ndim > 1 and v.is_floating_point() else v for k, v in tensors.items()}
    metadata = {"config": json.dumps(model.config), "card": json.dumps(card)}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return path


def load(path: str | Path) -> nn.Module:
    """Rebuild a network from `save`'s file, in evaluation mode; its card is `model.card`.

    Only builders of this package are called and nothing in the file is executed.
    """
    from medseg_lite import models

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a .safetensors file written by medseg_lite.models.save")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); download or export it again") from error
    if "config" not in metadata:
        raise ValueError(f"{path} holds no network description; expected a file written by medseg_lite.models.save")
    config = json.loads(metadata["config"])
    name = config.pop("builder", None)
    if name not in models.NETWORKS:
        raise ValueError(f"{path} asks for network {name!r}, which this version of medseg_lite does not have")
    try:
        model = getattr(models, name)(**config)
    except TypeError as error:
        raise ValueError(f"{path} asks for options that {name} does not have in this version ({error})") from error
    expected = {k: v.shape for k, v in model.state_dict().items() if not _training_only(k)}
    wrong = sorted(k for k in expected.keys() | tensors.keys() if k not in tensors or tensors[k].shape != expected.get(k))
    if wrong:
        raise ValueError(
            f"{path} does not fit {name}: {len(wrong)} tensors are missing, unknown or of another shape ({', '.join(wrong[:3])}, …)"
        )
    model.load_state_dict(tensors, strict=False)
    model.card = json.loads(metadata.get("card", "{}"))
    return model.eval()


def _training_only(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _TRAINING_ONLY
