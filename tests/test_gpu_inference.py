"""Prediction, feature maps, context scores and attribution on a GPU that is fake: numbers and number types are those of a real one."""

from __future__ import annotations

import ast
import json
from contextlib import contextmanager
from pathlib import Path

import fake_device
import numpy as np
import pandas as pd
import pytest
import torch

from medseg_lite import attribution, context, features, inference, models, paths, phantoms
from medseg_lite.engine import precision, tiles
from medseg_lite.engine.memory import measure
from medseg_lite.volume import Case
from medseg_lite.widgets import FeatureExplorer

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    paths.say_once.cache_clear()


def logits_of(model, case: Case, **options) -> np.ndarray:
    return inference.predict(model, case, output="logits", progress=False, **options)


@contextmanager
def number_types(model):
    """The number types in which the last convolution of a network computes, call by call."""
    found = []
    conv = [m for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)][-1]
    handle = conv.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    yield found
    handle.remove()


# ------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize(
    "name",
    [
        "deepmedic",
        "shallow",
        "dm2d_seg",
        "local_cascade_cnn",
        "kayalibay_unet3d",
        "fcn_fc_resnet",
        "mlynarski_2d",
        "mlynarski_3d",
    ],
)
def test_predicts_as_the_cpu(network, noise_case, name):
    model, case = network(name), noise_case((13, 11, 7), mask=True)
    expected = logits_of(model, case)
    with fake_device.cuda():
        found = logits_of(model.to("cuda"), case, precision="float32")
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(["preset", "dtype"], [("T4", torch.float16), ("A100", torch.bfloat16)], ids=["T4", "A100"])
def test_auto_is_the_gpus_half_precision(network, noise_case, capsys, preset, dtype):
    model, case = network("dm2d_seg"), noise_case((12, 12, 3))
    expected = logits_of(model, case)
    with fake_device.cuda(preset), number_types(model.to("cuda")) as types:
        found = logits_of(model, case)
    assert types == [dtype] and not capsys.readouterr().out
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < (0.01 if dtype == torch.float16 else 0.05)


def test_the_gpu_is_waited_for_once_a_tile(network, noise_case):
    model, case = network("deepmedic"), noise_case((12, 12, 12))
    with fake_device.cuda() as gpu:
        model.to("cuda")
        for output in inference.OUTPUTS:
            for kind in ("float16", "float32"):
                gpu.syncs.clear()
                inference.predict(model, case, output=output, tile=(6, 12, 6), precision=kind, progress=False)
                assert gpu.syncs.total() == 4, (output, kind, gpu.syncs)


# --------------------------------------------------------------------------------------------------- overflow in float16


def bright_prostate():
    case = phantoms.prostate(102, site="A", size=64, vary=True).crop(np.s_[:, :, 8:12])
    return case.replace(image=case.image * 1e4)  # beyond 65504, with the same outlines


SHIPPED = {"drozdzal_prostate": bright_prostate, "em_inputs_learned": lambda: phantoms.em(101, slices=1, size=128, counts=True)}


@pytest.mark.parametrize(
    ["name", "kind"], [("drozdzal_prostate", "auto"), ("drozdzal_prostate", "float16"), ("em_inputs_learned", "auto")]
)
def test_shipped_networks_for_raw_intensities_are_right_on_a_t4(capsys, name, kind):
    """Numbers of the first reach 1e7. Without the check its labels would be background."""
    model, case = models.load(paths.shipped("checkpoints", f"{name}.safetensors")), SHIPPED[name]()
    expected = inference.predict(model, case, progress=False)
    assert expected.any()
    with fake_device.cuda():
        model.to("cuda")
        with torch.no_grad(), precision.autocast(torch.float16, CUDA):
            x = torch.from_numpy(np.float32(case.image)).permute(3, 0, 1, 2).to("cuda")
            assert not model(x).isfinite().all()
        found = inference.predict(model, case, precision=kind, progress=False)
    assert np.array_equal(found, expected)
    assert capsys.readouterr().out == f"{case.name}: numbers too large for float16 (beyond 65504); going on in float32\n"


def test_bfloat16_holds_large_numbers(capsys):
    model, case = models.load(paths.shipped("checkpoints", "drozdzal_prostate.safetensors")), SHIPPED["drozdzal_prostate"]()
    expected = inference.predict(model, case, progress=False)
    with fake_device.cuda("A100"):
        found = inference.predict(model.to("cuda"), case, progress=False)
    assert (found == expected).mean() > 0.97 and not capsys.readouterr().out


@pytest.mark.parametrize("output", inference.OUTPUTS)
def test_tiles_after_an_overflow_are_computed_in_float32(network, noise_case, capsys, output):
    model, case = network("dm2d_seg"), noise_case((12, 12, 8), mask=True)
    case.image[..., 4] *= 1e6
    expected = inference.predict(model, case, output=output, progress=False)
    with fake_device.cuda(), number_types(model.to("cuda")) as types:
        found = inference.predict(model, case, output=output, tile=(12, 12, 1), progress=False)
    # Slices 2 to 6 hold the mask.
    assert types == [torch.float16] * 3 + [torch.float32] * 3
    assert capsys.readouterr().out.count("\n") == 1
    if output == "labels":
        assert (found == expected).mean() > 0.99 and np.array_equal(found[..., 4:], expected[..., 4:])
    else:
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[..., 4:], expected[..., 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["unet2d", "kayalibay_unet3d", "two_path_cnn"])
def test_weights_that_overflow(network, noise_case, capsys, name):
    """One class's logits alone overflow, downwards: its labels would be right, and its scores would not."""
    model, case = network(name), noise_case((16, 16, 4))
    last = [m for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)][-1]
    with torch.no_grad():
        last.weight[2].fill_(0)
        if last.bias is None:
            last.bias = torch.nn.Parameter(torch.zeros(3))
        last.bias[2] = -1e5
    expected = logits_of(model, case)
    with fake_device.cuda():
        found = logits_of(model.to("cuda"), case)
    assert found.min() < -9e4 and "going on in float32" in capsys.readouterr().out
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_no_check_where_it_is_not_needed(network, noise_case, capsys):
    """Numbers that are not finite in float32 are the network's own."""
    model, case = network("dm2d_seg"), noise_case((6, 6, 2))
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with fake_device.cuda():
        found = logits_of(model.to("cuda"), case)
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()
    assert capsys.readouterr().out.count("\n") == 1


# -------------------------------------------------------------------------------------------------------- little memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ["name", "shape"],
    [
        ("deepmedic", (63,) * 3),
        ("kayalibay_unet3d", (32,) * 3),
        ("unet2d", (64, 64)),
        ("fcn_fc_resnet", (64, 64)),
        ("mlynarski_2d", (64, 64)),
    ],
)
def test_memory_is_foreseen_to_the_byte(network, name, shape, dtype):
    model = network(name)
    size = (1, 2, *shape)
    with fake_device.cuda() as gpu:
        need = measure(model.to("cuda"), size, dtype)
        x, before = torch.zeros(size).to("cuda"), gpu.used
        gpu.peak = 0
        with torch.no_grad(), precision.autocast(dtype, CUDA):
            model(x)
        assert need.bytes == gpu.peak - before + 4 * x.numel()


@pytest.mark.parametrize(
    ["name", "shape", "options"],
    [
        ("deepmedic", (42, 24, 24), {}),
        ("kayalibay_unet3d", (60, 36, 33), {"blocks": 1, "maps": 1}),
        ("mlynarski_2d", (48, 32, 30), {}),
    ],
    ids=["deepmedic", "kayalibay_unet3d", "mlynarski_2d"],
)
def test_tiles_fit_a_small_gpu(network, noise_case, capsys, name, shape, options):
    """The plan avoids running out of memory, and the result is the same."""
    model, case = network(name, **options), noise_case(shape)
    expected = logits_of(model, case)
    with fake_device.cuda() as gpu:
        model.to("cuda")
        empty = gpu.used
        logits_of(model, case, precision="float32", tile=96)
        whole = gpu.peak - empty
    model.cpu()
    with fake_device.cuda(memory=empty + 0.7 * whole) as gpu:
        found = logits_of(model.to("cuda"), case, precision="float32")
        assert gpu.peak - empty > 0.2 * whole
    assert not capsys.readouterr().out
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(["kind", "tiles"], [("float16", 1), ("float32", 2)])
def test_half_precision_takes_larger_tiles(network, noise_case, capsys, kind, tiles):
    model, case = network("deep_plus"), noise_case((48, 30, 24))
    need = measure(model, (1, 2, 64, 46, 40), torch.float16)
    with fake_device.cuda(memory=2.1 * need.bytes), number_types(model.to("cuda")) as types:
        inference.predict(model, case, precision=kind, progress=False)
    assert len(types) == tiles and not capsys.readouterr().out


def test_a_tile_that_does_not_fit_is_halved_also_after_an_overflow(network, noise_case, capsys):
    """A tile that fits in float16 may not fit in float32."""
    model, case = network("deep_plus"), noise_case((24, 20, 16))
    case.image[0, 12, 10, 8] = 1e7
    expected = logits_of(model, case)
    half, single = (measure(model, (1, 2, 40, 36, 32), dtype).bytes for dtype in (torch.float16, torch.float32))
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    with fake_device.cuda(memory=weights + (half + 3 * single) / 4), number_types(model.to("cuda")) as types:
        found = logits_of(model, case, tile=24)
    assert types == [torch.float16, torch.float32, torch.float32]
    assert capsys.readouterr().out.splitlines() == [
        "noise: numbers too large for float16 (beyond 65504); going on in float32",
        "noise: out of memory with tiles of 24×20×16 voxels; trying 12×20×16, at the same result",
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


# ---------------------------------------------------------------------------------------- feature maps and attribution


@pytest.mark.parametrize("name", ["deepmedic", "mlynarski_2d"])
def test_feature_maps(network, noise_case, name):
    model, case = network(name), noise_case((15, 12, 9))
    expected = features.capture(model, case, progress=False)
    with fake_device.cuda():
        found = features.capture(model.to("cuda"), case, progress=False)
    assert list(found) == list(expected)
    for layer, maps in found.items():
        assert (maps.offset, maps.stride) == (expected[layer].offset, expected[layer].stride)
        np.testing.assert_allclose(maps.data, expected[layer].data, atol=2e-3, rtol=2e-3)


def test_the_feature_explorer_has_its_maps(network, noise_case):
    model, case = network("deepmedic"), noise_case((24, 27, 18), mask=True)
    expected = FeatureExplorer(model, case).table
    with fake_device.cuda():
        explorer, sent = FeatureExplorer(model.to("cuda"), case), []
        explorer.send = lambda content, buffers: sent.append(buffers)
        explorer._on_message(explorer, {"want": "0/low.3"}, [])
        assert len(sent[0][0]) > 100
        assert explorer.snapshot().startswith(b"\x89PNG")
        pd.testing.assert_frame_equal(explorer.table, expected, rtol=0.01, atol=0.01)


def test_ablation(network, noise_case):
    model, case = network("deepmedic"), noise_case((9, 9, 9))
    options = dict(channels=[0, 4], regions={"one": 1}, progress=False)
    expected = attribution.ablation_table(model, case, "normal.7", **options)
    residual = network("fc_resnet")
    block = attribution.removable(residual)[3]
    with attribution.without(residual, block):
        shorter = logits_of(residual, case)
    with fake_device.cuda():
        found = attribution.ablation_table(model.to("cuda"), case, "normal.7", precision="float32", **options)
        with attribution.without(residual.to("cuda"), block):
            assert np.allclose(
                logits_of(residual, case, precision="float32"), shorter, rtol=1e-3, atol=1e-3 * abs(shorter).max()
            )
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_strongest_patches(network, noise_case):
    model, cases = network("deepmedic"), [noise_case((14, 12, 10), seed=s, name=f"case {s}", mask=True) for s in range(2)]
    expected = attribution.strongest_patches(model, cases, "low.2", 1, progress=False)
    with fake_device.cuda():
        found = attribution.strongest_patches(model.to("cuda"), cases, "low.2", 1, progress=False)
    assert [(p.case, p.position) for p in found] == [(p.case, p.position) for p in expected]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_grad_cam(network, noise_case, device):
    """Apple's GPUs refuse float64."""
    model, case = network("deepmedic"), noise_case((12, 9, 9))
    where = case.label == 1
    expected = attribution.grad_cam(model, case, "normal.5", 1, where=where)
    with getattr(fake_device, device)():
        found = attribution.grad_cam(model.to(device), case, "normal.5", 1, where=where)
        labels = inference.predict(model, case, precision="float32", progress=False)
    np.testing.assert_allclose(found.data, expected.data, rtol=1e-3, atol=1e-3 * expected.data.max())
    assert expected.data.max() > 0
    assert (labels == inference.predict(model.cpu(), case, progress=False)).mean() > 0.999


def test_the_notebooks_branch_shares(network):
    """Notebook 10's function takes images as they are, wherever the network is."""
    notebook = json.loads(
        Path(__file__).parent.parent.joinpath("notebooks", "10_residual_blocks_and_normalisation.ipynb").read_text("utf-8")
    )
    source = next("".join(c["source"]) for c in notebook["cells"] if "def branch_shares" in "".join(c["source"]))
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    names = {"torch": torch, "Bottleneck": attribution.Bottleneck, "SimpleBlock": attribution.SimpleBlock}
    exec(compile(ast.Module([function], []), "notebook 10", "exec"), names)
    x = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    model = network("fc_resnet")
    expected = names["branch_shares"](model, x)
    with fake_device.cuda():
        assert names["branch_shares"](model.to("cuda"), x) == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------ 2D context


def test_context_scores_and_influence(noise_case, stir, tmp_path):
    torch.manual_seed(0)
    flat = {p: stir(models.mlynarski_2d(in_channels=2, classes=2, width=0.05), n) for n, p in enumerate(context.PLANES)}
    solid = stir(models.mlynarski_3d(in_channels=2, classes=2, variant="a", width=0.1))
    case = noise_case((50, 52, 54))
    context.extract_scores(flat, [case], tmp_path / "cpu", progress=False)
    expected = context.influence(flat, solid, case, (25, 26, 24), class_number=1)
    with fake_device.cuda():
        for network in flat.values():
            network.to("cuda")
        with pytest.raises(
            ValueError, match=r"axial network is on cuda:0, and the 3D network is on cpu; .*network\.to\('cpu'\)"
        ):
            context.influence(flat, solid, case, (25, 26, 24), class_number=1)
        solid.to("cuda")
        context.extract_scores(flat, [case], tmp_path / "gpu", progress=False)
        found = context.influence(flat, solid, case, (25, 26, 24), class_number=1)
    on_cpu, on_gpu = (context.with_scores(case, tmp_path / place).image for place in ("cpu", "gpu"))
    assert np.abs(on_gpu - on_cpu).max() < 0.02 * np.abs(on_cpu).max()
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


def test_a_brain_goes_through_a_card_of_12_gb_whole():
    """Kayalibay's network takes 171 bytes a voxel in float16, and 324 in float32."""
    model = models.kayalibay_unet3d()
    with fake_device.cuda(memory=12e9):
        for dtype in (torch.float16, torch.float32):
            tiling = tiles.plan(model, [0] * 3, (240, 240, 155), (240, 240, 155), CUDA, dtype=dtype)
            assert len(tiling.tiles()) == 1
