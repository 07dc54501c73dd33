"""The dense CRF against brute force with all N × N pairs and against pydensecrf2, and at its edges.

The appearance kernel's lattice is an approximation, so what shall be equal to rounding is tested with the smoothness kernel, or
with the lattice's own matrix in brute force's place.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from crf_by_brute_force import (
    APPEARANCE_ONLY,
    SMOOTH_ONLY,
    features,
    gaussian,
    lattice,
    make_case,
    mean_field,
    normalise,
    positions,
    problem,
    run,
    smoothness,
)

from medseg_lite.crf import DenseCRF

PYDENSECRF2 = Path(__file__).parent / "data" / "pydensecrf2.npz"

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
