"""The number types that networks compute in, by name.

"auto" has one meaning: the fastest type whose overflow cannot go unnoticed. On GPUs that compute in bfloat16 (Ampere and later) it is
bfloat16, which has the range of float32. On older GPUs, such as the T4, it is float32, unless the caller checks every result and
computes it again in float32 where it overflowed (`guarded`): then it is float16. On all other devices it is float32.
"""

from __future__ import annotations

import torch

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# cuDNN 9.8 to 9.14 computes half-precision 3-D convolutions wrong or very slowly.
_FAULTY_CUDNN = (90800, 91500)


def number_type(precision: str, device: torch.device, *, spatial_dims: int, guarded: bool = False) -> torch.dtype:
    """Return the number type that a name stands for.

    Args:
        precision: "float32", "float16", "bfloat16" or "auto".
        device: device that the network lies on.
        spatial_dims: 2 or 3, as the network has it.
        guarded: whether the caller finds overflow and repeats the computation in float32.

    Raises:
        ValueError: an unknown name, or a type that is slower than float32 on this device.
    """
    if precision == "auto":
        return _fastest(device, spatial_dims, guarded)
    if precision not in TYPES:
        raise ValueError(f"precision={precision!r}; expected auto, {', '.join(TYPES)}")
    return TYPES[precision]


def _fastest(device: torch.device, spatial_dims: int, guarded: bool) -> torch.dtype:
    if device.type != "cuda" or (spatial_dims == 3 and _cudnn_is_faulty()):
        return torch.float32
    # Older GPUs emulate bfloat16, slowly and with more memory, and PyTorch's `is_bf16_supported` counts that. AMD's have it.
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float16 if guarded else torch.float32


def _cudnn_is_faulty() -> bool:
    version = torch.backends.cudnn.version()
    return version is not None and _FAULTY_CUDNN[0] <= version < _FAULTY_CUDNN[1]


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return a context in which a network of float32 weights computes in another number type."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
