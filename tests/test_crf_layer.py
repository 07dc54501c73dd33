"""The dense CRF as a layer: gradients, types, batches and devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from crf_by_brute_force import features, gaussian, mean_field, normalise, problem, run, smoothness
from torch import nn
from torch.func import functional_call

from medseg_lite.crf import DenseCRF

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


def test_one_group_to_learn_may_be_a_plain_string():
    model = DenseCRF(learn="weights")
    assert model.smoothness_weight.requires_grad and not model.smoothness_sigma.requires_grad


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
