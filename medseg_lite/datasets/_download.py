"""Fetch a file, or unpack an archive, so that it is there whole and right, or not at all."""

from __future__ import annotations

import errno
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
from typing import IO

import pooch
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

    The file arrives as `.part-<name>` and gets its own name only after all checks. A connection that breaks off is taken up
    again where it stopped, as long as more arrives. What has arrived by the time that this gives up is kept for the next call if
    a checksum can tell then that all is right, and removed otherwise.

    Args:
        sha256, md5: checksum of the right file. A file at `path` with another one is replaced. None accepts whatever is
            there, or arrives and passes `check`.
        check: called with the temporary path; raises ValueError where the content is not what it should be.
        room: free space wanted on the disk, in sizes of the file: 2 where it is going to be unpacked.
        progress: whether to show a bar.

    Raises:
        ConnectionError: the server is not reached, refuses, or breaks off.
        OSError: the disk is full, or will be.
        ValueError: what arrived is a web page, is empty, fails `check`, or has another checksum.
    """
    algorithm, expected = ("md5", md5) if md5 else ("sha256", sha256)
    if path.is_file() and (expected is None or pooch.file_hash(str(path), algorithm) == expected):
        return path

    def verify() -> None:
        _check_content(url, part)
        if check is not None:
            check(part)
        found = pooch.file_hash(str(part), algorithm)
        if expected is not None and found != expected:
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
            _receive(url, part, room, progress)  # its first half was of another file: once more from the start
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


def _receive(url: str, part: Path, room: float, progress: bool) -> None:
    """Download to `part`, going on after what it holds."""
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
    """One request for what is missing; whether the file is complete after it."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:  # there is no more: it is complete, or was of another file
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
    """Raise OSError where the disk has less room than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {needed / 1e9:.1f} GB of room in {folder}, but only {free / 1e9:.1f} GB are free; make room, or "
            "choose a folder on another disk (--folder, MEDSEG_DATA_DIR)",
        )


@contextmanager
def readable_when_full(folder: Path) -> Iterator[None]:
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
    """Download an archive and unpack it to `folder`, which appears when it is complete; return `folder`.

    Args:
        ready: whether `folder` has what it should, so that nothing is to do.

    Raises FileExistsError where something else is there, and what `fetch` and `unpack` raise.
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
    """Unpack a tar or zip archive to `folder`, which must not exist or be empty, and appears when it is complete.

    Only plain files are accepted, under relative names that stay inside; nothing is written where one member is anything else,
    and neither owners nor permissions are taken over. A top folder that all members share is left out, and so is what macOS adds.

    Raises:
        ValueError: the archive is none, is damaged, or holds a link, a device, or a name that leads outside.
        OSError: the disk is full, or will be.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".part-{folder.name}-"))
    try:
        with _opened(archive) as members:
            names = _checked(archive, [(name, kind) for name, kind, _, _ in members])
            sizes = [size for _, _, size, _ in members]
            check_room(temporary, sum(sizes), archive)
            wanted = [(name, member) for name, member in zip(names, members) if name is not None]
            if not wanted:
                raise ValueError(f"{archive} holds no files; download it again")
            for name, (_, _, _, read) in tqdm(wanted, desc=f"unpacking {archive.name}", disable=not progress):
                target = temporary.joinpath(*name.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with read() as source, open(target, "xb") as file, readable_when_full(folder):
                    shutil.copyfileobj(source, file, 2**20)
        temporary.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{archive} is damaged or not a tar or zip archive ({error}); download it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _opened(archive: Path) -> Iterator[list[tuple[str, str, int, Callable[[], IO[bytes]]]]]:
    """Name, kind ("file", "folder" or what else it is), size and how to read it of every member."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield [(i.filename, _zip_kind(i), i.file_size, lambda i=i: file.open(i)) for i in file.infolist()]
    else:
        with tarfile.open(archive) as file:
            yield [(m.name, _tar_kind(m), m.size, lambda m=m: file.extractfile(m)) for m in file.getmembers()]


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "a link"
    return "folder" if info.is_dir() else "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "a device"


def _tar_kind(member: tarfile.TarInfo) -> str:
    if member.isreg():
        return "file"
    return "folder" if member.isdir() else "a link" if member.issym() or member.islnk() else "a device"


def _checked(archive: Path, members: list[tuple[str, str]]) -> list[PurePosixPath | None]:
    """Where each member goes, None where it is left out."""
    names: list[PurePosixPath | None] = []
    for name, kind in members:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
            raise ValueError(
                f"{archive} holds {name!r}, a name that leads outside its folder; this is not the archive that was published, "
                "nothing was unpacked"
            )
        if kind not in ("file", "folder"):
            raise ValueError(f"{archive} holds {name!r}, which is {kind} and not a file; nothing was unpacked")
        apple = path.name.startswith("._") or path.name == ".DS_Store" or "__MACOSX" in path.parts
        names.append(None if kind == "folder" or apple or not path.parts else path)
    files = [path for path in names if path is not None]
    if len(set(files)) != len(files):
        raise ValueError(f"{archive} holds {len(files) - len(set(files))} files twice; download it again")
    if len({path.parts[0] for path in files}) == 1 and all(len(path.parts) > 1 for path in files):
        names = [None if path is None else path.relative_to(path.parts[0]) for path in names]
    return names
