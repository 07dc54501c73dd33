"""The shipped network on a real scan that it has not been trained on."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from medseg_lite import inference, metrics, models, paths, transforms
from medseg_lite.volume import write_nifti

FOLDER = paths.real_data("brats2013_deepmedic")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is not there: set MEDSEG_DATA_DIR to real scans"),
]


def test_the_shipped_deepmedic_finds_a_real_tumour(tmp_path):
    from medseg_lite.datasets import brats2013_deepmedic

    model = models.load(paths.shipped("checkpoints", "deepmedic_brats2013.safetensors"))
    name = model.card["test_case"]
    (case,) = brats2013_deepmedic(cases=[name])
    assert model.card["normalise"] == "standardise"
    case = transforms.standardise(case.select(model.card["channels"]))
    labels = inference.predict(model, case, progress=False)
    assert metrics.dice(labels > 0, case.label > 0) >= 0.82

    written = nibabel.load(write_nifti(tmp_path / "found.nii.gz", labels, case))
    (original,) = (p for p in FOLDER.glob(f"**/{name}/*.nii.gz") if "flair" in p.name.lower())
    original = nibabel.load(original)
    assert written.shape == original.shape
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-4)
    # The same voxels, counted on the original's own grid.
    truth = nibabel.load(next(p for p in FOLDER.glob(f"**/{name}/*.nii.gz") if "multiclass" in p.name.lower()))
    found = np.asarray(written.dataobj)
    assert found.max() < model.classes and metrics.dice(found > 0, np.asarray(truth.dataobj) > 0) >= 0.82
