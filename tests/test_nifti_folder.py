"""Folders of your own scans, with all their usual faults."""

from __future__ import annotations

import numpy as np
import pytest
from small_files import classes, nifti, scan

from medseg_lite.datasets import Cohort, nifti_folder

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
