"""Fetch a file, or unpack an archive, so that it is there whole and right, or not at all."""

# Why this is not left to a library: data sets have up to 27 GB, so a download must go on where it stopped, and pooch, which is made
# for such files, starts anew. Checksums are `hashlib`'s. `requests` is kept, because `urllib` trusts the certificates of the system
# alone, and a Python from python.org has none on macOS: every download would fail there. `requests` brings its own.

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import requests
from tqdm import tqdm

TIMEOUT = 30  # seconds without a byte from the server
CHUNK = 2**16


def fetch(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    check: Callable[[Path], object] | None = None,
    room: float = 1,
    progress: bool = False,
) -> Path:
    """Download `url` to `path`, unless it is there already, and return `path`.

    The file arrives as `.part-<name>` and gets its own name after all checks. If the connection breaks off, the download goes on
    where it stopped, as long as more arrives. If it is given up, what has arrived is kept for the next call if there is a checksum,
    which will tell whether the parts fit. Otherwise it is removed.

    Args:
        url: address of the file.
        path: path that the file gets.
        sha256, md5: checksum of the right file. A file at `path` with another checksum is replaced. None accepts any file that is
            there, and any that arrives and passes `check`.
        check: function of the temporary path. It raises ValueError if the content is not right.
        room: free space needed on the disk, in sizes of the file: 2 if it is going to be unpacked.
        progress: True shows a progress bar.

    Raises:
        ConnectionError: the server is not reached, refuses, or breaks off.
        OSError: the disk is full, or will be.
        ValueError: what arrived is a web page, is empty, fails `check`, or has another checksum.
    """
    algorithm, expected = ("md5", md5) if md5 else ("sha256", sha256)
    if path.is_file() and (expected is None or _checksum(path, algorithm) == expected):
        return path

    def verify() -> None:
        _check_content(url, part)
        if check is not None:
            check(part)
        found = None if expected is None else _checksum(part, algorithm)
        if found != expected:
            raise ValueError(
                f"{url} arrived with {algorithm} {found}; expected {expected}. It was changed or damaged on its way and has "
                "been thrown away: try again, or from another network"
            )

    new_folder = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")  # with its ending, by which readers know the format
    resumed = part.is_file() and expected is not None
    try:
        if not resumed:
            part.unlink(missing_ok=True)
        _receive(url, part, room, progress)
        try:
            verify()
        except ValueError:
            part.unlink()
            if not resumed:
                raise
            _receive(url, part, room, progress)  # its first half belonged to another file: once more from the start
            verify()
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        if expected is None or isinstance(error, ValueError):
            part.unlink(missing_ok=True)
        if new_folder:
            with suppress(OSError):  # it holds other files by now
                path.parent.rmdir()
        raise
    return path


def _checksum(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _receive(url: str, part: Path, room: float, progress: bool) -> None:
    """Download to the end of `part`, as often as the connection breaks off and more has arrived."""
    while True:
        have = part.stat().st_size if part.is_file() else 0
        try:
            if _receive_some(url, part, have, room, progress):
                return
            reason = "the connection broke off"
        except requests.HTTPError as error:
            raise _failed(url, str(error)) from error
        except requests.RequestException as error:
            reason = str(error)
        if not part.is_file() or part.stat().st_size <= have:
            raise _failed(url, reason)


def _receive_some(url: str, part: Path, have: int, room: float, progress: bool) -> bool:
    """Make one request for what is missing. Return whether the file is complete after it."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:  # there is no more: the part is complete, or belongs to another file
            complete = answer.headers.get("Content-Range", "").endswith(f"/{have}")
            if not complete:
                part.unlink()
                return _receive_some(url, part, 0, room, progress)
            return True
        answer.raise_for_status()
        if answer.status_code != 206:  # the whole file, whatever was asked for
            have = 0
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        if total is not None:
            check_room(part.parent, round(room * total) - have, url)
        bar = tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.name.removeprefix(".part-"), disable=not progress
        )
        with bar, open(part, "ab" if have else "wb") as file:
            for chunk in answer.iter_content(CHUNK):
                with readable_when_full(part.parent):
                    file.write(chunk)
                bar.update(len(chunk))
            with readable_when_full(part.parent):
                file.flush()
    return total is None or part.stat().st_size >= total


def _failed(url: str, reason: str) -> ConnectionError:
    return ConnectionError(
        f"{url} could not be downloaded ({reason}); check the connection, then run the same command again: "
        "files that are complete are kept, and a large one goes on where it stopped"
    )


def check_room(folder: Path, needed: int, what: object) -> None:
    """Raise OSError if the disk has less room than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {needed / 1e9:.1f} GB of room in {folder}, but only {free / 1e9:.1f} GB are free; make room, or "
            "choose a folder on another disk (--folder, MEDSEG_DATA_DIR)",
        )


@contextmanager
def readable_when_full(folder: Path) -> Iterator[None]:
    """Raise a readable OSError if the disk gets full inside this block."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk of {folder} is full; make room and run the same command again, or choose a folder on another disk",
        ) from error


def _check_content(url: str, path: Path) -> None:
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


# ------------------------------------------------------------------------------------------------------------ archives


def fetch_archive(url: str, folder: Path, *, md5: str, ready: Callable[[Path], bool]) -> Path:
    """Download an archive, unpack it to `folder` and return `folder`. The folder appears when it is complete.

    Args:
        url: address of the archive.
        folder: folder to make.
        md5: checksum of the archive.
        ready: function that returns whether a folder holds the data set. If it does already, nothing is done.

    Raises:
        FileExistsError: `folder` holds something else.
        ConnectionError, OSError, ValueError: see `fetch` and `unpack`.
    """
    if ready(folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} exists and is not this data set, or not all of it; remove it, or choose another with --folder"
        )
    archive = folder.with_name(folder.name + "".join(PurePosixPath(url).suffixes[-1:]))
    fetch(url, archive, md5=md5, room=2, progress=True)
    unpack(archive, folder, progress=True)
    archive.unlink()
    return folder


def unpack(archive: Path, folder: Path, *, progress: bool = False) -> None:
    """Unpack a tar or zip archive to `folder`, which must not exist or be empty. The folder appears when it is complete.

    Only plain files are accepted, under relative names that stay inside. If one member is anything else, nothing is written. Owners
    and permissions are not taken over. A top folder that all files share is left out, and so is what macOS adds.

    Raises:
        ValueError: the file is no archive, is damaged, or holds a link, a device, or a name that leads outside.
        OSError: the disk is full, or will be.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".part-{folder.name}-"))
    try:
        with zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive) as file:
            options = {}
            if isinstance(file, tarfile.TarFile):
                # The standard library's own guard comes with Python 3.11.4. `_plain_files` is stricter, but may have a gap.
                file.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
                options["set_attrs"] = False
            members, size = _plain_files(archive, file)
            check_room(temporary, size, archive)
            for member in tqdm(members, desc=f"unpacking {archive.name}", disable=not progress):
                with readable_when_full(folder):
                    file.extract(member, temporary, **options)
        inside = list(temporary.iterdir())
        top = inside[0] if len(inside) == 1 and inside[0].is_dir() else temporary
        top.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.replace(top, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{archive} is damaged or not a tar or zip archive ({error}); download it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain_files(archive: Path, file: tarfile.TarFile | zipfile.ZipFile) -> tuple[list, int]:
    """Return the members to unpack and their size in bytes. Raise ValueError if one is neither a file nor a folder inside."""
    wanted, names, size = [], set(), 0
    for member in file.getmembers() if isinstance(file, tarfile.TarFile) else file.infolist():
        name, kind, length = _facts(member)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
            raise ValueError(
                f"{archive} holds {name!r}, a name that leads outside its folder; this is not the archive that was published, "
                "nothing was unpacked"
            )
        if kind not in ("file", "folder"):
            raise ValueError(f"{archive} holds {name!r}, which is {kind} and not a file; nothing was unpacked")
        apple = path.name.startswith("._") or path.name == ".DS_Store" or "__MACOSX" in path.parts
        if kind == "file" and not apple:
            if path in names:
                raise ValueError(f"{archive} holds {name!r} twice; download it again")
            wanted.append(member)
            names.add(path)
            size += length
    if not wanted:
        raise ValueError(f"{archive} holds no files; download it again")
    return wanted, size


def _facts(member: tarfile.TarInfo | zipfile.ZipInfo) -> tuple[str, str, int]:
    """Return name, kind and size of a member."""
    if isinstance(member, tarfile.TarInfo):
        kind = "file" if member.isreg() else "a link" if member.issym() or member.islnk() else "a device"
        return member.name, "folder" if member.isdir() else kind, member.size
    mode = member.external_attr >> 16
    kind = "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "a link" if stat.S_ISLNK(mode) else "a device"
    return member.filename, "folder" if member.is_dir() and kind != "a link" else kind, member.file_size
