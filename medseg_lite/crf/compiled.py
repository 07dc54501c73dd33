"""The choice between PyTorch and compiled loops, and threads for the loops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch

# Images with fewer voxels are filtered by PyTorch alone. It needs less time for them than Numba needs to compile.
LARGE = 2**15
_lock = threading.Lock()


def loops_for(points: int, dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """Return the compiled loops if they are to filter this many points: on a CPU, in float32, for large images. Else return None.

    They are imported when they are first needed. This compiles them where nobody has before, which takes seconds.
    """
    if device.type != "cpu" or dtype != torch.float32 or not LARGE <= points < 2**28:
        return None
    with _lock:
        from . import loops
    return loops


def side_by_side(function: Callable, values: Iterable) -> list:
    """Return the results of a function of each value. The calls run in as many threads as PyTorch has."""
    values, threads = list(values), torch.get_num_threads()
    if threads == 1 or len(values) < 2:
        return [function(value) for value in values]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, values))
