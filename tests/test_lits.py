"""LiTS: found, read and checked."""

from __future__ import annotations

import numpy as np
import pytest
from small_files import classes, nifti

from medseg_lite.datasets import lits


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
