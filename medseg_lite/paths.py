"""Where the project's files lie: shipped data, downloads, and the reader's own scans."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pooch

_PACKAGE = Path(__file__).resolve().parent
_CLONE = _PACKAGE.parent


def shipped(*parts: str) -> Path:
    """A file that ships with the project (anatomy, checkpoints): in the clone's `data/`, or inside the installed wheel."""
    root = _CLONE / "data" if (_CLONE / "pyproject.toml").is_file() else _PACKAGE / "data"
    path = root.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; it ships with medseg_lite: reinstall the package or restore the clone")
    return path


def cache() -> Path:
    """The folder for downloads and generated data: `data/cache` in a clone, a per-user cache folder otherwise."""
    if (_CLONE / "pyproject.toml").is_file():
        return _CLONE / "data" / "cache"
    return Path(pooch.os_cache("medseg_lite"))


def real_data(dataset: str) -> Path:
    """Where a data set is looked for: `$MEDSEG_DATA_DIR/<dataset>` when that variable is set, else the cache."""
    given = os.environ.get("MEDSEG_DATA_DIR")
    return (Path(given).expanduser() if given else cache()) / dataset


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds, remove it when it fails.

    A reader therefore sees the old file or the whole new one, never a half-written one. The temporary name keeps the
    suffixes of `path`, because writers such as nibabel choose the format by them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=path.name)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
