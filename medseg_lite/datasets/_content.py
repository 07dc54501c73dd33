"""Look at and unpack what a server has sent."""

from __future__ import annotations

import zlib
from pathlib import Path

CHUNK = 2**16


def check_content(url: str, path: Path) -> None:
    """Raise ValueError if what arrived is empty, a web page or a Git-LFS pointer."""
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
        raise ValueError(f"{url} answered with a Git-LFS pointer instead of the file; clone its repository with git-lfs")


def unpack_stream(packed: Path, plain: Path) -> None:
    """Unpack one or several gzip or zlib streams."""
    with open(packed, "rb") as source, open(plain, "wb") as target:
        unpacker, rest = zlib.decompressobj(47), b""
        while chunk := rest or source.read(CHUNK):
            target.write(unpacker.decompress(chunk))
            rest = unpacker.unused_data
            if unpacker.eof and rest:
                unpacker = zlib.decompressobj(47)
        if not unpacker.eof:
            raise EOFError("it is cut off")
