"""The dense CRF against brute force with all N × N pairs, against pydensecrf2, and at its edges; the recipe for tumours; the search.

The appearance kernel's lattice is an approximation, so what shall be equal to rounding is tested with the smoothness kernel, or
with the lattice's own matrix in brute force's place.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.func import functional_call

from medseg_lite.crf import SPACE, DenseCRF, Permutohedral, search, whole_tumour
from medseg_lite.statistics import paired_t_test
from medseg_lite.volume import Case

PYDENSECRF2 = Path(__file__).parent / "data" / "pydensecrf2.npz"
SMOOTH_ONLY = dict(appearance_weight=0.0, learn=())
APPEARANCE_ONLY = dict(smoothness_weight=0.0, learn=())

# --- Brute force ----------------------------------------------------------------------------------------------------------


def positions(shape) -> torch.Tensor:
    return torch.from_numpy(np.indices(shape).reshape(len(shape), -1)).double()


def gaussian(features: torch.Tensor) -> torch.Tensor:
    """exp(-|f_i - f_j|² / 2) of features `(d, N)`."""
    return torch.exp(-((features[:, :, None] - features[:, None, :]) ** 2).sum(0) / 2)


def per(sigma, count: int) -> torch.Tensor:
    return torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1).expand(count, 1)


def smoothness(shape, sigma) -> torch.Tensor:
    return gaussian(positions(shape) / per(sigma, len(shape)))


def features(image: torch.Tensor, near, alike) -> torch.Tensor:
    shape = image.shape[1:]
    alike = image.double().flatten(1) / per(alike, len(image))
    return torch.cat([positions(shape) / per(near, len(shape)), alike])


def lattice(features: torch.Tensor) -> torch.Tensor:
    """The matrix that the lattice applies."""
    return Permutohedral(features).filter(torch.eye(features.shape[1], dtype=features.dtype)).T


def normalise(kernel: torch.Tensor, how: str = "symmetric") -> torch.Tensor:
    n = kernel.sum(1)
    return {"symmetric": kernel / (n[:, None] * n).sqrt(), "before": kernel / n, "after": kernel / n[:, None], "none": kernel}[
        how
    ]


def mean_field(logits: torch.Tensor, kernels, *, iterations: int = 5, compatibility=None) -> torch.Tensor:
    """Q `(K, *space)`: every voxel hears every other, for each label in turn, as the update is written. kernels: (weight, matrix)."""
    u = logits.double().flatten(1)
    mu = 1 - torch.eye(len(u)) if compatibility is None else torch.as_tensor(compatibility)
    total = sum(weight * matrix for weight, matrix in kernels)
    q = u.softmax(0)
    for _ in range(iterations):
        energy = torch.stack([sum(mu[a, b] * (total @ q[b]) for b in range(len(u))) for a in range(len(u))])
        q = (u - energy).softmax(0)
    return q.view(logits.shape)


def problem(shape, channels=2, labels=3, *, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(K, *space)` and an image `(C, *space)`, float64."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(channels, *shape)).cumsum(1).cumsum(2) / 4
    return torch.from_numpy(1.5 * rng.normal(size=(labels, *shape))), torch.from_numpy(coarse)


def run(crf: DenseCRF, logits: torch.Tensor, image: torch.Tensor, mask=None, **options) -> torch.Tensor:
    """Q `(K, *space)` of one problem."""
    with torch.no_grad():
        return crf(logits[None], image[None], None if mask is None else mask[None], **options)[0].softmax(0)


def make_case(image, *, spacing=(1, 1, 1), **options) -> Case:
    image = np.asarray(image, np.float32)
    names = tuple(f"channel {c}" for c in range(len(image)))
    return Case(image=image, channels=names, affine=np.diag([*spacing, 1.0]), **options)


# --- How good the approximation is --------------------------------------------------------------------------------------


def compare_with_peer() -> pd.DataFrame:
    """For each kind of problem: mean |ΔQ| and share of equal labels, against brute force, of the CRF and of pydensecrf2; and
    of the voxels that brute force changes the share that each changes alike."""
    stored = np.load(PYDENSECRF2, allow_pickle=False)
    weights = {name: float(stored[name]) for name in ("smoothness_weight", "appearance_weight")}
    iterations, rows = int(stored["iterations"]), {}
    for kind in sorted({name.split("/")[0] for name in stored.files if "/" in name}):
        images, logits = (torch.from_numpy(stored[f"{kind}/{what}"]).float() for what in ("image", "logits"))
        dims, channels = images.ndim - 2, images.shape[1]
        near, wide = stored["smoothness_sigma"][:dims], stored["appearance_sigma"][:dims]
        alike = stored["intensity_sigma"][:channels]
        crf = DenseCRF(**weights, smoothness_sigma=near, appearance_sigma=wide, intensity_sigma=alike, iterations=iterations)
        with torch.no_grad():
            ours = crf(logits, images).softmax(1)
        exact = []
        for image, logit in zip(images, logits):
            kernels = [smoothness(image.shape[1:], near), gaussian(features(image, wide, alike))]
            exact.append(mean_field(logit, list(zip(weights.values(), map(normalise, kernels))), iterations=iterations))
        exact = torch.stack(exact)
        label = exact.argmax(1)
        changed = label != logits.argmax(1)
        row = {"changed": changed.float().mean().item()}
        for name, q in (("ours", ours), ("peer", torch.from_numpy(stored[f"{kind}/q"] / 65535))):
            row[f"{name} |dQ|"] = (q - exact).abs().mean().item()
            same = q.argmax(1) == label
            row[f"{name} agree"] = same.float().mean().item()
            row[f"{name} agree where changed"] = same[changed].float().mean().item()
        rows[kind] = row
    return pd.DataFrame(rows).T


def test_as_good_as_pydensecrf2_against_brute_force():
    table = compare_with_peer()
    assert len(table) == 6
    assert table["changed"].min() > 0.05  # the problems are not trivial
    assert table["ours |dQ|"].max() < 0.015
    assert table["ours agree"].min() > 0.98
    mean = table.mean()
    assert mean["ours |dQ|"] < 1.05 * mean["peer |dQ|"]
    assert mean["ours agree"] > mean["peer agree"] - 0.002
    assert mean["ours agree where changed"] > max(0.95, mean["peer agree where changed"] - 0.01)


@pytest.mark.parametrize(("shape", "sigma"), [((13, 12), 2.0), ((6, 8, 7), (0.4, 1.5, 4.0)), ((40,), 3.0), ((1, 9, 9), 2)])
@pytest.mark.parametrize("labels", [2, 3, 5])
def test_smoothness_is_exact(shape, sigma, labels):
    logits = torch.from_numpy(np.random.default_rng(labels).normal(size=(labels, *shape)))
    image = torch.zeros(1, *shape)
    exact = mean_field(logits, [(7.0, normalise(smoothness(shape, sigma)))])
    found = run(DenseCRF(smoothness_weight=7.0, smoothness_sigma=sigma, **SMOOTH_ONLY), logits.float(), image)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    assert (exact - logits.softmax(0)).abs().mean() > 0.04


@pytest.mark.parametrize("how", ["symmetric", "before", "after", "none"])
@pytest.mark.parametrize("compatibility", ["potts", "asymmetric"])
@pytest.mark.parametrize("labels", [2, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_update_is_the_one_written(how, compatibility, labels, masked):
    """Normalisations, any compatibility, weights and masks, with both kernels' own matrices in plain sums over all pairs."""
    shape = (6, 5, 4)
    logits, image = problem(shape, 2, labels)
    inside = torch.ones(shape, dtype=torch.bool)
    if masked:
        inside = torch.from_numpy(np.random.default_rng(3).random(shape) < 0.6)
    keep = inside.flatten()
    # An unnormalised kernel is about as heavy as there are voxels around: lighter weights for it.
    weights = (0.1, 0.15) if how == "none" else (0.8, 1.3)
    mu = None
    if compatibility == "asymmetric":
        mu = torch.from_numpy(np.random.default_rng(1).normal(size=(labels, labels)))
    near, wide, alike = (1.0, 1.5, 0.7), (3.1, 2.3, 4.7), (1.0, 2.0)
    kernels = [smoothness(shape, near)[keep][:, keep], lattice(features(image, wide, alike)[:, keep])]
    exact = mean_field(logits.flatten(1)[:, keep], list(zip(weights, (normalise(k, how) for k in kernels))), compatibility=mu)
    crf = DenseCRF(
        smoothness_weight=weights[0],
        smoothness_sigma=near,
        appearance_weight=weights[1],
        appearance_sigma=wide,
        intensity_sigma=alike,
        normalization=how,
        compatibility="potts" if mu is None else mu,
    ).double()
    found = run(crf, logits, image, inside if masked else None).flatten(1)
    # σ and μ were float32 before: .7 and the like are not exact there
    torch.testing.assert_close(found[:, keep], exact, rtol=0, atol=2e-5)
    outside = logits.flatten(1)[:, ~keep].softmax(0)
    torch.testing.assert_close(found[:, ~keep], outside)
    assert (exact - logits.flatten(1)[:, keep].softmax(0)).abs().mean() > 0.01


def test_learned_compatibility_gives_what_the_fixed_one_gives():
    """The short cut for Potts and the general way agree, with and without gradients."""
    logits, image = problem((7, 6), labels=3)
    logits, image = logits.float(), image.float()
    expected = run(DenseCRF(intensity_sigma=1.0, learn=()), logits, image)
    for crf in (
        DenseCRF(intensity_sigma=1.0, classes=3),
        DenseCRF(intensity_sigma=1.0, classes=3, learn=()),
        DenseCRF(intensity_sigma=1.0, compatibility=1 - np.eye(3)),
        DenseCRF(intensity_sigma=1.0, compatibility=[[0, 1, 1], [1, 0, 1], [1, 1, 0]]),
        DenseCRF(intensity_sigma=1.0, compatibility=-torch.eye(3)),  # a constant more for every label changes nothing
    ):
        torch.testing.assert_close(run(crf, logits, image), expected, rtol=0, atol=1e-5)


def test_without_iterations_or_weights_the_softmax():
    logits, image = problem((7, 6))
    for options in (dict(iterations=0), dict(smoothness_weight=0, appearance_weight=0)):
        for learn in ((), ("weights",)):
            crf = DenseCRF(**options, learn=learn)
            torch.testing.assert_close(run(crf, logits, image), logits.softmax(0))


def test_a_kernel_without_weight_is_left_out():
    """Whatever its parameters: here far too many lattice cells for an image with outliers."""
    logits, image = problem((6, 5, 4), 4)
    image = 1e6 * image
    with pytest.raises(ValueError, match="lattice cells"):
        run(DenseCRF(intensity_sigma=1e-3), logits, image)
    found = run(DenseCRF(intensity_sigma=1e-3, **SMOOTH_ONLY), logits, image)
    torch.testing.assert_close(found, run(DenseCRF(intensity_sigma=5.0, **SMOOTH_ONLY), logits, image))


# --- Parameters: units, sigmas ------------------------------------------------------------------------------------------


def test_mm_are_voxels_times_spacing():
    logits, image = problem((6, 5, 4))
    spacing = (1.0, 3.0, 0.5)
    # Sigmas that put no voxels on the borders of simplices, where float32 and float64 may see another simplex.
    in_mm = DenseCRF(units="mm", smoothness_sigma=1.5, appearance_sigma=(4.1, 6.3, 2.3), intensity_sigma=1.0)
    in_voxels = DenseCRF(smoothness_sigma=(1.5, 0.5, 3), appearance_sigma=(4.1, 2.1, 4.6), intensity_sigma=1.0)
    found = run(in_mm, logits, image, spacing=spacing)
    torch.testing.assert_close(found, run(in_voxels, logits, image), rtol=0, atol=1e-5)
    assert (found - run(in_mm, logits, image, spacing=(1, 1, 1))).abs().max() > 0.01
    # A case brings its spacing along.
    probabilities = logits.softmax(0).numpy()
    refined = in_mm.refine(probabilities, make_case(image, spacing=spacing), clip=1e-9)
    np.testing.assert_allclose(refined, found, atol=1e-4)


def test_one_sigma_stands_for_all_axes_and_channels():
    logits, image = problem((6, 5, 4))
    one = DenseCRF(smoothness_sigma=1.2, appearance_sigma=3.0, intensity_sigma=0.8)
    each = DenseCRF(smoothness_sigma=(1.2,) * 3, appearance_sigma=(3.0,) * 3, intensity_sigma=(0.8, 0.8))
    assert torch.equal(run(one, logits, image), run(each, logits, image))


def test_a_channel_with_a_wide_sigma_does_not_count():
    logits, image = problem((12, 11))
    both = DenseCRF(appearance_sigma=4.0, intensity_sigma=(0.7, 1e4), **APPEARANCE_ONLY)
    first = DenseCRF(appearance_sigma=4.0, intensity_sigma=0.7, **APPEARANCE_ONLY)
    second = DenseCRF(appearance_sigma=4.0, intensity_sigma=(1e4, 0.7), **APPEARANCE_ONLY)
    expected = run(first, logits, image[:1])
    # Lattices of 4 and 3 dimensions approximate differently.
    assert (run(both, logits, image) - expected).abs().mean() < 0.02
    assert (run(second, logits, image) - expected).abs().mean() > 0.04


# --- Gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("how", ["symmetric", "after"])
@pytest.mark.parametrize("learned", [True, False])
def test_gradcheck(labels, how, learned):
    logits, image = problem((3, 4), labels=labels)
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[0, 0, :2] = False
    mu = torch.from_numpy(np.random.default_rng(0).normal(size=(labels, labels))) if learned else "potts"
    crf = DenseCRF(
        smoothness_weight=0.7,
        smoothness_sigma=1.5,
        appearance_sigma=2.0,
        intensity_sigma=1.0,
        iterations=3,
        normalization=how,
        compatibility=mu,
    ).double()
    names = [name for name, parameter in crf.named_parameters() if parameter.requires_grad]
    assert names == ["smoothness_weight", "appearance_weight"] + ["compatibility"] * learned

    def function(logits, *parameters):
        return functional_call(crf, dict(zip(names, parameters)), (logits, image[None], mask))

    values = [crf.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, (logits[None].requires_grad_(), *values))


def slopes(function, values: list[float], step: float = 1e-4) -> np.ndarray:
    """Central differences."""
    result = []
    for i in range(len(values)):
        up, down = list(values), list(values)
        up[i] += step
        down[i] -= step
        result.append((function(up) - function(down)) / (2 * step))
    return np.array(result)


def test_gradients_of_the_smoothness_sigmas_are_exact():
    shape = (10, 12)
    logits, image = problem(shape)
    at = torch.from_numpy(np.random.default_rng(9).normal(size=logits.shape))
    crf = DenseCRF(smoothness_weight=1.2, smoothness_sigma=(0.8, 2.0), appearance_weight=0.0, learn=("sigmas",)).double()
    (at * crf(logits[None], image[None])[0].softmax(0)).sum().backward()

    def exact(sigma):
        return float((at * mean_field(logits, [(crf.smoothness_weight.item(), normalise(smoothness(shape, sigma)))])).sum())

    expected = slopes(exact, crf.smoothness_sigma.tolist())
    np.testing.assert_allclose(crf.smoothness_sigma.grad, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())
    assert crf.smoothness_weight.grad is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_of_the_appearance_sigmas_are_about_right(seed):
    """The lattice's own slope would say little; the rule in its place is that of the Gaussian it stands for."""
    shape, start = (10, 12), [3.0, 4.0, 1.0, 0.8]
    logits, image = problem(shape, seed=seed)
    truth = (image[0] > image[0].median()).long()  # what the appearance kernel can help to find
    logits = logits[:2] + 0.5 * torch.stack([1.0 - truth, truth])

    def loss(log_q):
        return nn.functional.nll_loss(log_q[None], truth[None])

    options = dict(appearance_weight=2.0, smoothness_weight=0.0, learn=("sigmas",))
    crf = DenseCRF(appearance_sigma=start[:2], intensity_sigma=start[2:], **options).double()
    loss(crf(logits[None], image[None])[0]).backward()
    found = np.concatenate([crf.appearance_sigma.grad, crf.intensity_sigma.grad])

    def exact(s):
        return float(loss(mean_field(logits, [(2.0, normalise(gaussian(features(image, s[:2], s[2:]))))]).log()))

    expected = slopes(exact, start)
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.9
    assert 0.6 < np.linalg.norm(found) / np.linalg.norm(expected) < 1.6


def test_shared_sigma_gets_the_sum_of_the_gradients():
    logits, image = problem((6, 7))
    grads = []
    for near, alike in ((3.0, 1.0), ((3.0, 3.0), (1.0, 1.0))):
        crf = DenseCRF(appearance_sigma=near, intensity_sigma=alike, learn=("sigmas",)).double()
        crf(logits[None], image[None])[0].softmax(0)[0].square().sum().backward()
        grads.append(torch.stack([crf.appearance_sigma.grad.sum(), crf.intensity_sigma.grad.sum()]))
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].abs().min() > 1e-6


def test_layer_trains_with_the_network_below():
    """A net that sees noise, and the CRF on top: gradients reach both, and a few steps help both."""
    torch.manual_seed(0)
    truth = torch.zeros(2, 10, 12, dtype=torch.long)
    truth[0, 2:7, 3:9] = 1
    truth[1, 4:, 6:] = 2
    image = truth[:, None].float() + 0.6 * torch.randn(2, 1, 10, 12)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    crf = DenseCRF(
        smoothness_weight=0.5,
        smoothness_sigma=1.0,
        appearance_weight=0.5,
        appearance_sigma=3.0,
        intensity_sigma=1.0,
        classes=3,
        learn=("weights", "compatibility", "sigmas"),
    )
    optimizer = torch.optim.Adam([*net.parameters(), *crf.parameters()], lr=0.03)
    before = {name: p.detach().clone() for name, p in crf.named_parameters()}
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(crf(net(image), image), truth)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in (*net.parameters(), *crf.parameters()))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert all((p != before[name]).any() for name, p in crf.named_parameters())
    assert net[0].weight.grad.abs().max() > 0


def test_features_of_a_network_may_be_the_image():
    """An image that asks for gradients gets none, and disturbs nothing."""
    logits, image = problem((6, 7))
    crf = DenseCRF(intensity_sigma=1.0)
    wanting = image.clone().requires_grad_()
    log_q = crf(logits[None].requires_grad_(), wanting[None])
    torch.testing.assert_close(log_q.detach()[0].softmax(0), run(crf, logits.detach(), image))
    log_q[0, 0].sum().backward()
    assert wanting.grad is None


def test_parameters_are_only_what_is_to_be_learned():
    def learned(**options):
        return {name for name, p in DenseCRF(**options).named_parameters() if p.requires_grad}

    weights, sigmas = ({"smoothness_weight", "appearance_weight"}, {"smoothness_sigma", "appearance_sigma", "intensity_sigma"})
    assert learned() == weights  # a Potts matrix without `classes` is no parameter
    assert learned(classes=3) == weights | {"compatibility"}
    assert learned(learn=("sigmas",), classes=3) == sigmas
    assert learned(learn=()) == set()


# --- Precision, batches, devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-5)])
@pytest.mark.parametrize("image_too", [True, False])
def test_types(dtype, tolerance, image_too):
    """Any type of logits, beside an image of the same or another type. Inputs are rounded first: only the answer's type differs."""
    logits, image = problem((6, 5, 4))
    logits, image = logits.to(dtype).float(), image.to(dtype).float()
    crf = DenseCRF(intensity_sigma=1.0, learn=())
    expected = crf(logits[None], image[None])
    found = crf(logits[None].to(dtype), image[None].to(dtype) if image_too else image[None])
    assert found.dtype == dtype
    torch.testing.assert_close(found.softmax(1).float(), expected.softmax(1), rtol=0, atol=tolerance)


def test_float64_is_computed_in_float64():
    logits, image = problem((6, 5, 4))
    logits32 = logits.float()
    crf = DenseCRF(intensity_sigma=1.0, learn=()).double()
    twice = [run(crf, logits + shift, image) for shift in (0, 1e-11)]  # a constant for all labels
    assert (twice[0] - twice[1]).abs().max() < 1e-10
    mixed = DenseCRF(intensity_sigma=1.0, learn=())(logits32[None], image[None])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed[0].softmax(0).double(), twice[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_is_its_members(masked):
    several = [problem((6, 5, 4), seed=seed) for seed in range(3)]
    logits, images = (torch.stack(x) for x in zip(*several))
    masks = torch.from_numpy(np.random.default_rng(0).random((3, 6, 5, 4)) < 0.7) if masked else None
    crf = DenseCRF(intensity_sigma=1.0, learn=())
    together = crf(logits, images, masks)
    for b in range(3):
        mask = None if masks is None else masks[b : b + 1]
        assert torch.equal(together[b], crf(logits[b : b + 1], images[b : b + 1], mask)[0])
    if masked:  # outside the logits as they came
        outside = ~masks[:, None].expand_as(logits)
        assert torch.equal(together[outside], logits[outside])
    prepared = [crf.prepare(image, None if masks is None else masks[b]) for b, image in enumerate(images)]
    assert torch.equal(crf(logits, images, masks, prepared=prepared), together)


def test_prepared_kernels_serve_any_weights_and_segmentation():
    logits, image = problem((6, 5, 4))
    other, _ = problem((6, 5, 4), seed=5)
    prepared = DenseCRF(intensity_sigma=1.0).prepare(image)
    for w in (0.5, 2.0):
        for u in (logits, other):
            crf = DenseCRF(intensity_sigma=1.0, smoothness_weight=w, appearance_weight=2 * w, iterations=3)
            assert torch.equal(run(crf, u, image, prepared=prepared), run(crf, u, image))


@pytest.fixture
def threads():
    """`threads(n)` for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_deterministic_and_nearly_the_same_for_any_number_of_threads(threads):
    logits, image = problem((36, 34, 32), 1, 2)
    logits, image = logits.float(), image.float()
    results = {}
    for n in (1, 2):
        threads(n)
        results[n] = run(DenseCRF(intensity_sigma=1.0, learn=()), logits, image)
        assert torch.equal(results[n], run(DenseCRF(intensity_sigma=1.0, learn=()), logits, image))
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("labels", [2, 4])
def test_gpu_as_cpu(labels):
    logits, image = problem((16, 15, 14), 2, labels)
    logits, image = logits.float(), image.float()
    mask = torch.from_numpy(np.random.default_rng(0).random((16, 15, 14)) < 0.8)
    grads = []
    for device in ("cpu", "cuda"):
        options = dict(appearance_sigma=4.3, intensity_sigma=1.0, classes=labels, learn=("weights", "compatibility", "sigmas"))
        crf = DenseCRF(**options).to(device)
        u = logits[None].to(device).requires_grad_()
        q = crf(u, image[None].to(device), mask[None].to(device)).softmax(1)
        assert q.device.type == device
        q[:, 0].square().mean().backward()
        grads.append([q, u.grad, *(p.grad for p in crf.parameters())])
        grads.append([x.detach().cpu() for x in grads.pop()])
    for cpu, cuda in zip(*grads):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-4)
    case = make_case(image, mask=mask.numpy())
    probabilities = logits.softmax(0).numpy()
    crf = DenseCRF(appearance_sigma=4.3, intensity_sigma=1.0)
    np.testing.assert_allclose(crf.cuda().refine(probabilities, case), crf.cpu().refine(probabilities, case), atol=1e-4)


def test_state_dict():
    logits, image = problem((6, 7))
    first = DenseCRF(
        smoothness_weight=0.3,
        smoothness_sigma=(1.0, 2.0),
        appearance_weight=1.1,
        appearance_sigma=4.0,
        intensity_sigma=(1.0, 0.5),
        compatibility=[[0.0, 1.0, 2.0], [0.5, 0.1, 1.0], [1.0, 0.7, 0.0]],
    )
    second = DenseCRF(smoothness_sigma=(5.0, 5.0), intensity_sigma=(9.0, 9.0), classes=3)
    assert not torch.allclose(run(first, logits, image), run(second, logits, image))
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(first, logits, image), run(second, logits, image))
    assert "iterations=5" in repr(first)


# --- refine: probabilities of a case ------------------------------------------------------------------------------------


def test_refine_is_forward_on_log_probabilities():
    logits, image = problem((6, 5, 4))
    mask = np.random.default_rng(0).random((6, 5, 4)) < 0.7
    case = make_case(image, mask=mask)
    p = logits.softmax(0).float().numpy()
    crf = DenseCRF(intensity_sigma=1.0)
    original = p.copy()
    refined = crf.refine(p, case)
    assert isinstance(refined, np.ndarray) and refined.dtype == np.float32 and refined.shape == p.shape
    assert np.array_equal(p, original)
    expected = run(crf, torch.from_numpy(p).log(), image.float(), torch.from_numpy(mask))
    np.testing.assert_allclose(refined, expected, atol=1e-5)
    assert np.array_equal(refined[:, ~mask], p[:, ~mask])
    everywhere = crf.refine(p, case, inside_mask=False)
    np.testing.assert_allclose(everywhere, crf.refine(p, case.replace(mask=None)))
    assert abs(everywhere[:, ~mask] - p[:, ~mask]).max() > 0.01
    prepared = crf.prepare(image.float(), torch.from_numpy(mask))
    np.testing.assert_allclose(crf.refine(p, case, prepared=prepared), refined)
    np.testing.assert_allclose(crf.refine(torch.from_numpy(p), case), refined)
    np.testing.assert_allclose(crf.refine(p.astype(np.float16), case), refined, atol=3e-3)
    float64 = case.replace(image=case.image.astype(np.float64))
    np.testing.assert_allclose(crf.refine(p.astype(np.float64), float64), refined, atol=1e-5)


def test_clip_lets_certainty_be_talked_out_of():
    """A voxel with probability exactly 0 among tumour: kept from `clip` on."""
    p = np.zeros((2, 5, 5, 5), np.float32)
    p[1], p[:, 2, 2, 2] = 1, (1, 0)
    case = make_case(np.zeros((1, 5, 5, 5)))
    crf = DenseCRF(smoothness_weight=6.0, smoothness_sigma=2.0, **SMOOTH_ONLY)
    assert crf.refine(p, case, clip=1e-2)[1, 2, 2, 2] > 0.5
    assert crf.refine(p, case, clip=1e-30)[1, 2, 2, 2] < 0.5
    assert np.isfinite(crf.refine(p, case)).all()


# --- What it is for -----------------------------------------------------------------------------------------------------


def test_an_isolated_false_positive_disappears_and_a_hole_fills():
    shape = (15, 14, 13)
    rng = np.random.default_rng(0)
    tumour = ((positions(shape) - torch.tensor([[7.0], [7.0], [6.0]])) ** 2).sum(0).view(shape).numpy() < 16
    image = (2.0 * tumour + 0.2 * rng.normal(size=shape))[None]
    p = np.where(tumour, 0.85, 0.1)
    p[1, 1, 1] = p[12, 2, 11] = 0.8  # false positives
    p[7, 7, 6] = 0.2  # a hole
    crf = DenseCRF(
        smoothness_weight=2.0, smoothness_sigma=1.5, appearance_weight=2.0, appearance_sigma=5.0, intensity_sigma=0.5
    )
    refined = crf.refine(np.stack([1 - p, p]), make_case(image))
    assert not np.array_equal(p > 0.5, tumour)
    assert np.array_equal(refined[1] > 0.5, tumour)


def test_an_edge_in_the_image_stops_smoothing():
    """Blurred probabilities place the border two voxels wrong; appearance moves it to the edge, if there is one in the image."""
    shape = (12, 16)
    w = np.arange(16)
    p = np.broadcast_to(1 / (1 + np.exp(0.8 * (w - 9.5))), shape)  # half at 9.5
    image = np.broadcast_to((w < 8).astype(float), shape)[None]  # edge at 7.5
    logits = torch.from_numpy(np.log([1 - p, p]))
    crf = DenseCRF(appearance_weight=4.0, appearance_sigma=6.0, intensity_sigma=0.2, **APPEARANCE_ONLY)
    with_edge = run(crf, logits, torch.from_numpy(image.copy()))[1] > 0.5
    flat = run(crf, logits, torch.zeros(1, *shape))[1] > 0.5
    assert torch.equal(with_edge, torch.from_numpy(w < 8).expand(shape))
    assert (flat[:, 8] & flat[:, 9]).all() and not flat[:, 12:].any()


# --- Edges --------------------------------------------------------------------------------------------------------------


def test_one_label():
    _, image = problem((6, 5, 4))
    crf = DenseCRF()
    assert torch.equal(run(crf, torch.randn(1, 6, 5, 4), image), torch.ones(1, 6, 5, 4))
    assert (crf.refine(np.ones((1, 6, 5, 4)), make_case(image)) == 1).all()


def test_empty_mask_and_mask_of_one_voxel():
    logits, image = problem((6, 5, 4))
    mask = torch.zeros(6, 5, 4, dtype=torch.bool)
    crf = DenseCRF(intensity_sigma=1.0, learn=("weights", "compatibility", "sigmas"))
    torch.testing.assert_close(run(crf, logits, image, mask), logits.softmax(0))
    p = logits.softmax(0).float().numpy()
    assert np.array_equal(crf.refine(p, make_case(image, mask=mask.numpy())), p)
    mask[2, 3, 1] = True
    # Alone a voxel hears itself, through kernels that are 1 when normalised.
    w = crf.smoothness_weight.item() + crf.appearance_weight.item()
    expected = mean_field(logits[:, mask], [(w, torch.ones(1, 1).double())])
    found = run(crf, logits, image, mask)
    torch.testing.assert_close(found[:, mask], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, ~mask], logits[:, ~mask].softmax(0))


@pytest.mark.parametrize("shape", [(1, 9, 8), (9, 1, 8), (9, 8, 1)])
def test_a_volume_of_one_slice_is_that_slice(shape):
    logits, image = problem((9, 8), labels=2)
    flat = DenseCRF(smoothness_sigma=2.0, intensity_sigma=1.0, **SMOOTH_ONLY)
    found = run(flat, logits.view(2, *shape), image.view(2, *shape)).view(2, 9, 8)
    torch.testing.assert_close(found, run(flat, logits, image), rtol=0, atol=1e-5)
    # Appearance: a lattice of one more dimension, and so another approximation.
    both = DenseCRF(smoothness_sigma=2.0, intensity_sigma=1.0, appearance_sigma=5.0)
    found = run(both, logits.view(2, *shape), image.view(2, *shape)).view(2, 9, 8)
    assert (found - run(both, logits, image)).abs().mean() < 0.05


def test_constant_image():
    """Appearance then sees positions alone; a constant, whatever its height."""
    logits, _ = problem((6, 5, 4))
    crf = DenseCRF(intensity_sigma=0.01)
    zero, five = (run(crf, logits.float(), torch.full((2, 6, 5, 4), value)) for value in (0.0, 5.0))
    assert zero.isfinite().all() and five.isfinite().all()
    assert (zero - five).abs().mean() < 0.03
    assert (zero.argmax(0) != logits.argmax(0)).any()


def test_five_channels_and_five_labels():
    logits, image = problem((7, 6, 5), 5, 5)
    crf = DenseCRF(smoothness_weight=1.0, appearance_weight=1.0, appearance_sigma=5.0, intensity_sigma=2.0)
    kernels = [smoothness((7, 6, 5), 3.0), gaussian(features(image, 5.0, 2.0))]
    exact = mean_field(logits, [(1.0, normalise(k)) for k in kernels])
    found = run(crf, logits, image)
    assert (found - exact).abs().mean() < 0.02
    assert (found.argmax(0) == exact.argmax(0)).float().mean() > 0.95


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad):
    logits, image = problem((6, 5, 4))
    logits, image = logits.float(), image.float()
    mask = torch.ones(6, 5, 4, dtype=torch.bool)
    mask[0] = False
    crf = DenseCRF(intensity_sigma=1.0)
    p = logits.softmax(0).numpy()
    for place, inside in (((0, 2, 2), False), ((3, 2, 2), True)):
        wrong_image, wrong_logits, wrong_p = image.clone(), logits.clone(), p.copy()
        for x in (wrong_image, wrong_logits, wrong_p):
            x[(1, *place)] = bad
        case = make_case(image, mask=mask.numpy())
        if inside:
            with pytest.raises(ValueError, match=r"image: 1 of 200 values are NaN or infinite.*mask"):
                run(crf, logits, wrong_image, mask)
            with pytest.raises(ValueError, match=r"logits: 1 of 300 values are NaN or infinite"):
                run(crf, wrong_logits, image, mask)
            with pytest.raises(ValueError, match=r"probabilities: 1 of 300 values are NaN or infinite"):
                crf.refine(wrong_p, case)
        else:
            expected = run(crf, logits, image, mask)
            assert torch.equal(run(crf, logits, wrong_image, mask), expected)
            found = run(crf, wrong_logits, image, mask)
            assert torch.equal(found[:, mask], expected[:, mask])
            found = crf.refine(wrong_p, case)
            assert np.array_equal(found[:, mask], crf.refine(p, case)[:, mask])
            assert np.array_equal(found[:, ~mask], wrong_p[:, ~mask], equal_nan=True)
    everything = np.full_like(p, bad)
    with pytest.raises(ValueError, match="probabilities: 300 of 300"):
        crf.refine(everything, case)


BAD_PARAMETERS = [
    (dict(smoothness_sigma=0), r"smoothness_sigma=0.0; standard deviations must be positive"),
    (dict(appearance_sigma=(1, -2, 3)), r"appearance_sigma=\[1.0, -2.0, 3.0\]"),
    (dict(intensity_sigma=float("nan")), "intensity_sigma=nan"),
    (dict(intensity_sigma=float("inf")), "intensity_sigma=inf"),
    (dict(smoothness_weight=float("nan")), "smoothness_weight=nan"),
    (dict(appearance_weight=(1.0, 2.0)), r"appearance_weight=\[1.0, 2.0\]; expected one"),
    (dict(iterations=-1), "iterations=-1"),
    (dict(iterations=2.5), r"iterations=2.5"),
    (dict(units="cm"), "units='cm'; expected one of voxels, mm"),
    (dict(normalization="l2"), "normalization='l2'; expected one of symmetric, before, after, none"),
    (dict(learn=("weight",)), "learn='weight'; expected one of weights, compatibility, sigmas"),
    (dict(compatibility="linear"), "compatibility='linear'"),
    (dict(compatibility=np.ones((2, 3))), r"compatibility has shape \(2, 3\)"),
    (dict(compatibility=[1.0, 2.0]), r"compatibility has shape \(2,\)"),
    (dict(compatibility=[[0, np.nan], [1, 0]]), "compatibility: 1 of 4"),
]


@pytest.mark.parametrize(("parameters", "message"), BAD_PARAMETERS, ids=[str(p) for p, _ in BAD_PARAMETERS])
def test_parameters_that_make_no_sense(parameters, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF(**parameters)


def test_sigmas_that_became_bad_in_training():
    logits, image = problem((6, 5, 4))
    crf = DenseCRF(learn=("sigmas",))
    with torch.no_grad():
        crf.appearance_sigma.fill_(-0.1)
    with pytest.raises(ValueError, match=r"appearance_sigma=-0\.1"):
        run(crf, logits, image)


def test_shapes_that_do_not_fit():
    crf, logits, image = DenseCRF(), torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5)
    with pytest.raises(ValueError, match=r"image is on the grid .* \(2, 4, 6\); the logits are on \(2, 4, 5\)"):
        crf(logits, torch.zeros(2, 1, 4, 6))
    with pytest.raises(ValueError, match=r"image is on the grid .* \(1, 4, 5\)"):
        crf(logits, image[:1])
    with pytest.raises(ValueError, match=r"mask is on the grid .* \(4, 5\)"):
        crf(logits, image, torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected \(B, K, \*space\) and \(B, C, \*space\)"):
        crf(logits, image[:, 0])
    with pytest.raises(ValueError, match="expected"):
        crf(logits[0, 0], image[0, 0])
    with pytest.raises(ValueError, match=r"mask has shape \(5, 4\); expected \(4, 5\)"):
        crf.prepare(image[0], torch.ones(5, 4))
    with pytest.raises(ValueError, match="smoothness_sigma has 3 values; expected one, or one for each of the 2 spatial axes"):
        DenseCRF(smoothness_sigma=(1, 2, 3))(logits, image)
    with pytest.raises(ValueError, match="intensity_sigma has 2 values; expected one, or one for each of the 1 channels"):
        DenseCRF(intensity_sigma=(1, 2))(logits, image)
    with pytest.raises(ValueError, match="compatibility matrix is for 2 classes, the segmentation has 3"):
        DenseCRF(classes=2)(logits, image)
    with pytest.raises(ValueError, match="needs the spacing"):
        DenseCRF(units="mm")(logits, image)
    for spacing in ((1, 1, 1), (1, 0), (1, -1), (1, float("nan"))):
        with pytest.raises(ValueError, match="expected 2 positive numbers"):
            DenseCRF(units="mm")(logits, image, spacing=spacing)
    with pytest.raises(ValueError, match=r"prepared is for 1 images; the batch has 2"):
        crf(logits, image, prepared=crf.prepare(image[0]))
    with pytest.raises(ValueError, match=r"prepared is for an image of \(3, 5\) voxels; the segmentation has \(4, 5\)"):
        crf(logits[:1], image[:1], prepared=crf.prepare(torch.zeros(1, 3, 5)))
    case = make_case(np.zeros((1, 4, 5, 6)), name="Ada")
    with pytest.raises(ValueError, match=r"\(2, 4, 5, 7\); Ada needs \(classes, \*\(4, 5, 6\)\)"):
        crf.refine(np.full((2, 4, 5, 7), 0.5), case)
    with pytest.raises(ValueError, match="prepared is for an image of"):
        crf.refine(np.full((2, 4, 5, 6), 0.5), case, prepared=crf.prepare(torch.zeros(1, 3, 5, 6)))


@pytest.mark.parametrize("values", [(-0.2, 1.2), (3.0, -4.0), (0.5, 1.1)])
def test_probabilities_out_of_range(values):
    p = np.stack([np.full((4, 5, 6), value) for value in values])
    with pytest.raises(ValueError, match=r"expected 0 to 1 \(for logits, call the CRF\)"):
        DenseCRF().refine(p, make_case(np.zeros((1, 4, 5, 6))))


@pytest.mark.parametrize("sigma", [1e-12, 1e-30, 1e-38])
def test_features_that_span_too_many_cells(sigma):
    logits, image = problem((4, 4, 4))
    with pytest.raises(ValueError, match=r"lattice cells.*standard deviations are too small"):
        run(DenseCRF(intensity_sigma=sigma), logits.float(), image.float())


# --- Whole tumour -------------------------------------------------------------------------------------------------------


def tumour_problem() -> tuple[np.ndarray, Case]:
    """A cube of tumour, its two classes side by side, with a false positive and a hole whose best tumour class is 2."""
    shape = (9, 10, 8)
    tumour = np.zeros(shape, bool)
    tumour[2:7, 3:8, 2:6] = True
    left = np.arange(9)[:, None, None] < 4
    p = np.empty((3, *shape), np.float32)
    p[1:] = np.where(tumour & left, [[[[0.8]]], [[[0.1]]]], np.where(tumour, [[[[0.2]]], [[[0.7]]]], 0.05))
    p[1:, 8, 9, 7] = 0.5, 0.3  # a false positive
    p[1:, 3, 5, 4] = 0.1, 0.3  # a hole
    p[0] = 1 - p[1:].sum(0)
    mask = np.ones(shape, bool)
    mask[:, 0] = False
    p[:, 0, 0, 0] = 0.1, 0.2, 0.7  # tumour outside the mask
    return p, make_case(2.0 * tumour[None], mask=mask, label=tumour.astype(np.uint8) * (2 - left))


def test_whole_tumour():
    p, case = tumour_problem()
    crf = DenseCRF(smoothness_weight=2, smoothness_sigma=1.5, appearance_weight=2, appearance_sigma=5, intensity_sigma=0.5)
    before, labels = p.argmax(0), whole_tumour(crf, p, case)
    assert labels.dtype == np.uint8 and labels.shape == case.shape
    assert before[8, 9, 7] == 1 and labels[8, 9, 7] == 0  # lost
    assert before[3, 5, 4] == 0 and labels[3, 5, 4] == 2  # gained: its most probable tumour class, though class 1 is around it
    untouched = np.ones(case.shape, bool)
    untouched[8, 9, 7] = untouched[3, 5, 4] = False
    assert np.array_equal(labels[untouched], before[untouched])
    assert labels[0, 0, 0] == 2  # outside the mask nothing changes
    prepared = crf.prepare(torch.from_numpy(case.image), torch.from_numpy(case.mask))
    assert np.array_equal(whole_tumour(crf, p, case, prepared=prepared), labels)
    off = DenseCRF(iterations=0)
    assert np.array_equal(whole_tumour(off, p, case), before)


def test_whole_tumour_refines_the_merged_classes():
    """Two tumour classes of .3 make a tumour of .6; one class is left as `refine` leaves it."""
    case = make_case(np.zeros((1, 4, 4, 4)))
    p = np.broadcast_to(np.array([0.4, 0.25, 0.35])[:, None, None, None], (3, 4, 4, 4))
    assert (whole_tumour(DenseCRF(), p, case) == 2).all()
    logits, image = problem((6, 5, 4), labels=2)
    case, p, crf = make_case(image), logits.softmax(0).numpy(), DenseCRF(intensity_sigma=1.0)
    assert np.array_equal(whole_tumour(crf, p, case), crf.refine(p, case).argmax(0))


# --- Search -------------------------------------------------------------------------------------------------------------

SMALL = dict(trials=7, weights_per_lattice=3, progress=False, iterations=3)


@pytest.fixture(scope="module")
def cohort():
    """Three noisy segmentations of a block that the image shows well."""
    cases, maps = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        label = np.zeros((10, 9, 8), np.uint8)
        label[2 + seed : 8, 2:7, 2:6] = 1
        image = np.stack([label + 0.3 * rng.normal(size=label.shape), rng.normal(size=label.shape)])
        p = 1 / (1 + np.exp(-(2.0 * label - 1 + 1.2 * rng.normal(size=label.shape))))
        mask = None if seed else np.pad(np.ones((10, 9, 6), bool), ((0, 0), (0, 0), (1, 1)))
        cases.append(make_case(image, name=f"case {seed}", label=label, mask=mask))
        maps.append(np.stack([1 - p, p]).astype(np.float32))
    return cases, maps


def equal(a, b) -> bool:
    return a.table.equals(b.table) and a.scores.equals(b.scores) and a.baseline.equals(b.baseline)


def dice_by_hand(a, b) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_search(cohort):
    cases, maps = cohort
    found = search(cases, maps, **SMALL)
    assert list(found.table.columns) == [*SPACE, "dice", "gain", "p"]
    assert found.scores.shape == (7, 3) and list(found.scores.columns) == ["case 0", "case 1", "case 2"]
    for name, (low, high) in SPACE.items():
        assert found.table[name].between(low, high).all()
    # Weights are drawn for each trial, sigmas for each three.
    assert found.table["smoothness_weight"].nunique() == found.table["appearance_weight"].nunique() == 7
    assert found.table["intensity_sigma"].tolist() == found.table["intensity_sigma"].iloc[[0, 0, 0, 3, 3, 3, 6]].tolist()
    assert found.table["intensity_sigma"].nunique() == 3

    table = found.table["dice"]
    assert table.max() > table.min() + 0.02 and found.table["gain"].max() > 0.05
    for c, (case, p) in enumerate(zip(cases, maps)):
        assert found.baseline.iloc[c] == pytest.approx(dice_by_hand(p[1] > 0.5, case.label > 0))
        best = DenseCRF(**found.best, iterations=3).refine(p, case)[1] > 0.5
        assert found.scores.loc[table.idxmax()].iloc[c] == pytest.approx(dice_by_hand(best, case.label > 0), abs=1e-3)
    np.testing.assert_allclose(table, found.scores.mean(axis=1))
    np.testing.assert_allclose(found.table["gain"], table - found.baseline.mean())
    test = found.test()
    assert test == paired_t_test(found.scores.loc[table.idxmax()], found.baseline)
    assert found.table["p"][table.idxmax()] == pytest.approx(test.p)
    assert found.test(2).mean == pytest.approx(found.table["gain"][2])
    assert found.test(alternative="greater").p == pytest.approx(test.p / 2)


def test_search_is_deterministic_and_its_trials_do_not_depend_on_their_number(cohort):
    first, again = (search(*cohort, **SMALL) for _ in range(2))
    assert equal(first, again)
    fewer = search(*cohort, **(SMALL | dict(trials=4)))
    assert fewer.table.equals(first.table.iloc[:4]) and fewer.scores.equals(first.scores.iloc[:4])
    other = search(*cohort, **SMALL, seed=1)
    assert not other.table[list(SPACE)].isin(first.table[list(SPACE)].to_numpy().ravel()).any().any()


@pytest.fixture
def refined(monkeypatch):
    """Counts refinements; `refined.stop_at` interrupts the one with that number."""

    class Refined:
        count, stop_at = 0, None

    original = DenseCRF.refine

    def refine(self, *args, **options):
        Refined.count += 1
        if Refined.count == Refined.stop_at:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(DenseCRF, "refine", refine)
    return Refined


@pytest.mark.parametrize("stop_at", [1, 5, 14, 21])
def test_search_goes_on_where_it_was_interrupted(cohort, tmp_path, refined, stop_at):
    whole = search(*cohort, **SMALL)
    assert refined.count == 7 * 3
    refined.count, refined.stop_at = 0, stop_at
    with pytest.raises(KeyboardInterrupt):
        search(*cohort, **SMALL, folder=tmp_path / "new")
    refined.count, refined.stop_at = 0, None
    resumed = search(*cohort, **SMALL, folder=tmp_path / "new")
    assert equal(resumed, whole)
    finished = (stop_at - 1) // 9 * 9  # trials of one lattice, on all cases, are kept together
    assert refined.count == 21 - finished
    refined.count = 0
    assert equal(search(*cohort, **SMALL, folder=tmp_path / "new"), whole)
    assert refined.count == 0
    more = search(*cohort, **(SMALL | dict(trials=8)), folder=tmp_path / "new")
    assert refined.count == 3 and more.table.iloc[:7].equals(whole.table)
    (file,) = (tmp_path / "new").iterdir()
    assert json.loads(file.read_text())["seed"] == 0


def test_search_does_not_take_another_search_s_results(cohort, tmp_path, refined):
    """Other images, probabilities with the same argmax, parameters or draws are another question."""
    cases, maps = cohort
    options = dict(trials=1, weights_per_lattice=1, iterations=1, progress=False, folder=tmp_path)
    brighter = [case.replace(image=2 * case.image) for case in cases]
    surer = [p**2 / (p**2).sum(0) for p in maps]
    unmasked = [case.replace(mask=None) for case in cases]
    search(cases, maps, **options)
    for changed in (
        lambda: search(brighter, maps, **options),
        lambda: search(cases, surer, **options),
        lambda: search(unmasked, maps, **options),
        lambda: search(cases, maps, **(options | dict(iterations=2))),
        lambda: search(cases, maps, **options, seed=1),
        lambda: search(cases, maps, **options, space={"smoothness_sigma": (1, 2)}),
        lambda: search(cases[:2], maps[:2], **options),
    ):
        refined.count = 0
        changed()
        assert refined.count >= 2
    refined.count = 0
    search(cases, maps, **options)
    assert refined.count == 0


def test_search_of_one_parameter_beside_fixed_ones(cohort):
    cases, maps = cohort
    found = search(
        cases[:1],
        maps[:1],
        trials=3,
        weights_per_lattice=1,
        progress=False,
        space={"smoothness_sigma": (0.5, 2.0)},
        smoothness_weight=2.0,
        appearance_weight=0.0,
    )
    assert set(found.best) == {"smoothness_sigma"} and len(found.table) == 3
    assert found.table["p"].isna().all()  # one case is no test
    DenseCRF(**found.best)


def test_search_with_several_classes_uses_the_recipe_for_tumours():
    p, case = tumour_problem()
    found = search([case], [p], trials=2, weights_per_lattice=1, progress=False)
    for trial, row in found.table[list(SPACE)].iterrows():
        labels = whole_tumour(DenseCRF(**row), p, case)
        assert found.scores.loc[trial].item() == pytest.approx(dice_by_hand(labels > 0, case.label > 0))


def test_search_refuses(cohort):
    cases, maps = cohort
    for args, options, message in [
        (([], []), {}, "0 cases and 0 probability maps"),
        ((cases, maps[:2]), {}, "3 cases and 2 probability maps"),
        (([cases[0].replace(label=None)], maps[:1]), {}, "case 0 has no label"),
        ((cases[:1], [maps[0][:, 1:]]), {}, r"case 0 have shape \(2, 9, 9, 8\)"),
        ((cases[:1], [maps[0][:1]]), {}, r"case 0 have shape \(1, 10, 9, 8\)"),
        (([cases[0], cases[0]], [maps[0], maps[0]]), {}, "two cases share one name"),
        ((cases, maps), dict(trials=0), "trials=0"),
        ((cases, maps), dict(weights_per_lattice=0), "weights_per_lattice=0"),
        ((cases, maps), dict(space={"sigma": (1, 2)}), "space has 'sigma'; what can be searched is smoothness_weight"),
        ((cases, maps), dict(space={"smoothness_sigma": (2, 1)}), r"space\['smoothness_sigma'\]=\(2, 1\)"),
        ((cases, maps), dict(space={"smoothness_sigma": (0, 1)}), "expected 0 < low <= high"),
        ((cases, maps), dict(smoothness_sigma=1.0), "smoothness_sigma cannot be both searched and fixed"),
    ]:
        with pytest.raises(ValueError, match=message):
            search(*args, **options, progress=False)


def test_whole_tumour_keeps_the_most_probable_class_outside_the_mask():
    probabilities = np.zeros((3, 4, 4, 4), np.float32)
    probabilities[:] = np.array([0.4, 0.3, 0.3])[:, None, None, None]  # background leads, though the tumour's sum is larger
    mask = np.zeros((4, 4, 4), bool)
    mask[1:3, 1:3, 1:3] = True
    case = Case(np.zeros((1, 4, 4, 4), np.float32), ("flair",), "uniform", mask=mask)
    labels = whole_tumour(DenseCRF(), probabilities, case)
    assert (labels[mask] == 1).all() and not labels[~mask].any()


def test_one_group_to_learn_may_be_a_plain_string():
    model = DenseCRF(learn="weights")
    assert model.smoothness_weight.requires_grad and not model.smoothness_sigma.requires_grad
