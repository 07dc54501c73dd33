"""Functions for the first cell of every notebook: they find out what machine this is, and how large a run it can afford."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__, paths, plotting
from .devices import describe_device, find_device

SCALES = ("cpu", "gpu")


@dataclass(frozen=True)
class Machine:
    """The machine a notebook runs on.

    Attributes:
        device: "cuda" or "cpu", for `model.to(...)`.
        scale: "cpu" (narrow networks, few cases, minutes) or "gpu" (the paper's sizes).
    """

    device: str
    scale: str

    def pick(self, *, cpu, gpu):
        """Return the value for this machine's scale: `width = machine.pick(cpu=0.3, gpu=1.0)`."""
        return gpu if self.scale == "gpu" else cpu


def start() -> Machine:
    """Set the style of all figures, print one line about this machine and return its settings.

    The scale is "gpu" if PyTorch sees a CUDA device, else "cpu". The environment variable MEDSEG_SCALE overrides it.

    Raises:
        ValueError: for another value of MEDSEG_SCALE.
    """
    device = find_device()
    scale = os.environ.get("MEDSEG_SCALE") or ("gpu" if device.type == "cuda" else "cpu")
    if scale not in SCALES:
        raise ValueError(f"MEDSEG_SCALE={scale!r}; expected one of {', '.join(SCALES)}")
    size = "the papers' sizes" if scale == "gpu" else "a short run: narrow networks, few cases"
    paths.say(
        f"medseg_lite {__version__} is ready on {describe_device(device)}, scale {scale} ({size}); "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    plotting.set_style()
    return Machine(device.type, scale)


def real_cases_available(dataset: str = "brats2013_deepmedic") -> Path | None:
    """Return the folder of a real data set if it is on this machine, else None. The notebooks then show phantoms only."""
    folder = paths.real_data(dataset)
    return folder if folder.is_dir() else None
