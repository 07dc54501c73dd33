"""The dense CRF on a GPU, real or fake: the numbers of the CPU, also under autocast, and on Apple's GPU."""

from __future__ import annotations

import fake_device
import numpy as np
import pytest
import torch
from crf_by_brute_force import make_case, problem
from torch import nn

from medseg_lite import crf, models, training
from medseg_lite.crf import DenseCRF, Permutohedral

SHAPE = (9, 8, 7)


def images(labels: int = 2):
    """Logits, an image, and a mask that leaves some voxels out."""
    logits, image = problem(SHAPE, 2, labels)
    return logits.float(), image.float(), torch.from_numpy(np.random.default_rng(0).random(SHAPE) < 0.8)


def cases(labels: int = 2):
    """Two cases with the probabilities of a network for each."""
    logits, image, mask = images(labels)
    p = logits.softmax(0).numpy()
    truth = (image[0] > 0).numpy().astype(np.uint8)
    made = [make_case(image, mask=mask.numpy(), label=truth, name="one", spacing=(1, 2, 1.5))]
    return [*made, make_case(image.flip(1), label=truth[::-1].copy(), name="two")], [p, p[:, ::-1].copy()]


def layer(**options) -> DenseCRF:
    return DenseCRF(**(dict(appearance_sigma=4.3, intensity_sigma=1.0, learn=("weights", "compatibility", "sigmas")) | options))


def run_layer(crf: DenseCRF, device: str, labels: int) -> list[torch.Tensor]:
    """log Q, and the gradients of the logits and of all parameters."""
    logits, image, mask = images(labels)
    crf, logits = crf.to(device), logits[None].to(device).requires_grad_()
    log_q = crf(logits, image[None].to(device), mask[None].to(device))
    assert log_q.device == logits.device
    log_q.softmax(1)[:, 0].square().mean().backward()
    return [x.detach().cpu() for x in (log_q, logits.grad, *(p.grad for p in crf.parameters() if p.requires_grad))]


def assert_close(found, expected, **options) -> None:
    torch.testing.assert_close(found, expected, **(dict(rtol=1e-3, atol=1e-4) | options))


# --- The numbers of the CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [4, 9, 60])
def test_lattice(gpu, far):
    rng = np.random.default_rng(5)
    features = torch.from_numpy(rng.normal(size=(5, 200)) + np.where(np.arange(200) % 2, far / 2, -far / 2)).float()
    signal = torch.from_numpy(rng.normal(size=(3, 200))).float()
    lattice, there = Permutohedral(features), Permutohedral(features.to(gpu.device))
    assert lattice.vertices == there.vertices
    for transpose in (False, True):
        found = there.filter(signal.to(gpu.device), transpose=transpose)
        assert found.device == gpu.device
        assert_close(found.cpu(), lattice.filter(signal, transpose=transpose))


@pytest.mark.parametrize("units", ["voxels", "mm"])
@pytest.mark.parametrize("how", crf.dense.NORMALIZATIONS)
def test_refine(gpu, units, how):
    (case, _), (p, _) = cases(3)
    # Kernels that are not normalised are about as heavy as there are voxels around.
    weights = (0.2, 0.3) if how == "none" else (2.0, 3.0)
    model = layer(units=units, normalization=how, smoothness_weight=weights[0], appearance_weight=weights[1])
    expected = model.refine(p, case)
    assert_close(model.to(gpu.device).refine(p, case), expected, rtol=0)
    assert abs(expected - p).max() > 0.01
    prepared = model.prepare(*(torch.from_numpy(x).to(gpu.device) for x in (case.image, case.mask)), spacing=case.spacing)
    assert_close(model.refine(p, case, prepared=prepared), expected, rtol=0)


def test_whole_tumour(gpu):
    (case, _), (p, _) = cases(4)
    labels = [crf.whole_tumour(layer().to(device), p, case) for device in ("cpu", gpu.device)]
    assert np.array_equal(*labels) and (labels[0] != p.argmax(0)).any()


@pytest.mark.parametrize("compatibility", ["potts", "learned"])
@pytest.mark.parametrize("labels", [2, 4])
def test_layer_and_its_gradients(gpu, labels, compatibility):
    options = dict(classes=labels if compatibility == "learned" else None)
    for found, expected in zip(*(run_layer(layer(**options), device, labels) for device in (gpu.device, "cpu"))):
        assert_close(found, expected)


def test_search(gpu):
    given = *cases(3), dict(trials=5, weights_per_lattice=2, iterations=2, progress=False)
    expected = crf.search(*given[:2], **given[2])
    found = crf.search(*given[:2], **given[2], device="cuda")
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-3)
    assert found.best == expected.best
    if gpu.counted:
        assert sum(gpu.launches.values()) > 1000


# --- Number types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_autocast_does_not_reach_the_layer(gpu, dtype, learned):
    """Half precision would merge cells of the lattice; only the logits are rounded, before and after."""
    logits, image, mask = (x[None].to(gpu.device) for x in images(3))
    image = 20 * image  # many cells
    model = layer(classes=3 if learned else None, intensity_sigma=0.5).to(gpu.device)
    half = logits.to(dtype)
    expected, refined = model(half.float(), image, mask), model.refine(*given())
    with torch.autocast("cuda", dtype=dtype):
        assert torch.mm(logits[0, 0, 0], logits[0, 0, 0].T).dtype == dtype  # the network's products are rounded
        found = model(half, image, mask)
        assert torch.equal(model(half.float(), image, mask), expected)
        assert np.array_equal(model.refine(*given()), refined)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def given():
    (case, _), (p, _) = cases(3)
    return p, case


class Layered(models.Network):
    """A small network with a CRF as its last layer, for slices."""

    spatial_dims = 2

    def __init__(self):
        super().__init__(2, 3)
        self.net = nn.Conv2d(2, 3, 3, padding=1)
        options = dict(smoothness_weight=0.5, appearance_weight=0.5, appearance_sigma=3.0, intensity_sigma=1.0)
        self.crf = DenseCRF(**options, classes=3, iterations=2)

    def forward(self, x):
        return self.crf(self.net(x), x)


class Slices:
    def batch(self, step):
        rng = np.random.default_rng(step)
        label = torch.from_numpy(rng.integers(0, 3, (1, 2, 3))).repeat_interleave(4, 1).repeat_interleave(4, 2)
        image = torch.stack([label == 1, label == 2], 1) * 4.0 + torch.from_numpy(rng.normal(size=(1, 2, 8, 12)))
        return image.float(), label


@pytest.mark.parametrize(("precision", "gpu"), [("float16", "T4"), ("bfloat16", "A100")], indirect=["gpu"])
def test_training_through_the_layer_in_half_precision(gpu, precision):
    """The losses are those of float32, but for the rounding of the network below."""
    losses = {}
    for number in ("float32", precision):
        torch.manual_seed(0)
        model = Layered().to(gpu.device)
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        history = training.fit(model, Slices(), steps=8, optimizer=optimizer, progress=False, engine={"precision": number})
        losses[number] = history["loss"].to_numpy()
    assert losses["float32"][-3:].mean() < 0.5 * losses["float32"][0]
    np.testing.assert_allclose(losses[precision], losses["float32"], rtol=0.1)


def test_the_lattice_itself_under_autocast(gpu):
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 300))).float().to(gpu.device) * 20
    expected = Permutohedral(features)
    with torch.autocast("cuda", dtype=torch.float16):
        found = Permutohedral(features)
    assert found.vertices == expected.vertices and found.weight.dtype == torch.float32


# --- Devices that do not fit --------------------------------------------------------------------------------------------


def test_everything_must_be_on_one_device(gpu):
    logits, image, mask = (x[None] for x in images())
    there = logits.to(gpu.device), image.to(gpu.device), mask.to(gpu.device)
    with pytest.raises(ValueError, match=r"logits: on device cuda:0, but the CRF is on cpu; .*crf\.to\('cuda:0'\)"):
        layer()(*there)
    with pytest.raises(ValueError, match="image: on device cpu, but the CRF is on cuda:0"):
        layer().to(gpu.device)(there[0], image, mask)
    (case, _), (p, _) = cases()
    prepared = layer().prepare(image[0], mask[0])
    with pytest.raises(ValueError, match="prepared: on device cpu, but the CRF is on cuda:0"):
        layer().to(gpu.device).refine(p, case, prepared=prepared)
    with pytest.raises(ValueError, match="prepared: on device cpu, but the CRF is on cuda:0"):
        layer().to(gpu.device)(*there, prepared=prepared)


def test_search_on_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device xpu: PyTorch sees no xpu device here"):
        crf.search(*cases(), trials=1, device="xpu")


# --- Apple's GPU: no float64 ----------------------------------------------------------------------------------------------


def test_mps():
    expected = [run_layer(layer(classes=3), "cpu", 3), layer().refine(*given()), crf.search(*cases(3), **SMALL).scores]
    with fake_device.mps():
        found = run_layer(layer(classes=3), "mps", 3)
        for a, b in zip(found, expected[0]):
            assert_close(a, b)
        assert_close(layer().to("mps").refine(*given()), expected[1], rtol=0)
        np.testing.assert_allclose(crf.search(*cases(3), **SMALL, device="mps").scores, expected[2], atol=2e-3)


SMALL = dict(trials=2, weights_per_lattice=2, iterations=2, progress=False)
