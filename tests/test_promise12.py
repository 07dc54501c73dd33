"""PROMISE12: found, read, checked and downloaded."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
from small_files import mhd, promise_case, zipped

from medseg_lite.datasets import download_promise12, promise12

# The package shows the function under the name of the module.
PROMISE = sys.modules["medseg_lite.datasets.promise12"]


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
