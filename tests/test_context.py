from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from medseg_lite import context, inference, models
from medseg_lite.context import PLANES, extract_scores, facing, facing_back, with_scores


@pytest.fixture
def networks(stir):
    def build(seed):
        torch.manual_seed(seed)
        return stir(models.mlynarski_2d(in_channels=2, classes=3, width=0.05), seed)

    return {plane: build(seed) for seed, plane in enumerate(PLANES)}


def test_facing_turns_everything_and_back(noise_case):
    case = noise_case((8, 9, 7), mask=True)
    case.extra["tissue"] = case.image[0].copy()
    for plane, axis in PLANES.items():
        turned = facing(case, plane)
        assert turned.shape[2] == case.shape[axis]
        assert np.array_equal(facing_back(turned.image, plane), case.image)
        for a, b in ((turned.label, case.label), (turned.mask, case.mask), (turned.extra["tissue"], case.image[0])):
            assert np.array_equal(facing_back(a, plane), b)
        # a voxel keeps its place in the world
        index = np.array([1, 2, 3])
        here = [index[a] for a in range(3) if a != axis] + [index[axis]]
        np.testing.assert_allclose((turned.affine @ [*here, 1])[:3], (case.affine @ [*index, 1])[:3])
    with pytest.raises(ValueError, match="plane='oblique'; expected one of axial, coronal, sagittal"):
        facing(case, "oblique")


def test_scores_are_those_of_the_networks_slice_by_slice(networks, noise_case, tmp_path):
    case = noise_case((17, 18, 20))
    extract_scores(networks, [case], tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{case.name}_{p}.safetensors" for p in PLANES)
    full = with_scores(case, tmp_path)
    assert full.channels == (*case.channels, *(f"{p} {k}" for p in PLANES for k in range(3)))
    assert np.array_equal(full.image[:2], case.image) and full.image.dtype == np.float32
    for n, (plane, axis) in enumerate(PLANES.items()):
        number = 4
        one = np.take(case.image, number, axis=axis + 1)[..., None]  # that slice alone, as a volume
        expected = inference.predict(
            networks[plane], case.replace(image=one, label=None, mask=None), output="logits", progress=False
        )[..., 0]
        found = np.take(full.image[2 + 3 * n : 5 + 3 * n], number, axis=axis + 1)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)  # kept in float16
    assert with_scores(case, tmp_path, planes=["coronal"]).image.shape[0] == 5


def test_an_interrupted_extraction_goes_on_without_recomputing(networks, noise_case, tmp_path, monkeypatch):
    cases = [noise_case((16, 16, 16), seed=n).replace(name=f"case{n}") for n in range(3)]
    done, predict = [], inference.predict

    def counted(model, case, **options):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(case.name)
        return predict(model, case, **options)

    monkeypatch.setattr(context.inference, "predict", counted)
    with pytest.raises(KeyboardInterrupt):
        extract_scores(networks, cases, tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 4
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    monkeypatch.setattr(context.inference, "predict", lambda m, c, **o: (done.append(c.name), predict(m, c, **o))[1])
    extract_scores(networks, cases, tmp_path, progress=False)
    assert len(done) == 9 and len(list(tmp_path.iterdir())) == 9
    assert all((tmp_path / name).stat().st_mtime_ns == t for name, t in times.items())
    extract_scores(networks, cases, tmp_path, progress=False)
    assert len(done) == 9  # nothing left to do

    with torch.no_grad():
        networks["coronal"].classifier.bias += 1  # trained on: its scores are made anew, the others' are kept
    extract_scores(networks, cases, tmp_path, progress=False)
    assert len(done) == 12
    (tmp_path / "case1_axial.safetensors").write_bytes(b"cut off")
    extract_scores(networks, cases, tmp_path, progress=False)
    assert len(done) == 13 and with_scores(cases[1], tmp_path).image.shape[0] == 11


def test_one_case_is_in_memory_at_a_time(noise_case, tmp_path, stir):
    network = {"axial": stir(models.mlynarski_2d(in_channels=1, classes=2, width=0.05))}

    def peak(count: int) -> int:
        cases = (
            noise_case((32, 32, 16), seed=n, channels=("flair",)).replace(name=f"{count}-{n}") for n in range(count)
        )
        tracemalloc.start()
        extract_scores(network, cases, tmp_path, progress=False)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(12) < 1.3 * peak(2)


def test_scores_of_another_image_are_refused(networks, noise_case, tmp_path):
    case = noise_case((16, 16, 16))
    with pytest.raises(FileNotFoundError, match=r"call extract_scores with .* and the axial network"):
        with_scores(case, tmp_path)
    extract_scores(networks, [case], tmp_path, progress=False)
    with pytest.raises(ValueError, match="was not made from this image"):
        with_scores(case.replace(image=case.image + 1), tmp_path)
    with pytest.raises(ValueError, match="two cases are called"):
        extract_scores(networks, [case, case], tmp_path, progress=False)
    with pytest.raises(ValueError, match="no slashes"):
        extract_scores(networks, [case.replace(name="../out")], tmp_path, progress=False)
