"""The devices that a network can run on: the CPU, a CUDA GPU, and other accelerators, asked in one way.

CUDA GPUs (and AMD's, which PyTorch calls "cuda" too) are found by themselves. Apple's ("mps") and Intel's ("xpu") are used where they
are named. Nobody has run the tests on one yet, so "auto" does not choose them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .paths import say

MEMORY_FILE = Path("/proc/meminfo")  # on Linux

# Parts of the messages that mean "this does not fit, try a smaller part". cuDNN's limit of 2³¹ numbers is one of them.
_MEMORY_WORDS = (
    "can't allocate memory",
    "out of memory",
    "alloc_failed",
    "allocation_failed",
    "canuse32bitindexmath",
    "32-bit index",
)


def find_device(name: str = "auto") -> torch.device:
    """Return the device of this name, when a small computation on it succeeds.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps", "xpu", or "auto": a CUDA GPU where there is one that works, else the CPU.

    Raises:
        ValueError: PyTorch does not know the device, sees none of its kind here, or cannot compute on it.
    """
    if name == "auto":
        fault = fault_of(torch.device("cuda"))
        if fault and torch.cuda.is_available():
            say(f"the GPU here cannot be used ({fault}); going on with the CPU")
        return torch.device("cpu" if fault else "cuda")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device {name!r}: PyTorch knows no such device; expected auto, cpu, cuda, cuda:1, mps or xpu"
        ) from error
    fault = fault_of(device)
    if fault:
        raise ValueError(f"device {name}: {fault}; use cpu")
    return device


def fault_of(device: torch.device) -> str | None:
    """Return why PyTorch cannot compute on a device, or None where it can.

    A GPU can be there without kernels for it in this build of PyTorch, so a small computation is tried.
    """
    if device.type == "cpu":
        return None
    if not module_of(device).is_available():
        kind = "CUDA GPU" if device.type == "cuda" else f"{device.type} device"
        return f"PyTorch sees no {kind} here"
    try:
        ones = torch.ones(1, 1, 8, 8, device=device)
        return None if torch.nn.functional.conv2d(ones, ones[..., :3, :3]).sum().item() == 324 else "it computes wrong numbers"
    except RuntimeError as error:
        return str(error).split("\n")[0]


def module_of(device: torch.device):
    """Return PyTorch's module for a kind of device, such as `torch.cuda`."""
    return torch.get_device_module(device)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device. A GPU gets it without the CPU waiting for what the GPU still has to do.

    Apple's GPUs are waited for: there a copy without waiting can read memory that is in other use by then (pytorch#189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def free_memory(device: torch.device) -> float | None:
    """Return the bytes that new tensors can take on a device, or None where the system does not tell.

    On a GPU this counts the memory that PyTorch keeps for later, because PyTorch gives it to new tensors.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    if device.type == "mps":
        return float(max(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(), 0))
    if device.type != "cpu":
        return None
    try:
        # Linux gives away the memory of cached files when it is asked for more.
        lines = MEMORY_FILE.read_text(encoding="ascii").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # not on macOS or Windows
        return None


def release_memory(device: torch.device) -> None:
    """Give back the memory that PyTorch keeps for later. This does nothing on a CPU."""
    if device.type != "cpu":
        module_of(device).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on an accelerator or in the machine, so that a smaller part may fit."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in _MEMORY_WORDS)


def describe_device(device: torch.device) -> str:
    """Return the name and the memory of a device, such as "Tesla T4, 15 GB"."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name}, {facts.total_memory / 1e9:.0f} GB"
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else f"the {device.type} device"
