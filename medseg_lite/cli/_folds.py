"""Folds of a cross-validation at once: a process for each, which shares nothing with the others but the folder of the run."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

import torch

from ..paths import say
from ._data import positive

_TALK = {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}
_BETWEEN_BARS = 60  # seconds after which a progress bar is printed anew


def add_folds(command: argparse.ArgumentParser) -> None:
    """Add the options of a cross-validation."""
    command.add_argument("--folds", type=positive, help="cross-validation; the recipe's, or 1 to train on all cases")
    command.add_argument("--fold", type=int, metavar="K", help="this fold alone, from 0")
    at_once = command.add_mutually_exclusive_group()
    at_once.add_argument(
        "--folds-on-gpus", action="store_true", help="each fold on a GPU of its own, as many at once as there are GPUs"
    )
    at_once.add_argument(
        "--folds-at-once",
        type=positive,
        default=1,
        metavar="N",
        help="this many folds at once on one device, each in a process of its own: for CPUs with many cores, or for networks that "
        "leave most of a GPU idle",
    )


def is_one_of_several(options) -> bool:
    """Return whether this process trains one of the folds that run at once."""
    return options.fold is not None and (options.folds_on_gpus or options.folds_at_once > 1)


def find_places(options) -> list[dict[str, str]]:
    """Return the places for folds that are to be trained at once, as what their processes find in the environment.

    There are none where the folds are trained in this process, one after the other.

    Raises:
        ValueError: the command was started by `torchrun`.
    """
    if options.command != "train" or options.fold is not None or not (options.folds_on_gpus or options.folds_at_once > 1):
        return []
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--folds-on-gpus and --folds-at-once start processes themselves; leave torchrun out")
    if not options.folds_on_gpus:
        return [{} for _ in range(options.folds_at_once)]
    gpus = find_gpus(options.device)
    if len(gpus) < 2:
        say(f"--folds-on-gpus: {'one GPU' if gpus else 'no GPU'} for --device {options.device}: one fold after the other")
        return []
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]


def find_gpus(device: str) -> list[str]:
    """Return the GPUs that this command may use, as CUDA_VISIBLE_DEVICES names them. They are counted and not touched."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(count)] if given is None else given.split(",")
    return [name.strip() for name in names[:count]]


class FoldProcesses:
    """Processes that train one fold each, by the same command with `--fold`. A place takes the next fold when it has done one.

    Args:
        arguments: what was typed, without the name of the program.
        places: what the processes at each place find in their environment, see `find_places`.
    """

    def __init__(self, arguments: Sequence[str], places: Sequence[Mapping[str, str]]):
        self.arguments, self.places = list(arguments), places
        self.waiting: deque[int] = deque()
        self.running: dict[int, subprocess.Popen] = {}
        self.status: dict[int, int | None] = {}
        self.lock = threading.Lock()

    def __call__(self, numbers: Sequence[int]) -> None:
        """Train the folds of these numbers. A fold that fails does not stop the others.

        Ctrl-C (or SIGTERM) is passed on, so that every process finishes its update and saves; a second one stops them at once.
        """
        self.waiting.extend(numbers)
        self.status = dict.fromkeys(numbers)
        stopped = False
        with _termination_as_ctrl_c(), ThreadPoolExecutor(len(self.places)) as pool:
            works = pending = [pool.submit(self._work, place) for place in self.places[: len(numbers)]]
            while pending:
                try:
                    # Not `Thread.join`: in Python 3.11 it takes a thread for ended when Ctrl-C comes meanwhile.
                    time.sleep(0.2)
                    pending = [work for work in works if not work.done()]
                except KeyboardInterrupt:
                    stopped = True
                    self._interrupt()
            for work in works:
                work.result()  # raises what went wrong when a process was to be started
        if stopped:
            raise KeyboardInterrupt("stopped; the same command goes on with every fold")

    def check(self) -> None:
        """Raise ChildProcessError where a fold has failed."""
        failed = [f"fold {number} (exit status {status})" for number, status in self.status.items() if status != 0]
        if failed:
            raise ChildProcessError(
                f"{', '.join(failed)} failed, see the lines that begin so; the same command goes on with what is missing"
            )

    def _work(self, place: Mapping[str, str]) -> None:
        """Train one fold after the other at a place, and print what its process says."""
        while (started := self._start_next(place)) is not None:
            number, process = started
            with process:  # where printing fails, its output is closed, which ends it
                for line in _lines_to_print(process.stdout):
                    with self.lock:  # or else two lines become one
                        say(f"fold {number}: {line}")
            with self.lock:
                del self.running[number]
                self.status[number] = process.returncode

    def _start_next(self, place: Mapping[str, str]) -> tuple[int, subprocess.Popen] | None:
        with self.lock:
            if not self.waiting:
                return None
            number = self.waiting.popleft()
            # A GPU that cannot be used ends the fold. "auto" would go on with the CPU.
            device = ["--device", "cuda"] if place else []
            self.running[number] = subprocess.Popen(
                [sys.executable, "-m", "medseg_lite", *self.arguments, "--fold", str(number), *device],
                env={"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // len(self.places)))} | os.environ | _TALK | place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C would reach it as well as ours, and two stop at once
            )
            return number, self.running[number]

    def _interrupt(self) -> None:
        with self.lock:
            say("stopping: every fold finishes its update and keeps its state")
            self.waiting.clear()
            for process in self.running.values():
                if os.name != "nt":  # Windows has told them already
                    process.send_signal(signal.SIGINT)


def _lines_to_print(output: BinaryIO) -> Iterator[str]:
    """Yield the lines of a process as they come. Of a progress bar, which ends in a carriage return, one a minute and the last."""
    last = time.monotonic()
    for line in io.TextIOWrapper(output, "utf-8", "replace", newline=""):
        if line.endswith("\r"):
            if time.monotonic() - last < _BETWEEN_BARS:
                continue
            last = time.monotonic()
        if line.strip():
            yield line.rstrip()


@contextmanager
def _termination_as_ctrl_c() -> Iterator[None]:
    """Take SIGTERM, which `kill` sends, as Ctrl-C within the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
