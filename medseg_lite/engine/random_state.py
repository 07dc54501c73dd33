"""PyTorch's random state, on the CPU and on a GPU: left alone, kept and restored."""

from __future__ import annotations

import torch


def own_random_numbers(device: torch.device):
    """Return a context that leaves PyTorch's random state as it was, also that of a GPU."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Restore what `random_state` returned, also one that was stored on another device."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
