"""What channels are for: ablation against zeroing by hand, patches against brute force, gradients against finite differences."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from medseg_lite import attribution, inference, models
from medseg_lite.attribution import ablate, ablation_table, grad_cam, position_explained, strongest_patches
from medseg_lite.engine.tiles import plan
from medseg_lite.features import FeatureMaps, capture
from medseg_lite.volume import padded_region


@pytest.fixture
def model(stir):
    torch.manual_seed(0)
    return stir(models.deepmedic(in_channels=2, classes=3, width=0.1))


def hooks(model) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def predict(model, case, **options):
    return inference.predict(model, case, output="logits", progress=False, **options)


def test_ablation_equals_zeroing_the_next_layers_weights(model, noise_case):
    case = noise_case((9, 12, 9))
    whole = predict(model, case)
    with ablate(model, "normal.7", [1, 3]) as same:
        assert same is model
        without = predict(model, case)
    assert np.abs(without - whole).max() > 1e-3
    assert (predict(model, case) == whole).all() and hooks(model) == 0 and "for_inference" not in vars(model)
    with torch.no_grad():
        model.hidden[0].conv.weight[:, [1, 3]] = 0
    np.testing.assert_allclose(without, predict(model, case), atol=1e-5)


def test_ablation_nests_takes_values_and_ends_with_exceptions(model, noise_case):
    case = noise_case((6, 6, 6))
    with ablate(model, "normal.7", [0, 2]):
        both = predict(model, case)
    with ablate(model, "normal.7", 0):
        with ablate(model, "normal.7", 2):
            assert (predict(model, case) == both).all()
        assert (predict(model, case) != both).any()
        one = predict(model, case)
    with ablate(model, "normal.7", 0, value=2.0):
        assert (predict(model, case) != one).any()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), ablate(model, "low.3", 0):
            raise error
    assert hooks(model) == 0 and "for_inference" not in vars(model)


@pytest.mark.parametrize(
    ["layer", "channels", "message"],
    [
        ("middle", 0, "no layer 'middle'; its parts are normal"),
        ("low.3", 99, r"channels=\[99\]; layer 'low.3' has channels 0 to 3"),
    ],
)
def test_ablation_rejects(model, noise_case, layer, channels, message):
    with pytest.raises(ValueError, match=message), ablate(model, layer, channels):
        predict(model, noise_case((6, 6, 6)))
    assert hooks(model) == 0


def test_ablation_table(model, noise_case):
    case = noise_case((9, 9, 9))
    table = ablation_table(model, case, "normal.7", channels=[4, 0], regions={"one": 1, "all": {1, 2}}, progress=False)
    assert table.index.tolist() == [4, 0]
    with ablate(model, "normal.7", 4):
        prediction = inference.predict(model, case, progress=False)
    truth = case.label == 1
    wanted = 2 * ((prediction == 1) & truth).sum() / ((prediction == 1).sum() + truth.sum())
    assert table.loc[4, "dice_one"] == pytest.approx(wanted)
    assert table.loc[4, "change_one"] == pytest.approx(wanted - table.attrs["dice"]["one"])
    assert len(ablation_table(model, case, "low.7", progress=False, regions={"one": 1})) == 5
    with pytest.raises(ValueError, match="noise has no label"):
        ablation_table(model, case.replace(label=None), "low.7")


def test_strongest_patches_against_brute_force(model, noise_case):
    cases = [noise_case((14, 12, 10), seed=s, name=f"case {s}", mask=True) for s in range(3)]
    found = strongest_patches(model, cases, "normal.2", 1, count=4, per_case=2, progress=False)
    assert [p.value for p in found] == sorted((p.value for p in found), reverse=True) and len(found) == 4
    maps = {
        c.name: np.where(c.mask, capture(model, c, "normal.2", progress=False)["normal.2"].data[1].astype(float), -9)
        for c in cases
    }
    assert found[0].value == max(m.max() for m in maps.values())
    for patch in found:
        case = next(c for c in cases if c.name == patch.case)
        assert maps[patch.case][patch.position] == patch.value and patch.image.shape == (2, 7, 7, 7)
        stop = [a + 7 for a in patch.start]
        assert (patch.image == padded_region(case.image, patch.start, stop)).all() and patch.image[0, 3, 3, 3] == case.image[
            (0, *patch.position)
        ]
        assert (patch.label == padded_region(case.label, patch.start, stop)).all()
    for a in found:
        for b in found:
            if a is not b and a.case == b.case:
                assert max(abs(p - q) for p, q in zip(a.position, b.position)) >= 3
    coarse = strongest_patches(model, cases[:1], "low.2", 0, size=(9, 9, 1), progress=False)
    assert coarse[0].image.shape == (2, 9, 9, 1)
    assert all(p % 3 == 1 for p in coarse[0].position)
    with pytest.raises(ValueError, match=r"channel=9; layer 'low.2' has channels 0 to 3"):
        strongest_patches(model, cases, "low.2", 9, progress=False)


@pytest.mark.parametrize("layer", ["normal.5", "low.7", "hidden.1"])
def test_grad_cam_against_autograd_on_one_patch(model, noise_case, layer, monkeypatch):
    case = noise_case((12, 9, 9))
    where = np.zeros(case.shape, bool)
    where[3:9, 2:7, 4:8] = True
    monkeypatch.setattr(attribution, "plan", partial(plan, tile=3))  # many tiles
    cam = grad_cam(model, case, layer, 1, where=where, region=np.s_[:, :, :])
    m, kept = model.margin, []
    x = torch.from_numpy(np.array(padded_region(case.image, [-m] * 3, [n + m for n in case.shape])))[None]
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o))
    logits = model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 1][torch.from_numpy(where)].sum(), kept[0])
    maps = capture(model, case, layer, progress=False)[layer]
    weights = gradient.sum(dim=(0, 2, 3, 4)).numpy() / maps.data[0].size
    wanted = np.maximum(np.tensordot(weights, maps.data.astype(np.float32), axes=1), 0)
    np.testing.assert_allclose(cam.data[0], wanted, rtol=1e-3, atol=1e-6 + 1e-3 * wanted.max())
    assert cam.offset == maps.offset and cam.stride == maps.stride and wanted.max() > 0
    assert hooks(model) == 0 and all(p.grad is None for p in model.parameters())


def test_grad_cam_of_predicted_voxels_in_two_dimensions(noise_case, stir):
    torch.manual_seed(1)
    model = stir(models.two_path_cnn(in_channels=2, classes=3, width=0.05, init="he"))
    torch.nn.init.normal_(model.output.weight)
    case = noise_case((14, 12, 3))
    target = int(np.bincount(inference.predict(model, case, progress=False).ravel()).argmax())
    cam = grad_cam(model, case, "local2", target)
    assert cam.data.shape[0] == 1 and cam.data.min() >= 0
    assert cam.laid_over(case.shape, 0).shape == case.shape


def test_grad_cam_of_a_network_that_pads(noise_case, monkeypatch):
    """The same in tiles as in one piece."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv3d(2, 4, 3, padding=1), torch.nn.ReLU(inplace=True), torch.nn.Conv3d(4, 2, 3, padding=1)
    )
    case = noise_case((24, 20, 16))
    where = case.label == 1
    whole = grad_cam(model, case, "0", 1, where=where, region=np.s_[:, :, :]).data
    monkeypatch.setattr(attribution, "plan", partial(plan, tile=6))
    tiled = grad_cam(model, case, "0", 1, where=where, region=np.s_[:, :, :]).data
    np.testing.assert_allclose(tiled, whole, rtol=1e-3, atol=1e-3 * whole.max())
    assert whole.max() > 0


def test_grad_cam_rejects(model, noise_case):
    case = noise_case((9, 9, 9))
    where = np.zeros(case.shape, bool)
    with pytest.raises(ValueError, match="no voxel of noise is predicted as class 7"):
        grad_cam(model, case, "low.7", 7)
    with pytest.raises(ValueError, match=r"where has shape \(3,\)"):
        grad_cam(model, case, "low.7", 1, where=np.ones(3))
    where[8] = True
    with pytest.raises(ValueError, match="81 voxels of where lie outside the region"):
        grad_cam(model, case, "low.7", 1, where=where, region=np.s_[:4, :, :])
    with pytest.raises(ValueError, match="target=9; the network has classes 0 to 2"):
        grad_cam(model, case, "low.7", 9, where=where)
    assert hooks(model) == 0


def test_position_explained():
    d, h, w = np.indices((9, 8, 7)).astype(np.float16)
    noise = np.random.default_rng(0).normal(size=d.shape)
    maps = FeatureMaps(
        "x", np.stack([d - 0.3 * h + 0.1 * w**2, noise, d * 0 + 3, d + 3 * noise]).astype(np.float16), (0, 0, 0), (1, 1, 1)
    )
    explained = position_explained(maps)
    assert explained[0] == pytest.approx(1, abs=1e-3) and explained[1] < 0.06 and explained[2] == 0 and 0.2 < explained[3] < 0.8
    mask = d < 4
    assert position_explained(maps, mask)[0] == pytest.approx(1, abs=1e-3)
    flat = FeatureMaps("x", maps.data[..., :1], (0, 0, 0), (1, 1, 1))  # one slice: no third direction
    assert position_explained(flat)[0] == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="no voxel of these maps"):
        position_explained(maps, np.zeros((9, 8, 7), bool))
