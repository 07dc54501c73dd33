"""Data sets: downloads that arrive whole or not at all, and folders of scans with all their usual faults."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg_lite import datasets, paths
from medseg_lite.datasets import (
    NiftiFolder,
    brats2013_deepmedic,
    download_brats2013_deepmedic,
    download_isbi2012,
    isbi2012,
    lits,
    msd,
    nifti_folder,
    promise12,
)
from medseg_lite.datasets._download import fetch
from medseg_lite.volume import read_case, write_nifti

# The package shows the function under the module's name.
BRATS = sys.modules["medseg_lite.datasets.brats2013_deepmedic"]
ISBI = sys.modules["medseg_lite.datasets.isbi2012"]


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
    """Answers each path with what `files` holds; a path in `cut` announces more bytes than it sends."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                content = outer.files.get(self.path)
                self.send_response(404 if content is None else 200)
                content = b"not here" if content is None else content
                self.send_header("Content-Length", str(len(content) * (2 if self.path in outer.cut else 1)))
                self.end_headers()
                self.wfile.write(content)

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


def test_a_connection_that_breaks_off_leaves_nothing_behind(server, tmp_path):
    server.files["/a.nii.gz"] = GOOD
    server.cut.add("/a.nii.gz")
    with pytest.raises((ConnectionError, ValueError), match=r"could not be downloaded|arrived with sha256"):
        fetch(f"{server.url}/a.nii.gz", tmp_path / "case" / "a.nii.gz", sha256=hashlib.sha256(GOOD * 2).hexdigest())
    assert list(tmp_path.iterdir()) == []


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
    assert repr(cohort) == "NiftiFolder(2 cases: BraTS20_001, BraTS20_002)"
    case = cohort[1]
    assert case.name == "BraTS20_002" and case.channels == ("flair", "t1c")
    assert np.array_equal(case.image, [scan(1), scan(11)]) and np.array_equal(case.label, classes(1))
    assert np.array_equal(case.mask, scan() > 0)
    assert cohort["BraTS20_002"].name == cohort[-1].name == case.name
    assert isinstance(cohort[:1], NiftiFolder) and [c.name for c in cohort[:1]] == ["BraTS20_001"]
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
        (
            archive(**{"a__train-volume.tif": b"1", "b__train-volume.tif": b"2"}),
            r"holds 2 files called train-volume\.tif",
        ),
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
    for function, match in (
        (promise12, r"has no CaseNN\.mhd; it holds x"),
        (lits, r"has no volume-N\.nii; it holds x"),
    ):
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
    with pytest.raises(
        ValueError, match=r"volume-28\.nii has an identity affine.*volumes 28 to 47.*identity_affine=True"
    ):
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
        FileNotFoundError, match=r"dataset\.json lists .*prostate_00\.nii\.gz, which does not exist \(prostate_01"
    ):
        msd(root)[0]
    with pytest.raises(
        FileNotFoundError, match=r"dataset\.json does not exist; .* holds Task05_Prostate: point at the task"
    ):
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
        (
            dict(training=[{"image": "../a.nii.gz", "label": "b.nii.gz"}]),
            r"lists '\.\./a\.nii\.gz', which lies outside",
        ),
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
