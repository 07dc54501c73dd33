"""Paths of the project's files: shipped data, downloads, and your own scans. Safe writing, on every system and network drive."""

from __future__ import annotations

import errno
import functools
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import platformdirs

_PACKAGE = Path(__file__).resolve().parent
_CLONE = _PACKAGE.parent
# What fsync answers on drives that have no such thing.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES)
# Seconds before each further try to replace a file that another program has open, as a virus scanner has for a moment.
_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\.|$)", re.IGNORECASE)  # names that Windows keeps for itself
_LONGEST = 255  # bytes in the name of a file, on most file systems


def shipped(*parts: str) -> Path:
    """Return the path of a file that ships with the project (anatomy, checkpoints).

    It lies in `data/` of the clone, or inside the installed package.
    """
    root = _CLONE / "data" if (_CLONE / "pyproject.toml").is_file() else _PACKAGE / "data"
    path = root.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; it ships with medseg_lite: reinstall the package or restore the clone")
    return path


def cache() -> Path:
    """Return the folder for downloads and generated data: `data/cache` in a clone, otherwise a cache folder of the user."""
    if (_CLONE / "pyproject.toml").is_file():
        return _CLONE / "data" / "cache"
    return platformdirs.user_cache_path("medseg_lite")


def real_data(dataset: str) -> Path:
    """Return the folder in which a data set is looked for: `$MEDSEG_DATA_DIR/<dataset>`, or `cache()/<dataset>` without it."""
    given = os.environ.get("MEDSEG_DATA_DIR")
    return (Path(given).expanduser() if given else cache()) / dataset


def file_for(folder: str | Path, name: str, ending: str, *, what: str = "case") -> Path:
    """Return the path of the file of a case, `<folder>/<name><ending>`.

    Args:
        folder: folder of the file.
        name: name of the case. It comes from folders, file names or users, so it may be anything.
        ending: rest of the file's name, for example ".nii.gz".
        what: kind of thing that has the name, for the error message.

    Raises:
        ValueError: the name cannot be that of a file on every system, so results could not be taken from one to another.
    """
    if not name or name.startswith(".") or re.search(r'[/\\<>:"|?*\x00-\x1f\x7f]', name) or _DEVICES.match(name):
        raise ValueError(
            f'a {what} is called {name!r}; a name that becomes a file must have no slashes, none of < > : " | ? * (Windows '
            "forbids them), must not be empty nor begin with a dot, nor be a device of Windows such as 'con': rename it"
        )
    size = len((name + ending).encode("utf-8", "surrogateescape"))
    if size > _LONGEST:
        raise ValueError(
            f"a {what} is called {name!r}; with {ending!r} that makes a file name of {size} bytes, and most file systems take "
            f"{_LONGEST}: rename it"
        )
    return Path(folder) / f"{name}{ending}"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. Rename it to `path` if the block succeeds, remove it if the block fails.

    So a reader sees the old file or the whole new one, never a half-written one. The temporary name keeps the endings of `path`,
    because writers such as nibabel choose the format by them. A new file gets the permissions that the user's umask leaves, and
    a file that was there before keeps its own. If `path` is a symbolic link, its target is replaced, and the link stays.
    """
    path = Path(path)
    try:
        target, temporary = _begin(path)
    except OSError as error:
        if error.filename is None:  # with a message of our own
            raise
        reason = error.strerror or error
        raise OSError(error.errno, f"{path} cannot be written ({reason}); choose another folder or a shorter name") from error
    made = _mode(temporary)
    try:
        yield temporary
        put_in_place(temporary, target, mode=made)
    finally:
        with suppress(OSError):  # a writer that failed may still have it open, which Windows minds
            temporary.unlink(missing_ok=True)


def _begin(path: Path) -> tuple[Path, Path]:
    """Return the file that is to be written, and an empty temporary file beside it."""
    target = follow_link(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder; expected the name of a file")
    if not path.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = unique_beside(target, ".partial")
    # The old file may be private, so the new one is never open to more people, not even while it is written.
    os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, (_mode(target) or 0o666) | 0o600))
    return target, temporary


def follow_link(path: Path) -> Path:
    """Return the file that a symbolic link leads to, at the end of all links. Any other path is returned as it is."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, f"{path} is a symbolic link that leads to itself; remove it")
    return target


def unique_beside(path: Path, prefix: str) -> Path:
    """Return a path beside `path` that no other process uses, with the same endings, hidden and not too long."""
    return path.with_name(f"{prefix}-{secrets.token_hex(6)}-{path.name[-32:]}")


def put_in_place(temporary: Path, path: Path, *, mode: int | None = None) -> None:
    """Give a complete file its own name, so that a crash of the machine leaves the old file or the new one.

    A file that has the name already is replaced, and its permissions are kept. Drives that know no permissions or cannot be told to
    write now are taken as they are.

    Args:
        temporary: the complete file, in the same folder.
        path: path that it gets.
        mode: permissions of a new file, which some writers (safetensors) set otherwise. None leaves them.

    Raises:
        PermissionError: the old file is in use by another program (on Windows) or protected.
    """
    with open(temporary, "r+b") as file:  # Windows syncs only what is open for writing
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
    mode = _mode(path) or mode
    if mode is not None and mode != _mode(temporary):
        with suppress(OSError):
            os.chmod(temporary, mode)
    replace(temporary, path)


def replace(old: Path, new: Path) -> None:
    """Rename a file or folder, in the place of another one if there is one. If that is in use, try again for one and a half seconds.

    Raises:
        PermissionError: it is still in use, or protected.
    """
    for wait in (*_WAITS, None):
        try:
            os.replace(old, new)
            return
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != errno.EBUSY:
                raise
            if wait is None:
                raise PermissionError(
                    error.errno,
                    f"{new} cannot be replaced ({error.strerror}): another program has it open, or it is protected; close that "
                    "program or choose another name",
                ) from error
        time.sleep(wait)


def _mode(path: Path) -> int | None:
    """Return the permissions of a file, or None if there is none."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line. Characters that the console cannot show, as "×" in an ASCII locale, become question marks."""
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(str(text).encode(encoding, "replace").decode(encoding), file=file, flush=True)


@functools.cache
def say_once(text: str) -> None:
    """Print a line, unless this process has printed it before."""
    say(text)
