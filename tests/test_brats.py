"""BRATS from 2015 on, in all the layouts in which it was handed out."""

from __future__ import annotations

import numpy as np
import pytest
from small_files import classes, nifti, scan

from medseg_lite.datasets import brats2015, brats2017


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
