"""Fetch a file so that it is there whole and right, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pooch

from ..paths import atomic_write

TIMEOUT = 30  # seconds without a byte from the server


def fetch(url: str, path: Path, *, sha256: str | None, check: Callable[[Path], object] | None = None) -> Path:
    """Download `url` to `path`, unless it is there already, and return `path`.

    The file arrives under a temporary name and gets its own only after all checks, so a download that is cut short
    leaves nothing behind and can simply be started again.

    Args:
        sha256: checksum of the right file. A file at `path` with another one is replaced. None accepts whatever is
            there, or arrives and passes `check`.
        check: called with the temporary path; raises ValueError where the content is not what it should be.

    Raises:
        ConnectionError: the server is not reached, refuses, or breaks off.
        ValueError: what arrived is a web page, is empty, fails `check`, or has another checksum.
    """
    if path.is_file() and (sha256 is None or pooch.file_hash(str(path)) == sha256):
        return path
    new_folder = not path.parent.exists()
    try:
        with atomic_write(path) as temporary:
            try:
                pooch.HTTPDownloader(timeout=TIMEOUT, chunk_size=2**16)(url, str(temporary), None)
            except OSError as error:  # requests' errors, and a disk that is full
                raise ConnectionError(
                    f"{url} could not be downloaded ({error}); check the connection and the disk, then run the same "
                    "command again: files that are complete are kept"
                ) from error
            _check_content(url, temporary)
            if check is not None:
                check(temporary)
            found = pooch.file_hash(str(temporary))
            if sha256 is not None and found != sha256:
                raise ValueError(
                    f"{url} arrived with sha256 {found}; expected {sha256}. It was changed or damaged on its way and has "
                    "been thrown away: try again, or from another network"
                )
    except BaseException:
        if new_folder:
            with suppress(OSError):  # it holds other files by now
                path.parent.rmdir()
        raise
    return path


def _check_content(url: str, path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if not start:
        raise ValueError(f"{url} answered with an empty file; try again later")
    if start.startswith((b"<!doctype html", b"<html")):
        raise ValueError(
            f"{url} answered with a web page instead of the file (a login, proxy or error page); "
            "open the address in a browser to see what it says"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{url} answered with a Git-LFS pointer instead of the file; clone its repository with git-lfs"
        )
