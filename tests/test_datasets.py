"""Data sets: downloads that arrive whole or not at all, and folders of scans with all their usual faults."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg_lite import cli, datasets, metrics, paths
from medseg_lite.datasets import (
    Cohort,
    brats2013_deepmedic,
    brats2015,
    brats2017,
    download_brats2013_deepmedic,
    download_isbi2012,
    download_msd,
    download_promise12,
    isbi2012,
    lits,
    msd,
    nifti_folder,
    promise12,
)
from medseg_lite.datasets._download import fetch, unpack
from medseg_lite.files import read_case, write_nifti

# The package shows the function under the module's name.
BRATS = sys.modules["medseg_lite.datasets.brats2013_deepmedic"]
ISBI = sys.modules["medseg_lite.datasets.isbi2012"]
MSD = sys.modules["medseg_lite.datasets.msd"]
PROMISE = sys.modules["medseg_lite.datasets.promise12"]
DOWNLOAD = sys.modules["medseg_lite.datasets._download"]


def nifti(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def scan(seed: int = 0, shape=(6, 7, 8)) -> np.ndarray:
    """Noise in the middle, a background of zeros."""
    array = np.zeros(shape, np.float32)
    array[1:-1, 1:-1, 1:-1] = np.random.default_rng(seed).uniform(1, 2, [n - 2 for n in shape])
    return array


def classes(seed: int = 0, shape=(6, 7, 8), among=(0, 1, 2, 4)) -> np.ndarray:
    return np.random.default_rng(seed).choice(among, shape).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------- downloads


class Server:
    """Answers each path with what `files` holds.

    A path in `cut` sends that many bytes of what it announces and hangs up, the first time; one in `always_cut` every time;
    one in `no_ranges` sends the whole file whatever part is asked for.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.always_cut: dict[str, int] = {}
        self.no_ranges: set[str] = set()
        self.asked: list[str] = []
        self.ranges: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                outer.ranges.append(self.headers["Range"])
                content, start = outer.files.get(self.path), 0
                if content is None:
                    self.send_error(404, "not here")
                    return
                if self.headers["Range"] and self.path not in outer.no_ranges:
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start and start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                part = content[start:]
                self.wfile.write(part[: outer.always_cut.get(self.path, outer.cut.pop(self.path, len(part)))])

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = Server()
    yield server
    server.close()


GOOD = gzip.compress(b"many voxels" * 100)
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


def tarball(members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as file:
        for name, data in members.items():
            if isinstance(data, tarfile.TarInfo):
                file.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(data), 0o6777
                file.addfile(info, io.BytesIO(data))
    return content.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(members: dict[str, bytes], modes: dict[str, int] | None = None) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (modes or {}).get(name, 0o100644) << 16
            file.writestr(info, data)
    return content.getvalue()


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


# ------------------------------------------------------------------------------------------ BRATS 2013, DeepMedic's


def fake_case(folder, seed: int) -> None:
    """The files of one case, small, as DeepMedic stores them: LPS, z-scored, masks of 0.99999997, float labels."""
    affine = np.array([[-1.0, 0, 0, 5], [0, -1, 0, 6], [0, 0, 1, 0], [0, 0, 0, 1]])
    inside = scan(seed) > 0
    for file in BRATS.CHANNELS.values():
        nifti(folder / file, np.where(inside, scan(seed) - 1.5, -3).astype(np.float32), affine)
    nifti(folder / BRATS.LABEL, classes(seed, among=range(5)).astype(np.float32), affine)
    nifti(folder / BRATS.MASK, inside * 0.9999999701976776, affine)
    (folder / BRATS.LICENCE_FILE).write_text("CC BY-NC-SA 3.0")


@pytest.fixture
def repository(server, monkeypatch, tmp_path):
    """A server that holds all six cases, and checksums that fit the four known ones."""
    for seed, (name, split) in enumerate(BRATS.SPLITS.items()):
        folder = tmp_path / "upstream" / split / name
        folder.mkdir(parents=True)
        fake_case(folder, seed)
        for path in folder.iterdir():
            server.files[f"/{split}/{name}/{path.name}"] = path.read_bytes()
    checksums = {
        name: tuple(hashlib.sha256(server.files[f"/{BRATS.SPLITS[name]}/{name}/{f}"]).hexdigest() for f in BRATS.FILES)
        for name in BRATS.SHA256
    }
    monkeypatch.setattr(BRATS, "URL", server.url)
    monkeypatch.setattr(BRATS, "SHA256", checksums)
    return server


def test_download_fetches_the_four_known_cases(repository, tmp_path):
    cases = brats2013_deepmedic(tmp_path / "cache", download=True)
    assert [c.name for c in cases] == [f"brats_2013_pat000{i}_1" for i in (3, 4, 5, 6)]
    assert len(repository.asked) == 20
    assert all((tmp_path / "cache" / c.name / BRATS.LICENCE_FILE).is_file() for c in cases)
    first = cases[0]
    assert first.channels == ("flair", "t1c") and first.native_axes == "LPS" and first.axes == "RAS"
    assert first.mask.dtype == bool and np.array_equal(first.mask, (scan(2) > 0)[::-1, ::-1])
    assert np.array_equal(first.label, classes(2, among=range(5))[::-1, ::-1])
    assert first.info["split"] == "validation" and first.info["licence"] == "CC BY-NC-SA 3.0"


def test_an_interrupted_download_goes_on_where_it_stopped(repository, tmp_path):
    missing = "/train/brats_2013_pat0005_1/T1c_subtrMeanDivStd.nii.gz"
    content = repository.files.pop(missing)
    with pytest.raises(ConnectionError, match=missing):
        download_brats2013_deepmedic(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob(".partial*"))
    with pytest.raises(FileNotFoundError, match=r"brats_2013_pat0005_1 lacks T1c.*it holds Flair.*Fetch them"):
        brats2013_deepmedic(tmp_path / "cache")
    repository.files[missing] = content
    before = len(repository.asked)
    assert download_brats2013_deepmedic(tmp_path / "cache") == tmp_path / "cache"
    assert len(repository.asked) - before == 20 - 11
    assert len(brats2013_deepmedic(tmp_path / "cache")) == 4


def test_cases_of_unknown_checksum_need_an_explicit_word(repository, tmp_path):
    with pytest.raises(ValueError, match=r"checksums of brats_2013_pat0001_1 are not known.*unverified=True"):
        brats2013_deepmedic(tmp_path / "cache", cases=["brats_2013_pat0001_1"], download=True)
    assert not repository.asked and not (tmp_path / "cache").exists()
    [case] = brats2013_deepmedic(tmp_path / "cache", cases=["brats_2013_pat0001_1"], download=True, unverified=True)
    assert case.info["split"] == "test"
    repository.files["/test/brats_2013_pat0002_1/Flair_subtrMeanDivStd.nii.gz"] = b"a proxy says no"
    with pytest.raises(ValueError, match="is a text file"):
        brats2013_deepmedic(tmp_path / "cache", cases=["brats_2013_pat0002_1"], download=True, unverified=True)
    assert not (tmp_path / "cache" / "brats_2013_pat0002_1").exists()


def test_a_clone_of_the_upstream_folder_is_read_and_completed_in_place(repository, tmp_path):
    clone = tmp_path / "upstream"
    assert len(brats2013_deepmedic(clone)) == 6
    two = ["brats_2013_pat0006_1", "brats_2013_pat0001_1"]
    assert [c.name for c in brats2013_deepmedic(clone, cases=two)] == two
    (clone / "train" / "brats_2013_pat0006_1" / BRATS.MASK).unlink()
    assert len(brats2013_deepmedic(clone, download=True)) == 6
    assert repository.asked == ["/train/brats_2013_pat0006_1/brainmask.nii.gz"]


def test_missing_data_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDSEG_DATA_DIR", str(tmp_path))
    remedy = r"CC BY-NC-SA 3\.0.*python -m medseg_lite download brats2013_deepmedic.*MEDSEG_DATA_DIR"
    with pytest.raises(FileNotFoundError, match=f"brats2013_deepmedic has none of the cases.*{remedy}"):
        brats2013_deepmedic()
    with pytest.raises(FileNotFoundError, match=f"has no brats_2013_pat0004_1.*{remedy}"):
        brats2013_deepmedic(cases=["brats_2013_pat0004_1"])
    with pytest.raises(ValueError, match=r"cases is \['pat4'\]; expected some of brats_2013_pat0001_1"):
        brats2013_deepmedic(cases=["pat4"])
    with pytest.raises(ValueError, match="expected some of"):
        download_brats2013_deepmedic(cases=[])


def test_a_label_outside_the_set_is_an_error(tmp_path):
    folder = tmp_path / "brats_2013_pat0003_1"
    folder.mkdir()
    fake_case(folder, 0)
    affine = nibabel.load(folder / BRATS.LABEL).affine
    nifti(folder / BRATS.LABEL, np.full((6, 7, 8), 5, np.float32), affine)
    with pytest.raises(ValueError, match=r"OTMultiClass\.nii\.gz holds label 5; expected only 0, 1, 2, 3, 4"):
        brats2013_deepmedic(tmp_path)


def test_downloads_by_name():
    assert datasets.downloads["brats2013_deepmedic"] is download_brats2013_deepmedic
    assert sorted(datasets.downloads) == [
        "brats2013_deepmedic",
        "isbi2012",
        "msd01_brain",
        "msd03_liver",
        "msd04_hippocampus",
        "msd05_prostate",
        "promise12",
    ]
    assert all(len(md5) == 32 for md5 in (PROMISE.MD5, *(md5 for _, md5 in MSD.TASKS.values())))
    for name, checksums in BRATS.SHA256.items():
        assert len(checksums) == len(BRATS.FILES) and all(len(c) == 64 for c in checksums), name


@pytest.mark.real
def test_the_real_cases():
    folder = paths.real_data("brats2013_deepmedic")
    if not folder.is_dir():
        pytest.skip(f"no real scans: {folder} does not exist; set MEDSEG_DATA_DIR")
    cases = brats2013_deepmedic(cases=["brats_2013_pat0005_1"])
    assert repr(cases) == "[Case('brats_2013_pat0005_1', flair+t1c, 240×240×155 voxels, 1×1×1 mm, label, mask)]"
    counts = np.bincount(cases[0].label.ravel())
    assert counts[1:].tolist() == [23030, 35416, 3882, 18354]
    air, brain = cases[0].image[:, ~cases[0].mask], cases[0].image[:, cases[0].mask]
    assert (air == air[:, :1]).all() and (brain.mean(1) > air[:, 0]).all()
    for name, checksums in BRATS.SHA256.items():
        for file, checksum in zip(BRATS.FILES, checksums):
            assert hashlib.sha256((folder / name / file).read_bytes()).hexdigest() == checksum


# ------------------------------------------------------------------------------------------------- the reader's own

CHANNELS = {"flair": "*_flair.nii.gz", "t1c": "*_t1ce.nii.gz"}


def brats_folder(root, names=("BraTS20_001", "BraTS20_002")):
    for seed, name in enumerate(names):
        nifti(root / name / f"{name}_flair.nii.gz", scan(seed))
        nifti(root / name / f"{name}_t1ce.nii.gz", scan(seed + 10))
        nifti(root / name / f"{name}_seg.nii.gz", classes(seed))
    return root


def test_a_folder_per_case(tmp_path):
    root = brats_folder(tmp_path)
    (root / "name_mapping.csv").write_text("a,b")
    (root / "BraTS20_001" / "BraTS20_001_flair.json").write_text("{}")
    (root / "empty").mkdir()
    cohort = nifti_folder(root, channels=CHANNELS, label="*_seg.nii.gz", labels=(0, 1, 2, 4))
    assert cohort.names == ["BraTS20_001", "BraTS20_002"] and len(cohort) == 2
    assert repr(cohort) == "Cohort(2 cases: BraTS20_001, BraTS20_002)"
    case = cohort[1]
    assert case.name == "BraTS20_002" and case.channels == ("flair", "t1c")
    assert np.array_equal(case.image, [scan(1), scan(11)]) and np.array_equal(case.label, classes(1))
    assert np.array_equal(case.mask, scan() > 0)
    assert cohort["BraTS20_002"].name == cohort[-1].name == case.name
    assert isinstance(cohort[:1], Cohort) and [c.name for c in cohort[:1]] == ["BraTS20_001"]
    assert [c.name for c in cohort] == cohort.names
    with pytest.raises(IndexError):
        cohort[2]
    with pytest.raises(KeyError, match="no case is called 'x'; there are BraTS20_001, BraTS20_002"):
        cohort["x"]


def test_files_side_by_side(tmp_path):
    for seed, name in enumerate(["b", "a"]):
        nifti(tmp_path / "images" / f"{name}_0000.nii.gz", scan(seed))
        nifti(tmp_path / "labels" / f"{name}.nii.gz", classes(seed))
    cohort = nifti_folder(tmp_path, channels={"t2": "images/*_0000.nii.gz"}, label="labels/*.nii.gz", mask="all")
    assert cohort.names == ["a", "b"]
    assert cohort[0].mask is None and np.array_equal(cohort[0].label, classes(1))


def test_side_by_side_a_file_belongs_to_the_longest_pattern(tmp_path):
    for name in ("p1", "p2"):
        nifti(tmp_path / f"{name}.nii", scan())
        nifti(tmp_path / f"{name}_seg.nii", classes())
        nifti(tmp_path / f"{name}_mask.nii", (scan() > 1.5) * 0.99999997)
    cohort = nifti_folder(tmp_path, channels={"ct": "*.nii"}, label="*_seg.nii", mask="*_mask.nii")
    assert cohort.names == ["p1", "p2"]
    assert np.array_equal(cohort["p2"].mask, scan() > 1.5)
    with pytest.raises(ValueError, match=r"pattern of ct is '[*]p[*].nii'; .*exactly one [*]"):
        nifti_folder(tmp_path, channels={"ct": "*p*.nii"})


def test_only_some_cases(tmp_path):
    root = brats_folder(tmp_path, ("a", "b", "c"))
    (root / "b" / "b_flair.nii.gz").unlink()
    assert nifti_folder(root, channels=CHANNELS, cases=["c", "a"]).names == ["c", "a"]
    for wrong in (["d"], []):
        with pytest.raises(ValueError, match=f"cases is \\{wrong}, but .* has a, b, c"):
            nifti_folder(root, channels=CHANNELS, cases=wrong)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_missing_sequence_names_what_is_there(tmp_path, side_by_side):
    root = brats_folder(tmp_path)
    (root / "BraTS20_002" / "BraTS20_002_t1ce.nii.gz").unlink()
    if side_by_side:
        for path in root.rglob("*.nii.gz"):
            path.rename(root / path.name)
    with pytest.raises(
        ValueError, match=r"BraTS20_002 in .* has no file for t1c \('\*_t1ce\.nii\.gz'\); it holds .*_flair\.nii\.gz"
    ):
        nifti_folder(root, channels=CHANNELS, label="*_seg.nii.gz")


def test_several_files_for_one_sequence(tmp_path):
    root = brats_folder(tmp_path)
    with pytest.raises(ValueError, match=r"has 3 files for flair \('\*\.nii\.gz'\); it holds .*: narrow the pattern"):
        nifti_folder(root, channels={"flair": "*.nii.gz"})


def test_truth_under_another_name(tmp_path):
    root = brats_folder(tmp_path)
    folder = root / "BraTS20_002"
    (folder / "BraTS20_002_seg.nii.gz").rename(folder / "W39_1998.09.19_Segm.nii.gz")
    with pytest.raises(ValueError, match=r"no file for the label .*W39_1998.09.19_Segm.nii.gz: .*label_optional=True"):
        nifti_folder(root, channels=CHANNELS, label="*_seg.nii.gz")
    cohort = nifti_folder(root, channels=CHANNELS, label="*_seg.nii.gz", label_optional=True)
    assert cohort[0].label is not None and cohort[1].label is None
    assert nifti_folder(root, channels=CHANNELS, label="*[_]*[sS]eg*")[1].label is not None
    assert nifti_folder(root, channels=CHANNELS)[0].label is None


def test_macos_files_are_ignored(tmp_path):
    root = brats_folder(tmp_path)
    for name in ("BraTS20_001", "__MACOSX", ".hidden"):
        (root / name).mkdir(exist_ok=True)
        (root / name / "._x_flair.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    nifti(root / ".hidden" / "x_flair.nii.gz", scan())
    assert nifti_folder(root, channels=CHANNELS).names == ["BraTS20_001", "BraTS20_002"]


@pytest.mark.parametrize("background", [-3024, 0.5])
def test_a_background_that_is_not_zero_needs_a_mask(tmp_path, background):
    array = np.where(scan() > 0, scan(), background).astype(np.float32)
    nifti(tmp_path / "p1" / "ct.nii.gz", array)
    message = rf"p1: 100\.0 % of the voxels are not 0 \(the first corner holds ct {background}\).*mask='all'"
    with pytest.raises(ValueError, match=message):
        nifti_folder(tmp_path, channels={"ct": "ct*"})[0]
    assert nifti_folder(tmp_path, channels={"ct": "ct*"}, mask="all")[0].mask is None
    nifti(tmp_path / "p1" / "mask.nii.gz", (scan() > 0).astype(np.uint8))
    assert nifti_folder(tmp_path, channels={"ct": "ct*"}, mask="mask*")[0].mask.sum() == (scan() > 0).sum()


def test_labels_are_checked_before_they_are_mapped(tmp_path):
    root = brats_folder(tmp_path)
    options = {"channels": CHANNELS, "label": "*_seg.nii.gz"}
    mapped = nifti_folder(root, **options, labels=iter((0, 1, 2, 4)), label_map={4: 3, 1: 2, 2: 1})
    for _ in range(2):
        label = mapped[0].label
        assert label.dtype == np.uint8
        assert np.array_equal(label, np.array([0, 2, 1, 9, 3])[classes(0)])
    with pytest.raises(ValueError, match=r"_seg\.nii\.gz holds label 4; expected only 0, 1, 2, 3"):
        nifti_folder(root, **options, labels=range(4), label_map={3: 4})[0]
    for wrong in ({4: 300}, {-1: 0}):
        with pytest.raises(ValueError, match=r"label_map .*expected classes from 0 to 255"):
            nifti_folder(root, **options, label_map=wrong)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("flair", b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        ("flair", b"<!doctype html>", "web page"),
        ("seg", b"a,b\n1,2\n", "text file"),
        ("t1ce", b"\x1f\x8b\x08\x00", "not a NIfTI file: its start is damaged or cut off"),
    ],
)
def test_files_that_are_no_images_are_named_when_read(tmp_path, file, content, message):
    root = brats_folder(tmp_path)
    (root / "BraTS20_001" / f"BraTS20_001_{file}.nii.gz").write_bytes(content)
    cohort = nifti_folder(root, channels=CHANNELS, label="*_seg.nii.gz")
    with pytest.raises(ValueError, match=rf"BraTS20_001_{file}\.nii\.gz is a?.*{message}"):
        cohort[0]
    assert cohort[1].name == "BraTS20_002"


def test_a_shape_that_differs_is_named_when_read(tmp_path):
    root = brats_folder(tmp_path)
    nifti(root / "BraTS20_001" / "BraTS20_001_seg.nii.gz", classes(shape=(6, 7, 7)))
    with pytest.raises(ValueError, match=r"BraTS20_001_seg\.nii\.gz is 6×7×7 but BraTS20_001_flair\.nii\.gz is 6×7×8"):
        nifti_folder(root, channels=CHANNELS, label="*_seg.nii.gz")[0]


def test_an_empty_cohort_and_the_wrong_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no case: .* It holds nothing"):
        nifti_folder(tmp_path, channels=CHANNELS)
    brats_folder(tmp_path / "HGG")
    with pytest.raises(FileNotFoundError, match="It holds HGG/; point at the folder right above the cases"):
        nifti_folder(tmp_path, channels=CHANNELS)
    with pytest.raises(FileNotFoundError, match="LGG is not a folder"):
        nifti_folder(tmp_path / "LGG", channels=CHANNELS)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": {}}, "channels is empty"),
        ({"channels": {"flair": ""}}, "pattern of flair is ''"),
        ({"channels": {"flair": "/data/*.nii"}}, "pattern of flair is '/data/[*].nii'; expected one inside the folder"),
        ({"channels": CHANNELS, "label": "../*.nii"}, "pattern of the label is '../[*].nii'"),
        ({"channels": CHANNELS, "mask": "/*"}, "pattern of the mask"),
    ],
)
def test_bad_patterns(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        nifti_folder(brats_folder(tmp_path), **options)


# --------------------------------------------------------------------------------------------------------- ISBI 2012


def tiff(pages) -> bytes:
    file = io.BytesIO()
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()


def em_pages(pages=3, rows=10, columns=14, seed=0):
    """Images and labels `(pages, rows, columns)`: membranes (0) dark, cells (255) bright."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((pages, rows, columns)) < 0.3, 0, 255).astype(np.uint8)
    return (labels // 2 + rng.integers(0, 100, labels.shape)).astype(np.uint8), labels


@pytest.fixture
def em_folder(tmp_path):
    """`em_folder(images, labels)`: the two files of the challenge; either may be bytes, or None to leave it out."""

    def make(images, labels):
        for name, content in (("train-volume.tif", images), ("train-labels.tif", labels)):
            if content is not None:
                (tmp_path / name).write_bytes(content if isinstance(content, bytes) else tiff(content))
        return tmp_path

    return make


def test_isbi_pages_become_slices_along_w(em_folder):
    images, labels = em_pages()
    case = isbi2012(em_folder(images, labels))
    assert case.shape == (14, 10, 3) and case.channels == ("em",) and case.info["classes"] == ("cell", "membrane")
    assert case.image.dtype == np.float32 and case.label.dtype == np.uint8 and case.axes == "RAS"
    assert case.spacing == pytest.approx((4e-6, 4e-6, 5e-5))
    for page, row, column in [(0, 0, 0), (1, 2, 5), (2, 9, 13)]:
        assert case.image[0, 13 - column, 9 - row, page] == images[page, row, column]
        assert case.label[13 - column, 9 - row, page] == (labels[page, row, column] == 0)


def test_isbi_results_are_written_as_the_pages_lie(em_folder, tmp_path):
    images, labels = em_pages()
    case = isbi2012(em_folder(images, labels))
    written = nibabel.load(write_nifti(tmp_path / "out.nii.gz", case.image[0], case))
    assert nibabel.aff2axcodes(written.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(np.asarray(written.dataobj), images.transpose(2, 1, 0))
    np.testing.assert_allclose(written.affine[:3, 3], 0, atol=1e-9)
    again = read_case({"em": tmp_path / "out.nii.gz"})
    np.testing.assert_array_equal(again.image, case.image)


def test_isbi_labels_of_one_bit_and_the_test_stack(em_folder):
    images, labels = em_pages()
    folder = em_folder(images, tiff(labels == 255))
    assert np.array_equal(isbi2012(folder).label.sum(), (labels == 0).sum())
    (folder / "test-volume.tif").write_bytes(tiff(images))
    case = isbi2012(folder, split="test")
    assert case.label is None and case.name == "isbi2012-test"
    with pytest.raises(ValueError, match="split is 'val'; expected 'train' or 'test'"):
        isbi2012(folder, split="val")


IMAGES, LABELS = em_pages()
INVERTED, GREY, FLAT = 255 - LABELS, LABELS.copy(), IMAGES.copy()
GREY[0, 0, 0], FLAT[1] = 7, 80


@pytest.mark.parametrize(
    "images, labels, error, match",
    [
        (IMAGES, None, FileNotFoundError, r"lacks train-labels\.tif \(train-volume\.tif\).*download=True"),
        (None, None, FileNotFoundError, r"lacks train-volume\.tif and train-labels\.tif \(it is empty\)"),
        (IMAGES, LABELS[:2], ValueError, r"train-labels\.tif has 2 pages of 10×14 but train-volume\.tif has 3 pages"),
        (IMAGES, LABELS[:, :8], ValueError, r"has 3 pages of 8×14 but train-volume\.tif has 3 pages of 10×14"),
        (IMAGES, INVERTED, ValueError, "is inverted or belongs to other images"),
        (IMAGES, GREY, ValueError, r"train-labels\.tif holds 7; expected 0 \(membrane\) and 255"),
        (IMAGES, 0 * LABELS, ValueError, "is 0 everywhere; expected 0 on membranes"),
        (FLAT, LABELS, ValueError, r"page 2 of .*train-volume\.tif is 80 everywhere"),
        (IMAGES.astype(np.uint16), LABELS, ValueError, r"page 1 of .* has pixels of kind 'I;16'; expected grey"),
        (np.stack([IMAGES] * 3, -1), LABELS, ValueError, "has pixels of kind 'RGB'"),
        ([IMAGES[0], IMAGES[1][:, :9]], LABELS, ValueError, "page 2 of .* is 10×9 but page 1 is 10×14"),
        (tiff(IMAGES)[:-150], LABELS, ValueError, r"train-volume\.tif cannot be read .*truncated or damaged"),
        (b"<!DOCTYPE html><html>", LABELS, ValueError, "is a web page, not an image"),
        (b"version https://git-lfs.github.com/spec/v1", LABELS, ValueError, "is a Git-LFS pointer"),
        (b"", LABELS, ValueError, "is not a TIFF file"),
        (b"just text", LABELS, ValueError, "is not a TIFF file"),
    ],
)
def test_isbi_defects_are_named(em_folder, images, labels, error, match):
    folder = em_folder(images, labels)
    with pytest.raises(error, match=match):
        isbi2012(folder)


def archive(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in files.items():
            file.writestr(name.replace("__", "/"), data)
    return content.getvalue()


@pytest.fixture
def challenge(server, monkeypatch):
    """`challenge(content)`: what the challenge's server answers."""
    monkeypatch.setattr(ISBI, "URL", f"{server.url}/isbi.zip")
    return lambda content: server.files.update({"/isbi.zip": content})


def test_isbi_downloads_only_on_an_explicit_word(challenge, server, tmp_path):
    member = {"..__..__train-volume.tif": tiff(IMAGES), "data__train-labels.tif": tiff(LABELS), "..__evil": b"x"}
    challenge(archive(**member))
    folder = tmp_path / "isbi"
    with pytest.raises(ValueError, match=r"checksum of .* is not known.*unverified=True"):
        isbi2012(folder, download=True)
    assert server.asked == []
    case = isbi2012(folder, download=True, unverified=True)
    assert case.shape == (14, 10, 3)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["train-labels.tif", "train-volume.tif"]


@pytest.mark.parametrize(
    "content, match",
    [
        (b"PK but no archive", "is not a complete zip archive"),
        (b"<html>sign in</html>", "answered with a web page"),
        (archive(**{"train-volume.tif": b"1"}), r"holds 0 files called train-labels\.tif, expected one"),
        (archive(**{"a__train-volume.tif": b"1", "b__train-volume.tif": b"2"}), r"holds 2 files called train-volume\.tif"),
    ],
)
def test_isbi_download_of_something_else_leaves_nothing(challenge, tmp_path, content, match):
    challenge(content)
    with pytest.raises(ValueError, match=match):
        download_isbi2012(tmp_path / "isbi", unverified=True)
    assert list(tmp_path.rglob("*")) == []


# --------------------------------------------------------------------------------------------------------- PROMISE12


def mhd(path, array, spacing=(0.6, 0.6, 3.6)):
    types = {"uint8": "MET_UCHAR", "int16": "MET_SHORT", "float32": "MET_FLOAT"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"ObjectType = Image\nNDims = 3\nElementSpacing = {' '.join(map(str, spacing))}\n"
        f"DimSize = {' '.join(map(str, array.shape))}\nElementType = {types[array.dtype.name]}\nElementDataFile = {path.stem}.raw\n"
    )
    path.with_suffix(".raw").write_bytes(array.tobytes(order="F"))
    return path


def promise_case(folder, name="Case00", seed=0, shape=(6, 7, 4)):
    image = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[2:4, 3:5, 1:3] = 1
    mhd(folder / f"{name}.mhd", image)
    mhd(folder / f"{name}_segmentation.mhd", label)
    return image, label


def test_promise12_reads_cases_on_demand(tmp_path):
    image, label = promise_case(tmp_path / "training_data")
    promise_case(tmp_path / "training_data", "Case01", 1)
    mhd(tmp_path / "test" / "Case30.mhd", image)
    (tmp_path / "training_data" / "._Case02.mhd").write_bytes(b"Mac OS X")
    cohort = promise12(tmp_path)
    assert cohort.names == ["Case00", "Case01", "Case30"] and len(cohort) == 3
    case = cohort["Case00"]
    np.testing.assert_array_equal(case.image[0], image[::-1, ::-1])  # stored LPS
    np.testing.assert_array_equal(case.label, label[::-1, ::-1])
    assert case.spacing == pytest.approx((0.6, 0.6, 3.6)) and case.channels == ("t2",) and case.name == "Case00"
    assert case.info["classes"] == ("background", "prostate") and case.native_axes == "LPS"
    assert cohort[2].label is None and cohort[-1].name == "Case30"
    assert cohort[1:].names == ["Case01", "Case30"] and [c.name for c in cohort[:2]] == ["Case00", "Case01"]
    assert promise12(tmp_path, cases=["Case30", "Case00"]).names == ["Case30", "Case00"]
    assert repr(cohort) == "Cohort(3 cases: Case00, Case01, Case30)"
    with pytest.raises(KeyError, match="no case is called 'Case99'; there are Case00"):
        cohort["Case99"]
    with pytest.raises(IndexError):
        cohort[3]


def damage_raw(folder):
    (folder / "Case00.raw").unlink()


def damage_size(folder):
    (folder / "Case00.raw").write_bytes(b"\1" * 10)


def damage_label(folder):
    mhd(folder / "Case00_segmentation.mhd", np.full((6, 7, 4), 3, np.uint8))


def damage_empty(folder):
    mhd(folder / "Case00_segmentation.mhd", np.zeros((6, 7, 4), np.uint8))


def damage_shape(folder):
    mhd(folder / "Case00_segmentation.mhd", np.ones((6, 7, 3), np.uint8))


def damage_affine(folder):
    mhd(folder / "Case00_segmentation.mhd", np.ones((6, 7, 4), np.uint8), spacing=(1, 1, 1))


def damage_image(folder):
    mhd(folder / "Case00.mhd", np.zeros((6, 7, 4), np.int16))


def damage_nan(folder):
    image = np.ones((6, 7, 4), np.float32)
    image[0, 0, 0] = np.nan
    mhd(folder / "Case00.mhd", image)


@pytest.mark.parametrize(
    "damage, error, match",
    [
        (damage_raw, FileNotFoundError, r"Case00\.raw, which holds the voxels of Case00\.mhd, does not exist"),
        (damage_size, ValueError, r"Case00\.raw holds 10 bytes of voxels; expected 336"),
        (damage_label, ValueError, r"Case00_segmentation\.mhd holds label 3; expected only 0, 1"),
        (damage_empty, ValueError, r"Case00_segmentation\.mhd is empty: no voxel is prostate"),
        (damage_shape, ValueError, r"Case00_segmentation\.mhd is 6×7×3 but Case00\.mhd is 6×7×4"),
        (damage_affine, ValueError, "have the same size but lie elsewhere in the world"),
        (damage_image, ValueError, r"Case00\.mhd is 0 everywhere"),
        (damage_nan, ValueError, "has 1 NaN or infinite voxels"),
    ],
)
def test_promise12_defects_are_named(tmp_path, damage, error, match):
    promise_case(tmp_path)
    damage(tmp_path)
    cohort = promise12(tmp_path)
    with pytest.raises(error, match=match):
        cohort[0]


def test_data_sets_that_are_not_there(tmp_path):
    for function, match in ((promise12, r"has no CaseNN\.mhd; it holds x"), (lits, r"has no volume-N\.nii; it holds x")):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            function(tmp_path / "no")
        (tmp_path / "x").touch()
        with pytest.raises(FileNotFoundError, match=match):
            function(tmp_path)
    promise_case(tmp_path)
    with pytest.raises(ValueError, match=r"cases is \['Case07'\], but .* has Case00"):
        promise12(tmp_path, cases="Case07")


# -------------------------------------------------------------------------------------------------------------- LiTS


def lits_case(folder, number=0, *, affine=None, labels=(0, 1, 2), dtype=np.uint8, lowest=-3024):
    affine = np.diag([-0.7, -0.7, 2.5, 1]) if affine is None else affine
    image = np.random.default_rng(number).integers(-900, 300, (5, 6, 7)).astype(np.int16)
    image[0, 0] = lowest
    nifti(folder / f"volume-{number}.nii", image, affine)
    label = classes(number, (5, 6, 7), labels).astype(dtype)
    nifti(folder / f"segmentation-{number}.nii", label, affine)
    return image, label


def test_lits_reads_cases_in_the_order_of_their_numbers(tmp_path):
    image, label = lits_case(tmp_path / "Training Batch 1", 2)
    lits_case(tmp_path / "Training Batch 2", 10, lowest=-1000)
    lits_case(tmp_path / "Training Batch 2", 11, dtype=np.float64)
    nifti(tmp_path / "test" / "volume-111.nii.gz", image, np.diag([1, 1, 2, 1]))
    (tmp_path / "._volume-3.nii").write_bytes(b"Mac OS X")
    cohort = lits(tmp_path)
    assert cohort.names == ["volume-2", "volume-10", "volume-11", "volume-111"]
    case = cohort[0]
    np.testing.assert_array_equal(case.image[0], image[::-1, ::-1])
    np.testing.assert_array_equal(case.label, label[::-1, ::-1])
    assert case.info["padding"] == -3024 and case.info["classes"] == ("background", "liver", "lesion")
    assert np.array_equal(case.mask, case.image[0] != -3024) and not case.mask.all()
    assert "padding" not in cohort[1].info and cohort[1].mask is None
    assert cohort["volume-11"].label.dtype == np.uint8  # whole numbers stored as float
    assert cohort["volume-111"].label is None


def test_lits_volumes_without_an_affine(tmp_path):
    lits_case(tmp_path, 28, affine=np.eye(4))
    with pytest.raises(ValueError, match=r"volume-28\.nii has an identity affine.*volumes 28 to 47.*identity_affine=True"):
        lits(tmp_path)[0]
    assert lits(tmp_path, identity_affine=True)[0].spacing == (1, 1, 1)


def test_lits_defects_are_named(tmp_path):
    lits_case(tmp_path, 0, labels=(0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"segmentation-0\.nii holds label 3; expected only 0, 1, 2"):
        lits(tmp_path)[0]
    lits_case(tmp_path, 0)
    nifti(tmp_path / "segmentation-0.nii", classes(0, (5, 6, 7), (0, 1)), np.diag([0.7, -0.7, 2.5, 1]))
    with pytest.raises(ValueError, match=r"lie elsewhere in the world \(RPS against LPS\)"):
        lits(tmp_path)[0]
    nifti(tmp_path / "segmentation-0.nii", np.full((5, 6, 7), 0.5), np.diag([-0.7, -0.7, 2.5, 1]))
    with pytest.raises(ValueError, match=r"holds 0\.5, not a whole class number"):
        lits(tmp_path)[0]
    (tmp_path / "volume-0.nii").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"volume-0\.nii is a Git-LFS pointer"):
        lits(tmp_path)[0]


# --------------------------------------------------------------------------------------------------------- Decathlon


PROSTATE = {
    "modality": {"0": "T2", "1": "ADC"},
    "labels": {"0": "background", "1": "PZ", "2": "TZ"},
    "training": [
        {"image": "./imagesTr/prostate_00.nii.gz", "label": "./labelsTr/prostate_00.nii.gz"},
        {"image": "./imagesTr/prostate_01.nii.gz", "label": "./labelsTr/prostate_01.nii.gz"},
    ],
    "test": ["./imagesTs/prostate_03.nii.gz"],
}


@pytest.fixture
def decathlon(tmp_path):
    """`decathlon(**changes)`: Task05 in small, with another dataset.json."""

    def make(**changes):
        root = tmp_path / "Task05_Prostate"
        for n, name in enumerate(("imagesTr/prostate_00", "imagesTr/prostate_01", "imagesTs/prostate_03")):
            image = np.random.default_rng(n).normal(size=(5, 6, 4, 2)).astype(np.float32)
            nifti(root / f"{name}.nii.gz", image)
            if "Tr" in name:
                nifti(root / f"{name}.nii.gz".replace("images", "labels"), classes(n, (5, 6, 4), (0, 1, 2)))
        (root / "dataset.json").write_text(json.dumps({**PROSTATE, **changes}))
        (root / "imagesTr" / "._prostate_00.nii.gz").write_bytes(b"Mac OS X")
        return root

    return make


def test_msd_reads_what_dataset_json_lists(decathlon):
    root = decathlon()
    cohort = msd(root)
    assert cohort.names == ["prostate_00", "prostate_01"]
    case = cohort["prostate_01"]
    assert case.channels == ("t2", "adc") and case.info["classes"] == ("background", "PZ", "TZ")
    stored = nibabel.load(root / "imagesTr" / "prostate_01.nii.gz").get_fdata()
    np.testing.assert_array_equal(case.image, np.moveaxis(stored, -1, 0).astype(np.float32))
    np.testing.assert_array_equal(case.label, classes(1, (5, 6, 4), (0, 1, 2)))
    (test,) = msd(root, split="test")
    assert test.name == "prostate_03" and test.label is None
    assert msd(root, cases="prostate_01").names == ["prostate_01"]
    with pytest.raises(ValueError, match="split is 'train'; expected 'training' or 'test'"):
        msd(root, split="train")


def test_msd_of_one_channel(decathlon):
    root = decathlon(modality={"0": "CT"}, labels={"0": "background", "1": "liver", "2": "cancer"})
    image = np.random.default_rng(0).normal(size=(5, 6, 4)).astype(np.float32)
    nifti(root / "imagesTr" / "prostate_00.nii.gz", image)
    case = msd(root)[0]
    assert case.channels == ("ct",) and case.image.shape == (1, 5, 6, 4) and case.info["dataset"] == "Task05_Prostate"
    nifti(root / "imagesTr" / "prostate_00.nii.gz", image[..., None])  # a trailing axis of length one
    np.testing.assert_array_equal(msd(root)[0].image, case.image)


def test_msd_ignores_what_macos_left(decathlon):
    listed = [{"image": "./imagesTr/._prostate_00.nii.gz", "label": "./labelsTr/._prostate_00.nii.gz"}]
    assert msd(decathlon(training=listed + PROSTATE["training"])).names == ["prostate_00", "prostate_01"]


def test_msd_defects_are_named(decathlon, tmp_path):
    root = decathlon()
    image, label = root / "imagesTr" / "prostate_00.nii.gz", root / "labelsTr" / "prostate_00.nii.gz"
    for path, content, match in [
        (image, np.ones((5, 6, 4), np.float32), r"prostate_00\.nii\.gz holds 1 volumes \(5×6×4\); expected 2: t2, adc"),
        (image, np.ones((5, 6, 4, 2), np.float32), "is 1 everywhere"),
        (image, np.full((5, 6, 4, 2), np.inf, np.float32), "has 120 NaN or infinite voxels"),
        (label, np.full((5, 6, 4), 7, np.uint8), "holds label 7; expected only 0, 1, 2"),
        (label, np.ones((5, 6, 3), np.uint8), "is 5×6×3 but prostate_00"),
    ]:
        decathlon()
        nifti(path, content)
        with pytest.raises(ValueError, match=match):
            msd(root)[0]
    decathlon()
    image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(ValueError, match="truncated or damaged"):
        msd(root)[0]
    image.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"dataset\.json lists .*prostate_00\.nii\.gz, which does not exist \(there is prostate_01"
    ):
        msd(root)[0]
    with pytest.raises(FileNotFoundError, match=r"dataset\.json does not exist; .* holds Task05_Prostate/: point at the task"):
        msd(tmp_path)


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(modality={"first": "T2"}), "is not a description of a Decathlon task"),
        (dict(labels=[1, 2]), "is not a description of a Decathlon task"),
        (dict(training=["a"]), "is not a description"),
        (dict(labels={}), "is not a description"),
        (dict(labels={"0": "background", "999999999999": "much"}), "is not a description"),
        (dict(training=[]), "lists no training cases"),
        (dict(training=[{"image": "../a.nii.gz", "label": "b.nii.gz"}]), r"lists '\.\./a\.nii\.gz', which lies outside"),
        (dict(training=[{"image": "a.nii.gz", "label": "/etc/b.nii.gz"}]), "lists '/etc/b.nii.gz', which lies outside"),
    ],
)
def test_msd_descriptions_that_are_wrong(decathlon, changes, match):
    with pytest.raises(ValueError, match=match):
        msd(decathlon(**changes))


def test_msd_description_that_is_no_json(decathlon):
    root = decathlon()
    (root / "dataset.json").write_text("<html>")
    with pytest.raises(ValueError, match="is not a description of a Decathlon task"):
        msd(root)


BRAIN = {
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
    "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
    "test": ["./imagesTs/BRATS_485.nii.gz"],
}


def brain_task(root):
    """Task01 in small, and what its first case holds."""
    image = np.stack([scan(n, (6, 5, 4)) for n in range(4)], axis=-1)
    label = np.where(image[..., 0] > 0, classes(1, (6, 5, 4), (0, 1, 2, 3)), 0).astype(np.uint8)
    nifti(root / "imagesTr" / "BRATS_001.nii.gz", image)
    nifti(root / "labelsTr" / "BRATS_001.nii.gz", label.astype(np.float32))
    nifti(root / "imagesTs" / "BRATS_485.nii.gz", image)
    (root / "dataset.json").write_text(json.dumps(BRAIN))
    return image, label


def test_msd_brain_in_the_numbers_of_brats(tmp_path):
    image, label = brain_task(tmp_path)
    (plain,), (case,) = msd(tmp_path), msd(tmp_path, as_brats=True)
    assert plain.channels == ("flair", "t1w", "t1gd", "t2w") and np.array_equal(plain.label, label)
    assert case.channels == ("flair", "t1", "t1c", "t2") and case.info["classes"][4] == "enhancing tumour"
    np.testing.assert_array_equal(case.image, plain.image)
    np.testing.assert_array_equal(case.label, np.array([0, 2, 1, 4])[label])
    np.testing.assert_array_equal(case.mask, (image != 0).any(-1))
    # Whole, core and enhancing tumour are the same in either year's regions.
    for year in ("brats2015", "brats2017"):
        table = metrics.evaluate(case.label, case.label, regions=year, metrics=["dice"])
        assert (table["dice"] == 1).all()
        voxels = {region: np.isin(case.label, list(numbers)).sum() for region, numbers in metrics.regions[year].items()}
        assert voxels == {"whole": (label > 0).sum(), "core": (label > 1).sum(), "enhancing": (label == 3).sum()}
    (test,) = msd(tmp_path, split="test", as_brats=True)
    assert test.label is None and test.channels == case.channels


def test_only_the_brain_task_has_the_numbers_of_brats(decathlon):
    with pytest.raises(ValueError, match=r"as_brats=True is for Task01_BrainTumour; .* has channels t2, adc and classes"):
        msd(decathlon(), as_brats=True)


@pytest.fixture
def decathlon_server(server, tmp_path, monkeypatch):
    brain_task(tmp_path / "upstream" / "Task01_BrainTumour")
    content = tarball(
        {
            p.relative_to(tmp_path / "upstream").as_posix(): p.read_bytes()
            for p in sorted((tmp_path / "upstream").rglob("*"))
            if p.is_file()
        }
        | {"Task01_BrainTumour/imagesTr/._BRATS_001.nii.gz": b"Mac OS X"}
    )
    server.files["/Task01_BrainTumour.tar"] = content
    monkeypatch.setattr(MSD, "URL", server.url)
    monkeypatch.setitem(MSD.TASKS, "msd01_brain", ("Task01_BrainTumour", hashlib.md5(content).hexdigest()))
    monkeypatch.setenv("MEDSEG_DATA_DIR", str(tmp_path / "data"))
    return server


def test_msd_downloads_once_and_is_found_by_its_name(decathlon_server, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fetch it with `python -m medseg_lite download msd01_brain`"):
        msd("msd01_brain")
    for _ in range(2):
        assert download_msd("msd01_brain") == tmp_path / "data" / "msd01_brain"
    assert decathlon_server.asked == ["/Task01_BrainTumour.tar"]
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["msd01_brain"]
    assert msd("msd01_brain", as_brats=True).names == ["BRATS_001"]
    assert datasets.downloads["msd01_brain"](tmp_path / "elsewhere") == tmp_path / "elsewhere"
    with pytest.raises(ValueError, match="name is 'msd02'; expected one of msd01_brain"):
        download_msd("msd02")


def test_a_download_never_touches_a_folder_of_something_else(decathlon_server, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="mine exists and is not this data set"):
        download_msd("msd01_brain", tmp_path / "mine")
    assert decathlon_server.asked == [] and [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_damaged_decathlon_archive_leaves_nothing(decathlon_server, tmp_path):
    decathlon_server.files["/Task01_BrainTumour.tar"] += b"more"
    with pytest.raises(ValueError, match=r"Task01_BrainTumour\.tar arrived with md5 .*; expected"):
        download_msd("msd01_brain")
    assert not (tmp_path / "data").exists()


def test_promise12_downloads(server, tmp_path, monkeypatch):
    image, _ = promise_case(tmp_path / "upstream")
    content = zipped({f"training_data/{p.name}": p.read_bytes() for p in (tmp_path / "upstream").iterdir()})
    server.files["/training_data.zip"] = content
    monkeypatch.setattr(PROMISE, "URL", f"{server.url}/training_data.zip")
    monkeypatch.setattr(PROMISE, "MD5", hashlib.md5(content).hexdigest())
    for _ in range(2):
        folder = download_promise12(tmp_path / "p")
    assert len(server.asked) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["p", "upstream"]
    np.testing.assert_array_equal(promise12(folder)[0].image[0], image[::-1, ::-1])


def test_downloads_on_the_command_line(decathlon_server, tmp_path, capsys):
    assert cli.main(["download", "msd01_brain"]) == 0
    assert f"msd01_brain is ready in {tmp_path / 'data' / 'msd01_brain'}" in capsys.readouterr().out
    options = cli._parser().parse_args(["evaluate", "--predictions", "p", "--data", "msd01_brain"])
    (case,) = cli._cases(options, label=True, normalise="standardise")
    assert case.name == "BRATS_001" and set(np.unique(case.label)) == {0, 1, 2, 4}
    for arguments, match in [
        (["promise12", "--unverified"], "--unverified: the checksum of promise12 is known; leave it out"),
        (["isbi2012"], "is not known, so a download cannot be verified"),
    ]:
        assert cli.main(["download", *arguments]) == 1
        assert match in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- BRATS from 2015 on


def mha(path, array):
    types = {"uint8": "MET_UCHAR", "int16": "MET_SHORT"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        f"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = "
        f"{' '.join(map(str, array.shape))}\nElementType = {types[array.dtype.name]}\nElementDataFile = LOCAL\n".encode()
        + array.tobytes(order="F")
    )


def brats2015_case(place, number: int, truth: bool = True):
    """A case as it was handed out, and its stored arrays in the order flair, t1, t1c, t2 and label."""
    arrays = [(100 * scan(number + n)).astype(np.int16) for n in range(4)]
    label = np.where(arrays[0] > 0, classes(number, among=range(5)), 0).astype(np.uint8)
    for n, (sequence, array) in enumerate(zip(("Flair", "T1", "T1c", "T2"), arrays)):
        name = f"VSD.Brain.XX.O.MR_{sequence}.{54512 + n}"
        mha(place / name / f"{name}.mha", array)
        (place / name / "license_CC_BY_NC_SA_3.0.txt").touch()
    if truth:
        name = f"VSD.Brain_3more.XX.O.OT.{54517}"
        mha(place / name / f"{name}.mha", label)
    return arrays, label


def test_brats2015(tmp_path):
    arrays, label = brats2015_case(tmp_path / "HGG" / "brats_2013_pat0001_1", 0)
    brats2015_case(tmp_path / "LGG" / "brats_tcia_pat101_0001", 1)
    (tmp_path / "HGG" / "._brats_2013_pat0001_1").mkdir()
    cohort = brats2015(tmp_path)
    assert cohort.names == ["brats_2013_pat0001_1", "brats_tcia_pat101_0001"]
    case = cohort[0]
    assert case.channels == ("flair", "t1", "t1c", "t2") and case.native_axes == "LPS"
    np.testing.assert_array_equal(case.image, np.stack(arrays)[:, ::-1, ::-1])  # T1 is not T1c
    np.testing.assert_array_equal(case.label, label[::-1, ::-1])
    np.testing.assert_array_equal(case.mask, (np.stack(arrays) != 0).any(0)[::-1, ::-1])
    assert [c.info["grade"] for c in cohort] == ["HGG", "LGG"] and case.info["classes"][3] == "non-enhancing tumour"
    assert brats2015(tmp_path, grades=["LGG"]).names == ["brats_tcia_pat101_0001"]
    assert brats2015(tmp_path / "LGG").names == ["brats_tcia_pat101_0001"]
    assert "grade" not in brats2015(tmp_path / "LGG")[0].info
    assert brats2015(tmp_path, cases=["brats_tcia_pat101_0001"]).names == ["brats_tcia_pat101_0001"]


def test_brats2015_defects(tmp_path):
    place = tmp_path / "HGG" / "p1"
    brats2015_case(place, 0, truth=False)
    with pytest.raises(ValueError, match=r"p1 has 0 files for the label, expected one; .* holds VSD.*label_optional=True"):
        brats2015(tmp_path)[0]
    assert brats2015(tmp_path, label_optional=True)[0].label is None
    (flair,) = place.glob("*Flair*/*.mha")
    mha(place / "copy" / flair.name, scan().astype(np.int16))
    with pytest.raises(ValueError, match="p1 has 2 files for flair, expected one"):
        brats2015(tmp_path, label_optional=True)[0]
    for path in place.glob("**/*MR_T1.*.mha"):
        path.unlink()
    (place / "copy" / flair.name).unlink()
    with pytest.raises(ValueError, match=r"p1 has 0 files for t1, expected one; .*MR_T1c"):
        brats2015(tmp_path, label_optional=True)[0]
    _, label = brats2015_case(place, 0)
    (truth,) = place.glob("*OT*/*.mha")
    mha(truth, 0 * label)
    with pytest.raises(ValueError, match=r"OT\.54517\.mha is empty: no voxel is tumour"):
        brats2015(tmp_path)[0]
    mha(truth, label + np.uint8(1))
    with pytest.raises(ValueError, match=r"OT\.54517\.mha holds label 5; expected only 0, 1, 2, 3, 4"):
        brats2015(tmp_path)[0]
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder.*by registration"):
        brats2015(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no cases of BRATS 2015; it holds VSD"):
        brats2015(place)


LATER = {
    2018: ("{}_flair.nii.gz", "{}_t1.nii.gz", "{}_t1ce.nii.gz", "{}_t2.nii.gz", "{}_seg.nii.gz"),
    2020: ("{}_flair.nii", "{}_t1.nii", "{}_t1ce.nii", "{}_t2.nii", "{}_seg.nii"),
    2023: ("{}-t2f.nii.gz", "{}-t1n.nii.gz", "{}-t1c.nii.gz", "{}-t2w.nii.gz", "{}-seg.nii.gz"),
    2024: ("{0}-t2f.nii.gz/{0}-t2f.nii", "{}-t1n.nii.gz", "{}-t1c.nii.gz", "{}-t2w.nii.gz", "{}-seg.nii.gz"),
}


def later_case(root, name, year, seed=0):
    arrays = [scan(seed + n) for n in range(4)]
    highest = 4 if year < 2023 else 3
    label = np.where(arrays[0] > 0, classes(seed, among=(0, 1, 2, highest)), 0).astype(np.uint8)
    for pattern, array in zip(LATER[year], [*arrays, label]):
        nifti(root / name / pattern.format(name), array, np.diag([-1.0, -1, 1, 1]))
    return arrays, label


@pytest.mark.parametrize("year", LATER)
def test_brats_of_later_years(tmp_path, year):
    arrays, label = later_case(tmp_path / "HGG", "BraTS_b", year)
    later_case(tmp_path / "LGG", "BraTS_a", year, seed=5)
    (tmp_path / "HGG" / "BraTS_b" / "._BraTS_b_flair.nii.gz").write_bytes(b"Mac OS X")
    cohort = brats2017(tmp_path)
    assert cohort.names == ["BraTS_a", "BraTS_b"]
    case = cohort["BraTS_b"]
    assert case.channels == ("flair", "t1", "t1c", "t2") and case.native_axes == "LPS"
    np.testing.assert_array_equal(case.image, np.stack(arrays)[:, ::-1, ::-1])
    expected = np.where(label == 3, 4, label)[::-1, ::-1]
    np.testing.assert_array_equal(case.label, expected)
    assert set(np.unique(case.label)) == {0, 1, 2, 4} and case.info["dataset"] == ("brats2023" if year > 2022 else "brats2017")
    np.testing.assert_array_equal(case.mask, (np.stack(arrays) != 0).any(0)[::-1, ::-1])


def test_brats_truth_under_another_name(tmp_path):
    name = "BraTS20_Training_355"
    _, label = later_case(tmp_path, name, 2020)
    truth = tmp_path / name / f"{name}_seg.nii"
    truth.rename(truth.with_name("W39_1998.09.19_Segm.nii"))
    np.testing.assert_array_equal(brats2017(tmp_path)[0].label, label[::-1, ::-1])
    truth.with_name("W39_1998.09.19_Segm.nii").unlink()
    with pytest.raises(ValueError, match=rf"{name} has 0 files for the label, expected one; .* holds {name}_flair"):
        brats2017(tmp_path)[0]
    assert brats2017(tmp_path, label_optional=True)[0].label is None


def test_brats_defects_of_later_years(tmp_path):
    later_case(tmp_path, "a", 2018)
    nifti(tmp_path / "a" / "a_seg.nii.gz", classes(among=(0, 1, 3)), np.diag([-1.0, -1, 1, 1]))
    with pytest.raises(ValueError, match=r"a_seg\.nii\.gz holds label 3; expected only 0, 1, 2, 4"):
        brats2017(tmp_path)[0]
    later_case(tmp_path, "a", 2018)
    (tmp_path / "a" / "a_t1ce.nii.gz").unlink()
    with pytest.raises(ValueError, match="a has 0 files for t1c, expected one"):
        brats2017(tmp_path)[0]
    later_case(tmp_path, "a", 2018)
    nifti(tmp_path / "a" / "a_t2.nii.gz", scan(), np.eye(4))
    with pytest.raises(ValueError, match=r"a_t2\.nii\.gz and a_flair\.nii\.gz have the same size but lie elsewhere"):
        brats2017(tmp_path)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no CASE_flair\.nii\.gz .*; it holds nothing"):
        brats2017(tmp_path / "empty")
