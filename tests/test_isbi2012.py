"""The ISBI 2012 stack: read, checked and downloaded."""

from __future__ import annotations

import io
import sys
import zipfile

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg_lite.datasets import download_isbi2012, isbi2012
from medseg_lite.files import read_case, write_nifti

# The package shows the function under the name of the module.
ISBI = sys.modules["medseg_lite.datasets.isbi2012"]


def tiff(pages) -> bytes:
    file = io.BytesIO()
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()


def em_pages(pages=3, rows=10, columns=14, seed=0):
    """Images and labels `(pages, rows, columns)`: membranes (0) dark, cells (255) bright."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((pages, rows, columns)) < 0.3, 0, 255).astype(np.uint8)
    return (labels // 2 + rng.integers(0, 100, labels.shape)).astype(np.uint8), labels


@pytest.fixture
def em_folder(tmp_path):
    """`em_folder(images, labels)`: the two files of the challenge; either may be bytes, or None to leave it out."""

    def make(images, labels):
        for name, content in (("train-volume.tif", images), ("train-labels.tif", labels)):
            if content is not None:
                (tmp_path / name).write_bytes(content if isinstance(content, bytes) else tiff(content))
        return tmp_path

    return make


def test_isbi_pages_become_slices_along_w(em_folder):
    images, labels = em_pages()
    case = isbi2012(em_folder(images, labels))
    assert case.shape == (14, 10, 3) and case.channels == ("em",) and case.info["classes"] == ("cell", "membrane")
    assert case.image.dtype == np.float32 and case.label.dtype == np.uint8 and case.axes == "RAS"
    assert case.spacing == pytest.approx((4e-6, 4e-6, 5e-5))
    for page, row, column in [(0, 0, 0), (1, 2, 5), (2, 9, 13)]:
        assert case.image[0, 13 - column, 9 - row, page] == images[page, row, column]
        assert case.label[13 - column, 9 - row, page] == (labels[page, row, column] == 0)


def test_isbi_results_are_written_as_the_pages_lie(em_folder, tmp_path):
    images, labels = em_pages()
    case = isbi2012(em_folder(images, labels))
    written = nibabel.load(write_nifti(tmp_path / "out.nii.gz", case.image[0], case))
    assert nibabel.aff2axcodes(written.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(np.asarray(written.dataobj), images.transpose(2, 1, 0))
    np.testing.assert_allclose(written.affine[:3, 3], 0, atol=1e-9)
    again = read_case({"em": tmp_path / "out.nii.gz"})
    np.testing.assert_array_equal(again.image, case.image)


def test_isbi_labels_of_one_bit_and_the_test_stack(em_folder):
    images, labels = em_pages()
    folder = em_folder(images, tiff(labels == 255))
    assert np.array_equal(isbi2012(folder).label.sum(), (labels == 0).sum())
    (folder / "test-volume.tif").write_bytes(tiff(images))
    case = isbi2012(folder, split="test")
    assert case.label is None and case.name == "isbi2012-test"
    with pytest.raises(ValueError, match="split is 'val'; expected 'train' or 'test'"):
        isbi2012(folder, split="val")


IMAGES, LABELS = em_pages()
INVERTED, GREY, FLAT = 255 - LABELS, LABELS.copy(), IMAGES.copy()
GREY[0, 0, 0], FLAT[1] = 7, 80


@pytest.mark.parametrize(
    "images, labels, error, match",
    [
        (IMAGES, None, FileNotFoundError, r"lacks train-labels\.tif \(train-volume\.tif\).*download=True"),
        (None, None, FileNotFoundError, r"lacks train-volume\.tif and train-labels\.tif \(it is empty\)"),
        (IMAGES, LABELS[:2], ValueError, r"train-labels\.tif has 2 pages of 10×14 but train-volume\.tif has 3 pages"),
        (IMAGES, LABELS[:, :8], ValueError, r"has 3 pages of 8×14 but train-volume\.tif has 3 pages of 10×14"),
        (IMAGES, INVERTED, ValueError, "is inverted or belongs to other images"),
        (IMAGES, GREY, ValueError, r"train-labels\.tif holds 7; expected 0 \(membrane\) and 255"),
        (IMAGES, 0 * LABELS, ValueError, "is 0 everywhere; expected 0 on membranes"),
        (FLAT, LABELS, ValueError, r"page 2 of .*train-volume\.tif is 80 everywhere"),
        (IMAGES.astype(np.uint16), LABELS, ValueError, r"page 1 of .* has pixels of kind 'I;16'; expected grey"),
        (np.stack([IMAGES] * 3, -1), LABELS, ValueError, "has pixels of kind 'RGB'"),
        ([IMAGES[0], IMAGES[1][:, :9]], LABELS, ValueError, "page 2 of .* is 10×9 but page 1 is 10×14"),
        (tiff(IMAGES)[:-150], LABELS, ValueError, r"train-volume\.tif cannot be read .*truncated or damaged"),
        (b"<!DOCTYPE html><html>", LABELS, ValueError, "is a web page, not an image"),
        (b"version https://git-lfs.github.com/spec/v1", LABELS, ValueError, "is a Git-LFS pointer"),
        (b"", LABELS, ValueError, "is not a TIFF file"),
        (b"just text", LABELS, ValueError, "is not a TIFF file"),
    ],
)
def test_isbi_defects_are_named(em_folder, images, labels, error, match):
    folder = em_folder(images, labels)
    with pytest.raises(error, match=match):
        isbi2012(folder)


def archive(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in files.items():
            file.writestr(name.replace("__", "/"), data)
    return content.getvalue()


@pytest.fixture
def challenge(server, monkeypatch):
    """`challenge(content)`: what the challenge's server answers."""
    monkeypatch.setattr(ISBI, "URL", f"{server.url}/isbi.zip")
    return lambda content: server.files.update({"/isbi.zip": content})


def test_isbi_downloads_only_on_an_explicit_word(challenge, server, tmp_path):
    member = {"..__..__train-volume.tif": tiff(IMAGES), "data__train-labels.tif": tiff(LABELS), "..__evil": b"x"}
    challenge(archive(**member))
    folder = tmp_path / "isbi"
    with pytest.raises(ValueError, match=r"checksum of .* is not known.*unverified=True"):
        isbi2012(folder, download=True)
    assert server.asked == []
    case = isbi2012(folder, download=True, unverified=True)
    assert case.shape == (14, 10, 3)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["train-labels.tif", "train-volume.tif"]


@pytest.mark.parametrize(
    "content, match",
    [
        (b"PK but no archive", "is not a complete zip archive"),
        (b"<html>sign in</html>", "answered with a web page"),
        (archive(**{"train-volume.tif": b"1"}), r"holds 0 files called train-labels\.tif, expected one"),
        (archive(**{"a__train-volume.tif": b"1", "b__train-volume.tif": b"2"}), r"holds 2 files called train-volume\.tif"),
    ],
)
def test_isbi_download_of_something_else_leaves_nothing(challenge, tmp_path, content, match):
    challenge(content)
    with pytest.raises(ValueError, match=match):
        download_isbi2012(tmp_path / "isbi", unverified=True)
    assert list(tmp_path.rglob("*")) == []
