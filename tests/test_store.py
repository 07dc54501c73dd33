"""Cohorts on disk: stored once, never stale, never half there."""

from __future__ import annotations

import errno
import os
from functools import partial

import numpy as np
import pytest
from small_files import brain

from medseg_lite import datasets, transforms
from medseg_lite.datasets import nifti_folder
from medseg_lite.engine import stored
from medseg_lite.engine.stored import StoredCase, write
from medseg_lite.files import write_case, write_nifti
from medseg_lite.volume import Case


class Counting:
    """A normalisation that remembers for which cases it was called."""

    seen: list[str] = []  # noqa: RUF012


def counted(case: Case, *, gain: float = 1.0) -> Case:
    Counting.seen.append(case.name)
    return case.replace(image=gain * case.image)


@pytest.fixture
def seen():
    Counting.seen = []
    return Counting.seen


@pytest.fixture
def raw(tmp_path):
    for n in range(3):
        write_case(tmp_path / "raw" / f"p{n}", brain(n))
    channels = {c: f"{c}.nii.gz" for c in ("flair", "t1c")}
    return lambda **options: nifti_folder(
        tmp_path / "raw", channels=channels, label="label.nii.gz", mask="mask.nii.gz", **options
    )


def test_a_cohort_is_standardised_and_stored_once(tmp_path, raw):
    cohort = datasets.store(raw(), tmp_path / "s", progress=False)
    assert cohort.names == ["p0", "p1", "p2"] and sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        f"p{n}.safetensors" for n in range(3)
    ]
    for case, expected in zip(cohort, raw()):
        expected = transforms.standardise(expected)
        np.testing.assert_array_equal(case.image, expected.image.astype(np.float16).astype(np.float32))
    assert cohort["p1"].name == "p1" and cohort[1:].names == ["p1", "p2"]
    assert datasets.stored(tmp_path / "s", cases=["p2", "p0"]).names == ["p2", "p0"]


def test_nothing_is_done_twice_and_nothing_stale_is_used(tmp_path, raw, seen):
    folder = tmp_path / "s"

    def again(cases, normalise=counted, **options):
        seen.clear()
        datasets.store(cases, folder, normalise=normalise, progress=False, **options)
        return list(seen)

    assert again(raw()) == ["p0", "p1", "p2"]
    assert again(raw()) == []
    assert again(raw(cases=["p2"])) == []
    write_nifti(tmp_path / "raw" / "p1" / "t1c.nii.gz", 2 * brain(1).image[1], brain(1))  # a changed source
    assert again(raw()) == ["p1"]
    assert again(raw(label_map={4: 3})) == ["p0", "p1", "p2"]  # changed reading
    assert datasets.stored(folder)[0].highest_label == 3
    assert again(raw()) == ["p0", "p1", "p2"]
    assert again(raw(), dtype="float32") == ["p0", "p1", "p2"]  # changed settings
    assert again(raw(), partial(counted, gain=2.0), dtype="float32") == ["p0", "p1", "p2"]
    assert again(raw(), partial(counted, gain=2.0), dtype="float32") == []
    np.testing.assert_array_equal(datasets.stored(folder)[0].image, 2 * raw()[0].image)


def test_a_change_in_any_file_of_a_case_is_noticed(tmp_path, seen):
    """Loaders that know a case by its folder, by a header with its values beside it, or by single files."""
    case = brain(shape=(9, 8, 7))
    for name in ("flair", "t1", "t1ce", "t2", "seg"):
        array = case.label if name == "seg" else np.where(case.mask, case.image[0] + 9, 0)
        write_nifti(tmp_path / "brats" / "p0" / f"p0_{name}.nii.gz", array.astype(np.float32), case)
    (tmp_path / "promise").mkdir()
    for name, array in (
        ("Case00", case.image[0].astype(np.float32)),
        ("Case00_segmentation", (case.label > 0).astype(np.uint8)),
    ):
        kind = "MET_FLOAT" if array.dtype == np.float32 else "MET_UCHAR"
        # The name of the values is another one, and its letters are as Windows has them.
        header = f"NDims = 3\nDimSize = 9 8 7\nElementSpacing = 1 1 1\nElementType = {kind}\nElementDataFile = V_{name}.RAW\n"
        (tmp_path / "promise" / f"{name}.mhd").write_text(header)
        (tmp_path / "promise" / f"V_{name}.raw").write_bytes(array.tobytes(order="F"))
    for cohort, changed in [
        (datasets.brats2017(tmp_path / "brats"), tmp_path / "brats" / "p0" / "p0_t2.nii.gz"),
        (datasets.promise12(tmp_path / "promise"), tmp_path / "promise" / "V_Case00_segmentation.raw"),
    ]:
        for expected in (1, 0, 1, 0):
            seen.clear()
            datasets.store(cohort, tmp_path / "s", normalise=counted, progress=False)
            assert len(seen) == expected
            if not expected:
                later = changed.stat().st_mtime_ns + 10**9
                os.utime(changed, ns=(later, later))


def test_a_function_is_known_by_what_may_change_its_result(tmp_path, raw, monkeypatch):
    """Functions of this package are known by name and version, others by their source text."""

    def key(normalise):
        return datasets.store(raw(cases=["p0"]), tmp_path / "s", normalise=normalise, progress=False)[0].stored_as["key"]

    assert key(transforms.standardise) == key(transforms.standardise) != key(transforms.rescale)
    whole = key(lambda case: case)
    assert whole != key(lambda case: case.replace(mask=None))
    before = key(transforms.standardise)
    monkeypatch.setattr("medseg_lite.datasets._store.VERSION", 99)
    assert key(transforms.standardise) != before


def test_cases_from_memory_are_known_by_their_content(tmp_path, seen):
    cases = [brain(0), brain(1)]
    for changed, expected in [
        (cases, ["brain0", "brain1"]),
        (cases, []),
        ([cases[0], cases[1].replace(label=None)], ["brain1"]),
        ([cases[0].replace(affine=np.eye(4)), cases[1].replace(label=None)], ["brain0"]),
    ]:
        seen.clear()
        datasets.store(changed, tmp_path, normalise=counted, progress=False)
        assert seen == expected


def test_an_interrupted_store_goes_on_where_it_stopped(tmp_path, raw, seen, monkeypatch):
    def stop(path, case, **options):
        if case.name == "p1":
            raise KeyboardInterrupt
        return write(path, case, **options)

    with monkeypatch.context() as patch:
        patch.setattr("medseg_lite.datasets._store.write", stop)
        with pytest.raises(KeyboardInterrupt):
            datasets.store(raw(), tmp_path / "s", normalise=counted, progress=False)
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["p0.safetensors"]
    seen.clear()
    assert len(datasets.store(raw(), tmp_path / "s", normalise=counted, progress=False)) == 3
    assert seen == ["p1", "p2"]


def test_a_damaged_file_is_written_anew(tmp_path, raw, seen):
    datasets.store(raw(), tmp_path / "s", normalise=counted, progress=False)
    path = tmp_path / "s" / "p1.safetensors"
    content = path.read_bytes()
    for damage in (content[:-1], content + b"x", content[:100], b"", b"<html>", b"\xff" * 64):
        seen.clear()
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"p1\.safetensors is not a stored case .*store the cohort again"):
            datasets.stored(tmp_path / "s")
        datasets.store(raw(), tmp_path / "s", normalise=counted, progress=False)
        assert seen == ["p1"] and StoredCase(path).name == "p1"


def test_a_full_disk_leaves_nothing_half_there(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored, "save_file", full)
    with pytest.raises(OSError, match=r"the disk is full: brain0 needs .* MB in .*cases that are complete are kept"):
        datasets.store([brain()], tmp_path / "s", progress=False)
    assert list((tmp_path / "s").iterdir()) == []


def test_errors(tmp_path, raw):
    case, big = brain(), brain().replace(image=1e5 * brain().image)
    nan = brain()
    nan.image = nan.image.copy()
    nan.image[:] = np.nan  # afterwards, for no case is made of such an image
    offset = 2.0

    def shifted(case):
        return case.replace(image=case.image + offset)

    for call, error, match in [
        (lambda: datasets.store([case, case], tmp_path, progress=False), ValueError, "two cases are called brain0"),
        (lambda: datasets.store([case.replace(name="a/b")], tmp_path, progress=False), ValueError, "no slashes"),
        (
            lambda: datasets.store([case], tmp_path, normalise=shifted),
            ValueError,
            "uses variables of the function around it.*partial",
        ),
        (
            lambda: datasets.store([big], tmp_path, normalise=None, dtype="float16", progress=False),
            ValueError,
            "too large for float16; choose dtype='float32'",
        ),
        (lambda: datasets.store([nan], tmp_path, normalise=None, progress=False), ValueError, "has NaN or infinite voxels"),
        (
            lambda: datasets.store([case], tmp_path, dtype="int8", progress=False),
            ValueError,
            "dtype is 'int8'; expected 'float16' or 'float32'",
        ),
        (lambda: datasets.stored(tmp_path / "none"), FileNotFoundError, "holds no stored case; make them with datasets.store"),
    ]:
        with pytest.raises(error, match=match):
            call()
    datasets.store(raw(cases=["p0"]), tmp_path / "s", progress=False)
    datasets.store(raw(cases=["p1"]), tmp_path / "s", normalise=None, progress=False)
    with pytest.raises(ValueError, match=r"p1\.safetensors and .*p0\.safetensors were normalised differently"):
        datasets.stored(tmp_path / "s")
    with pytest.raises(ValueError, match=r"cases is \['p9'\], but .* has p0, p1"):
        datasets.stored(tmp_path / "s", cases=["p9"])


# ---------------------------------------------------------------------------------------------------- float16 or float32

RNG = np.random.default_rng(0)
SHAPE = (6, 7, 8)
IMAGES = {
    # Images, and whether float16 is enough.
    "standardised": (RNG.normal(size=SHAPE), True),
    "standardised, with a bright vessel": (np.where(RNG.random(SHAPE) < 0.01, 40, RNG.normal(size=SHAPE)), True),
    "divided by the median": (RNG.gamma(2, 0.5, SHAPE), True),
    "from 0 to 1": (RNG.random(SHAPE), True),
    "nothing": (np.zeros(SHAPE), True),
    "grey values of 8 bits": (RNG.integers(0, 256, SHAPE), True),
    "whole numbers up to 2048": (RNG.integers(-2048, 2049, SHAPE), True),
    "whole numbers of 12 bits": (RNG.integers(0, 4096, SHAPE), False),
    "few whole numbers that float16 holds": (RNG.choice([0, 4096, 60000 // 32 * 32], SHAPE), True),
    "CT": (RNG.integers(-1024, 3072, SHAPE), False),
    "whole numbers up to 30000": (RNG.integers(0, 30001, SHAPE), False),
    "PET beyond float16": (RNG.integers(0, 100_000, SHAPE), False),
    "PET with decimals": (RNG.random(SHAPE) * 20_000, False),
    "at the end of float16": (RNG.choice([0, 65504], SHAPE), True),
    "a step beyond the end": (RNG.choice([0, 65505], SHAPE), False),
    "negative beyond the end": (RNG.choice([0, -70000], SHAPE), False),
    "an offset": (1000 + RNG.random(SHAPE), False),
    "a small offset": (10 + RNG.random(SHAPE), False),
    "tiny numbers": (1e-7 * RNG.random(SHAPE), False),
    "echoes in tesla": (1e-30 * RNG.normal(size=SHAPE), False),
}


@pytest.mark.parametrize("what", IMAGES)
def test_float16_where_it_is_enough(tmp_path, what, capsys):
    image, enough = np.float32(IMAGES[what][0]), IMAGES[what][1]
    good = np.float32(IMAGES["standardised"][0])
    case = Case(np.stack([good, image]), ("good", "other"), "p")  # one channel decides for the case
    found = datasets.store([case], tmp_path, normalise=None)[0]
    assert found.dtype == ("float16" if enough else "float32")
    assert ("1 of 1 cases were stored as float32 (p)" in capsys.readouterr().err) != enough
    span = image.max() - image.min()
    assert np.abs(found.image[1] - image).max() <= (2**-11 * span if enough else 0)
    if np.array_equal(image, np.rint(image)):
        np.testing.assert_array_equal(found.image[1], image)
    datasets.store([case], tmp_path, normalise=None)
    assert "float32" not in capsys.readouterr().err  # it is said when it is done


def test_each_case_has_the_type_that_it_needs(tmp_path):
    wide = Case(np.float32(IMAGES["CT"][0])[None], ("ct",), "wide")
    narrow = wide.replace(name="narrow", image=wide.image / 1024)
    datasets.store([wide, narrow], tmp_path, normalise=None, progress=False)
    assert {case.name: case.dtype for case in datasets.stored(tmp_path)} == {"wide": "float32", "narrow": "float16"}
    for dtype in ("float16", "float32"):
        assert {c.dtype for c in datasets.store([wide, narrow], tmp_path, normalise=None, dtype=dtype, progress=False)} == {
            dtype
        }
    with pytest.raises(ValueError, match="wide: the image has intensities up to 1e\\+300, too large for float32; divide"):
        datasets.store([wide.replace(image=np.full((1, 2, 3, 4), 1e300))], tmp_path, normalise=None, progress=False)


def test_two_names_that_are_one_file_on_some_disks(tmp_path, monkeypatch):
    """As on Windows and macOS, which do not tell small from capital letters. Elsewhere there are two files."""
    (tmp_path / "X").touch()
    for n, pair in enumerate([("P1", "p1"), ("é", "e\u0301")]):
        cases = [brain(0).replace(name=name) for name in pair]
        if not (tmp_path / "x").exists():
            assert datasets.store(cases, tmp_path / f"s{n}", progress=False).names == list(pair)
        monkeypatch.setattr("pathlib.Path.samefile", lambda *_: True)
        with pytest.raises(ValueError, match="are one file on this disk; the cases would overwrite each other"):
            datasets.store(cases, tmp_path / f"s{n}", progress=False)
        monkeypatch.undo()
