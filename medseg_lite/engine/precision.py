"""The number types that networks compute in, by name.

Training and inference share the names but not the meaning of "auto" on a GPU. Training takes bfloat16 where the GPU has it: gradients
differ by many orders of magnitude, and bfloat16 has the range of float32. Inference takes float16: it computes no gradients, and
float16 has three more binary digits.
"""

from __future__ import annotations

import torch

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def number_type(precision: str, device: torch.device, *, auto: torch.dtype) -> torch.dtype:
    """Return the number type that a name stands for.

    Args:
        precision: "float32", "float16", "bfloat16" or "auto".
        device: device that the network lies on.
        auto: meaning of "auto" on a CUDA device that supports this type. On all other devices "auto" is float32.
    """
    if precision == "auto":
        supported = device.type == "cuda" and (auto != torch.bfloat16 or torch.cuda.is_bf16_supported())
        return auto if supported else torch.float32
    if precision not in TYPES:
        raise ValueError(f"precision={precision!r}; expected auto, {', '.join(TYPES)}")
    return TYPES[precision]


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return a context in which a network of float32 weights computes in another number type."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
