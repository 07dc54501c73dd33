"""Tools of the benchmarks: calls by turns, calls in a process of their own, and the page beside the script.

The frame of the experiments writes the page: a script fills the blocks between `<!-- name -->` and `<!-- /name -->`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))
from _frame import Store, machine, markdown

__all__ = ["KEEP_MEMORY", "fill", "markdown", "memory", "options", "run_alone", "take_turns"]

# glibc gives large arrays back to the system at once and gets them again page by page; keeping them makes every method faster.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}


def options(description: str) -> argparse.ArgumentParser:
    """Return a command line that every benchmark has, for the script to add its own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", metavar="FOLDER", help="write the page into this folder instead of beside the script")
    return parser


def take_turns(
    functions: dict[str, Callable], *, repeats: int = 0, seconds: float = 0.0, warm_up: int = 1
) -> dict[str, np.ndarray]:
    """Call functions by turns, A B A B, so that other work on the machine disturbs all alike.

    Args:
        functions: functions of the number of the call, by name.
        repeats: least number of turns.
        seconds: least seconds of turns.
        warm_up: calls of each function before the clock runs.

    Returns:
        For each function, `(turns, 2)` seconds: by the clock and of the processor.
    """
    taken = {name: [] for name in functions}
    for function in functions.values():
        for turn in range(warm_up):
            function(turn)
    start, turn = time.perf_counter(), warm_up
    while turn < warm_up + repeats or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            function(turn)
            taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
        turn += 1
    return {name: np.array(times) for name, times in taken.items()}


def run_alone(command: list, environment: dict[str, str] | None = None, failure: str | None = None) -> dict:
    """Run Python with these arguments in a process of its own; return the last line of JSON that it prints.

    Args:
        command: arguments of Python: a script and its own.
        environment: variables that the process has besides those of this one.
        failure: beginning of a printed line that says that the process did something else than it was asked for.

    Raises:
        RuntimeError: the process printed no JSON, or that line.
    """
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if failure and line.startswith(failure)]
    found = [line for line in lines if line.startswith("{")]
    if failed or not found:
        raise RuntimeError((failed or (done.stderr.strip() or "no output").splitlines()[-1:])[0][:120])
    return json.loads(found[-1])


def memory(field: str) -> int:
    """Return a number of bytes from Linux about this process: "VmRSS" now, "VmHWM" at the peak, pages of files included."""
    (line,) = (line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def fill(script: str, results: str | None, about: str, blocks: dict[str, str]) -> None:
    """Fill the page of a script, with date, machine and what else there is to say about the run; print the blocks."""
    blocks = {"made": f"{machine()}{about}"} | blocks
    Store(script, results).fill(blocks)
    print(*blocks.values(), sep="\n\n")
