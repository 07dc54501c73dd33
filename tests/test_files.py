"""Reading and writing: every orientation there and back, and every defect of real files named."""

from __future__ import annotations

import gzip
import itertools
import re
import warnings
import zlib

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_files import SPACING, affine_of, noise

from medseg_lite import datasets
from medseg_lite.files import read_case, read_image, read_label, read_metaimage, read_nifti, write_case, write_nifti
from medseg_lite.volume import Case

ORIENTATIONS = [(axes, signs) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)]


def save(path, array, affine=None, *, sform=1, qform=1, descrip=b""):
    affine = affine_of() if affine is None else affine
    header = nibabel.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_sform(affine, sform)
    header.set_qform(affine, qform)
    header.set_xyzt_units("mm", "sec")
    header["descrip"] = descrip
    nibabel.save(nibabel.Nifti1Image(array, None, header), path)  # no affine: the header's codes stay as they are
    return path


@pytest.fixture
def image(tmp_path):
    """A good image file to put a bad one beside."""
    return save(tmp_path / "flair.nii.gz", noise((4, 5, 6)))


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axes, signs", ORIENTATIONS)
def test_every_orientation_there_and_back(tmp_path, axes, signs, suffix):
    stored = noise((3, 4, 5), np.int16)
    affine = affine_of(axes, signs)
    path = save(tmp_path / f"in{suffix}", stored, affine, sform=2, qform=1, descrip=b"scanner 7")
    scan, case = read_nifti(path), read_case({"t1": path})

    # In memory every case is RAS+, and each voxel lies where its file puts it.
    assert case.axes == "RAS"
    assert np.allclose(case.spacing, np.asarray(SPACING)[np.argsort(axes)])
    index = np.argwhere(np.ones(stored.shape))
    world = index @ affine[:3, :3].T + affine[:3, 3]
    there = np.rint((world - scan.affine[:3, 3]) @ np.linalg.inv(scan.affine[:3, :3]).T).astype(int)
    assert np.array_equal(scan.array[tuple(there.T)], stored[tuple(index.T)])
    assert np.array_equal(case.image[0], scan.array)

    # Written back, the file is the same again.
    before, after = nibabel.load(path), nibabel.load(write_nifti(tmp_path / f"out{suffix}", scan.array, case))
    assert np.asanyarray(after.dataobj).tobytes() == np.asanyarray(before.dataobj).tobytes()
    assert after.get_data_dtype() == np.int16
    assert after.affine.tobytes() == before.affine.tobytes()
    for field in ("sform_code", "qform_code", "pixdim", "descrip", "xyzt_units", "dim", "quatern_b", "srow_x"):
        assert np.array_equal(after.header[field], before.header[field]), field


@given(seed=st.integers(0, 2**32 - 1), codes=st.sampled_from([(1, 1), (1, 0), (0, 1), (2, 1)]))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_oblique_scans_there_and_back(tmp_path, seed, codes):
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn * rng.uniform(0.3, 6, 3)
    affine[:3, 3] = rng.normal(size=3) * 100
    path = save(tmp_path / "in.nii", noise((3, 4, 5), np.int16), affine, sform=codes[0], qform=codes[1])
    before = nibabel.load(path)
    after = nibabel.load(write_nifti(tmp_path / "out.nii", read_nifti(path).array, read_case({"t1": path})))
    assert np.array_equal(np.asanyarray(after.dataobj), np.asanyarray(before.dataobj))
    assert after.affine.tobytes() == before.affine.tobytes()
    assert (int(before.header["sform_code"]), int(before.header["qform_code"])) == codes
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == codes


@given(array=hnp.arrays(st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32]), (2, 3, 4)))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_survive_writing(tmp_path, array):
    case = Case(image=np.zeros((1, 2, 3, 4), np.float32), channels=("t1",), native_axes="PIR")
    back = nibabel.load(write_nifti(tmp_path / "a.nii", array, case))
    assert back.get_data_dtype() == array.dtype
    assert "".join(nibabel.aff2axcodes(back.affine)) == "PIR"
    assert read_nifti(tmp_path / "a.nii").array.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "given, stored", [(bool, np.uint8), (np.float64, np.float32), (np.float16, np.float32), (np.int64, np.int32)]
)
def test_types_that_nifti_readers_dislike_become_common_ones(tmp_path, given, stored):
    case = Case(image=np.zeros((1, 2, 3, 4), np.float32), channels=("t1",))
    array = np.arange(24).reshape(2, 3, 4).astype(given)
    back = nibabel.load(write_nifti(tmp_path / "a.nii.gz", array, case))
    assert back.get_data_dtype() == stored
    assert np.array_equal(back.get_fdata(), array)


def test_scaled_integers_are_read_as_their_values_and_written_plain(tmp_path):
    image = nibabel.Nifti1Image(noise((3, 4, 5), np.int16), affine_of())
    image.header.set_slope_inter(0.5, -10)
    nibabel.save(image, tmp_path / "in.nii")
    case = read_case({"t1": tmp_path / "in.nii"})
    expected = nibabel.load(tmp_path / "in.nii").get_fdata()
    assert np.allclose(case.image[0], expected)
    back = nibabel.load(write_nifti(tmp_path / "out.nii", case.image[0], case))
    assert np.array_equal(back.get_fdata(dtype=np.float32), case.image[0])


def test_probabilities_are_written_with_classes_last(tmp_path):
    path = save(tmp_path / "in.nii.gz", noise((3, 4, 5)), affine_of((1, 0, 2), (-1, 1, -1)))
    case = read_case({"t1": path})
    maps = noise((2, *case.shape))
    out = nibabel.load(write_nifti(tmp_path / "out.nii.gz", maps, case))
    assert out.shape == (3, 4, 5, 2)
    assert np.array_equal(out.affine, nibabel.load(path).affine)
    assert np.array_equal(np.moveaxis(read_nifti(tmp_path / "out.nii.gz").array, -1, 0), maps)


def test_a_case_written_as_a_folder_reads_the_same(tmp_path):
    case = Case(
        image=noise((2, 3, 4, 5)),
        channels=("flair", "t1c"),
        name="p1",
        label=noise((3, 4, 5), np.uint8) % 5,
        mask=noise((3, 4, 5)) > 0,
        affine=affine_of(),
        native_axes="LPS",
    )
    folder = write_case(tmp_path / "p1", case)
    back = read_case(
        {c: folder / f"{c}.nii.gz" for c in case.channels}, label=folder / "label.nii.gz", mask=folder / "mask.nii.gz"
    )
    assert back.name == "p1" and back.channels == case.channels and back.native_axes == "LPS"
    for what in ("image", "label", "mask", "affine"):
        assert np.array_equal(getattr(back, what), getattr(case, what)), what
    assert sorted(p.name for p in folder.iterdir()) == ["flair.nii.gz", "label.nii.gz", "mask.nii.gz", "t1c.nii.gz"]


def test_big_endian_files_give_native_arrays(tmp_path):
    image = nibabel.Nifti1Image(noise((3, 4, 5)), affine_of(), nibabel.Nifti1Header(endianness=">"))
    nibabel.save(image, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == b"\x00\x00\x01\x5c"
    case = read_case({"t1": tmp_path / "a.nii"})
    assert case.image.dtype.isnative and case.image.flags.c_contiguous
    assert np.array_equal(case.image[0], noise((3, 4, 5)))


@pytest.mark.parametrize("suffix", [".NII", ".NII.GZ", ".nii.GZ"])
def test_endings_in_capital_letters(tmp_path, suffix):
    case = Case(image=noise((1, 3, 4, 5)), channels=("t1",), native_axes="LPS")
    path = write_nifti(tmp_path / f"A{suffix}", case.image[0], case)
    assert path.read_bytes().startswith(b"\x1f\x8b") == suffix.lower().endswith(".gz")
    np.testing.assert_array_equal(read_image(path).array, case.image[0])
    path.write_bytes(b"patient,age\n1,50\n")
    with pytest.raises(ValueError, match=r"is a text file|is not a NIfTI file"):
        read_image(path)


@pytest.mark.parametrize(
    "array, name, message",
    [
        (np.zeros((2, 3, 5)), "a.nii", "the array is 2×3×5 but case is 2×3×4"),
        (np.zeros((1, 1, 2, 3, 4)), "a.nii", "but case is 2×3×4"),
        (np.zeros((2, 3, 4)), "a.mha", "must end in .nii or .nii.gz"),
        (np.full((2, 3, 4), 2**40), "a.nii", "does not fit in 32 bits"),
    ],
)
def test_writing_refuses(tmp_path, array, name, message):
    case = Case(image=np.zeros((1, 2, 3, 4), np.float32), channels=("t1",))
    with pytest.raises(ValueError, match=message):
        write_nifti(tmp_path / name, array, case)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- files that are no image


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.nii.gz", b"", "is empty; download"),
        ("a.nii", b"", "is empty; download"),
        ("a.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git-LFS pointer.*git lfs pull"),
        ("a.nii", b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        ("a.nii.gz", b"\n <!DOCTYPE html><html>", "is a web page, not an image"),
        ("a.nii.gz", b"<html><body>Sign in</body>", "is a web page"),
        ("a.nii.gz", b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page"),
        ("a.nii.gz", b"patient,age\n1,50\n", "is a text file, not a compressed NIfTI"),
        ("a.nii.gz", b"\x5c\x01\x00\x00" + bytes(600), "is not gzip-compressed"),
        ("a.nii", b"patient,age\n1,50\n", "is not a NIfTI file"),
        ("a.nii.gz", gzip.compress(b"patient,age\n1,50\n", mtime=0), "is not a NIfTI file"),
        ("._a.nii.gz", b"\x00\x05\x16\x07" + bytes(90), r"macOS metadata.*without the leading '\._'"),
        ("a.dcm", b"\x00" * 128 + b"DICM", "must end in .nii or .nii.gz"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){re.escape(name)}.*{message}"):
        read_nifti(tmp_path / name)


def test_a_missing_file_says_what_is_beside_it(image):
    with pytest.raises(FileNotFoundError, match=r"t1\.nii\.gz does not exist; that folder holds flair\.nii\.gz"):
        read_nifti(image.parent / "t1.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"does not exist$"):
        read_nifti(image.parent / "no" / "t1.nii.gz")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@given(keep=st.floats(0, 0.98))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_files(tmp_path, suffix, keep):
    whole = save(tmp_path / f"whole{suffix}", noise((6, 7, 8))).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=rf"cut{re.escape(suffix)} (is empty|is not a NIfTI file|cannot be read)"):
        read_nifti(path)


def test_a_gzip_cut_in_the_middle_of_the_voxels(tmp_path):
    whole = save(tmp_path / "whole.nii.gz", noise((40, 40, 40))).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.nii\.gz cannot be read .*truncated or damaged: download"):
        read_nifti(tmp_path / "cut.nii.gz")


@given(position=st.integers(0, 347), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_an_error_with_the_file_or_harmless(tmp_path, position, value):
    content = bytearray(save(tmp_path / "a.nii", noise((4, 5, 6))).read_bytes())
    content[position] = value
    (tmp_path / "b.nii").write_bytes(content)
    try:
        case = read_case({"t1": tmp_path / "b.nii"})
    except ValueError as error:
        assert "b.nii" in str(error)
    else:
        assert case.image.ndim == 4 and np.isfinite(case.image).all() and case.axes == "RAS"


# ------------------------------------------------------------------------------------------------ shapes and affines


def test_a_trailing_axis_of_one_is_dropped(tmp_path):
    path = save(tmp_path / "a.nii", noise((4, 5, 6, 1)))
    assert read_nifti(path).array.shape == (4, 5, 6)
    assert read_case({"t1": path}).shape == (4, 5, 6)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((4, 5), r"is 2-D \(4×5\); expected a 3-D volume. Export the whole volume"),
        ((4, 5, 6, 1, 3), "is 5-D"),
        ((0, 5, 6), "has no voxels"),
    ],
)
def test_wrong_number_of_axes(tmp_path, shape, message):
    path = save(tmp_path / "a.nii", np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=message):
        read_nifti(path)


def test_four_dimensions_where_three_are_expected(tmp_path, image):
    four = save(tmp_path / "four.nii.gz", noise((4, 5, 6, 2), np.uint8))
    with pytest.raises(ValueError, match=r"four\.nii\.gz is 4-D \(4×5×6×2\); expected one 3-D volume per file"):
        read_case({"t1": four})
    for what in ("label", "mask"):
        with pytest.raises(ValueError, match=f"the {what} is 4×5×6×2 but the image is 4×5×6"):
            read_case({"t1": image}, **{what: four})


def test_shapes_that_differ(tmp_path, image):
    other = save(tmp_path / "seg.nii.gz", noise((4, 5, 7), np.uint8))
    message = r"seg\.nii\.gz is 4×5×7 but flair\.nii\.gz is 4×5×6; .*share one grid"
    for files in (
        {"images": {"a": image, "b": other}},
        {"images": {"a": image}, "label": other},
        {"images": {"a": image}, "mask": other},
    ):
        with pytest.raises(ValueError, match=message):
            read_case(**files)


def test_the_same_grid_stored_in_two_orientations_is_one_case(tmp_path):
    array = noise((4, 5, 6))
    ras = save(tmp_path / "ras.nii.gz", array)
    affine = affine_of()
    affine[:3, 3] += affine[:3, :3] @ (3, 4, 0)  # the voxel that comes first when D and H run backwards
    affine[:3, :2] *= -1
    lps = save(tmp_path / "lps.nii.gz", array[::-1, ::-1], affine)
    case = read_case({"a": ras, "b": lps})
    assert np.array_equal(case.image[0], case.image[1])
    assert read_case({"b": lps, "a": ras}).native_axes == "LPS"  # results go back to the first file's grid


def test_a_flipped_header_on_unflipped_voxels_is_an_error(tmp_path, image):
    flipped = save(tmp_path / "t1.nii.gz", noise((4, 5, 6)), affine_of(signs=(-1, -1, 1)))
    with pytest.raises(ValueError, match=r"t1\.nii\.gz and flair\.nii\.gz have the same size.*\(LPS against RAS\)"):
        read_case({"flair": image, "t1": flipped})


def test_a_shifted_affine_is_an_error_and_rounding_is_not(tmp_path, image):
    shifted = save(tmp_path / "t1.nii.gz", noise((4, 5, 6)), affine_of(origin=(-90.5, 12.25, 33.5)))
    with pytest.raises(ValueError, match=r"affines differ by 0\.5 mm; resample one onto the other"):
        read_case({"flair": image, "t1": shifted})
    rounded = save(tmp_path / "t2.nii.gz", noise((4, 5, 6)), affine_of(origin=(-90.5001, 12.25, 33.0)))
    assert read_case({"flair": image, "t2": rounded}).shape == (4, 5, 6)


@pytest.mark.parametrize("flat", [np.diag([1.0, 1, 0, 1]), np.ones((4, 4)), np.diag([1.0, np.nan, 1, 1])])
def test_an_affine_that_places_no_voxels(tmp_path, flat):
    flat[3] = 0, 0, 0, 1
    image = nibabel.Nifti1Image(noise((4, 5, 6)), np.eye(4))
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = flat[row]
    image.header["sform_code"] = 1
    image.header["qform_code"] = 0
    # The header goes out as it is: nibabel itself would refuse to write some of these.
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(4) + noise((4, 5, 6)).tobytes(order="F"))
    with pytest.raises(ValueError, match="unusable affine"):
        read_nifti(tmp_path / "a.nii")


def test_voxels_of_nanometres_are_fine(tmp_path):
    path = save(tmp_path / "em.nii", noise((4, 5, 6)), np.diag([4e-6, 4e-6, 5e-5, 1]))
    assert read_case({"em": path}).spacing == pytest.approx((4e-6, 4e-6, 5e-5))


# --------------------------------------------------------------------------------------------- intensities and masks


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_intensities_that_are_not_finite(tmp_path, bad):
    array = noise((4, 5, 6))
    array[1, 2, 3] = array[0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"a\.nii has 2 NaN or infinite voxels; replace"):
        read_case({"t1": save(tmp_path / "a.nii", array)})


@pytest.mark.parametrize("value", [0, 7])
def test_an_image_with_nothing_in_it(tmp_path, value):
    path = save(tmp_path / "a.nii", np.full((4, 5, 6), value, np.int16))
    with pytest.raises(ValueError, match=f"is {value} everywhere: there is no image"):
        read_case({"t1": path})


@pytest.mark.parametrize(
    "kind, message", [([("R", "u1"), ("G", "u1"), ("B", "u1")], "holds colour values"), (np.complex64, "holds complex values")]
)
def test_values_that_are_not_one_number(tmp_path, kind, message):
    path = save(tmp_path / "a.nii", np.zeros((4, 5, 6), kind))
    with pytest.raises(ValueError, match=message):
        read_nifti(path)


def test_a_mask_of_nearly_one(tmp_path, image):
    inside = noise((4, 5, 6)) > 0
    mask = save(tmp_path / "mask.nii.gz", inside * np.float64(0.9999999701976776))
    assert np.array_equal(read_case({"t1": image}, mask=mask).mask, inside)


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0])
def test_an_empty_mask(tmp_path, image, value):
    mask = save(tmp_path / "mask.nii.gz", np.full((4, 5, 6), value, np.float32))
    with pytest.raises(ValueError, match=r"mask\.nii\.gz is an empty mask"):
        read_case({"t1": image}, mask=mask)


# ------------------------------------------------------------------------------------------------------------ labels


def test_float_labels_of_whole_numbers(tmp_path, image):
    classes = noise((4, 5, 6), np.uint8) % 5
    for nearly in (classes.astype(np.float32), classes * np.float64(0.9999999)):
        label = save(tmp_path / "seg.nii.gz", nearly)
        case = read_case({"t1": image}, label=label, labels=range(5))
        assert case.label.dtype == np.uint8 and np.array_equal(case.label, classes)


@pytest.mark.parametrize(
    "value, labels, message",
    [
        (1.5, None, r"seg\.nii\.gz holds 1\.5, not a whole class number; it was interpolated"),
        (np.nan, None, r"seg\.nii\.gz has NaN or infinite values"),
        (-1.0, None, "holds classes -1 to 0; expected 0 to 255"),
        (256.0, None, "holds classes 0 to 256; expected 0 to 255"),
        (3.0, (0, 1, 2, 4), "holds label 3; expected only 0, 1, 2, 4. Map its labels first"),
    ],
)
def test_bad_labels(tmp_path, image, value, labels, message):
    array = np.zeros((4, 5, 6), np.float32)
    array[2, 2, 2] = value
    with pytest.raises(ValueError, match=message):
        read_case({"t1": image}, label=save(tmp_path / "seg.nii.gz", array), labels=labels)


# ------------------------------------------------------------------------------------------------------------ MetaImage

LPS, IDENTITY = np.diag([-1.0, -1, 1, 1]), np.eye(3)


def metaimage(path, array, *, matrix=IDENTITY, spacing=SPACING, offset=(7, -8, 9), compress=False, big=False, **fields):
    """Write `array[i, j, k]`, where i varies fastest, with the rows of `matrix` as the axes' directions in LPS."""
    types = {"uint8": "MET_UCHAR", "int16": "MET_SHORT", "float32": "MET_FLOAT", "float64": "MET_DOUBLE"}
    data = array.astype(array.dtype.newbyteorder(">" if big else "<")).tobytes(order="F")
    if compress:
        data = zlib.compress(data)
    local = path.suffix == ".mha"
    header = {
        "ObjectType": "Image",
        "NDims": array.ndim,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": big,
        "CompressedData": compress,
        "TransformMatrix": " ".join(map(str, np.ravel(matrix))),
        "Offset": " ".join(map(str, offset)),
        "ElementSpacing": " ".join(map(str, spacing)),
        "DimSize": " ".join(map(str, array.shape)),
        "ElementType": types[array.dtype.name],
        **fields,
        "ElementDataFile": "LOCAL" if local else fields.get("ElementDataFile", path.stem + (".zraw" if compress else ".raw")),
    }
    text = "".join(f"{k} = {v}\n" for k, v in header.items() if v is not None).encode()
    path.write_bytes(text + data if local else text)
    if not local:
        (path.parent / (path.stem + (".zraw" if compress else ".raw"))).write_bytes(data)
    return path


@pytest.mark.parametrize("ending", ["mhd", "mha"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_metaimage_is_read_in_ras(tmp_path, ending, compress, big, dtype):
    array = np.random.default_rng(0).integers(0, 200, (4, 5, 6)).astype(dtype)
    scan = read_metaimage(metaimage(tmp_path / f"a.{ending}", array, compress=compress, big=big))
    np.testing.assert_array_equal(scan.array, array[::-1, ::-1])  # LPS to RAS
    assert scan.array.dtype == dtype and scan.native_axes == "LPS"
    # The voxel stored first lies at the offset: 7 mm to the left, 8 mm to the front, 9 mm up.
    np.testing.assert_allclose(scan.affine @ [3, 4, 0, 1], [-7, 8, 9, 1])
    np.testing.assert_allclose(np.diag(scan.affine), [*SPACING, 1])


@given(st.permutations(range(3)), st.tuples(*[st.sampled_from([1, -1])] * 3), st.floats(-0.3, 0.3))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_metaimage_and_nifti_of_one_scan_agree(tmp_path, axes, signs, angle):
    """In any orientation, oblique ones too: nibabel's reading of the same affine is the peer."""
    c, s = np.cos(angle), np.sin(angle)
    directions = np.eye(3)[axes] * np.array(signs)[:, None] @ [[c, -s, 0], [s, c, 0], [0, 0, 1]]  # row i: of axis i, in LPS
    array = np.random.default_rng(1).normal(size=(3, 4, 5)).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions.T * SPACING, (7, -8, 9)
    nibabel.save(nibabel.Nifti1Image(array, LPS @ affine), tmp_path / "a.nii")
    ours = read_image(metaimage(tmp_path / "a.mha", array, matrix=directions))
    theirs = read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(ours.array, theirs.array)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
    assert ours.native_axes == theirs.native_axes


@pytest.mark.parametrize("name", ["A.MHA", "A.MHD"])
def test_metaimage_endings_in_capital_letters(tmp_path, name):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    metaimage(tmp_path / name.lower(), array)
    (tmp_path / name.lower()).rename(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name).array, array[::-1, ::-1])


def test_metaimages_make_a_case_that_is_written_on_their_grid(tmp_path):
    image = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    label = (image > 0).astype(np.uint8)
    metaimage(tmp_path / "a.mhd", image)
    metaimage(tmp_path / "a_segmentation.mhd", label, compress=True)
    case = read_case({"t2": tmp_path / "a.mhd"}, label=tmp_path / "a_segmentation.mhd", labels=range(2))
    np.testing.assert_array_equal(case.label, case.image[0] > 0)
    written = nibabel.load(write_nifti(tmp_path / "out.nii.gz", case.label, case))
    np.testing.assert_array_equal(np.asarray(written.dataobj), label)
    assert nibabel.aff2axcodes(written.affine) == ("L", "P", "S")
    metaimage(tmp_path / "a_segmentation.mhd", label, matrix=np.diag([-1, 1, 1]))
    with pytest.raises(ValueError, match=r"same size but lie elsewhere in the world \(RPS against LPS\)"):
        read_case({"t2": tmp_path / "a.mhd"}, label=tmp_path / "a_segmentation.mhd")


def test_metaimage_header_variants(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = metaimage(tmp_path / "a.mha", array, ElementSpacing=None, ElementSize="2 2 3", Offset=None, Position="1 2 3")
    scan = read_metaimage(path)
    np.testing.assert_allclose(np.abs(np.diag(scan.affine)[:3]), (2, 2, 3))
    np.testing.assert_allclose(scan.affine @ [1, 2, 0, 1], [-1, -2, 3, 1])
    (tmp_path / "b.raw").write_bytes(b"skip me" + array.tobytes(order="F"))
    head = "ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementSpacing = 1 1 1\nElementType = MET_SHORT\nHeaderSize = {}\nElementDataFile = b.raw"
    for skip in (7, -1):
        (tmp_path / "b.mhd").write_text(head.format(skip))
        np.testing.assert_array_equal(read_metaimage(tmp_path / "b.mhd").array, array[::-1, ::-1])
    four = metaimage(tmp_path / "c.mha", array[..., None], matrix=np.eye(4), spacing=(1, 1, 2, 1), offset=(0, 0, 0, 0))
    assert read_metaimage(four).array.shape == (2, 3, 4)  # a trailing axis of length one


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(DimSize="4 5 7"), r"a\.mha holds 240 bytes of voxels; expected 280 for 4×5×7 of MET_SHORT.*truncated"),
        (dict(DimSize="4 5 5"), "holds 240 bytes of voxels; expected 200"),
        (dict(DimSize="4 5"), "NDims = 3 and DimSize = '4 5'; expected a 3-D volume"),
        (dict(DimSize="4 5 -6"), "expected a 3-D volume"),
        (dict(DimSize="4 nan 6"), "has DimSize = '4 nan 6'; expected numbers"),
        (dict(DimSize=None), "has no DimSize; expected numbers"),
        (dict(NDims=2, DimSize="4 30"), "expected a 3-D volume"),
        (dict(ElementType="MET_STRING"), "ElementType = 'MET_STRING'; expected one of MET_UCHAR"),
        (dict(ElementNumberOfChannels=3), "has 3 numbers per voxel; expected one"),
        (dict(ElementSpacing="1 1"), "of a length that does not fit 3 axes"),
        (dict(ElementSpacing="1 0 1"), r"a\.mha has ElementSpacing = '1 0 1'; expected three positive voxel sizes"),
        (dict(ElementSpacing="1 -1 1"), "has ElementSpacing = '1 -1 1'; expected three positive"),
        (dict(ElementSpacing="1 nan 1"), "has ElementSpacing = '1 nan 1'; expected numbers"),
        (dict(ElementSpacing=None), "has no ElementSpacing; expected numbers"),
        (dict(ElementSpacing=None, ElementSize="0 0 0"), "has ElementSize = '0 0 0'; expected three positive"),
        (dict(BinaryData=False), "has BinaryData = False, voxels as text; convert it"),
        (dict(DistanceUnits="parsec"), "has DistanceUnits = 'parsec'; expected one of"),
        (dict(TransformMatrix="1 0 0 1 0 0 0 0 1"), "unusable affine"),
        (dict(Offset="a b c"), "has Offset = 'a b c'; expected numbers"),
        (dict(CompressedData=True), r"a\.mha cannot be unpacked .*damaged"),
    ],
)
def test_metaimage_headers_that_lie(tmp_path, fields, match):
    path = metaimage(tmp_path / "a.mha", np.ones((4, 5, 6), np.int16), **fields)
    with pytest.raises(ValueError, match=match):
        read_metaimage(path)


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", r"a\.mhd is empty"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git-LFS pointer"),
        (b"just text", "is not a MetaImage: expected lines such as"),
        (b"NDims = 3\nDimSize = 2 2 2\n", "is not a MetaImage.*but after 2 there is b''"),
        (b"\0" * 9999, "is not a MetaImage"),
        (b"ElementDataFile = ../a.raw\n", r"keeps its values in '\.\./a\.raw'; expected LOCAL or one file in the same folder"),
        (b"ElementDataFile = /etc/passwd\n", "expected LOCAL or one file in the same folder"),
        (b"ElementDataFile = LIST\n", "keeps its values in 'LIST'"),
        (b"ElementDataFile = s%03d.raw 1 9 1\n", "expected LOCAL or one file"),
    ],
)
def test_files_that_are_no_metaimages(tmp_path, content, match):
    (tmp_path / "a.mhd").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_metaimage(tmp_path / "a.mhd")


def test_a_metaimage_without_its_values(tmp_path):
    path = metaimage(tmp_path / "a.mhd", np.ones((4, 5, 6), np.int16))
    (tmp_path / "a.raw").rename(tmp_path / "b.raw")
    with pytest.raises(FileNotFoundError, match=r"a\.raw, which holds the voxels of a\.mhd, does not exist; .* holds b\.raw"):
        read_metaimage(path)
    (tmp_path / "a.raw").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"a\.raw is a Git-LFS pointer"):
        read_metaimage(path)
    (tmp_path / "a.raw").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"a\.raw holds 4 bytes of voxels; expected 240"):
        read_metaimage(path)
    with pytest.raises(FileNotFoundError, match=r"c\.mhd does not exist; that folder holds a\.mhd"):
        read_metaimage(tmp_path / "c.mhd")


def test_a_metaimage_never_unpacks_to_more_than_it_says(tmp_path):
    path = metaimage(tmp_path / "a.mha", np.zeros((100, 100, 100), np.uint8), compress=True, DimSize="2 2 2")
    with pytest.raises(ValueError, match="holds more than 8 bytes of voxels; expected 8"):
        read_metaimage(path)


def test_a_case_without_images():
    with pytest.raises(ValueError, match="at least one image"):
        read_case({})


def test_one_file_with_all_channels(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii")
    case = read_case(tmp_path / "a.nii", channels=("t2", "adc"))
    assert case.channels == ("t2", "adc")
    np.testing.assert_array_equal(case.image, np.moveaxis(array, -1, 0))
    with pytest.raises(ValueError, match=r"holds 2 volumes \(3×4×5×2\); expected 4: flair, t1, t1c, t2"):
        read_case(tmp_path / "a.nii", channels=("flair", "t1", "t1c", "t2"))
    nibabel.save(nibabel.Nifti1Image(array[..., 0], np.eye(4)), tmp_path / "b.nii")
    assert read_case(tmp_path / "b.nii", channels=["ct"]).channels == ("ct",)
    with pytest.raises(ValueError, match=r"holds 1 volumes \(3×4×5\); expected 2: t2, adc"):
        read_case(tmp_path / "b.nii", channels=("t2", "adc"))
    with pytest.raises(ValueError, match="name them with channels="):
        read_case(tmp_path / "b.nii")


# ------------------------------------------------------------------------------------------- geometry that headers lack


def raw_nifti(path, array, **fields):
    """Write a NIfTI file whose header fields are as given, also if nibabel would correct them."""
    image = nibabel.Nifti1Image(array, affine_of())
    header = image.header.copy()
    header["magic"], header["vox_offset"] = b"n+1", 352
    for name, value in fields.items():
        if name == "pixdim":
            header["pixdim"][1 : 1 + len(value)] = value
        else:
            header[name] = value
    path.write_bytes(header.binaryblock + bytes(4) + array.tobytes(order="F"))
    return path


def test_a_file_without_orientation_is_named_once(tmp_path):
    for name in ("flair.nii", "t1.nii"):
        raw_nifti(tmp_path / name, noise((4, 5, 6)), sform_code=0, qform_code=0, pixdim=(2, 3, 4))
    paths = {name: tmp_path / f"{name}.nii" for name in ("flair", "t1")}
    with pytest.warns(UserWarning, match=r"\.nii stores no orientation \(qform_code and sform_code are 0\)") as found:
        case = read_case(paths)
    assert [str(tmp_path / f"{name}.nii") in str(w.message) for name, w in zip(paths, found)] == [True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_case(paths).spacing == (2, 3, 4)
    # What is written has no orientation either, and lies on the same grid.
    written = nibabel.load(write_nifti(tmp_path / "out.nii", case.image[0], case))
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (0, 0)
    np.testing.assert_array_equal(written.affine, nibabel.load(paths["t1"]).affine)


@pytest.mark.parametrize("pixdim", [(0, 1, 1), (1, 1, 0), (1, np.nan, 1), (np.inf, 1, 1), (-1, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (1, 0)])
def test_voxel_sizes_that_are_needed_and_missing(tmp_path, pixdim, codes):
    """They are not needed where the sform gives the whole affine."""
    path = raw_nifti(tmp_path / "a.nii", noise((4, 5, 6)), sform_code=codes[0], qform_code=codes[1], pixdim=pixdim)
    if codes[0]:
        case = read_case({"t1": path})
        assert case.spacing == pytest.approx(SPACING)
        again = nibabel.load(write_nifti(tmp_path / "b.nii", case.image[0], case))
        assert again.header.get_zooms() == pytest.approx(SPACING)
    else:
        with pytest.raises(ValueError, match=r"a\.nii has pixdim .*; expected three positive voxel sizes"):
            read_nifti(path)


@pytest.mark.parametrize("unit, mm", [("meter", 1000), ("mm", 1), ("micron", 0.001), ("unknown", 1)])
def test_units_of_the_header(tmp_path, unit, mm):
    """World coordinates are in mm in memory. What is written has the unit of its file, and lies on its grid."""
    image = nibabel.Nifti1Image(noise((4, 5, 6)), affine_of((1, 0, 2), (-1, 1, 1)))
    image.header.set_xyzt_units(unit, "sec")
    nibabel.save(image, tmp_path / "in.nii")
    case = read_case({"em": tmp_path / "in.nii"})
    assert case.spacing == pytest.approx(np.array(SPACING)[[1, 0, 2]] * mm)
    datasets.store([case], tmp_path / "s", progress=False)
    for kept in (case, datasets.stored(tmp_path / "s")[0]):
        written = nibabel.load(write_nifti(tmp_path / "out.nii", case.image[0], kept))
        assert written.header == nibabel.load(tmp_path / "in.nii").header
        np.testing.assert_array_equal(
            read_label(write_nifti(tmp_path / "l.nii", case.image[0] > 0, kept), kept), case.image[0] > 0
        )
    # The same grid in mm is the same grid.
    in_mm = save(tmp_path / "mm.nii", noise((4, 5, 6)), np.diag([mm, mm, mm, 1]) @ image.affine)
    assert len(read_case({"a": tmp_path / "in.nii", "b": in_mm}).channels) == 2


@pytest.mark.parametrize("unit, mm", [("um", 0.001), ("mm", 1), ("cm", 10), ("?", 1), ("MET_DISTANCE_UNITS_CM", 10)])
def test_units_of_a_metaimage(tmp_path, unit, mm):
    path = metaimage(tmp_path / "a.mha", noise((4, 5, 6)), DistanceUnits=unit)
    scan = read_metaimage(path)
    np.testing.assert_allclose(np.diag(scan.affine)[:3], np.array(SPACING) * mm)
    np.testing.assert_allclose(scan.affine @ [3, 4, 0, 1], [-7 * mm, 8 * mm, 9 * mm, 1])


@pytest.mark.parametrize("size", [4e-6, 0.05, 1.0, 30.0])
def test_a_shift_by_a_voxel_is_noticed_whatever_the_voxel_size(tmp_path, size):
    affine = np.diag([size, size, size, 1.0])
    first = save(tmp_path / "a.nii", noise((4, 5, 6)), affine)
    affine[0, 3] = size
    with pytest.raises(ValueError, match="lie elsewhere in the world"):
        read_case({"a": first}, label=save(tmp_path / "b.nii", noise((4, 5, 6), np.uint8), affine))
    affine[0, 3] = min(size * 1e-4, 5e-4)
    assert read_case({"a": first}, label=save(tmp_path / "c.nii", noise((4, 5, 6), np.uint8), affine)).labelled


def test_a_crop_keeps_the_codes_of_its_file(tmp_path):
    path = save(tmp_path / "in.nii", noise((6, 7, 8)), affine_of((2, 0, 1), (1, -1, 1)), sform=1, qform=1)
    case = read_case({"t1": path})
    part = case.crop((slice(1, 4), slice(2, 7), slice(0, 5)))
    written = nibabel.load(write_nifti(tmp_path / "out.nii", part.image[0], part))
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(written.header.get_qform(), written.header.get_sform(), atol=1e-5)
    back = read_case({"t1": tmp_path / "out.nii"})
    np.testing.assert_array_equal(back.image, part.image)
    np.testing.assert_allclose(back.affine, part.affine, atol=1e-5)


def gantry(angle: float, spacing=(0.5, 0.5, 5)) -> np.ndarray:
    """Return the affine of a CT whose gantry was tilted: slices lie on top of each other but for a shift."""
    affine = np.diag([*spacing, 1.0])
    affine[1, 2] = np.tan(np.deg2rad(angle)) * spacing[2]
    return affine


@pytest.mark.parametrize("angle, sheared", [(0, False), (0.05, False), (0.5, True), (15, True), (-30, True)])
def test_a_sheared_grid_is_read_and_written_but_has_no_spacing(tmp_path, angle, sheared):
    array, affine = noise((4, 5, 6)), gantry(angle)
    path = save(tmp_path / "in.nii", array, affine, qform=0)
    case = read_case({"ct": path})
    assert case.sheared == sheared and "mm" in repr(case)
    written = nibabel.load(write_nifti(tmp_path / "out.nii", array, case))
    np.testing.assert_allclose(written.affine, affine, atol=1e-6)
    part = case.crop((slice(1, 3), slice(0, 4), slice(2, 6)))
    cropped = nibabel.load(write_nifti(tmp_path / "part.nii", part.image[0], part))
    np.testing.assert_allclose(cropped.affine, part.affine, atol=1e-6)
    if sheared:
        with pytest.raises(ValueError, match=r"voxel axes are not at right angles .*gantry.*resample"):
            _ = case.spacing
    else:
        assert case.spacing == pytest.approx((0.5, 0.5, 5), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- header variants


def test_types_of_nifti_2_and_large_grids(tmp_path):
    nibabel.save(nibabel.Nifti2Image(noise((4, 5, 6), np.int16), affine_of((1, 0, 2), (-1, 1, 1))), tmp_path / "in.nii")
    case = read_case({"t1": tmp_path / "in.nii"})
    datasets.store([case], tmp_path / "s", progress=False)
    before = nibabel.load(tmp_path / "in.nii")
    for kept in (
        case,
        datasets.stored(tmp_path / "s")[0],
        case.replace(name="b"),
        datasets.stored(tmp_path / "s")[0].replace(),
    ):
        assert isinstance(kept.header, nibabel.Nifti2Header)
        after = nibabel.load(write_nifti(tmp_path / "out.nii", case.image[0].astype(np.int16), kept))
        assert isinstance(after, nibabel.Nifti2Image) and after.header == before.header
        np.testing.assert_array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
    long = Case(np.arange(40_000, dtype=np.float32).reshape(1, -1, 1, 1), ("a",))  # NIfTI-1 counts to 32767
    np.testing.assert_array_equal(read_nifti(write_nifti(tmp_path / "long.nii", long.image[0], long)).array, long.image[0])


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_byte_orders_and_extensions_are_kept(tmp_path, kind, order):
    header = kind.header_class(endianness=order)
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"scanner 7"))
    nibabel.save(kind(noise((4, 5, 6)), affine_of((1, 0, 2), (-1, 1, 1)), header), tmp_path / "in.nii")
    case = read_case({"t1": tmp_path / "in.nii"})
    datasets.store([case], tmp_path / "s", dtype="float32", progress=False)
    for kept in (case, datasets.stored(tmp_path / "s")[0]):
        assert (tmp_path / "in.nii").read_bytes() == write_nifti(tmp_path / "out.nii", case.image[0], kept).read_bytes()


@pytest.mark.parametrize(
    "slope, inter, expected", [(2, -10, 2), (0, 5, None), (np.nan, 0, None), (1, 0, 1), (0.1, 0, 0.1), (-1, 100, -1)]
)
def test_slopes(tmp_path, slope, inter, expected):
    """A slope of 0 or NaN means none."""
    array = noise((4, 5, 6), np.int16)
    path = raw_nifti(tmp_path / "a.nii", array, scl_slope=slope, scl_inter=inter)
    right = array if expected is None else slope * array.astype(float) + inter
    np.testing.assert_allclose(read_case({"t1": path}).image[0], right, rtol=1e-6)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.hdr", b"x" * 400, "is one half of a pair .hdr and .img; convert the pair"),
        ("a.img", b"x" * 400, "is one half of a pair"),
        (
            "a.nii",
            gzip.compress(b"x" * 400, mtime=0),
            r"is gzip-compressed, but its name does not say so; rename it to a\.nii\.gz",
        ),
    ],
)
def test_files_under_a_name_that_is_not_theirs(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float64]
)
def test_every_type_of_intensities_and_labels(tmp_path, dtype):
    array = np.arange(120).reshape(4, 5, 6).astype(dtype)
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(array, affine_of(), dtype=dtype), path)
    case = read_case({"t1": path}, label=path)
    np.testing.assert_array_equal(case.image[0], array)
    np.testing.assert_array_equal(case.label, array)
    assert case.image.dtype == np.float32 and case.label.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_labels_above_255(tmp_path, image, dtype):
    array = np.zeros((4, 5, 6), dtype)
    array[1, 2, 3] = 1035
    nibabel.save(nibabel.Nifti1Image(array, affine_of(), dtype=dtype), tmp_path / "aparc.nii")
    with pytest.raises(ValueError, match=r"aparc\.nii holds classes 0 to 1035; expected 0 to 255"):
        read_case({"t1": image}, label=tmp_path / "aparc.nii")


@pytest.mark.parametrize(
    "low, high, dtype",
    [
        (0, 1e300, np.float64),
        (-1e39, 1e39, np.float64),
        (1e-300, 2e-300, np.float64),
        (1e9, 1e9 + 100, np.float64),
        (2**30, 2**30 + 50, np.int32),
        (2**60, 2**60 + 5000, np.int64),
        (2**63, 2**63 + 9000, np.uint64),
    ],
)
def test_intensities_that_float32_cannot_tell_apart(tmp_path, low, high, dtype):
    array = np.full((4, 5, 6), low, dtype)
    array[::2] = dtype(high)
    nibabel.save(nibabel.Nifti1Image(array, affine_of(), dtype=dtype), tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii holds values from .*which float32 cannot hold or tell apart"):
        read_case({"t1": tmp_path / "a.nii"})


@pytest.mark.parametrize(
    "array", [np.full((2, 3, 4), 1e300), np.full((2, 3, 4), -1e39), np.full((2, 3, 4), 1 + 2j), np.full((2, 3, 4), "a")]
)
def test_arrays_that_do_not_fit_are_not_written(tmp_path, array):
    case = Case(image=np.zeros((1, 2, 3, 4), np.float32), channels=("t1",))
    with pytest.raises(ValueError, match=r"which does not fit in float32|; expected real numbers"):
        write_nifti(tmp_path / "a.nii", array, case)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_maps_may_hold_what_is_not_finite(tmp_path, value):
    case = Case(image=np.zeros((1, 2, 3, 4), np.float32), channels=("t1",))
    back = nibabel.load(write_nifti(tmp_path / "a.nii", np.full((2, 3, 4), value), case))
    np.testing.assert_array_equal(back.get_fdata(), np.full((2, 3, 4), value))


# -------------------------------------------------------------------------------------- names of cases, files of others


def test_the_name_of_a_case_is_that_of_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "study" / "Fall 7 äö"
    folder.mkdir(parents=True)
    save(folder / "t1.nii", noise((4, 5, 6)))
    (tmp_path / "study" / "other").mkdir()
    monkeypatch.chdir(folder)
    for path in ("t1.nii", "./t1.nii", "../Fall 7 äö/t1.nii", folder / "t1.nii", "../other/../Fall 7 äö/t1.nii"):
        assert read_case({"t1": path}).name == "Fall 7 äö"
    monkeypatch.chdir(tmp_path / "study" / "other")
    save(tmp_path / "study" / "t2.nii", noise((4, 5, 6)))
    assert read_case({"t2": "../t2.nii"}).name == "study"
    assert read_case({"t2": "../t2.nii"}, name="own").name == "own"


def test_metaimages_from_windows(tmp_path):
    """Its names do not tell small from capital letters, and may be in any language."""
    array = noise((4, 5, 6), np.int16)
    path = metaimage(tmp_path / "a.mhd", array, ElementDataFile="FALL_é.RAW")
    (tmp_path / "a.raw").rename(tmp_path / "fall_é.raw")
    path.write_bytes(path.read_text("utf-8").encode("utf-8"))
    np.testing.assert_array_equal(read_metaimage(path).array, array[::-1, ::-1])
    path.write_bytes(path.read_text("utf-8").encode("latin-1"))
    np.testing.assert_array_equal(read_metaimage(path).array, array[::-1, ::-1])
    (tmp_path / "Fall_é.Raw").write_bytes(b"another")
    if len(list(tmp_path.iterdir())) == 3:  # where both may be there, neither is taken
        with pytest.raises(FileNotFoundError, match=r"FALL_é\.RAW, which holds the voxels of a\.mhd, does not exist"):
            read_metaimage(path)
