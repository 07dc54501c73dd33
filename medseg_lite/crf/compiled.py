"""The choice between PyTorch and compiled loops, and threads for the loops."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch

# Images with fewer voxels are filtered by PyTorch alone. It needs less time for them than Numba needs to compile.
LARGE = 2**15
_lock = threading.Lock()
_here = threading.local()


def loops_for(points: int, dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """Return the compiled loops if they are to filter this many points: on a CPU, in float32, for large images. Else return None.

    They are imported when they are first needed. This compiles them where nobody has before, which takes seconds.
    """
    if device.type != "cpu" or dtype != torch.float32 or not LARGE <= points < 2**28:
        return None
    with _lock:
        from . import loops
    return loops


@contextlib.contextmanager
def threads_for(loops: ModuleType | None) -> Iterator[None]:
    """Let the loops, if there are any, have all the threads of PyTorch, and PyTorch only one.

    PyTorch's own threads keep the cores busy for some milliseconds after each operation, while they wait for the next one.
    """
    if loops is None:
        yield
        return
    before = torch.get_num_threads()
    _here.threads = before
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        del _here.threads


def _threads() -> int:
    return getattr(_here, "threads", torch.get_num_threads())


def share_out(count: int, jobs: int = 1) -> list[slice]:
    """Cut `count` things into a range for each thread, or into one range if there are several jobs to run side by side."""
    ranges = _threads() if jobs == 1 else 1
    return [slice(count * i // ranges, count * (i + 1) // ranges) for i in range(ranges)]


def side_by_side(function: Callable, values: Iterable) -> list:
    """Return the results of a function of each value. The calls run in as many threads as there are for the loops."""
    values, threads = list(values), _threads()
    if threads == 1 or len(values) < 2:
        return [function(value) for value in values]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, values))
