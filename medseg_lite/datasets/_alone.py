"""One process at a time: what several processes would fetch or unpack at once is done by one of them."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..paths import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

POLL = 0.2  # seconds between two looks at a lock
_MISSES = 5


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Wait until no other process holds the lock of `path`, hold it during the block, and yield True.

    The lock is a file `.lock-<name>` beside `path`. The system gives it free when the process ends, also if it is killed. On a drive
    without locks nothing is waited for, and False is yielded. The folder of `path` is made, and removed again if the block fails
    and leaves nothing in it.
    """
    new_folder = not path.parent.exists()
    lock = path.with_name(f".lock-{path.name}")
    handle, held = _wait(lock)
    try:
        yield held
    except BaseException:
        _release(handle, lock)
        if new_folder:
            with suppress(OSError):  # it holds other files by now
                path.parent.rmdir()
        raise
    else:
        _release(handle, lock)


def _wait(lock: Path) -> tuple[int, bool]:
    """Return an open lock file, and whether it is locked."""
    told, misses = False, 0
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process failed and removed the folder
            continue
        except FileExistsError:  # a file lies in the folder's place, or another process removed the folder meanwhile
            if any(_is_no_folder(folder) for folder in lock.parents):
                raise
            continue
        held = _try_lock(handle)
        if held is None:
            return handle, False
        if held:
            if _is_there(handle, lock):
                return handle, True
            misses += 1  # the process before removed this file while it waited to be locked
            if misses > _MISSES:
                return handle, False  # a drive where no two looks at a file agree
        os.close(handle)
        if not held:
            if not told:
                say(f"another process works on {lock.name.removeprefix('.lock-')}: waiting for it", sys.stderr)
                told = True
            time.sleep(POLL)


def _try_lock(handle: int) -> bool | None:
    """Return whether the lock was free and is held now, or None on a drive without locks."""
    busy = (errno.EAGAIN, errno.EWOULDBLOCK) if fcntl else (errno.EACCES, errno.EDEADLK)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return False if error.errno in busy else None
    return True


def _is_no_folder(path: Path) -> bool:
    """Return whether something other than a folder lies at `path`, by one look at the disk."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return path.is_symlink()  # a link that leads nowhere


def _is_there(handle: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(lock))
    except FileNotFoundError:
        return False


def _release(handle: int, lock: Path) -> None:
    """Remove the lock file and give it free."""
    with suppress(OSError):
        lock.unlink()  # before it is free, so that nobody locks a file that is about to vanish
    os.close(handle)
    if not fcntl:
        with suppress(OSError):  # Windows removes no open files
            lock.unlink(missing_ok=True)
