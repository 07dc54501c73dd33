"""Real data: the shipped network on a scan that it has not been trained on, and the EM stack beside its phantom."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from medseg_lite import inference, metrics, models, paths, phantoms, transforms
from medseg_lite.files import write_nifti

FOLDER, EM = paths.real_data("brats2013_deepmedic"), paths.real_data("isbi2012")
pytestmark = pytest.mark.real


def needs(folder):
    return pytest.mark.skipif(not folder.is_dir(), reason=f"{folder} is not there: set MEDSEG_DATA_DIR to real scans")


@needs(FOLDER)
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


@needs(EM)
def test_the_real_em_stack_and_its_phantom_are_alike():
    from medseg_lite.datasets import isbi2012

    real, phantom = isbi2012(), phantoms.em(0)
    assert real.shape[:2] == (512, 512) and real.shape[2] in (20, 30)
    assert real.label.mean() == pytest.approx(0.22, abs=0.02)
    assert real.channels == phantom.channels and real.info["classes"] == phantom.info["classes"]
    assert phantom.image.mean() == pytest.approx(real.image.mean(), rel=0.2)
    assert phantom.image.std() == pytest.approx(real.image.std(), rel=0.2)
    for k in (0, 1):  # mean grey value of cells and of membranes
        assert phantom.image[0][phantom.label == k].mean() == pytest.approx(real.image[0][real.label == k].mean(), rel=0.2)
