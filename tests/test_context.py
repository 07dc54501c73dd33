from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch

from medseg_lite import context, inference, metrics, models, paths, phantoms, transforms
from medseg_lite.context import PLANES, extract_scores, facing, facing_back, influence, with_scores


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
    scaled = with_scores(case, tmp_path, scale=0.25)
    assert np.array_equal(scaled.image[:2], case.image) and np.array_equal(scaled.image[2:], full.image[2:] / 4)


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
        cases = (noise_case((32, 32, 16), seed=n, channels=("flair",)).replace(name=f"{count}-{n}") for n in range(count))
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


def test_influence_is_the_gradient_through_both_steps(networks, noise_case, stir):
    case = noise_case((50, 64, 52))
    torch.manual_seed(0)
    solid = stir(models.mlynarski_3d(in_channels=2, classes=3, variant="a", width=0.1))
    voxel = (26, 33, 24)

    image = torch.from_numpy(case.image).requires_grad_()  # the whole volume in one graph
    parts = [image]
    for plane, axis in PLANES.items():
        others = [a for a in range(3) if a != axis]
        slices = image.permute(axis + 1, 0, *(a + 1 for a in others))
        fill = [-n % 16 for n in slices.shape[2:]]
        filled = torch.nn.functional.pad(slices, (0, fill[1], 0, fill[0]), mode="reflect")
        scores = networks[plane](filled)[:, :, : slices.shape[2], : slices.shape[3]].movedim(0, -1)
        parts.append(scores.permute(0, *(1 + (*others, axis).index(a) for a in range(3))))
        expected = inference.predict(networks[plane], facing(case, plane), output="logits", progress=False)
        np.testing.assert_allclose(parts[-1].detach(), facing_back(expected, plane), atol=1e-4)
    patch = tuple(slice(v // 4 * 4 - 21, v // 4 * 4 + 25) for v in voxel)
    joined = torch.cat([image, *(0.5 * part for part in parts[1:])])
    logits = solid(joined[(slice(None), *patch)][None])
    (gradient,) = torch.autograd.grad(logits[0, 1, 2, 1, 0], image)

    found = influence(networks, solid, case, voxel, class_number=1, scale=0.5)
    expected = gradient.abs().sum(0).numpy()  # rounding may switch a rectifier here and there
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)
    assert np.isclose(found, expected, rtol=1e-3, atol=1e-6).mean() > 0.99
    far = found.copy()
    far[patch] = 0
    assert far.max() > 0  # beyond the cube
    for axes in [(0,), (1,), (2,)]:  # but only in slices that pass through it
        far[tuple(patch[a] if a in axes else slice(None) for a in range(3))] = 0
    assert far.max() == 0


def test_influence_without_features_is_the_cube(networks, noise_case, stir):
    case = noise_case((70, 60, 56))
    torch.manual_seed(0)
    solid = stir(models.mlynarski_3d(in_channels=2, classes=3, width=0.1))
    sides = set()
    for voxel in ((32, 28, 24), (33, 29, 25), (34, 30, 26), (35, 31, 27)):
        seen = np.argwhere(influence({}, solid, case, voxel, class_number=0))
        assert (seen.min(0) <= voxel).all() and (seen.max(0) >= voxel).all()
        sides |= set((seen.max(0) - seen.min(0) + 1).tolist())
    assert sides <= {42, 46} and 46 in sides
    with pytest.raises(ValueError, match=r"reaches from -1 to 45 along H, out of noise of 60 voxels"):
        influence({}, solid, case, (32, 20, 24), class_number=0)
    with pytest.raises(ValueError, match=r"call its eval\(\) first"):
        influence({}, solid.train(), case, (32, 28, 24), class_number=0)


def test_shipped_networks_score_what_is_stored(tmp_path):
    table = pd.read_csv(paths.shipped("results", "context.csv"))
    assert not table.duplicated(["row", "seed", "set", "case"]).any()
    assert table.filter(like="dice").stack().between(0, 1).all()
    table = table[table.seed == 0].set_index(["row", "case"])

    case = phantoms.brain(103, site="B")
    case = transforms.standardise(case.replace(label=np.array([0, 1, 2, 1, 3], np.uint8)[case.label], extra={}))
    parts = {f"2d_{plane}" for plane in PLANES} | {"3d_standard", "3d_a"}
    networks = {part: models.load(paths.shipped("checkpoints", f"context_{part}.safetensors")) for part in parts}
    assert not any(case.name in network.card["trained_on"] for network in networks.values())
    extract_scores({plane: networks[f"2d_{plane}"] for plane in PLANES}, [case], tmp_path, progress=False)
    full = with_scores(case, tmp_path, scale=1 / 4)
    coronal = 4 * full.image[8:12]
    coronal[0] += table.loc[("2D coronal", case.name), "shift"]
    found = {
        "2D coronal": np.where(case.mask, coronal.argmax(0), 0),
        "standard": inference.predict(networks["3d_standard"], case, progress=False),
        "A": inference.predict(networks["3d_a"], full, progress=False),
    }
    for row, label in found.items():
        for region, classes in {"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]}.items():
            dice = metrics.dice(np.isin(label, classes), np.isin(case.label, classes))
            assert dice == pytest.approx(table.loc[(row, case.name), f"dice_{region}"], abs=0.02), (row, region)
