"""PyTorch's random state, on the CPU and on an accelerator: left alone, kept and restored."""

from __future__ import annotations

import torch

from ..devices import module_of


def own_random_numbers(device: torch.device):
    """Return a context that leaves PyTorch's random state as it was, also that of an accelerator."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device.index or 0], device_type=device.type)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random generators that dropout draws from, by kind of device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = module_of(device).get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Restore what `random_state` returned, also one that was stored on another device."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type != "cpu" and device.type in state:
        module_of(device).set_rng_state(state[device.type].cpu(), device)
