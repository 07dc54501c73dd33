"""The data sets together: their names, and messages about data that are not there."""

from __future__ import annotations

import sys

import pytest
from small_files import promise_case

from medseg_lite import datasets
from medseg_lite.datasets import download_brats2013_deepmedic, lits, promise12

# The package shows the function under the name of the module.
BRATS = sys.modules["medseg_lite.datasets.brats2013_deepmedic"]
MSD = sys.modules["medseg_lite.datasets.msd"]
PROMISE = sys.modules["medseg_lite.datasets.promise12"]


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


def test_names_of_cases_are_known_without_reading_a_cohort(noise_case):
    def never():
        raise AssertionError("a case was read")

    assert datasets.case_names(datasets.Cohort({"a": never, "b": never})) == ["a", "b"]
    assert datasets.case_names([noise_case(name="x"), noise_case(name="y")]) == ["x", "y"]
