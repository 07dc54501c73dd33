"""A reader's own scans, as scanners and other programs leave them: found, trained on and segmented where they lie in the world."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.processing import resample_from_to

from medseg_lite import datasets, models
from medseg_lite.cli import main

pytestmark = pytest.mark.slow

WORLD = nibabel.Nifti1Image(
    np.zeros((80, 80, 80), np.uint8), np.diag([1.0, 1, 1, 1]) + np.outer([-40, -40, -40, 0], [0, 0, 0, 1])
)
CENTRES = {"anna": (-12.0, 4.0, 6.0), "ben": (9.0, -8.0, -5.0), "cleo": (2.0, 10.0, 0.0)}  # of the lesions, mm
AXES = {"anna": "LSP", "ben": "PIR", "cleo": "SAL"}
SPACING, RADIUS, SHAPE = (1.5, 2.0, 3.0), 9.0, (40, 32, 24)  # along R, A, S
TILT = 0.2  # radians about the vertical axis: the head was not straight


def scan(name: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, label and affine in the axis order in which they are stored: a bright ball in a head of noise."""
    c, s = np.cos(TILT), np.sin(TILT)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * SPACING
    affine[:3, 3] = -affine[:3, :3] @ (np.array(SHAPE) - 1) / 2
    world = np.einsum("ij,j...->i...", affine[:3, :3], np.indices(SHAPE)) + affine[:3, 3].reshape(3, 1, 1, 1)
    head = np.linalg.norm(world, axis=0) < 34
    lesion = np.linalg.norm(world - np.reshape(CENTRES[name], (3, 1, 1, 1)), axis=0) < RADIUS
    image = (100 + 10 * np.random.default_rng(seed).standard_normal(SHAPE) + 80 * lesion) * head
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(AXES[name]))
    stored = affine @ inv_ornt_aff(turn, SHAPE)
    assert "".join(nibabel.aff2axcodes(stored)) == AXES[name]
    return apply_orientation(image, turn), apply_orientation(lesion, turn), stored


@pytest.fixture
def folder(tmp_path):
    """`<name>_T2.nii.gz` and `<name>_lesion.nii.gz` side by side: scaled integers, labels as floating-point numbers."""
    place = tmp_path / "my scans"
    place.mkdir()
    for seed, name in enumerate(CENTRES):
        image, lesion, affine = scan(name, seed)
        stored = nibabel.Nifti1Image(image.astype(np.float32), affine)
        stored.set_data_dtype(np.int16)  # with a slope, as converters write it
        stored.to_filename(place / f"{name}_T2.nii.gz")
        nibabel.Nifti1Image(lesion * 0.9999, affine).to_filename(place / f"{name}_lesion.nii.gz")
    return place


def in_the_world(path) -> np.ndarray:
    """Resampled by nibabel, which knows nothing of ours, to a grid of 1 mm."""
    image = nibabel.load(path)
    assert image.get_fdata().max() > 0
    return resample_from_to(nibabel.Nifti1Image(image.get_fdata().round(), image.affine), WORLD, order=0).get_fdata() > 0


def test_odd_axes_and_float_labels_from_training_to_a_segmentation_in_its_place(folder, tmp_path, capsys):
    data = ["--data", str(folder), "--channels", "t2=*_T2.nii.gz", "--mask", "all"]
    train = [*data, "--label", "*_lesion.nii.gz", "--classes", "2", "--hold-out", "cleo", "--stored", str(tmp_path / "stored")]
    size = ["--width", "0.2", "--steps", "45", "--halvings", "0.8", "--batch-size", "6", "--device", "cpu"]
    assert main(["train", "deep_plus", *train, *size, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert models.load(tmp_path / "run" / "model.safetensors").card["held_out"] == ["cleo"]
    assert datasets.stored(tmp_path / "stored").names == ["anna", "ben", "cleo"]

    model, out = str(tmp_path / "run" / "model.safetensors"), tmp_path / "out"
    assert main(["segment", "--model", model, *data, "--out", str(out), "--device", "cpu"]) == 0, capsys.readouterr().err
    scores = ["evaluate", "--predictions", str(out), *data, "--label", "*_lesion.nii.gz", "--out", str(tmp_path / "scores.csv")]
    assert main(scores) == 0, capsys.readouterr().err

    for name, centre in CENTRES.items():
        original, result = nibabel.load(folder / f"{name}_T2.nii.gz"), nibabel.load(out / f"{name}.nii.gz")
        assert "".join(nibabel.aff2axcodes(result.affine)) == AXES[name]
        assert result.shape == original.shape and np.allclose(result.affine, original.affine, atol=1e-4)
        assert result.get_data_dtype() == np.uint8 and result.header["xyzt_units"] == original.header["xyzt_units"]
        found, truth = in_the_world(out / f"{name}.nii.gz"), in_the_world(folder / f"{name}_lesion.nii.gz")
        # A network so small, trained so shortly, finds the lesions whole and draws them too large.
        assert (found & truth).sum() > 0.9 * truth.sum()
        assert 2 * (found & truth).sum() > 0.35 * (found.sum() + truth.sum())
        # Where the lesion was put, in millimetres to the patient's right, front and top: mirrored it would be elsewhere.
        middle = np.median(nibabel.affines.apply_affine(WORLD.affine, np.argwhere(found)), axis=0)
        np.testing.assert_allclose(middle, centre, atol=2.5)


def test_the_same_scans_are_read_in_one_order_of_axes(folder):
    cohort = datasets.nifti_folder(folder, channels={"t2": "*_T2.nii.gz"}, label="*_lesion.nii.gz", labels=range(2))
    for case in cohort:
        assert case.axes == "RAS" and case.shape == SHAPE and case.native_axes == AXES[case.name]
        assert case.spacing == pytest.approx(SPACING, abs=1e-5) and case.label.dtype == np.uint8
        place = nibabel.affines.apply_affine(case.affine, np.argwhere(case.label == 1)).mean(0)
        np.testing.assert_allclose(place, CENTRES[case.name], atol=0.5)
        assert case.image[0][case.label == 1].mean() > 150
