"""Paths of the project's files: shipped data, downloads, and your own scans."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

_PACKAGE = Path(__file__).resolve().parent
_CLONE = _PACKAGE.parent


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


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. Rename it to `path` if the block succeeds, remove it if the block fails.

    So a reader sees the old file or the whole new one, never a half-written one. The temporary name keeps the endings of `path`,
    because writers such as nibabel choose the format by them.
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
