"""Batches that are made on a GPU: the same as on the CPU, from a cohort that stays in main memory."""

from __future__ import annotations

import tracemalloc
from functools import partial

import fake_device
import numpy as np
import pytest
import torch

from medseg_lite import datasets, models, sampling, transforms
from medseg_lite.sampling import Batch, SegmentSampler, VolumeSampler

DROP = partial(transforms.drop_channels, probability=0.7)
DEEPMEDIC = models.deepmedic(in_channels=2, width=0.1)
PATCHES = models.dm2d_patch(in_channels=2, width=0.1)
CUT = {"margin": DEEPMEDIC.margin, "cut": DEEPMEDIC.cut, "batch_size": 3}
FLAT = {"spatial_dims": 2, "batch_size": 6}
BOTH = {"margin": PATCHES.margin, "cut": PATCHES.cut, "output": 6}
SAMPLERS = {
    "DeepMedic's segments, shifted": (SegmentSampler, {"shift": 0.1} | CUT),
    "patches": (SegmentSampler, {"output": 1, "margin": 16, "scheme": "equal"} | FLAT),
    "slices, distorted": (SegmentSampler, {"output": 12, "augment": transforms.distort} | FLAT),
    "two inputs, distorted and shifted": (SegmentSampler, {"shift": 0.1, "augment": transforms.distort} | BOTH | FLAT),
    "slices without a sequence": (SegmentSampler, {"output": 12, "augment": DROP} | FLAT),
    "volumes": (VolumeSampler, {"multiple": 4, "augment": transforms.augment, "batch_size": 3}),
    "crops": (VolumeSampler, {"crop": (8, 12, 10), "augment": transforms.augment, "batch_size": 3}),
    "crops as they are": (VolumeSampler, {"crop": 10}),
}
EXACT = {"DeepMedic's segments, shifted", "patches", "slices without a sequence", "crops as they are"}  # without interpolation


@pytest.fixture
def cases(noise_case):
    return [noise_case((14, 16, 12), seed=n, name=f"c{n}") for n in range(3)]


def parts(batch: Batch) -> list[torch.Tensor]:
    inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
    return [*inputs, batch.label]


def make(name: str, cases, **options):
    kind, settings = SAMPLERS[name]
    return kind(cases, seed=5, **settings, **options)


def check_same(found: Batch, expected: Batch, exact: bool, device: str = "cuda") -> None:
    for tensor in parts(found):
        assert tensor.device.type == device
    *inputs, label = [tensor.cpu() for tensor in parts(found)]
    for tensor, other in zip(inputs, parts(expected)[:-1], strict=True):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, other, rtol=0, atol=0 if exact else 1e-4)
    assert label.dtype == torch.int64 and torch.equal(label, expected.label)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_batches_are_those_of_the_cpu(name, stored, cases, tmp_path):
    cases = datasets.store(cases, tmp_path, normalise=None, progress=False) if stored else cases
    plain = make(name, cases)
    with fake_device.cuda() as gpu:
        sampler = make(name, cases, device="cuda")
        assert sampler.device == gpu.device and sampler.describe() == plain.describe()  # a run goes on on either
        before = gpu.syncs.total()
        for step in (3, 0, 7):
            check_same(sampler.batch(step), plain.batch(step), name in EXACT)
        copied_back = 3 * len(parts(plain.batch(0)))  # by this test
        assert gpu.syncs.total() - before == copied_back, "the CPU waited for the GPU where a batch was made"


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_gpu_holds_a_batch_and_no_case(name, cases):
    with fake_device.cuda() as gpu:
        sampler = make(name, cases * 5, device="cuda")
        assert gpu.used == 0
        batch = sampler.batch(0)
        whole = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (p.elem for p in parts(batch))}
        assert gpu.used == sum(whole.values())
        del batch
        assert gpu.used == 0


def test_the_generator_of_an_augmentation_draws_on_the_cpu(cases):
    seen = []

    def look(image, label, *, rng):
        seen.append((image.device.type, label.device.type, label.dtype, rng.integers(1000)))
        return image, label

    with fake_device.cuda():
        for device in ("cpu", "cuda"):
            VolumeSampler(cases, augment=look, device=device).batch(2)
            SegmentSampler(cases, augment=look, output=4, device=device).batch(2)
    volume, segment, volume_there, segment_there = seen
    assert volume[:3] == segment[:3] == ("cpu", "cpu", torch.int64)
    assert volume_there == ("cuda", "cuda", *volume[2:]) and segment_there == ("cuda", "cuda", *segment[2:])


@pytest.mark.parametrize("name", ["slices, distorted", "crops"])
def test_where_memory_runs_out_the_cpu_makes_the_batches(name, cases, capsys):
    plain = make(name, cases)
    with fake_device.cuda(memory=30_000) as gpu:
        sampler = make(name, cases, device="cuda")
        check_same(sampler.batch(4), plain.batch(4), exact=True, device="cpu")
        told = capsys.readouterr()
        assert "out of memory on cuda:0 where batches are made" in told.out + told.err and gpu.used == 0
        check_same(sampler.batch(5), plain.batch(5), exact=True, device="cpu")
        told = capsys.readouterr()
        assert not told.out + told.err, "it is said once"


def test_other_errors_of_an_augmentation_are_passed_on(cases):
    def fail(image, label, *, rng):
        if image.device.type != "cpu":
            raise RuntimeError("expected scalar type Float but found Half")
        return image, label

    with fake_device.cuda(), pytest.raises(RuntimeError, match="but found Half"):
        VolumeSampler(cases, augment=fail, device="cuda").batch(0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_apple_gpus_are_given_no_float64(name, cases):
    plain = make(name, cases)
    with fake_device.mps():
        sampler = make(name, cases, device="mps")
        for step in range(3):
            check_same(sampler.batch(step), plain.batch(step), name in EXACT, device="mps")


def test_a_gpu_that_is_not_there(cases):
    for kind in (VolumeSampler, SegmentSampler):
        with pytest.raises(ValueError, match="device mps: PyTorch sees no mps device here; use cpu"):
            kind(cases, device="mps")
    assert VolumeSampler(cases, device="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("multiple, bytes_of_a_voxel", [(1, 0), (32, 4 * 4 + 1)])
def test_volumes_take_17_bytes_a_voxel_where_they_are_filled_up_and_none_where_not(multiple, bytes_of_a_voxel, noise_case):
    cases = [noise_case((30, 32, 31), channels=("a", "b", "c", "d"), name=f"c{n}", seed=n) for n in range(3)]
    tracemalloc.start()
    try:
        sampler = VolumeSampler(cases, multiple=multiple)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    expected = bytes_of_a_voxel * 3 * 32**3
    assert abs(taken - expected) < 50_000 and sampler.batch(0).label.dtype == torch.int64


def test_transforms_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    volumes = torch.randn(6, 2, 9, 8, 7, generator=generator), torch.randint(4, (6, 9, 8, 7), generator=generator)
    slices = torch.randn(6, 2, 20, 30, generator=generator), torch.randint(4, (6, 20, 30), generator=generator)
    calls = [(transforms.augment, volumes), (transforms.augment, slices), (transforms.distort, slices), (DROP, volumes)]
    for function, (image, label) in calls:
        expected = function(image, label, rng=np.random.default_rng(3))
        for place in (fake_device.cuda, fake_device.mps):
            with place() as gpu:
                found = function(image.to(gpu.device), label.to(gpu.device), rng=np.random.default_rng(3))
                assert all(t.device == gpu.device for t in found) and not gpu.syncs
                torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=1e-4)
                assert torch.equal(found[1].cpu(), expected[1])


def test_a_sampler_of_ones_own_needs_no_device():
    class Own(sampling.Sampler):
        def batch(self, step):
            return Batch(torch.zeros(1), torch.zeros(1))

    assert Own().batch(0).label.device == Own.device == torch.device("cpu")
