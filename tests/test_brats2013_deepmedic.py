"""DeepMedic's BRATS 2013 cases: downloaded, found and read."""

from __future__ import annotations

import hashlib
import sys

import nibabel
import numpy as np
import pytest
from small_files import classes, nifti, scan

from medseg_lite import paths
from medseg_lite.datasets import brats2013_deepmedic, download_brats2013_deepmedic

# The package shows the function under the name of the module.
BRATS = sys.modules["medseg_lite.datasets.brats2013_deepmedic"]


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
