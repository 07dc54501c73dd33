"""Downloads that arrive whole or not at all, and archives that are unpacked safely."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from small_files import special, tarball, zipped

from medseg_lite.datasets._download import fetch, unpack

DOWNLOAD = sys.modules["medseg_lite.datasets._download"]

GOOD = gzip.compress(b"many voxels" * 100, mtime=0)
GOOD_SHA256 = hashlib.sha256(GOOD).hexdigest()
LARGE = np.random.default_rng(0).bytes(300_000)
LARGE_SHA256 = hashlib.sha256(LARGE).hexdigest()


def test_a_good_file_arrives_and_is_not_fetched_twice(server, tmp_path):
    server.files["/a.nii.gz"] = GOOD
    target = tmp_path / "cache" / "case" / "a.nii.gz"
    for _ in range(2):
        assert fetch(f"{server.url}/a.nii.gz", target, sha256=GOOD_SHA256) == target
    assert target.read_bytes() == GOOD
    assert list(target.parent.iterdir()) == [target]
    assert server.asked == ["/a.nii.gz"]


@pytest.mark.parametrize(
    "content, message",
    [
        (GOOD[:-1] + b"!", "arrived with sha256 .*; expected .*thrown away: try again"),
        (b"<!DOCTYPE html><html>Please log in</html>", "answered with a web page instead of the file"),
        (b"  <html>403</html>", "answered with a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "answered with a Git-LFS pointer"),
        (b"", "answered with an empty file"),
    ],
)
def test_a_wrong_file_leaves_nothing_behind(server, tmp_path, content, message):
    server.files["/a.nii.gz"] = content
    with pytest.raises(ValueError, match=rf"{server.url}/a\.nii\.gz {message}"):
        fetch(f"{server.url}/a.nii.gz", tmp_path / "case" / "a.nii.gz", sha256=GOOD_SHA256)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_off_is_taken_up_again(server, tmp_path, ranges):
    server.files["/a.nii.gz"] = LARGE
    server.cut["/a.nii.gz"] = 150_000
    if not ranges:
        server.no_ranges.add("/a.nii.gz")
    target = fetch(f"{server.url}/a.nii.gz", tmp_path / "a.nii.gz", sha256=LARGE_SHA256)
    assert target.read_bytes() == LARGE and list(tmp_path.iterdir()) == [target]
    assert server.ranges[0] is None and server.ranges[1].startswith("bytes=") and len(server.ranges) == 2


def test_a_download_that_was_given_up_goes_on_where_it_stopped(server, tmp_path):
    server.files["/a.nii.gz"] = LARGE
    server.cut["/a.nii.gz"] = 150_000
    server.always_cut["/a.nii.gz"] = 0

    def get():
        return fetch(f"{server.url}/a.nii.gz", tmp_path / "a.nii.gz", md5=hashlib.md5(LARGE).hexdigest())

    (tmp_path / ".part-a.nii.gz").write_bytes(LARGE[:70_000])  # of a process that was killed
    with pytest.raises(ConnectionError, match=r"a\.nii\.gz could not be downloaded .*goes on where it stopped"):
        get()
    assert [p.name for p in tmp_path.iterdir()] == [".part-a.nii.gz"]
    server.always_cut.clear(), server.ranges.clear()
    server.cut.clear()
    assert get().read_bytes() == LARGE
    assert server.ranges == ["bytes=70000-"] and [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


@pytest.mark.parametrize("left", [b"of another file", b"x" * 400_000, None])
def test_a_beginning_of_another_file_is_thrown_away(server, tmp_path, left):
    """None: the download was complete, and only its new name was missing."""
    server.files["/a.nii.gz"] = LARGE
    (tmp_path / ".part-a.nii.gz").write_bytes(LARGE if left is None else left)
    target = fetch(f"{server.url}/a.nii.gz", tmp_path / "a.nii.gz", sha256=LARGE_SHA256)
    assert target.read_bytes() == LARGE and list(tmp_path.iterdir()) == [target]


def test_without_a_checksum_nothing_is_taken_up_again(server, tmp_path):
    server.files["/a.nii.gz"] = LARGE
    (tmp_path / ".part-a.nii.gz").write_bytes(b"of another file")
    server.always_cut["/a.nii.gz"] = 0
    with pytest.raises(ConnectionError):
        fetch(f"{server.url}/a.nii.gz", tmp_path / "a.nii.gz")
    assert list(tmp_path.iterdir()) == []
    server.always_cut.clear()
    assert fetch(f"{server.url}/a.nii.gz", tmp_path / "a.nii.gz").read_bytes() == LARGE


def test_a_disk_without_room_is_told_before_and_a_full_one_during_the_download(server, tmp_path, monkeypatch):
    server.files["/a.nii.gz"] = LARGE
    monkeypatch.setattr(DOWNLOAD.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * len(LARGE) - 1))
    with pytest.raises(OSError, match=r"a\.nii\.gz needs 0\.0 GB of room in .*but only 0\.0 GB are free; make room, or"):
        fetch(f"{server.url}/a.nii.gz", tmp_path / "case" / "a.nii.gz", sha256=LARGE_SHA256, room=2)
    assert list(tmp_path.iterdir()) == []
    fetch(f"{server.url}/a.nii.gz", tmp_path / "a.nii.gz", sha256=LARGE_SHA256, room=1)

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DOWNLOAD, "open", lambda *_: Full(), raising=False)
    with pytest.raises(OSError, match=r"the disk of .* is full; make room and run the same command again"):
        fetch(f"{server.url}/a.nii.gz", tmp_path / "b.nii.gz", sha256=LARGE_SHA256)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def test_a_refusal_and_a_missing_server_leave_nothing_behind(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"no\.nii\.gz could not be downloaded .*404.*complete are kept"):
        fetch(f"{server.url}/no.nii.gz", tmp_path / "case" / "a.nii.gz", sha256=GOOD_SHA256)
    server.close()
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        fetch(f"{server.url}/a.nii.gz", tmp_path / "case" / "a.nii.gz", sha256=GOOD_SHA256)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_replaced_but_only_by_a_good_one(server, tmp_path):
    target = tmp_path / "a.nii.gz"
    target.write_bytes(b"damaged")
    server.files["/a.nii.gz"] = b"<html>"
    with pytest.raises(ValueError, match="web page"):
        fetch(f"{server.url}/a.nii.gz", target, sha256=GOOD_SHA256)
    assert target.read_bytes() == b"damaged" and list(tmp_path.iterdir()) == [target]
    server.files["/a.nii.gz"] = GOOD
    fetch(f"{server.url}/a.nii.gz", target, sha256=GOOD_SHA256)
    assert target.read_bytes() == GOOD


def test_without_a_checksum_the_content_is_still_checked(server, tmp_path):
    def refuse(path):
        raise ValueError("this is no image")

    server.files["/a.nii.gz"] = GOOD
    with pytest.raises(ValueError, match="this is no image"):
        fetch(f"{server.url}/a.nii.gz", tmp_path / "case" / "a.nii.gz", sha256=None, check=refuse)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ archives


FILES = {"Task/dataset.json": b"{}", "Task/imagesTr/a.nii.gz": GOOD}
APPLE = {"Task/._dataset.json": b"Mac OS X", "__MACOSX/Task/._x": b"Mac OS X", "Task/.DS_Store": b"Mac OS X"}


@pytest.mark.parametrize(
    "content",
    [
        tarball(FILES | APPLE),
        tarball(FILES, "w:gz"),
        zipped(FILES | APPLE),
        tarball({"dataset.json": b"{}", "imagesTr/a.nii.gz": GOOD}),
        tarball({"./Task": special("./Task", tarfile.DIRTYPE)} | {f"./{name}": data for name, data in FILES.items()}),
    ],
)
def test_an_archive_is_unpacked_without_its_top_folder(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    unpack(tmp_path / "a.tar", tmp_path / "sub" / "task")
    files = {p.relative_to(tmp_path / "sub" / "task").as_posix(): p for p in (tmp_path / "sub").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in files.items()} == {"dataset.json": b"{}", "imagesTr/a.nii.gz": GOOD}
    assert all(not path.stat().st_mode & 0o6111 for path in files.values()) or os.name == "nt"


OUTSIDE, NO_FILE = "a name that leads outside its folder", "and not a file; nothing was unpacked"


@pytest.mark.parametrize(
    "content, match",
    [
        (tarball(FILES | {"Task/../../evil": b"x"}), OUTSIDE),
        (tarball(FILES | {"/tmp/evil": b"x"}), OUTSIDE),
        (tarball(FILES | {"C:\\evil": b"x"}), OUTSIDE),
        (tarball(FILES | {"l": special("Task/l", tarfile.SYMTYPE, "/etc/passwd")}), f"which is a link {NO_FILE}"),
        (tarball(FILES | {"l": special("Task/l", tarfile.LNKTYPE, "Task/dataset.json")}), f"which is a link {NO_FILE}"),
        (tarball(FILES | {"d": special("Task/d", tarfile.CHRTYPE)}), f"which is a device {NO_FILE}"),
        (tarball(FILES | {"f": special("Task/f", tarfile.FIFOTYPE)}), f"which is a device {NO_FILE}"),
        (zipped(FILES | {"../evil": b"x"}), OUTSIDE),
        (zipped(FILES | {"/evil": b"x"}), OUTSIDE),
        (zipped(FILES | {"Task/l": b"/etc/passwd"}, {"Task/l": 0o120777}), f"which is a link {NO_FILE}"),
        (tarball(FILES | {"Task/./dataset.json": b"again"}), "holds .*dataset.json' twice"),
        (tarball({}), "holds no files"),
        (tarball(FILES)[:700], "is damaged or not a tar or zip archive"),
        (zipped(FILES).replace(GOOD[20:30], b"0123456789"), "is damaged"),
        (b"PK\x03\x04 something", "is damaged or not a tar or zip archive"),
        (b"", "is damaged or not a tar or zip archive"),
    ],
)
def test_archives_that_are_not_unpacked(tmp_path, content, match):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        unpack(tmp_path / "a.tar", tmp_path / "task")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_disk_without_room_for_what_an_archive_holds(tmp_path, monkeypatch):
    """A zip of few bytes that unpacks to many, and a disk that fills up on the way."""
    (tmp_path / "a.zip").write_bytes(zipped({"zeros": bytes(10**7)}))
    with monkeypatch.context() as patch:
        patch.setattr(DOWNLOAD.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
        with pytest.raises(OSError, match=r"a\.zip needs 0\.0 GB of room in .*; make room"):
            unpack(tmp_path / "a.zip", tmp_path / "task")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DOWNLOAD.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"the disk of .*task is full"):
        unpack(tmp_path / "a.zip", tmp_path / "task")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]
