"""The number types that networks compute in, by name.

"auto" has one meaning: the fastest type whose overflow cannot go unnoticed. On GPUs that compute in bfloat16 (Ampere and later) it is
bfloat16, which has the range of float32. On older GPUs, such as the T4, it is float32, unless the caller checks every result and
computes it again in float32 where it overflowed (`guarded`): then it is float16. On all other devices it is float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ..paths import say, say_once
from . import distributed

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
        ValueError: an unknown name.
    """
    if precision == "auto":
        return _fastest(device, spatial_dims, guarded)
    if precision not in TYPES:
        raise ValueError(f"precision={precision!r}; expected auto, {', '.join(TYPES)}")
    return TYPES[precision]


def _fastest(device: torch.device, spatial_dims: int, guarded: bool) -> torch.dtype:
    if device.type != "cuda" or (spatial_dims == 3 and _cudnn_is_faulty()):
        return torch.float32
    if _has_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if guarded else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    """Return whether a CUDA GPU computes in bfloat16.

    Older GPUs emulate it, slowly and with more memory, and PyTorch's `is_bf16_supported` counts that. AMD's have it.
    """
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _cudnn_is_faulty() -> bool:
    version = torch.backends.cudnn.version()
    return version is not None and _FAULTY_CUDNN[0] <= version < _FAULTY_CUDNN[1]


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Return a context in which a network of float32 weights computes in another number type."""
    if dtype == torch.float32 and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class TrainingPrecision:
    """The number type of a training, with what float16 needs besides.

    Numbers of float16 end at 65504 and begin at 6e-8. So the loss is multiplied by a factor, the gradients are divided by it, and an
    update whose gradients are not finite is skipped and makes the factor smaller (`torch.amp.GradScaler`). That does not help a
    network whose own numbers exceed float16, as for raw intensities. It leaves float16 for good and goes on in float32, and says so.

    Args:
        precision: "float32", "bfloat16", "float16" or "auto".
        device: device that the network lies on.
        spatial_dims: 2 or 3, as the network has it.

    Raises:
        ValueError: an unknown name, or float16 on another device than a CUDA GPU.
    """

    def __init__(self, precision: str, device: torch.device, *, spatial_dims: int):
        dtype = number_type(precision, device, spatial_dims=spatial_dims)
        if dtype == torch.float16 and device.type != "cuda":
            where = "CPU" if device.type == "cpu" else f"{device.type} device"
            raise ValueError(f"float16 training needs a CUDA device; use precision='float32' on the {where}")
        if precision == "auto" and device.type == "cuda" and not _has_bfloat16(device) and distributed.rank() == 0:
            say_once(
                f"training in float32, because a {torch.cuda.get_device_name(device)} does not compute in bfloat16; with standardised "
                'images, precision="float16" needs less memory and may be faster (an option of `engine`, --precision of the command)'
            )
        self.device, self.left_float16 = device, False
        self._compute_in(dtype)

    def _compute_in(self, dtype: torch.dtype) -> None:
        self.dtype, self.autocast = dtype, autocast(dtype, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def leave_float16(self, reason: str) -> None:
        """Go on in float32, and say why."""
        if distributed.rank() == 0:
            say(
                f"{reason}: the training goes on in float32; standardised images (transforms.standardise) mostly fit into float16"
            )
        self._compute_in(torch.float32)
        self.left_float16 = True

    def step(self, optimizer: torch.optim.Optimizer, *, finite: bool) -> None:
        """Let an optimiser change the weights. In float16, gradients that are not finite change nothing.

        Args:
            optimizer: optimiser of the weights.
            finite: whether the gradients are known to be finite. If not, the scaler looks at each, and the CPU waits for the GPU.
        """
        if finite:
            self.scaler.unscale_(optimizer)
            optimizer.step()
        else:
            self.scaler.step(optimizer)
        self.scaler.update()
        if not finite and self.scaler.get_scale() < 1:  # the gradients overflow by themselves, not by the factor
            self.leave_float16("gradients exceed 65504, the largest number of float16")

    def state_dict(self) -> dict:
        """Return what a resumed run needs: nothing, unless it was begun in float16."""
        return {"left_float16": True} if self.left_float16 else self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken, also from a state of another number type."""
        if not self.scaler.is_enabled():
            return
        if state.get("left_float16"):
            self.leave_float16("numbers of this run have exceeded 65504, the largest of float16")
        elif state:  # empty in the state of a run in float32 or bfloat16
            self.scaler.load_state_dict(state)
