"""Trained networks as single safetensors files: the weights, and a card that says what they are and how they came to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..paths import atomic_write
from ..plain import make_plain
from .network import BUILDERS, Network

# Statistics of the last training batches: needed to go on training, not to use the network.
_TRAINING_ONLY = ("recent", "batches")


def save(path: str | Path, model: Network, card: Mapping[str, object], *, half: bool = False) -> Path:
    """Write the weights of a network, the call that builds it again, and its card.

    Args:
        path: a `.safetensors` file; it appears only when complete.
        model: a network that one of the builders made.
        card: facts that a user must know: channels, classes, normalisation, data, steps, seed, command, scores. JSON values.
        half: True writes kernels as float16, for a file of half the size. All else stays as it is, because statistics of batch
            normalisation may exceed the range of float16. `load` gives float32 in either case.

    Raises:
        ValueError: the network has no builder, or a weight is not finite.
        TypeError: the card, or an option of the builder, holds what JSON cannot hold.
    """
    path = Path(path)
    if not isinstance(model, Network) or model.config is None:
        raise ValueError(
            f"{type(model).__name__} was not made by a builder, so it could not be rebuilt from the file; write a function that "
            "returns the network, put @models.builder above it, and make the network with that function"
        )
    if not isinstance(card, Mapping):
        raise TypeError(f"the card is of type {type(card).__name__}; expected a dictionary of facts")
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not _training_only(k)}
    if half:
        tensors = {k: v.half() if v.ndim > 1 and v.is_floating_point() else v for k, v in tensors.items()}
    _check_finite(tensors)
    metadata = {"config": json.dumps(make_plain(model.config, "config")), "card": json.dumps(make_plain(card, "card"))}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return path


def load(path: str | Path) -> Network:
    """Rebuild a network from a file that `save` wrote. It comes in evaluation mode, with its card as `model.card`.

    Only registered builders are called, and nothing in the file is executed.
    """
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
    config, card = (_read_facts(path, metadata, name) for name in ("config", "card"))
    model = _rebuild(path, config)
    expected = {k: v.shape for k, v in model.state_dict().items() if not _training_only(k)}
    wrong = sorted(k for k in expected.keys() | tensors.keys() if k not in tensors or tensors[k].shape != expected.get(k))
    if wrong:
        raise ValueError(
            f"{path} does not fit {model.config['builder']}: {len(wrong)} tensors are missing, unknown or of another shape "
            f"({', '.join(wrong[:3])}, …)"
        )
    model.load_state_dict(tensors, strict=False)
    model.card = card
    return model.eval()


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{name} has {count} NaN or infinite values of {tensor.numel()}; such a network is of no use: go back to an earlier "
                "state, or train it again with a lower learning rate"
            )


def _read_facts(path: Path, metadata: Mapping[str, str], name: str) -> dict:
    """Return the config or the card of a file."""
    try:
        facts = json.loads(metadata.get(name, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"the {name} of {path} is not JSON ({error}); download or export the file again") from None
    if not isinstance(facts, dict):
        raise ValueError(
            f"the {name} of {path} is {str(facts)[:60]!r}; expected a dictionary, as medseg_lite.models.save writes it"
        )
    return facts


def _rebuild(path: Path, config: dict) -> Network:
    name = config.pop("builder", None)
    if name not in BUILDERS:
        raise ValueError(
            f"{path} asks for network {name!r}, which this version of medseg_lite does not have; if the builder is your own, "
            "import its module before you load the file"
        )
    try:
        return BUILDERS[name](**config)
    except TypeError as error:
        raise ValueError(f"{path} asks for options that {name} does not have in this version ({error})") from error


def _training_only(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _TRAINING_ONLY
