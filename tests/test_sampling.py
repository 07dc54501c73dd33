"""In most of these tests an image holds its own coordinates, so a patch tells exactly where it was taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from medseg_lite import datasets, models, transforms
from medseg_lite.sampling import SegmentSampler, VolumeSampler
from medseg_lite.volume import Case, array_code


def segments(sampler: SegmentSampler, batches: int):
    """`(patch, label)` of every segment of some batches, as arrays."""
    for step in range(batches):
        inputs, label = sampler.batch(step)
        yield from zip(inputs.numpy(), label.numpy())


def check_segment(patch: np.ndarray, label: np.ndarray, case: Case, margin: int, mirrored: list[bool]) -> None:
    """The patch is that of the mirror-padded volume at the block's place, and the label is that block's."""
    dims = label.ndim
    block = patch[(slice(None), *(slice(margin, n - margin) for n in patch.shape[1:]))].astype(int)
    assert block.shape[1:] == label.shape
    steps = [np.diff(block[axis], axis=axis) for axis in range(dims)]
    for axis, step in enumerate(steps):
        assert (step == step.flat[0]).all() and step.flat[0] in ((1, -1) if axis == 0 else (1,))
    for axis, size in enumerate(case.shape):
        assert block[axis].min() >= 0 and block[axis].max() < size
    assert np.array_equal(label, case.label[tuple(block)])

    start = [int(block[axis].min()) for axis in range(3)]
    margins = [margin] * dims + [0] * (3 - dims)
    padded = np.pad(case.image, [(0, 0), *((m, m) for m in margins)], mode="reflect")
    sides = [*label.shape, *(1,) * (3 - dims)]
    expected = padded[(slice(None), *(slice(a, a + n + 2 * m) for a, n, m in zip(start, sides, margins)))]
    flipped = steps[0].flat[0] == -1
    mirrored.append(bool(flipped))
    expected = expected[:, ::-1] if flipped else expected
    assert np.array_equal(patch.reshape(expected.shape), expected)


@pytest.mark.parametrize("scheme", ["foreground", "uniform", "equal"])
@pytest.mark.parametrize(
    "shape, output, margin, dims",
    [
        ((14, 11, 12), 3, 2, 3),
        ((14, 11, 12), 4, 5, 3),
        ((4, 9, 5), 4, 24, 3),  # smaller than the receptive field: mirrored several times
        ((14, 11, 6), 3, 4, 2),
        ((7, 9, 1), 6, 8, 2),
    ],
)
def test_label_and_patch_belong_together(grid_case, scheme, shape, output, margin, dims):
    case, mirrored = grid_case(shape), []
    sampler = SegmentSampler([case], output=output, margin=margin, spatial_dims=dims, scheme=scheme, batch_size=20)
    for patch, label in segments(sampler, 4):
        check_segment(patch, label, case, margin, mirrored)
    assert 20 < sum(mirrored) < 60  # of 80


def test_masked_label_and_patch_belong_together(grid_case):
    mask = np.zeros((16, 18, 14), bool)
    mask[5:9, 7:16, 6:8] = True
    case = grid_case(mask.shape, mask=mask)
    label = np.where(mask, case.label, 0)
    label[1, 1, 1] = 2  # outside the mask, yet labelled: it may be drawn
    case = case.replace(label=label.astype(np.uint8))
    sampler = SegmentSampler([case], output=3, margin=4, batch_size=50, scheme="equal")
    labels = []
    for patch, target in segments(sampler, 4):
        check_segment(patch, target, case, 4, [])
        labels.append(patch[:, 5, 5, 5].tolist())
    assert [1, 1, 1] in labels


def test_centres_reach_every_voxel_and_move_in_at_the_border(grid_case):
    """With a block of 3 in 5 voxels, centres 0 and 1 both become block 0-2: twice the chance of the middle block."""
    sampler = SegmentSampler([grid_case((5, 5, 5))], output=3, scheme="uniform", flip=False, batch_size=1000)
    inputs, _ = sampler.batch(0)
    for axis in range(3):
        starts = inputs[:, axis].amin(dim=(1, 2, 3)).long()
        counts = np.bincount(starts, minlength=3)
        assert stats.chisquare(counts, 1000 * np.array([2, 1, 2]) / 5).pvalue > 1e-4


def test_without_flips(grid_case):
    case, mirrored = grid_case(), []
    for patch, label in segments(SegmentSampler([case], output=3, margin=2, flip=False, batch_size=20), 2):
        check_segment(patch, label, case, 2, mirrored)
    assert not any(mirrored)


# ---------------------------------------------------------------------------------------------------- what is drawn


def masked_case(seed: int = 0, *, classes=(0, 1, 2, 4), share=(0.9, 0.06, 0.03, 0.01)) -> Case:
    """Coordinates, with random labels inside a random mask."""
    rng = np.random.default_rng(seed)
    shape = (16, 17, 18)
    image = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)
    mask = rng.random(shape) < 0.6
    label = np.where(mask, rng.choice(classes, shape, p=share), 0).astype(np.uint8)
    return Case(image=image, channels=("d", "h", "w"), name=f"case {seed}", label=label, mask=mask)


def draw(sampler: SegmentSampler, batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates and labels of single-voxel segments, `(batches · size, 3)` and `(batches, size)`."""
    parts = [sampler.batch(step) for step in range(batches)]
    where = np.concatenate([p.inputs.numpy().reshape(-1, 3) for p in parts]).astype(int)
    return where, np.stack([p.label.numpy().ravel() for p in parts])


def test_foreground_scheme_is_half_and_half():
    case = masked_case()
    where, label = draw(SegmentSampler([case], output=1, batch_size=50), 40)
    assert ((label > 0).sum(1) == 25).all()
    assert case.mask[tuple(where.T)].all()
    # Within each half every voxel is equally likely, so the tumour classes come in their natural proportion.
    found = np.bincount(label[label > 0], minlength=5)[[1, 2, 4]]
    natural = np.bincount(case.label[case.label > 0], minlength=5)[[1, 2, 4]]
    assert stats.chisquare(found, found.sum() * natural / natural.sum()).pvalue > 1e-4


@pytest.mark.parametrize("size", [1, 5])
def test_foreground_scheme_with_odd_batches_takes_turns(size):
    _, label = draw(SegmentSampler([masked_case()], output=1, batch_size=size), 200)
    counts = (label > 0).sum(1)
    assert set(counts) == {size // 2, size // 2 + 1}
    assert 60 < (counts == size // 2).sum() < 140


def test_foreground_blocks_are_centred_on_a_labelled_voxel(grid_case):
    case = grid_case((15, 15, 15))
    label = np.zeros(case.shape, np.uint8)
    label[6, 8, 7] = label[9, 7, 5] = 3
    sampler = SegmentSampler([case.replace(label=label)], output=5, batch_size=10)
    for step in range(5):
        inputs, target = sampler.batch(step)
        assert (target[:, 2, 2, 2] == 3).sum() == 5
        centres = {tuple(c) for c in inputs[target[:, 2, 2, 2] == 3][:, :, 2, 2, 2].long().tolist()}
        assert centres <= {(6, 8, 7), (9, 7, 5)}


def test_uniform_scheme_draws_every_voxel_of_the_mask_equally():
    case = masked_case()
    where, label = draw(SegmentSampler([case], output=1, scheme="uniform", batch_size=500), 80)
    numbers = np.ravel_multi_index(where.T, case.shape)
    inside = np.flatnonzero(case.mask)
    counts = np.bincount(numbers, minlength=case.mask.size)
    assert counts[inside].sum() == counts.sum() == 40_000
    assert stats.chisquare(counts[inside]).pvalue > 1e-4
    natural = np.bincount(case.label[case.mask], minlength=5)[[0, 1, 2, 4]]
    found = np.bincount(label.ravel(), minlength=5)[[0, 1, 2, 4]]
    assert stats.chisquare(found, found.sum() * natural / natural.sum()).pvalue > 1e-4


def test_equal_scheme_draws_every_class_equally():
    case = masked_case()  # without class 3, which is then not drawn
    where, label = draw(SegmentSampler([case], output=1, scheme="equal", batch_size=500), 8)
    found = np.bincount(label.ravel(), minlength=5)
    assert found[3] == 0 and stats.chisquare(found[[0, 1, 2, 4]]).pvalue > 1e-4
    assert case.mask[tuple(where.T)].all()


@pytest.mark.parametrize("scheme", ["foreground", "uniform", "equal"])
def test_cases_are_equally_likely_whatever_their_size(grid_case, scheme):
    small, large = grid_case((3, 4, 5), classes=2), grid_case((12, 13, 14), classes=2)
    large = large.replace(image=large.image + 100)
    sampler = SegmentSampler([small, large], output=1, scheme=scheme, batch_size=1000)
    share = float((sampler.batch(0).inputs[:, 0] >= 100).float().mean())
    assert abs(share - 0.5) < 0.08


def test_cases_without_a_class_are_not_asked_for_it(grid_case):
    with_lesion, healthy = grid_case((6, 6, 6), classes=2), grid_case((6, 6, 6), classes=1)
    healthy = healthy.replace(image=healthy.image + 100)
    inputs, label = SegmentSampler([with_lesion, healthy], output=1, batch_size=1000).batch(0)
    second = inputs[:, 0].flatten() >= 100
    label = label.flatten()
    assert not label[second].any()
    assert 0.15 < float(second.float().mean()) < 0.35  # half of the background half


# --------------------------------------------------------------------------------------------------- the same again


def equal(a, b) -> bool:
    inputs = [b.inputs if isinstance(b.inputs, tuple) else (b.inputs,) for b in (a, b)]
    return torch.equal(a.label, b.label) and all(torch.equal(x, y) for x, y in zip(*inputs))


def test_a_batch_depends_on_seed_and_step_alone(noise_case):
    cases = [noise_case(seed=s, mask=True) for s in range(3)]

    def sampler(seed):
        return SegmentSampler(cases, output=3, margin=2, shift=0.1, seed=seed, batch_size=4)

    forwards, backwards = sampler(7), sampler(7)
    first = [forwards.batch(step) for step in range(5)]
    second = [backwards.batch(step) for step in reversed(range(5))][::-1]
    assert all(equal(a, b) for a, b in zip(first, second))
    assert equal(forwards.batch(2), first[2])
    assert not equal(first[0], first[1])
    assert not equal(sampler(8).batch(0), first[0])


def test_global_random_states_are_left_alone(noise_case):
    sampler = SegmentSampler([noise_case()], output=3)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    sampler.batch(0)
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_state, torch.get_rng_state())


def test_batches_do_not_share_memory(noise_case):
    case = noise_case()
    original = case.image.copy()
    sampler = SegmentSampler([case], output=3, margin=2)
    first = sampler.batch(0)
    kept = first.inputs.clone()
    sampler.batch(1).inputs.fill_(9)
    sampler.batch(0).inputs.fill_(9)
    assert torch.equal(first.inputs, kept) and np.array_equal(case.image, original)


# -------------------------------------------------------------------------------------------- inputs of the networks


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("build, output", [(models.deepmedic, 9), (models.dm2d_patch, 1), (models.shallow, 5)])
def test_cut_gives_each_pathway_its_part_of_the_patch(noise_case, build, output, centered):
    model = build(in_channels=2, width=0.1, centered=centered).eval()
    options = {"output": output, "margin": model.margin, "spatial_dims": model.spatial_dims, "batch_size": 3}
    case = noise_case((14, 15, 12))
    whole = SegmentSampler([case], **options).batch(5)
    parts = SegmentSampler([case], cut=model.cut, **options).batch(5)
    assert torch.equal(whole.label, parts.label)
    inputs = parts.inputs if isinstance(parts.inputs, tuple) else (parts.inputs,)
    for a, b in zip(model.cut(whole.inputs), inputs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model(whole.inputs), model(parts.inputs))
    assert model(parts.inputs).shape[2:] == parts.label.shape[1:]


def test_types_and_shapes(noise_case):
    case = noise_case()
    case = case.replace(image=(100 * case.image).astype(np.int16))
    inputs, label = SegmentSampler([case], output=3, margin=2, batch_size=4).batch(0)
    assert inputs.dtype == torch.float32 and inputs.shape == (4, 2, 7, 7, 7)
    assert label.dtype == torch.int64 and label.shape == (4, 3, 3, 3)
    inputs, label = SegmentSampler([case], output=3, margin=2, spatial_dims=2).batch(0)
    assert inputs.shape == (10, 2, 7, 7) and label.shape == (10, 3, 3)


def test_intensity_shift_is_the_same_in_every_voxel_and_pathway(noise_case):
    case = noise_case((12, 12, 12), mask=True)
    model = models.deepmedic(in_channels=2, width=0.1)
    options = {"output": 3, "margin": model.margin, "cut": model.cut, "batch_size": 1, "flip": False}
    # A segment is drawn before its shift is, so the whole difference is the shift.
    plain = SegmentSampler([case], **options).batch(0)
    shifted = SegmentSampler([case], shift=0.1, **options).batch(0)
    normal, low = ((b - a)[0].flatten(1) for a, b in zip(plain.inputs, shifted.inputs))
    for part in (normal, low):
        torch.testing.assert_close(part, normal[:, :1].expand_as(part), rtol=0, atol=1e-5)
    assert normal[:, 0].abs().min() > 0 and normal[0, 0] != normal[1, 0]


def test_intensity_shift_has_the_given_spread():
    """Intensities are ±1 and ±40 inside the mask, so a drawn value is nearest to its own, and σ_c is 1 and 40."""
    rng = np.random.default_rng(0)
    mask = rng.random((8, 8, 8)) < 0.7
    sign = np.where(rng.permutation(mask.sum()) % 2, 1.0, -1.0)
    image = np.full((2, *mask.shape), -1000, np.float32)  # the outside must not count
    image[:, mask] = sign * np.array([[1], [40]])
    case = Case(image=image, channels=("a", "b"), label=np.zeros(mask.shape, np.uint8), mask=mask)
    sampler = SegmentSampler([case], output=1, scheme="uniform", batch_size=2000, shift=0.1)
    found = sampler.batch(0).inputs.reshape(2000, 2).numpy() / [1, 40]
    shift = found - np.sign(found)
    for channel in shift.T:
        assert stats.kstest(channel, "norm", (0, 0.1)).pvalue > 1e-4
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.1


# ------------------------------------------------------------------------------------------------------------- errors


def test_errors(noise_case):
    case = noise_case((12, 15, 9))
    dark = np.zeros_like(case.label)
    checks = [
        (lambda: SegmentSampler([]), "no cases to sample from"),
        (lambda: SegmentSampler([case], scheme="balanced"), "scheme='balanced'; expected one of foreground, uniform, equal"),
        (lambda: SegmentSampler([case], output=0), "output=0, batch_size=10; both must be at least 1"),
        (lambda: SegmentSampler([case], batch_size=0), "batch_size=0"),
        (lambda: SegmentSampler([case, case.replace(label=None, name="b")]), "b has no label; training needs one"),
        (
            lambda: SegmentSampler([case, case.select(["t1c"]).replace(name="b")]),
            r"b has channels \('t1c',\) but noise has \('flair', 't1c'\)",
        ),
        (
            lambda: SegmentSampler([case], output=10),
            "noise is only 9 voxels along W; the output needs 10: choose a smaller one",
        ),
        (
            lambda: SegmentSampler([case.replace(label=dark)] * 2, output=3),
            "none of the 2 cases has a labelled voxel inside its mask; scheme='foreground'",
        ),
        (lambda: SegmentSampler([case.replace(label=dark + 1)], output=3), "none of the 1 cases has a background voxel"),
        (lambda: SegmentSampler([case.replace(mask=dark > 0)], output=3, scheme="uniform"), "noise: the mask is empty"),
    ]
    for call, message in checks:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_2d_sampler_needs_no_depth(noise_case):
    inputs, label = SegmentSampler([noise_case((12, 15, 1))], output=9, spatial_dims=2).batch(0)
    assert inputs.shape == (10, 2, 9, 9) and label.shape == (10, 9, 9)


def test_healthy_cohorts_can_be_sampled_uniformly_and_equally(noise_case):
    case = noise_case()
    case = case.replace(label=np.zeros_like(case.label))
    for scheme in ("uniform", "equal"):
        assert not SegmentSampler([case], output=3, scheme=scheme).batch(0).label.any()


# ------------------------------------------------------------------------------------------------------- whole volumes


def test_whole_volumes_are_filled_up_by_mirroring(grid_case):
    case = grid_case((7, 8, 5))
    image, label = VolumeSampler([case], multiple=4).batch(0)
    assert image.shape == (1, 3, 8, 8, 8) and label.shape == (1, 8, 8, 8) and label.dtype == torch.int64
    pad = [(0, 1), (0, 0), (0, 3)]
    np.testing.assert_array_equal(image[0], np.pad(case.image, [(0, 0), *pad], mode="reflect"))
    np.testing.assert_array_equal(label[0], np.pad(case.label, pad, mode="reflect"))


def test_every_case_comes_up_before_any_comes_up_again(grid_case):
    cases = [grid_case((4, 4, 4)).replace(image=np.full((3, 4, 4, 4), n, np.float32)) for n in range(5)]
    sampler = VolumeSampler(cases, batch_size=2)
    seen = [int(v) for step in range(10) for v in sampler.batch(step).inputs[:, 0, 0, 0, 0]]
    rounds = [seen[n : n + 5] for n in range(0, 20, 5)]
    assert all(sorted(r) == list(range(5)) for r in rounds) and len({tuple(r) for r in rounds}) > 1


def test_crops_lie_inside_and_anywhere(grid_case):
    case = grid_case((9, 7, 6))
    sampler = VolumeSampler([case], crop=(4, 2, 6), multiple=2, batch_size=3)
    corners = set()
    for step in range(60):
        image, label = sampler.batch(step)
        assert image.shape == (3, 3, 4, 2, 6)
        for patch, target in zip(image.long(), label):
            corners.add(tuple(patch[:, 0, 0, 0].tolist()))
            np.testing.assert_array_equal(target, case.label[tuple(patch)])
    assert corners == {(d, h, 0) for d in range(6) for h in range(6)}


def test_batches_of_volumes_depend_on_seed_and_step_alone(noise_case):
    cases = [noise_case((8, 9, 10), seed=n) for n in range(3)]

    def batches(seed, steps):
        sampler = VolumeSampler(cases, crop=6, batch_size=2, augment=transforms.augment, seed=seed)
        return [sampler.batch(s) for s in steps]

    forward, backward = batches(0, range(6)), batches(0, reversed(range(6)))[::-1]
    assert all(torch.equal(a.inputs, b.inputs) and torch.equal(a.label, b.label) for a, b in zip(forward, backward))
    assert not torch.equal(forward[0].inputs, batches(1, [0])[0].inputs)


def test_volumes_are_not_changed_by_augmentation(noise_case):
    case = noise_case((8, 8, 8))
    sampler = VolumeSampler([case], augment=transforms.augment)
    for step in range(8):
        image, label = sampler.batch(step)
        image.zero_(), label.zero_()
    plain = VolumeSampler([case]).batch(0)
    np.testing.assert_array_equal(plain.inputs[0], case.image)
    np.testing.assert_array_equal(plain.label[0], case.label)


def test_the_codes_of_cases_stay_so_that_runs_of_earlier_versions_go_on(noise_case):
    case = noise_case((8, 9, 10), name="c0")
    (name, code), *_ = VolumeSampler([case]).case_codes()
    assert (name, code) == ("c0", array_code(case.image, case.label.astype(np.int64)))  # labels were int64 then


def test_volume_sampler_errors(noise_case):
    case, small = noise_case((8, 8, 8)), noise_case((8, 8, 6))
    for cases, options, message in [
        ([], {}, "no cases to sample from"),
        ([case.replace(label=None)], {}, "noise has no label"),
        ([case, noise_case(channels=("t1",))], {}, "has channels"),
        ([case], {"batch_size": 0}, "batch_size=0, multiple=1; both must be at least 1"),
        ([case], {"crop": 12, "multiple": 8}, "crop=12; expected one number of voxels, or three, each a multiple of 8"),
        ([case], {"crop": (8, 8)}, "or three"),
        ([case, small], {"crop": 8}, r"noise is 8×8×6 voxels, smaller than the crop of \(8, 8, 8\)"),
        ([case, small], {"batch_size": 2}, "of different sizes, so whole volumes make no batch"),
    ]:
        with pytest.raises(ValueError, match=message):
            VolumeSampler(cases, **options)


def test_segments_are_augmented_as_a_batch(grid_case):
    """The function gets the batch and the batch's own random numbers."""

    def turned(image, label, *, rng):
        return image.flip(-1) + rng.integers(1), label.flip(-1)

    plain, other = (
        SegmentSampler([grid_case()], output=6, batch_size=3, scheme="uniform", spatial_dims=2, augment=a, seed=3)
        for a in (None, turned)
    )
    for step in range(3):
        (x, y), (u, v) = plain.batch(step), other.batch(step)
        assert torch.equal(u, x.flip(-1)) and torch.equal(v, y.flip(-1))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", ["deepmedic", "dm2d_seg"])
def test_augmentation_moves_the_label_with_the_whole_patch(noise_case, tmp_path, name, stored):
    """A network that loses a margin: the patch is augmented with its label, then both are cut to what the network takes."""
    model = getattr(models, name)(in_channels=2, classes=2, width=0.1)
    cases = [noise_case((60, 62, 58), seed=n, name=f"c{n}") for n in range(2)]
    if stored:
        cases = list(datasets.store(cases, tmp_path, dtype="float32", progress=False))
    seen = []

    def mirrored(image, label, *, rng):
        seen.append((image.shape, label.shape))
        return image.flip(-1), label.flip(-1)

    how = {"margin": model.margin, "cut": model.cut, "batch_size": 3, "spatial_dims": model.spatial_dims, "seed": 1}
    plain, same, other = (
        SegmentSampler(cases, augment=a, **how) for a in (None, lambda image, label, *, rng: (image, label), mirrored)
    )
    side = 9 + 2 * model.margin
    for step in range(2):
        (x, y), (u, v), (m, n) = plain.batch(step), same.batch(step), other.batch(step)
        assert all(torch.equal(a, b) for a, b in zip(x, u)) and torch.equal(y, v)
        assert torch.equal(n, y.flip(-1)) and torch.equal(m[0], x[0].flip(-1)) and m[1].shape == x[1].shape
        assert seen[-1] == ((3, 2, *[side] * model.spatial_dims), (3, *[side] * model.spatial_dims))
