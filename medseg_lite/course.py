"""Functions for the first cell of every notebook, which find out what machine this is; and what the checks of exercises return."""

from __future__ import annotations

import functools
import io
import os
import platform
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from . import __version__, paths, plotting
from .claims import card as card
from .devices import describe_device, fault_of, find_device
from .engine.precision import number_type
from .statistics import Interval, two_way

SCALES = ("cpu", "gpu")
DRIVE = Path("/content/drive")  # where Colab puts Google Drive
# What training in a number type means, for the line below the first one.
MEANINGS = {
    torch.float32: "float32, because it has no bfloat16, and the faster float16 can overflow in training",
    torch.bfloat16: "bfloat16, which is faster than float32, with its range and two or three digits",
}


@dataclass(frozen=True)
class Machine:
    """The machine a notebook runs on.

    Attributes:
        device: "cuda" or "cpu", for `model.to(...)`.
        scale: "cpu" (narrow networks, few cases, minutes) or "gpu" (the sizes that the notebook's header names).
    """

    device: str
    scale: str

    def pick(self, *, cpu, gpu):
        """Return the value for this machine's scale: `width = machine.pick(cpu=0.3, gpu=1.0)`."""
        return gpu if self.scale == "gpu" else cpu


def start(device: str = "auto") -> Machine:
    """Set the style of all figures, say in a line or two what this machine is, and return its settings.

    The scale is "gpu" if PyTorch can compute on a CUDA device, else "cpu". The environment variable MEDSEG_SCALE overrides it.

    Args:
        device: as in `devices.find_device`. "mps" and "xpu", the GPUs of Apple and Intel, are used where they are named.

    Raises:
        ValueError: for another value of MEDSEG_SCALE, or a device that cannot be used.
    """
    found = find_device(device)
    scale = os.environ.get("MEDSEG_SCALE") or ("gpu" if found.type == "cuda" else "cpu")
    if scale not in SCALES:
        raise ValueError(f"MEDSEG_SCALE={scale!r}; expected one of {', '.join(SCALES)}")
    size = "the sizes that the header names for it" if scale == "gpu" else "a short run: narrow networks, few cases"
    paths.say(
        f"medseg_lite {__version__} is ready on {describe_device(found)}, scale {scale} ({size}); "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    if found.type == "cuda":
        paths.say(f"networks train on this GPU in {_numbers(found)}")
    elif device == "auto":
        for name, maker in (("mps", "Apple's"), ("xpu", "Intel's")):
            if fault_of(torch.device(name)) is None:
                paths.say(f"{maker} GPU is here too; nobody has tested the course on one: course.start({name!r}) uses it")
    plotting.set_style()
    return Machine(str(found), scale)


def _numbers(device: torch.device) -> str:
    """Return the number type that networks are trained in on a CUDA device, and what that means."""
    flat, solid = (number_type("auto", device, spatial_dims=dims) for dims in (2, 3))
    if flat == solid:
        return MEANINGS[flat]
    return f"{MEANINGS[flat]}; 3D networks in float32, because of a fault in this cuDNN's half precision"


def keep(name: str) -> Path:
    """Return a folder for the runs of a notebook. A run that was cut off goes on there when its cell is run again.

    On Colab the folder is in your Google Drive, because Colab's own disk is lost with the machine. Colab asks you for the
    permission. Elsewhere the folder is `runs` in the clone's `data/cache`, or in the user's cache folder.

    Args:
        name: name of the folder, such as "notebook02".

    Raises:
        ValueError: the name cannot be that of a folder.
    """
    root = paths.cache() / "runs"
    if "google.colab" in sys.modules:
        from google.colab import drive

        drive.mount(str(DRIVE))
        root = DRIVE / "MyDrive" / "medseg_lite_runs"
    folder = paths.file_for(root, name, "", what="folder of runs")
    folder.mkdir(parents=True, exist_ok=True)
    paths.say(f"runs are kept in {folder}; delete it to begin anew")
    return folder


def puzzle(name: str) -> dict[str, dict[str, Interval]]:
    """Return what networks make of a puzzle: mean Dice over three seeds and eight cases, with its interval over both.

    Args:
        name: name of the puzzle, a key of `phantoms.PUZZLES`.

    Returns:
        For each network its interval where the property is "needed" and where it is "not needed", from the table that
        experiments/puzzles.py stored.

    Raises:
        ValueError: there is no such puzzle in the table.
    """
    stored = pd.read_csv(paths.shipped("results", "puzzles.csv")).dropna(subset="seed")
    rows = stored[stored["puzzle"] == name]
    if rows.empty:
        raise ValueError(f"there is no puzzle {name!r}; there are {', '.join(stored['puzzle'].unique())}")
    ends = {"needed": rows["needed"].max(), "not needed": rows["needed"].min()}
    found: dict[str, dict[str, Interval]] = {}
    for method, runs in rows.groupby("method", sort=False):
        tables = {
            end: runs[runs["needed"] == dial].pivot(index="seed", columns="case", values="dice") for end, dial in ends.items()
        }
        found[method] = {end: two_way(table) for end, table in tables.items()}
    return found


@dataclass(frozen=True)
class Verdict:
    """The answer of an exercise's check.

    It is true where the answer is right. A notebook shows nothing for it, because `check` has printed the reason.

    Attributes:
        passed: True if the answer is right.
        reason: lines that the check has printed: what is wrong, or what is right.
    """

    passed: bool
    reason: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return self.reason

    def _ipython_display_(self) -> None:
        pass


def check(function: Callable[..., bool | None]) -> Callable[..., Verdict]:
    """Turn a function that prints what is wrong, and returns True if nothing is, into one that returns a `Verdict`.

    It prints as before. Where the function has an argument `seed`, grading gives it a secret one: the check then draws other
    patients or numbers, whose right answer it knows too.

        @course.check
        def check_share(share, seed=0): ...
    """

    @functools.wraps(function)
    def judge(*answers, **options) -> Verdict:
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                passed = bool(function(*answers, **options))
        finally:
            if printed.getvalue():
                paths.say(printed.getvalue().removesuffix("\n"))
        return Verdict(passed, printed.getvalue().strip())

    return judge


def real_cases_available(dataset: str = "brats2013_deepmedic") -> Path | None:
    """Return the folder of a real data set if it is on this machine, else None. The notebooks then show phantoms only."""
    folder = paths.real_data(dataset)
    return folder if folder.is_dir() else None
