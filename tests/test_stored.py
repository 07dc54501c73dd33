"""Cases on disk: the same blocks and the same samples as in memory, and no whole volume read."""

from __future__ import annotations

import errno
import json
import os
import threading

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from small_files import brain, kept

from medseg_lite import datasets, inference, models, transforms
from medseg_lite.engine.stored import StoredCase, write
from medseg_lite.files import read_case, write_case, write_nifti
from medseg_lite.sampling import SegmentSampler, VolumeSampler
from medseg_lite.volume import Case, padded_region

# ------------------------------------------------------------------------------------------------------------ one case


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_case_comes_back(tmp_path, mask, dtype):
    case = brain(mask=mask)
    found = kept(tmp_path, case, dtype=dtype)
    assert isinstance(found, Case) and repr(found) == repr(case)
    expected = case.image.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found.image, expected)
    assert found.image.dtype == np.float32 and found.image.flags.writeable
    np.testing.assert_array_equal(found.label, case.label)
    assert found.mask is None if not mask else np.array_equal(found.mask, case.mask)
    assert (found.channels, found.shape, found.native_axes, found.name) == (case.channels, case.shape, "LPS", case.name)
    np.testing.assert_array_equal(found.affine, case.affine)
    assert found.info == {"classes": ("a", "b"), "site": 3}
    assert found.highest_label == 4 and found.labelled
    inside = case.image[:, case.mask] if mask else case.image.reshape(2, -1)
    np.testing.assert_allclose(found.std, inside.std(1), rtol=1e-6)


def test_a_stored_case_answers_like_one_in_memory(tmp_path):
    case = brain()
    found = kept(tmp_path, case, dtype="float32")
    assert case.in_memory and not found.in_memory
    for group in ("mask", "labelled", "background", "class 1", "class 3", "class 4"):
        assert found.count(group) == case.count(group)
    assert found.labelled == case.labelled and found.highest_label == case.highest_label
    np.testing.assert_allclose(found.std, case.std, rtol=1e-6)
    start, stop = (-3, 2, 10), (5, 9, 20)
    np.testing.assert_array_equal(found.block(start, stop), case.block(start, stop))
    np.testing.assert_array_equal(found.label_block(start, stop), case.label_block(start, stop))
    np.testing.assert_array_equal(found.relabelled({1: 2, 2: 1}).label, case.relabelled({1: 2, 2: 1}).label)


def test_only_what_is_not_constant_is_stored(tmp_path):
    case = brain()
    path = kept(tmp_path, case).path
    with safe_open(path, "np") as file:  # an independent reader of the format
        image, label = file.get_tensor("image"), file.get_tensor("label")
    content = case.mask | (case.label > 0)
    box = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(content))
    np.testing.assert_array_equal(image, case.image[(slice(None), *box)].astype(np.float16))
    np.testing.assert_array_equal(label, case.label[box])
    assert image[0].size < 0.8 * case.image[0].size


def test_without_a_label_and_an_image_that_is_constant(tmp_path):
    case = brain().replace(label=None)
    found = kept(tmp_path, case)
    assert found.label is None and not found.labelled and set(found.counts) == {"mask"}
    with pytest.raises(ValueError, match="brain0 has no label"):
        found.label_block((0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="brain0 has no label; training needs one"):
        SegmentSampler([found])
    flat = Case(np.full((1, 3, 4, 5), 7, np.float32), ("ct",), "flat")
    np.testing.assert_array_equal(kept(tmp_path, flat).image, flat.image)


def test_changes_make_cases_in_memory(tmp_path):
    case = brain()
    found = kept(tmp_path, case, dtype="float32")
    for ours, theirs in [
        (found.select(["t1c"]), case.select(["t1c"])),
        (found.crop((slice(2, 9), slice(None), slice(1, 5))), case.crop((slice(2, 9), slice(None), slice(1, 5)))),
        (found.replace(label=None), case.replace(label=None)),
        (transforms.standardise(found), transforms.standardise(case)),
    ]:
        assert type(ours) is Case and repr(ours) == repr(theirs)
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.mask, theirs.mask)


def test_results_are_written_on_the_grid_of_the_original(tmp_path):
    write_case(tmp_path / "raw", brain())
    case = read_case({"flair": tmp_path / "raw" / "flair.nii.gz"}, label=tmp_path / "raw" / "label.nii.gz")
    ours, theirs = (
        nibabel.load(write_nifti(tmp_path / name, case.label, c))
        for name, c in [("a.nii", case), ("b.nii", kept(tmp_path, case))]
    )
    assert ours.header == theirs.header and nibabel.aff2axcodes(theirs.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_block_is_that_of_the_volume(tmp_path, data):
    """Within the stored box, across its border, outside it, and mirrored far beyond the volume."""
    case = brain()
    path = tmp_path / "brain0.safetensors"
    found = StoredCase(path) if path.exists() else kept(tmp_path, case, dtype="float32")
    start = [data.draw(st.integers(-40, n + 20)) for n in case.shape]
    stop = [a + data.draw(st.integers(1, 45)) for a in start]
    np.testing.assert_array_equal(found.block(start, stop), padded_region(case.image, start, stop))
    np.testing.assert_array_equal(found.label_block(start, stop), padded_region(case.label[None], start, stop)[0])


def test_every_voxel_of_every_group_is_found_in_order(tmp_path):
    case = brain()
    found, file = kept(tmp_path, case), kept(tmp_path, case).open()
    groups = {
        "mask": case.mask,
        "labelled": case.label > 0,
        "background": case.mask & (case.label == 0),
        **{f"class {c}": case.label == c for c in (1, 2, 4)},
    }
    assert set(found.counts) == set(groups)
    for group, voxels in groups.items():
        places = [file.voxel(group, number) for number in range(found.counts[group])]
        assert places == [tuple(p) for p in np.argwhere(voxels).tolist()]
        for number in (-1, len(places)):
            with pytest.raises(IndexError, match=f"there is no number {number}"):
                file.voxel(group, number)


# ------------------------------------------------------------------------------------------------------------- samples


def same(a, b, tolerance: float) -> None:
    torch.testing.assert_close(a.label, b.label, rtol=0, atol=0)
    for x, y in zip(*([i] if isinstance(i, torch.Tensor) else i for i in (a.inputs, b.inputs))):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture
def cohort(tmp_path):
    """Cases in memory, and the same on disk in each type."""
    cases = [brain(n, shape) for n, shape in enumerate([(19, 23, 17), (16, 14, 21), (12, 25, 13)])]
    cases[1] = cases[1].replace(mask=None)
    return cases, {
        dtype: list(datasets.store(cases, tmp_path / dtype, normalise=None, dtype=dtype, progress=False))
        for dtype in ("float32", "float16")
    }


@pytest.mark.parametrize("scheme", ["foreground", "uniform", "equal"])
@pytest.mark.parametrize("dims, margin", [(3, 4), (3, 30), (2, 6)])
def test_segments_are_those_of_cases_in_memory(cohort, scheme, dims, margin):
    cases, on_disk = cohort
    options = {"output": 5, "margin": margin, "spatial_dims": dims, "scheme": scheme, "shift": 0.1, "seed": 3}
    memory = SegmentSampler(cases, **options)
    for dtype, tolerance in [("float32", 1e-6), ("float16", 2e-3)]:
        disk = SegmentSampler(on_disk[dtype], **options)
        for step in (4, 0, 7):
            same(memory.batch(step), disk.batch(step), tolerance)


def test_segments_of_a_network_with_two_inputs_and_of_a_mixed_cohort(cohort):
    cases, on_disk = cohort
    model = models.deepmedic(in_channels=2, width=0.1)
    options = {"output": 3, "margin": model.margin, "cut": model.cut, "batch_size": 4}
    mixed = [on_disk["float32"][0], cases[1], on_disk["float32"][2]]
    for step in range(2):
        same(SegmentSampler(cases, **options).batch(step), SegmentSampler(mixed, **options).batch(step), 1e-6)


@pytest.mark.parametrize("options", [{"crop": 12, "batch_size": 2}, {"crop": (8, 12, 4)}, {"multiple": 16}])
def test_volumes_are_those_of_cases_in_memory(cohort, options):
    cases, on_disk = cohort
    memory = VolumeSampler(cases, **options, augment=transforms.augment)
    for dtype, tolerance in [("float32", 1e-6), ("float16", 5e-3)]:
        disk = VolumeSampler(on_disk[dtype], **options, augment=transforms.augment)
        for step in (5, 0, 1):
            same(memory.batch(step), disk.batch(step), tolerance)


def test_sampling_never_reads_a_whole_volume(cohort, monkeypatch):
    _, on_disk = cohort

    def never(self):
        raise AssertionError("the whole volume was read")

    for what in ("image", "label", "mask"):
        monkeypatch.setattr(StoredCase, what, property(never))
    SegmentSampler(on_disk["float16"], output=3, margin=2, shift=0.1).batch(0)
    VolumeSampler(on_disk["float16"], crop=4).batch(0)


def test_any_number_of_workers_makes_the_same_batches(cohort):
    _, on_disk = cohort
    sampler = SegmentSampler(on_disk["float16"], output=3, margin=4)
    expected, found = [sampler.batch(step) for step in range(12)], {}

    def work(steps):
        for step in steps:
            found[step] = sampler.batch(step)

    threads = [threading.Thread(target=work, args=(range(n, 12, 3),)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step, batch in enumerate(expected):
        same(batch, found[step], 0)


def test_no_file_stays_open(cohort):
    _, on_disk = cohort
    sampler = SegmentSampler(on_disk["float16"], output=3)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if before is None:
        pytest.skip("no list of open files on this system")
    for step in range(3):
        sampler.batch(step)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_network_segments_a_stored_case(tmp_path):
    case = brain()
    model = models.deep_plus(in_channels=2, width=0.1).eval()
    ours, theirs = (
        inference.predict(model, c, output="logits", progress=False) for c in (kept(tmp_path, case, dtype="float32"), case)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_file_replaced_under_an_open_cohort_is_noticed(tmp_path):
    found = kept(tmp_path, brain())
    kept(tmp_path, brain().replace(image=brain().image + 1))
    with pytest.raises(ValueError, match=r"brain0\.safetensors was written anew since it was opened; open the cohort"):
        found.block((0, 0, 0), (1, 1, 1))
    found.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"brain0\.safetensors does not exist; store the cohort again"):
        _ = found.image


def test_an_empty_mask_is_an_error_when_sampling(tmp_path):
    case = brain()
    found = kept(tmp_path, case.replace(mask=np.zeros_like(case.mask)))
    with pytest.raises(ValueError, match="brain0: the mask is empty"):
        SegmentSampler([found], output=3)


def test_files_that_are_no_stored_cases(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        write(tmp_path / "a.npy", brain())
    newer = json.dumps({"format": 99})
    content = json.dumps({"__metadata__": {"case": newer}}).encode()
    (tmp_path / "new.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(ValueError, match="it has format 99, this version reads 1"):
        StoredCase(tmp_path / "new.safetensors")


def test_a_drive_that_numbers_its_files_anew_each_time(tmp_path, monkeypatch):
    """Some network drives have no inodes: the number of a file is another one after each opening."""
    found, numbers = kept(tmp_path, brain()), iter(range(1000))
    real = os.fstat

    def fstat(handle):
        state = real(handle)
        return os.stat_result((state[0], next(numbers), *state[2:10]), {"st_mtime_ns": state.st_mtime_ns})

    monkeypatch.setattr(os, "fstat", fstat)
    np.testing.assert_array_equal(found.label, brain().label)
    content = found.path.read_bytes()
    state = found.path.stat()
    found.path.write_bytes(content.replace(b"brain0", b"brain1"))  # other facts, same size and time
    os.utime(found.path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match="was written anew since it was opened"):
        _ = found.label


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL])
def test_a_drive_whose_files_cannot_be_mapped(tmp_path, monkeypatch, number):
    found = kept(tmp_path, brain(), dtype="float32")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("medseg_lite.engine.stored.mmap.mmap", refuse)
    np.testing.assert_array_equal(found.image, brain().image)
    assert found.open().voxel("class 1", 0) == tuple(np.argwhere(brain().label == 1)[0])
