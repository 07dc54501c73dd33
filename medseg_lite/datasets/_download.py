"""Fetch a file, or unpack an archive, so that it is there whole and right, or not at all."""

# Why this is not left to a library: data sets have up to 27 GB, so a download must go on where it stopped, and pooch, which is made
# for such files, starts anew. Checksums are `hashlib`'s. `requests` is kept, because `urllib` trusts the certificates of the system
# alone, and a Python from python.org has none on macOS: every download would fail there. `requests` brings its own.

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..paths import follow_link, put_in_place, replace, say, unique_beside
from ._alone import alone
from ._content import check_content, unpack_stream

if TYPE_CHECKING:  # is imported where a download begins: few who import the package download
    import requests

TIMEOUT = 30  # seconds without a byte from the server
CHUNK = 2**16
BUSY = (429, 502, 503, 504)  # answers of servers that may have time later
LONGEST_WAIT = 120  # seconds that a busy server is waited for at a time
TRIES = 5  # times that a busy server is asked again, or that a file that changed on the way is begun anew


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
    where it stopped, as long as more arrives and the file on the server is still the same. If it is given up, what has arrived is
    kept for the next call if there is a checksum, which will tell whether the parts fit. Otherwise it is removed. If another
    process fetches the same file, it is waited for. A busy server is asked again when it says so, within two minutes.

    Args:
        url: address of the file.
        path: path that the file gets.
        sha256, md5: checksum of the right file. A file at `path` with another checksum is replaced. None accepts any file that is
            there, and any that arrives and passes `check`.
        check: function of the temporary path. It raises ValueError if the content is not right.
        room: free space needed on the disk, in sizes of the file: 2 if it is going to be unpacked.
        progress: True shows a progress bar.

    Raises:
        ConnectionError: the server is not reached, refuses, is busy for longer, or breaks off.
        OSError: the disk is full, or will be.
        ValueError: what arrived is a web page, is empty, fails `check`, or has another checksum.
    """
    algorithm, expected = ("md5", md5) if md5 else ("sha256", sha256)
    target = follow_link(path)

    def complete(file: Path) -> bool:
        return file.is_file() and (expected is None or _checksum(file, algorithm) == expected)

    def verify(part: Path) -> None:
        check_content(url, part)
        if check is not None:
            check(part)
        if not complete(part):
            raise ValueError(
                f"{url} arrived with {algorithm} {_checksum(part, algorithm)}; expected {expected}. It was changed or damaged on its "
                "way and has been thrown away: try again, or from another network"
            )

    if complete(target):
        return path
    with alone(target) as held:
        if complete(target):  # another process was faster
            return path
        # The part keeps the ending, by which readers know the format.
        part = target.with_name(f".part-{target.name}") if held else unique_beside(target, ".part")
        resumed = part.is_file() and expected is not None
        try:
            if not resumed:
                part.unlink(missing_ok=True)
            pieces = _Download(url, part, room, progress).run(complete if expected else None)
            try:
                verify(part)
            except ValueError:
                part.unlink()
                if expected is None or (pieces == 1 and not resumed):
                    raise
                # The pieces belonged to different files: once more from the start.
                _Download(url, part, room, progress).run(complete)
                verify(part)
            put_in_place(part, target)
        except BaseException as error:
            if expected is None or not held or isinstance(error, ValueError):
                part.unlink(missing_ok=True)
            raise
    return path


def _checksum(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


class _Busy(Exception):
    """The server has no time now."""

    def __init__(self, answer: requests.Response):
        super().__init__(f"{answer.status_code} {answer.reason}")
        self.after = answer.headers.get("Retry-After", "").strip()

    def seconds(self, tries: int) -> float:
        """Return how long to wait: what the server says, in seconds or as a date, or twice as long after each try."""
        if self.after.isdigit():
            return int(self.after)
        try:
            return max(0.0, (parsedate_to_datetime(self.after) - datetime.now(UTC)).total_seconds())
        except (TypeError, ValueError):
            return 2**tries


class _Changed(Exception):
    """The server sends something that does not go on where the part ends."""


class _Download:
    """The download of one file, in as many requests as it takes.

    Args:
        url: address of the file.
        part: file that the bytes are appended to, as the server sends them.
        room: free space needed, in sizes of the file.
        progress: whether to show a bar.
    """

    def __init__(self, url: str, part: Path, room: float, progress: bool):
        self.url, self.part, self.room, self.progress = url, part, room, progress
        self.total: int | None = None
        self.validators: dict[str, str] = {}  # that tell this version of the file from another one
        self.encoding = "identity"

    def run(self, right: Callable[[Path], bool] | None) -> int:
        """Download all, and return in how many pieces it came.

        Args:
            right: function that tells whether a file has the right checksum, or None if that is not known. Then pieces are only put
                together if the server says that they are of one version of the file.
        """
        import requests
        import urllib3

        waited = begun = pieces = 0
        while True:
            have = self._size()
            pieces += 1
            try:
                if self._receive(have, known=right is not None):
                    break
                reason = "the connection broke off"
            except _Busy as busy:
                waited += 1
                seconds = busy.seconds(waited)
                if waited > TRIES or seconds > LONGEST_WAIT:
                    raise _failed(self.url, f"{busy}; it asks to wait for {seconds:.0f} s") from busy
                pieces -= 1
                say(f"{self.url} is busy ({busy}): waiting for {seconds:.0f} s", sys.stderr)
                time.sleep(seconds)
                continue
            except _Changed as change:
                begun += 1
                if begun > TRIES:
                    raise _failed(self.url, str(change)) from change
                self.part.unlink(missing_ok=True)
                self.total, self.validators = None, {}
                continue
            except requests.HTTPError as error:
                raise _failed(self.url, str(error)) from error
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                reason = str(error)
            if self._size() <= have:
                raise _failed(self.url, reason)
        self._decode(right)
        return pieces

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _receive(self, have: int, *, known: bool) -> bool:
        """Make one request for what is missing. Return whether the file is complete after it."""
        import requests

        with requests.get(self.url, headers=self._headers(have, known=known), stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code in BUSY:
                raise _Busy(answer)
            if have and answer.status_code == 416:  # there is no more: the part is complete, or belongs to another file
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                if total == str(have) or (not total.isdigit() and known):
                    return True
                raise _Changed("the server has no such part of the file")
            answer.raise_for_status()
            if answer.status_code == 206:
                self._check_goes_on(answer, have, known=known)
            else:  # the whole file, whatever was asked for
                have, self.total = 0, None
            self._remember(answer, have)
            self._write(answer, have)
        if self.total is not None and self._size() > self.total:
            raise _Changed("it is larger than the server says")
        return self.total is None or self._size() == self.total

    def _headers(self, have: int, *, known: bool) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        # Without any way to tell whether two pieces belong together, the file is fetched from its start.
        if have and (known or self.validators):
            headers["Range"] = f"bytes={have}-"
            strong = [v for v in self.validators.values() if not v.startswith("W/")]
            headers |= {"If-Range": strong[0]} if strong and not known else {}
        return headers

    def _check_goes_on(self, answer: requests.Response, have: int, *, known: bool) -> None:
        """Raise _Changed if a part of the file is not the one that was asked for, or is one of another version of it."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
        length = answer.headers.get("Content-Length", "")
        if found:
            right = int(found[1]) == have and (self.total is None or found[2] in (str(self.total), "*"))
        else:
            right = self.total is not None and length.isdigit() and have + int(length) == self.total
        # Servers of one name may disagree about validators. A checksum tells more.
        new = _validators(answer)
        same = known or all(new.get(name) == value for name, value in self.validators.items())
        if not (have and right and same):
            raise _Changed("the server sends another part than it was asked for, or the file has changed there")
        if found and found[2] != "*":
            self.total = int(found[2])

    def _remember(self, answer: requests.Response, have: int) -> None:
        """Note the size of the file, how it is encoded, and what tells it from another version."""
        length = answer.headers.get("Content-Length", "")
        if self.total is None and length.isdigit():
            self.total = have + int(length)
        self.validators = _validators(answer)
        self.encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()

    def _write(self, answer: requests.Response, have: int) -> None:
        """Append the bytes to the part."""
        if self.total is not None:
            check_room(self.part.parent, round(self.room * self.total) - have, self.url)
        name = self.part.name.removeprefix(".part-")
        bar = tqdm(total=self.total, initial=have, unit="B", unit_scale=True, desc=name, disable=not self.progress)
        with bar, open(self.part, "ab" if have else "wb") as file:
            for chunk in answer.raw.stream(CHUNK, decode_content=False):
                with readable_when_full(self.part.parent):
                    file.write(chunk)
                bar.update(len(chunk))
            with readable_when_full(self.part.parent):
                file.flush()

    def _decode(self, right: Callable[[Path], bool] | None) -> None:
        """Unpack a file that the server has compressed on the way, though it was asked not to.

        Some servers call a `.gz` file that they send as it is compressed, too. So the bytes are kept where they are right already:
        by the checksum, or because the name ends in `.gz` and there is no second gzip inside.
        """
        if self.encoding in ("identity", "") or (right is not None and right(self.part)):
            return
        if self.encoding not in ("gzip", "x-gzip", "deflate"):
            raise ValueError(
                f"{self.url} arrived compressed by {self.encoding!r}; expected the file as it is: try another network"
            )
        plain = unique_beside(self.part, ".part")
        try:
            with readable_when_full(self.part.parent):
                unpack_stream(self.part, plain)
            with open(plain, "rb") as file:
                twice = file.read(2) == b"\x1f\x8b"
            if right is not None or twice or self.part.suffix.lower() not in (".gz", ".tgz"):
                os.replace(plain, self.part)
        except (zlib.error, EOFError) as error:
            raise ValueError(f"{self.url} arrived compressed and cannot be unpacked ({error}); try again") from error
        finally:
            plain.unlink(missing_ok=True)


def _validators(answer: requests.Response) -> dict[str, str]:
    """Return what tells one version of a file from another."""
    return {name: answer.headers[name] for name in ("ETag", "Last-Modified") if name in answer.headers}


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
    place = Path(os.path.abspath(folder))  # with a name, even if it was given as "."
    if ready(place):
        return folder
    with alone(place):
        if ready(place):  # another process was faster
            return folder
        if place.exists() and any(place.iterdir()):
            raise FileExistsError(
                f"{folder} exists and is not this data set, or not all of it; remove it, or choose another with --folder"
            )
        archive = place.with_name(place.name + "".join(PurePosixPath(url).suffixes[-1:]))
        fetch(url, archive, md5=md5, room=2, progress=True)
        unpack(archive, place, progress=True)
        archive.unlink(missing_ok=True)
    return folder


def unpack(archive: Path, folder: Path, *, progress: bool = False) -> None:
    """Unpack a tar or zip archive to `folder`, which must not exist or be empty. The folder appears when it is complete.

    Only plain files are accepted, under relative names that stay inside. If one member is anything else, nothing is written. Owners
    and permissions are not taken over. A top folder that all files share is left out, and so is what macOS adds.

    Raises:
        ValueError: the file is no archive, is damaged, or holds a link, a device, or a name that leads outside.
        OSError: the disk is full, or will be.
    """
    temporary = unique_beside(folder, ".part")
    temporary.mkdir(parents=True)
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
        if folder.is_dir():
            folder.rmdir()
        replace(top, folder)
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
