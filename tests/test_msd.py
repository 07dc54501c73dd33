"""The Medical Segmentation Decathlon: read as dataset.json says, in the numbers of BRATS, and downloaded."""

from __future__ import annotations

import hashlib
import json
import sys

import nibabel
import numpy as np
import pytest
from small_files import classes, nifti, scan, tarball

from medseg_lite import cli, datasets, metrics
from medseg_lite.cli._data import read_cases
from medseg_lite.datasets import download_msd, msd

# The package shows the function under the name of the module.
MSD = sys.modules["medseg_lite.datasets.msd"]


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


def test_downloads_on_the_command_line(decathlon_server, tmp_path, capsys):
    assert cli.main(["download", "msd01_brain"]) == 0
    assert f"msd01_brain is ready in {tmp_path / 'data' / 'msd01_brain'}" in capsys.readouterr().out
    options = cli.make_parser().parse_args(["evaluate", "--predictions", "p", "--data", "msd01_brain"])
    (case,) = read_cases(options, label=True, normalise="standardise")
    assert case.name == "BRATS_001" and set(np.unique(case.label)) == {0, 1, 2, 4}
    for arguments, match in [
        (["promise12", "--unverified"], "--unverified: the checksum of promise12 is known; leave it out"),
        (["isbi2012"], "is not known, so a download cannot be verified"),
    ]:
        assert cli.main(["download", *arguments]) == 1
        assert match in capsys.readouterr().err


def test_a_task_given_as_a_dot_with_a_description_saved_by_windows(decathlon, monkeypatch):
    root = decathlon()
    (root / "dataset.json").write_text((root / "dataset.json").read_text("utf-8"), "utf-8-sig")
    monkeypatch.chdir(root)
    assert msd(".")[0].info["dataset"] == "Task05_Prostate"
