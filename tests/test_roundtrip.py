"""Nothing is lost on the way: every format that is read, written back, read again, and kept in a store."""

from __future__ import annotations

import gzip
import itertools
import re
import unicodedata
import zlib
from dataclasses import dataclass

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from medseg_lite import datasets
from medseg_lite.files import read_case, read_image, read_label, write_case, write_nifti
from medseg_lite.volume import Case

FAST = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
WAYS = st.integers(0, 8)
SHAPE = (3, 4, 5)
SIGNED = [
    np.eye(3)[:, list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]

# ------------------------------------------------------------------------------------------------------------------ grids


@dataclass
class Grid:
    """The affine of a file, and where it comes from, for messages of failures."""

    kind: str
    affine: np.ndarray


@st.composite
def grids(draw, sheared: bool = True) -> Grid:
    """Any grid: the 48 orientations, those at 45° between them, any oblique one, and those of tilted gantries."""
    kind = draw(st.sampled_from(["straight", "tie", "near a tie", "oblique", *["sheared"] * sheared]))
    turn = SIGNED[draw(st.integers(0, 47))]
    if kind in ("tie", "near a tie"):
        angles = np.array(draw(st.tuples(*[st.sampled_from([0, 45, 90, 135, 180, 225, 270, 315])] * 3)), float)
        if kind == "near a tie":
            angles += draw(st.tuples(*[st.sampled_from([0, 1e-9, -1e-7, 1e-5, -1e-3, 0.1])] * 3))
        turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ turn
    if kind in ("oblique", "sheared"):
        turn = np.linalg.qr(np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=(3, 3)))[0] @ turn
    steps = turn @ np.diag(draw(st.tuples(*[st.sampled_from([4e-6, 0.05, 0.5, 0.9375, 1, 1.2, 3, 8])] * 3)))
    assume(np.linalg.norm(steps, axis=0).max() / np.linalg.norm(steps, axis=0).min() < 1e3)
    if kind == "sheared":
        steps[:, 2] += np.tan(np.deg2rad(draw(st.sampled_from([-30, -5, 0.3, 12, 25])))) * steps[:, 1]
    affine = np.eye(4)
    size = np.abs(steps).max()
    affine[:3, :3], affine[:3, 3] = steps, np.array(draw(st.tuples(*[st.integers(-300, 300)] * 3))) * size / 2
    return Grid(f"{kind} {affine.tolist()}", affine)


def world(affine: np.ndarray, shape) -> np.ndarray:
    """Return where each voxel lies, `(n, 3)`, in C order."""
    return np.argwhere(np.ones(shape, bool)) @ affine[:3, :3].T + affine[:3, 3]


def check_places(case: Case, array: np.ndarray, affine: np.ndarray) -> None:
    """Check that a case has each value of a file at its place in the world, in RAS+ order."""
    assert case.axes == "RAS"
    index = (world(affine, array.shape) - case.affine[:3, 3]) @ np.linalg.inv(case.affine[:3, :3]).T
    there = np.rint(index).astype(int)
    np.testing.assert_allclose(index, there, atol=1e-2)
    np.testing.assert_array_equal(case.image[0][tuple(there.T)], array.ravel())


def along(way: int, case: Case, folder) -> Case:
    """Return a case after one of the things that keep it as it is."""
    whole = tuple(slice(None) for _ in case.shape)
    if way >= 5:
        case = datasets.store([case], folder, normalise=None, dtype="float32", progress=False)[0]
        way -= 4
    changes = [
        lambda: case,
        lambda: case.replace(name="again"),
        lambda: case.select(case.channels),
        lambda: case.crop(whole),
        lambda: case.relabelled({1: 1}),
    ]
    return changes[way]()


# ----------------------------------------------------------------------------------------------------------------- NIfTI


@FAST
@given(
    grid=grids(),
    dtype=st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32]),
    kind=st.sampled_from([nibabel.Nifti1Image, nibabel.Nifti2Image]),
    order=st.sampled_from("<>"),
    codes=st.sampled_from([(1, 1), (2, 0), (4, 1), (1, 3)]),
    suffix=st.sampled_from([".nii", ".nii.gz", ".NII", ".Nii.Gz"]),
    unit=st.sampled_from(["mm", "mm", "micron", "meter", "unknown"]),
    way=WAYS,
)
def test_nifti(tmp_path_factory, grid, dtype, kind, order, codes, suffix, unit, way):
    folder = tmp_path_factory.mktemp("nifti")
    array = np.random.default_rng(0).permutation(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    header.set_data_shape(SHAPE)
    header.set_sform(grid.affine, codes[0])
    header.set_qform(grid.affine, 0 if "sheared" in grid.kind else codes[1])
    header.set_xyzt_units(unit, "sec")
    header["descrip"] = b"scanner 7"
    path = folder / f"in{suffix}"
    content = kind(array, None, header).to_bytes()
    path.write_bytes(gzip.compress(content) if suffix.lower().endswith("gz") else content)
    before, factor = kind.from_bytes(content), {"micron": 1e-3, "meter": 1e3}.get(unit, 1)
    case = read_case({"t1": path}, label=path)
    check_places(case, array, np.diag([factor, factor, factor, 1]) @ before.affine)
    kept = along(way, case, folder / "s")
    assert (kept.axes, kept.native_axes) == ("RAS", case.native_axes)
    written = write_nifti(folder / f"out{suffix}", kept.image[0].astype(dtype), kept)
    assert [p.name for p in folder.glob("*out*")] == [written.name]
    again = read_case({"t1": written})
    np.testing.assert_array_equal(again.image, case.image)
    np.testing.assert_array_equal(read_label(written, kept), case.label)
    after = nibabel.load(written.rename(folder / f"out{suffix.lower()}"))
    assert type(after) is kind and after.header == before.header and after.get_data_dtype().newbyteorder("=") == dtype
    assert after.affine.tobytes() == before.affine.tobytes()
    np.testing.assert_array_equal(np.asanyarray(after.dataobj), array)


@FAST
@given(grid=grids(), data=st.data())
def test_a_part_of_a_file_is_that_part(tmp_path_factory, grid, data):
    """Cropped in memory and written, the voxels come in the order of the file, at their places."""
    folder = tmp_path_factory.mktemp("part")
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    nibabel.save(nibabel.Nifti1Image(array, grid.affine), folder / "in.nii")
    case = read_case({"t1": folder / "in.nii"})
    starts = [data.draw(st.integers(0, n - 1)) for n in case.shape]
    box = tuple(slice(a, data.draw(st.integers(a + 1, n))) for a, n in zip(starts, case.shape))
    part = case.crop(box)
    assert part.native_axes == case.native_axes and part.axes == "RAS"
    after = nibabel.load(write_nifti(folder / "out.nii", part.image[0].astype(np.int16), part))
    found = np.asanyarray(after.dataobj)
    first = np.argwhere(array == found.flat[0])[0]  # every value is there once
    np.testing.assert_array_equal(found, array[tuple(slice(a, a + n) for a, n in zip(first, found.shape))])
    expected = grid.affine @ [*first, 1]
    size = np.linalg.norm(grid.affine[:3, :3], axis=0).min()
    np.testing.assert_allclose(after.affine[:3, 3], expected[:3], atol=max(1e-3 * size, 1e-5 * np.abs(expected).max()))
    np.testing.assert_allclose(after.affine[:3, :3], grid.affine[:3, :3], atol=1e-5 * np.abs(grid.affine[:3, :3]).max())


@FAST
@given(
    array=hnp.arrays(np.float32, (2, *SHAPE), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
)
def test_intensities_and_maps(tmp_path_factory, array, suffix):
    assume(all(a.min() < a.max() for a in array))
    folder = tmp_path_factory.mktemp("values")
    case = Case(array, ("a", "b"), "p", native_axes="PIR")
    back = read_case({c: write_nifti(folder / f"{c}{suffix}", i, case) for c, i in zip("ab", array)})
    assert back.image.tobytes() == array.tobytes()
    maps = write_nifti(folder / f"maps{suffix}", array, case)
    assert np.moveaxis(read_image(maps).array, -1, 0).tobytes() == array.tobytes()
    assert read_case(maps, channels=("a", "b")).image.tobytes() == array.tobytes()
    exact = datasets.store([case], folder / "32", normalise=None, dtype="float32", progress=False)[0]
    np.testing.assert_array_equal(exact.image, array)
    chosen = datasets.store([case], folder / "any", normalise=None, progress=False)[0]
    for found, right in zip(chosen.image, array.astype(np.float64)):
        assert np.abs(found - right).max() <= 2**-11 * (right.max() - right.min())


@FAST
@given(
    classes=st.lists(st.integers(0, 255), min_size=1, max_size=6, unique=True),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64]),
    native=st.sampled_from(["RAS", "LPS", "ILA", "PSR"]),
)
@example([0, 255], np.uint16, "LPS")
@example([3], np.int64, "LPS")
def test_class_numbers(tmp_path_factory, classes, dtype, native):
    folder = tmp_path_factory.mktemp("label")
    rng = np.random.default_rng(0)
    label = rng.choice(classes, SHAPE).astype(np.uint8)
    case = Case(rng.normal(size=(1, *SHAPE)).astype(np.float32), ("a",), "p", label, native_axes=native)
    image, written = (
        write_nifti(folder / "a.nii", case.image[0], case),
        write_nifti(folder / "l.nii", label.astype(dtype), case),
    )
    if max(classes) <= np.iinfo(np.int16).max:
        np.testing.assert_array_equal(read_label(written, case), label)
    back = read_case({"a": image}, label=written, labels=classes)
    np.testing.assert_array_equal(back.label, label)
    stored = datasets.store([back], folder / "s", progress=False)[0]
    np.testing.assert_array_equal(stored.label, label)
    assert {c for c in classes if c and (label == c).any()} == {int(g.split()[1]) for g in stored.counts if g[:6] == "class "}


# ------------------------------------------------------------------------------------------------------------- MetaImage


def write_metaimage(path, array, affine, *, compress: bool, big: bool):
    """Write `array[i, j, k]`, where i varies fastest, on the grid of an affine to RAS+."""
    directions = (np.diag([-1.0, -1, 1]) @ affine[:3, :3]).T
    sizes = np.linalg.norm(directions, axis=1)
    types = {
        "uint8": "MET_UCHAR",
        "int16": "MET_SHORT",
        "uint16": "MET_USHORT",
        "float32": "MET_FLOAT",
        "float64": "MET_DOUBLE",
    }
    values = array.astype(array.dtype.newbyteorder(">" if big else "<")).tobytes(order="F")
    values = zlib.compress(values) if compress else values
    local = path.suffix.lower() == ".mha"
    source = path.with_suffix(".zraw" if compress else ".raw")
    lines = {
        "ObjectType": "Image",
        "NDims": 3,
        "CompressedData": compress,
        "BinaryDataByteOrderMSB": big,
        "TransformMatrix": " ".join(repr(float(v)) for v in (directions / sizes[:, None]).ravel()),
        "Offset": " ".join(repr(float(v)) for v in affine[:3, 3] * (-1, -1, 1)),
        "ElementSpacing": " ".join(repr(float(v)) for v in sizes),
        "DimSize": " ".join(map(str, array.shape)),
        "ElementType": types[array.dtype.name],
        "ElementDataFile": "LOCAL" if local else source.name,
    }
    text = "".join(f"{k} = {v}\n" for k, v in lines.items()).encode("utf-8")
    path.write_bytes(text + values if local else text)
    if not local:
        source.write_bytes(values)
    return path


@FAST
@given(
    grid=grids(),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.float32, np.float64]),
    name=st.sampled_from(["a.mha", "a.mhd", "Fall é 7.MHA", "b c.d.MHD"]),
    compress=st.booleans(),
    big=st.booleans(),
    way=WAYS,
)
def test_metaimage(tmp_path_factory, grid, dtype, name, compress, big, way):
    folder = tmp_path_factory.mktemp("meta")
    array = np.random.default_rng(0).permutation(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)
    path = write_metaimage(folder / name, array, grid.affine, compress=compress, big=big)
    case = read_case({"t2": path}, label=path)
    check_places(case, array, grid.affine)
    kept = along(way, case, folder / "s")
    written = write_nifti(folder / "out.nii", kept.image[0], kept)
    after = nibabel.load(written)
    np.testing.assert_array_equal(np.asanyarray(after.dataobj), array)
    np.testing.assert_allclose(after.affine, grid.affine, atol=1e-6 * np.abs(grid.affine).max())
    # NIfTI rounds the affine, which must not turn a grid at 45° otherwise.
    np.testing.assert_array_equal(read_label(written, kept), case.label)
    np.testing.assert_array_equal(read_case({"a": path, "b": written}, label=written).image[1], case.image[0])


# ----------------------------------------------------------------------------------------------------------------- names

DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\.|$)", re.IGNORECASE)
LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co", "Zl", "Zp"], exclude_characters='/\\<>:"|?*')
NAMES = st.text(LETTERS, min_size=1, max_size=40).filter(
    lambda name: not name.startswith(".") and unicodedata.normalize("NFC", name) == name and not DEVICE.match(name)
)


@FAST
@given(name=NAMES, channel=NAMES)
@example("Fall 7. Nr. 3", "t1.gd post")
@example("sub-01_ses-2.nii", "mask.nii.gz")
@example("東京 ✓ ß", "T2 * FLAIR".replace("*", "×"))
@example("x" * 200, "y" * 200)
@example(" lead and trail ", "-")
def test_names(tmp_path_factory, name, channel):
    folder = tmp_path_factory.mktemp("names")
    rng = np.random.default_rng(0)
    try:
        name.encode("utf-8"), (folder / name).touch(), (folder / name).unlink()
    except (OSError, UnicodeEncodeError):
        assume(False)
    case = Case(
        rng.normal(size=(1, *SHAPE)).astype(np.float32),
        (channel,),
        name,
        rng.integers(0, 3, SHAPE).astype(np.uint8),
        rng.random(SHAPE) > 0.3,
    )
    assume(channel not in ("label", "mask") and len((name + ".safetensors").encode()) < 250 and len(channel.encode()) < 240)
    written = write_case(folder / "raw" / name, case)
    files = {channel: written / f"{channel}.nii.gz"}
    back = read_case(files, label=written / "label.nii.gz", mask=written / "mask.nii.gz")
    assert (back.name, back.channels) == (name, (channel,))
    cohort = datasets.store([back], folder / "s", normalise=None, dtype="float32", progress=False)
    for found in (cohort[name], datasets.stored(folder / "s")[0]):
        assert (found.name, found.channels) == (name, (channel,))
        for what in ("image", "label", "mask"):
            np.testing.assert_array_equal(getattr(found, what), getattr(case, what))


CODES = ["".join(c) for pairs in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*pairs)]


@pytest.mark.parametrize("native", CODES)
def test_a_case_from_memory_in_every_orientation(tmp_path, native):
    """Phantoms have no file: they are written in the orientation that they name."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    label, mask = rng.integers(0, 4, SHAPE).astype(np.uint8), rng.random(SHAPE) > 0.3
    affine = np.array([[0.5, 0, 0, 7], [0, 1.5, 0, -8], [0, 0, 4, 9], [0, 0, 0, 1]])
    case = Case(image, ("a", "b"), "p", label, mask, affine, native)
    folder = write_case(tmp_path / "p", case)
    assert "".join(nibabel.aff2axcodes(nibabel.load(folder / "a.nii.gz").affine)) == native
    back = read_case({c: folder / f"{c}.nii.gz" for c in "ab"}, label=folder / "label.nii.gz", mask=folder / "mask.nii.gz")
    assert (back.native_axes, back.name) == (native, "p")
    for what in ("image", "label", "mask", "affine"):
        np.testing.assert_array_equal(getattr(back, what), getattr(case, what))
