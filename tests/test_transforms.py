from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from medseg_lite import phantoms, transforms
from medseg_lite.transforms import augment, mirror_healthy, standardise
from medseg_lite.volume import Case


def small(values, mask=None, channels=("flair",)) -> Case:
    image = np.asarray(values, np.float32).reshape(len(channels), 1, 1, -1)
    return Case(image=image, channels=channels, name="small", mask=None if mask is None else np.reshape(mask, (1, 1, -1)))


def test_by_hand():
    # Inside the mask: 2, 4, 4, 6, with mean 4 and variance (4 + 0 + 0 + 4) / 4 = 2.
    case = small([0, 2, 4, 4, 6, 100], mask=[False, True, True, True, True, False])
    expected = (np.array([0, 2, 4, 4, 6, 100]) - 4) / np.sqrt(2)
    result = standardise(case)
    np.testing.assert_allclose(result.image.ravel(), expected, rtol=1e-6)
    assert result.image.dtype == np.float32 and result.mask is case.mask
    assert case.image.ravel().tolist() == [0, 2, 4, 4, 6, 100]  # the original is left alone


def test_without_a_mask_every_voxel_counts():
    np.testing.assert_allclose(standardise(small([1, 3])).image.ravel(), [-1, 1])


def test_channels_are_independent_and_background_becomes_a_constant(noise_case):
    case = noise_case((10, 11, 12), mask=True)
    image = case.image * np.array([3, 500], np.float32).reshape(2, 1, 1, 1) + 1000
    image[:, ~case.mask] = 0
    result = standardise(case.replace(image=image)).image
    inside = result[:, case.mask]
    np.testing.assert_allclose(inside.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(inside.std(1), 1, atol=1e-4)
    for channel in result:
        (background,) = np.unique(channel[~case.mask])
        assert background < -1.5


def test_large_intensities_keep_their_precision():
    result = standardise(small(1e6 + np.arange(64) % 4)).image
    np.testing.assert_allclose(result.ravel()[:4], (np.arange(4) - 1.5) / np.sqrt(1.25), rtol=1e-5)


def test_whole_numbers_are_fine():
    case = small([1, 3])
    assert standardise(case.replace(image=case.image.astype(np.int16))).image.dtype == np.float32


@pytest.mark.parametrize("value", [0.0, 0.1, 1e5])
def test_constant_channel(value):
    case = small([[1, 2, 3] * 10, [value] * 30], channels=("flair", "t1c"))
    with pytest.raises(ValueError, match="small: t1c is constant inside the mask"):
        standardise(case)


def test_empty_mask():
    with pytest.raises(ValueError, match="small: the mask is empty"):
        standardise(small([1, 2], mask=[False, False]))


def test_rescale_by_hand():
    case = small([0, 2, 4, 12, 100], mask=[False, True, True, True, False])
    result = transforms.rescale(case)
    np.testing.assert_allclose(result.image.ravel(), [-0.2, 0, 0.2, 1, 9.8], rtol=1e-6)
    assert result.image.dtype == np.float32 and case.image.max() == 100
    two = transforms.rescale(small([[1, 3], [-500, 1500]], channels=("a", "b")))
    assert two.image.ravel().tolist() == [0, 1, 0, 1]


def test_equalise_gives_the_share_that_is_darker():
    values = np.random.default_rng(0).gamma(2, 300, 3000)
    result = transforms.equalise(small(values), bins=2048).image.ravel()
    share = (values[:, None] >= values[None]).mean(1)
    np.testing.assert_allclose(result, share, atol=0.02)
    again = transforms.equalise(small(7 * values + 900), bins=2048).image.ravel()
    np.testing.assert_allclose(result, again, atol=2e-3)  # gain and offset leave no trace


def test_equalise_counts_inside_the_mask():
    case = small([0] * 1000 + list(range(1, 101)), mask=[False] * 1000 + [True] * 100)
    inside = transforms.equalise(case).image[0][case.mask]
    np.testing.assert_allclose(inside, np.arange(1, 101) / 100, atol=0.02)


@pytest.mark.parametrize("normalise", [transforms.rescale, transforms.equalise])
def test_nothing_to_normalise(normalise):
    with pytest.raises(ValueError, match="small: t1c is constant inside the mask"):
        normalise(small([[1, 2, 3], [5, 5, 5]], channels=("flair", "t1c")))
    with pytest.raises(ValueError, match="small: the mask is empty"):
        normalise(small([1, 2], mask=[False, False]))


# --------------------------------------------------------------------------------------------------------- augmentation


class Draws:
    """Stands in for a generator: one kind of transformation with given settings."""

    def __init__(self, kind: int, axis: int = 0, plane=(0, 1), degrees: float = 0.0):
        self.kind, self.axis, self.plane, self.degrees = kind, axis, plane, degrees
        self.calls = 0

    def integers(self, high, size):
        self.calls += 1
        return np.full(size, self.kind if self.calls == 1 else self.axis)

    def permutation(self, n):
        return np.array([*self.plane, *(k for k in range(n) if k not in self.plane)])

    def uniform(self, low, high, size):
        return np.full(size, self.degrees)


def batch(*space, channels=2, count=2):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, channels, *space, generator=generator)
    return image, torch.randint(5, (count, *space), generator=generator)


def test_identity_and_flips_are_exact():
    image, label = batch(5, 6, 7)
    same, labels = augment(image, label, rng=Draws(0))
    assert torch.equal(same, image) and torch.equal(labels, label) and same is not image
    for axis in range(3):
        flipped, labels = augment(image, label, rng=Draws(1, axis))
        assert torch.equal(flipped, image.flip(axis + 2)) and torch.equal(labels, label.flip(axis + 1))


@pytest.mark.parametrize("plane", [(0, 1), (1, 0), (0, 2), (1, 2), (2, 1)])
def test_quarter_turns_are_those_of_rot90(plane):
    image, label = batch(9, 9, 9)
    turned, labels = augment(image, label, rng=Draws(2, plane=plane, degrees=90))
    a, b = plane
    torch.testing.assert_close(turned, torch.rot90(image, 1, [a + 2, b + 2]), atol=1e-4, rtol=0)
    assert torch.equal(labels, torch.rot90(label, 1, [a + 1, b + 1]))


@pytest.mark.parametrize("plane", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("degrees", [17.0, -60.0])
def test_rotation_against_scipy(degrees, plane):
    """A volume whose sides differ: voxels stay cubes. Each channel has its own lowest value."""
    image, label = batch(14, 10, 6, count=1)
    turned, _ = augment(image, label, rng=Draws(2, plane=plane, degrees=degrees))
    for channel, found in zip(image[0].numpy(), turned[0].numpy()):
        low = float(channel.min())
        peer = low + ndimage.rotate(channel - low, degrees, axes=plane, reshape=False, order=1, mode="grid-constant")
        np.testing.assert_allclose(found, peer, atol=1e-3)


@pytest.mark.parametrize("shape, plane", [((9, 8, 7), (0, 1)), ((9, 8, 7), (2, 0)), ((5, 9, 6), (1, 2)), ((9, 7), (1, 0))])
@pytest.mark.parametrize("degrees", [33.0, -121.0])
def test_rotation_is_that_of_one_grid_over_the_whole_volume(shape, plane, degrees):
    """The same by the textbook: three matrices in all dimensions, and one interpolation."""
    image, label = batch(*shape)
    turned, labels = augment(image, label, rng=Draws(2, plane=plane, degrees=degrees))
    a, b = plane
    angle, half = np.deg2rad(degrees), np.diag([(n - 1) / 2 for n in shape])
    rotation = np.eye(len(shape))
    rotation[[a, b, a, b], [a, b, b, a]] = np.cos(angle), np.cos(angle), np.sin(angle), -np.sin(angle)
    theta = (np.linalg.inv(half) @ rotation @ half)[::-1, ::-1]
    theta = torch.from_numpy(np.concatenate([theta, np.zeros((len(shape), 1))], axis=1)).float().expand(2, -1, -1)
    grid = functional.affine_grid(theta, [2, 1, *shape], align_corners=True)
    low = image.flatten(2).amin(2).reshape(2, 2, *(1,) * len(shape))
    expected = functional.grid_sample(image - low, grid, align_corners=True) + low
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-4)
    nearest = functional.grid_sample(label[:, None].float(), grid, mode="nearest", align_corners=True)[:, 0]
    assert (labels != nearest).float().mean() < 0.005  # but for ties


def test_image_and_label_turn_together_and_no_new_labels_appear():
    label = torch.zeros(1, 24, 20, 16, dtype=torch.long)
    label[:, 6:18, 8:12, 5:11] = 4
    label[:, 12:18, 8:12, 5:11] = 2
    rng = np.random.default_rng(0)
    for _ in range(30):
        image, turned = augment(label[:, None].float(), label, rng=rng)
        assert turned.dtype == torch.long and set(turned.unique().tolist()) <= {0, 2, 4}
        assert (image[:, 0] - turned).abs().mean() < 0.1


def test_each_volume_has_its_own_and_all_three_come_up():
    image, label = batch(8, 8, 8, channels=1, count=300)
    turned, _ = augment(image, label, rng=np.random.default_rng(0))
    same = (turned == image).flatten(1).all(1)
    flipped = torch.stack([(turned == image.flip(a)).flatten(1).all(1) for a in (2, 3, 4)])
    assert 70 < int(same.sum()) < 130 and 70 < int(flipped.any(0).sum()) < 130
    assert (flipped.sum(1) > 15).all()


def test_what_comes_in_from_outside_is_air():
    image, label = torch.full((1, 2, 12, 12, 12), 3.0), torch.ones(1, 12, 12, 12, dtype=torch.long)
    image[:, 0, 6, 6, 6], image[:, 1] = -2.0, 7.0
    turned, labels = augment(image, label, rng=Draws(2, degrees=45))
    assert turned[0, 0, 0, 0, 5] == -2 and turned[0, 1, 0, 0, 5] == 7 and labels[0, 0, 0, 5] == 0


def test_augmentation_of_slices_half_precision_and_the_angle_limit():
    image, label = batch(16, 12)
    rng = np.random.default_rng(1)
    for _ in range(6):
        turned, labels = augment(image.half(), label.to(torch.uint8), rng=rng)
        assert turned.dtype == torch.float16 and labels.dtype == torch.uint8 and turned.shape == image.shape
    still, _ = augment(image, label, rng=Draws(2, degrees=0))
    torch.testing.assert_close(still, image, atol=1e-4, rtol=0)


def test_augmentation_is_the_seeds_alone():
    image, label = batch(6, 6, 6)
    a, b = (augment(image, label, rng=np.random.default_rng([0, 7]))[0] for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        (((1, 1, 4, 4, 4), (1, 4, 4)), {}, r"expected \(B, C, \*space\)"),
        (((1, 1, 4), (1, 4)), {}, "in 2D or 3D"),
        (((1, 1, 4, 4), (1, 4, 4)), {"angle": 270}, "angle=270; expected 0 to 180"),
    ],
)
def test_augmentation_rejects(shapes, options, message):
    image, label = (torch.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        augment(image, label, rng=np.random.default_rng(0), **options)


def line(values, label, **options) -> Case:
    """A case of one line of voxels from left to right."""
    image = np.asarray(values, np.float32).reshape(1, -1, 1, 1)
    label = np.asarray(label, np.uint8).reshape(-1, 1, 1)
    return Case(image=image, channels=("flair",), label=label, mask=image[0] > 0, name="line", **options)


@pytest.mark.parametrize(
    "label, expected", [([0, 2, 0, 0, 0, 0], [0, 50, 40, 40, 50, 0]), ([0, 0, 0, 0, 4, 0], [0, 20, 30, 30, 20, 0])]
)
def test_mirrored_by_hand(label, expected):
    case = line([0, 20, 30, 40, 50, 0], label, extra={"wm": np.arange(6.0).reshape(6, 1, 1)})
    result = mirror_healthy(case)
    assert result.image.ravel().tolist() == expected and not result.label.any() and result.info["mirrored"]
    assert result.mask.ravel().tolist() == [v > 0 for v in expected]
    assert result.extra["wm"].ravel().tolist() == ([5, 4, 3, 3, 4, 5] if label[1] else [0, 1, 2, 2, 1, 0])
    assert case.label.any() and case.image.ravel().tolist() == [0, 20, 30, 40, 50, 0]  # the original is left alone


def test_mirrored_about_a_midline_off_the_middle():
    midline = np.array([-1, 1, 2, 3, 4, 5.0]).reshape(6, 1, 1)
    result = mirror_healthy(line([7, 20, 30, 40, 50, 60], [0, 0, 1, 0, 0, 0], extra={"midline": midline}))
    assert result.image.ravel().tolist() == [7, 7, 0, 0, 0, 0]  # the rest would come from outside the grid
    given = mirror_healthy(line([7, 20, 30, 40, 50, 60], [1, 0, 0, 0, 0, 0]), midline=midline)
    assert given.image.ravel().tolist() == [20, 20, 30, 40, 50, 60]


def test_without_a_midline_the_plane_of_symmetry_is_found():
    result = mirror_healthy(line([0, 2, 3, 4, 5, 0, 0], [0, 1, 0, 0, 0, 0, 0]))  # brain in voxels 1 to 4 of 7
    assert result.image.ravel().tolist() == [0, 5, 4, 4, 5, 0, 0]


def test_mirrored_phantom_is_the_one_that_its_maker_mirrors():
    ill = phantoms.brain(3, spacing=4, lesion="stroke")
    found, expected = mirror_healthy(ill), phantoms.brain(3, spacing=4, lesion="stroke", mirrored=True)
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.mask, expected.mask)


@pytest.mark.parametrize(
    "case, options, message",
    [
        (line([1] * 6, [0, 1, 0, 0, 1, 1]), {}, "line has 1 lesion voxels left of the midline and 2 right of it"),
        (line([1] * 6, [0] * 6), {}, "no lesion in its label"),
        (line([1] * 6, [0, 1, 0, 0, 0, 0]).replace(mask=None), {}, "has no mask to find the midline by"),
        (line([1] * 6, [0, 1, 0, 0, 0, 0]), {"midline": np.zeros((3, 1, 1))}, r"midline has shape \(3, 1, 1\)"),
    ],
)
def test_mirroring_rejects(case, options, message):
    with pytest.raises(ValueError, match=message):
        mirror_healthy(case, **options)


def test_median_normalisation():
    case = small([0, 2, 4, 6, 100], channels=("flair",))
    np.testing.assert_allclose(transforms.median_normalise(case).image.ravel(), np.array([0, 2, 4, 6, 100]) / 5)  # of 4 and 6
    masked = small([0, 2, 4, 6, 100], mask=[False, True, True, True, False])
    np.testing.assert_allclose(transforms.median_normalise(masked, constant=100).image.ravel(), [0, 50, 100, 150, 2500])
    again = transforms.median_normalise(transforms.median_normalise(masked, constant=7), constant=100)
    np.testing.assert_allclose(again.image.ravel(), [0, 50, 100, 150, 2500], rtol=1e-6)
    for values in ([-1, -2, -3], [0, 0, 0]):
        with pytest.raises(ValueError, match=r"the median of flair is .*; expected raw intensities"):
            transforms.median_normalise(small(values, mask=[True] * 3))


# ----------------------------------------------------------------------------------------------------------- distortion


def smooth_batch(count: int = 3, shape=(40, 52)) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(count, 2, *shape)), (0, 0, 3, 3)).astype(np.float32)
    return torch.from_numpy(image), torch.from_numpy((image[:, 0] > 0).astype(np.int64) + 4 * (image[:, 1] > 0))


def test_distort_does_nothing_when_told_so():
    image, label = smooth_batch()
    still = {"flip": False, "shear": 0, "angle": 0, "warp": 0}
    same, names = transforms.distort(image, label, rng=np.random.default_rng(0), **still)
    torch.testing.assert_close(same, image, rtol=0, atol=1e-5)
    assert torch.equal(names, label)


def test_distort_keeps_classes_and_joins_image_and_label():
    image, label = smooth_batch()
    image[:, 0] = label  # the picture shows the label itself
    moved, names = transforms.distort(image, label, rng=np.random.default_rng(1))
    assert set(names.unique().tolist()) <= set(label.unique().tolist()) and names.dtype == label.dtype
    assert (moved[:, 0].round() == names).float().mean() > 0.85  # but for interpolation along the borders
    assert (names != label).float().mean() > 0.2
    again = transforms.distort(image, label, rng=np.random.default_rng(1))
    assert torch.equal(again[0], moved) and torch.equal(again[1], names)
    assert not torch.equal(transforms.distort(image, label, rng=np.random.default_rng(2))[1], names)


@pytest.mark.parametrize("shear, angle", [(0, 25), (0.41, 0), (0.3, 20)])
def test_shear_and_rotation_against_scipy(shear, angle):
    image, label = smooth_batch(1)
    draw = np.random.default_rng(5)
    rng = np.random.default_rng(5)
    s, t = draw.uniform(-shear, shear, 1)[0], np.deg2rad(draw.uniform(-angle, angle, 1)[0])
    moved, _ = transforms.distort(image, label, rng=rng, flip=False, shear=shear, angle=angle, warp=0)
    xy = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) @ np.array([[1, -np.sin(s)], [0, np.cos(s)]])
    matrix = xy[::-1, ::-1]  # SciPy names the vertical axis first
    middle = (np.array(image.shape[2:]) - 1) / 2
    for channel in range(2):
        expected = ndimage.affine_transform(image[0, channel].numpy(), matrix, middle - matrix @ middle, order=1, mode="mirror")
        np.testing.assert_allclose(moved[0, channel], expected, atol=1e-4)
    assert (moved - image).abs().max() > 0.05


def test_warp_is_smooth_and_as_large_as_asked():
    ramp = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 65), torch.linspace(-1, 1, 65), indexing="ij"))
    moved, _ = transforms.distort(
        ramp.expand(200, -1, -1, -1),
        torch.zeros(200, 65, 65, dtype=torch.long),
        rng=np.random.default_rng(0),
        flip=False,
        shear=0,
        angle=0,
        warp=0.1,
    )
    shift = (moved - ramp)[..., 32, 32]  # at the grid's middle point, far from the mirrored border
    assert shift.std() == pytest.approx(0.1, rel=0.15) and abs(shift.mean()) < 0.02
    assert moved.diff(dim=-1).diff(dim=-1)[..., 20:44, 20:44].abs().max() < 0.02


def test_distort_checks_shapes():
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\) and \(B, H, W\)"):
        transforms.distort(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 4, 4, 4), rng=np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------------ missing sequences


def test_complete_puts_zeros_where_a_sequence_is_missing():
    case = small([[1, 2, 3], [4, 5, 6]], channels=("t2", "flair"))
    whole = transforms.complete(case, ["flair", "t1", "t2"])
    assert whole.channels == ("flair", "t1", "t2") and whole.image.dtype == np.float32
    assert whole.image[:, 0, 0].tolist() == [[4, 5, 6], [0, 0, 0], [1, 2, 3]]
    assert transforms.complete(case, ["t2", "flair", "t1"], value=-1).image[2].max() == -1
    assert transforms.complete(whole, whole.channels) is whole
    assert case.channels == ("t2", "flair")


def test_complete_refuses_what_the_network_does_not_know():
    with pytest.raises(ValueError, match=r"small has t2; expected some of flair, t1: use case.select"):
        transforms.complete(small([[1, 2], [3, 4]], channels=("flair", "t2")), ("flair", "t1"))


def test_drop_channels_takes_one_channel_of_the_drawn_share():
    image, label = torch.rand(400, 4, 2, 2) + 1, torch.zeros(400, 2, 2, dtype=torch.long)
    before = image.clone()
    dropped, same = transforms.drop_channels(image, label, rng=np.random.default_rng(0), probability=0.25)
    gone = (dropped == 0).flatten(2).all(2)
    assert same is label and torch.equal(image, before)
    assert int(gone.sum(1).max()) == 1 and 70 < int(gone.sum()) < 130
    assert gone.sum(0).min() > 10  # every channel has its turn
    assert torch.equal(dropped[~gone], image[~gone])


def test_drop_channels_never_and_always():
    image, label = torch.ones(8, 2, 3, 3), torch.zeros(8, 3, 3, dtype=torch.long)
    for probability, left in ((0.0, 2), (1.0, 1)):
        dropped, _ = transforms.drop_channels(image, label, rng=np.random.default_rng(1), probability=probability)
        assert (dropped.flatten(2).sum(2) > 0).sum(1).tolist() == [left] * 8
    with pytest.raises(ValueError, match="with 1 channels; expected 0 to 1, and a channel that remains"):
        transforms.drop_channels(image[:, :1], label, rng=np.random.default_rng(0), probability=0.5)
    with pytest.raises(ValueError, match=r"probability=1\.5"):
        transforms.drop_channels(image, label, rng=np.random.default_rng(0), probability=1.5)


def test_normalise_by_name(noise_case):
    case = noise_case(mask=True)
    case = case.replace(image=case.image + 10)
    np.testing.assert_array_equal(transforms.normalise(case, "standardise").image, standardise(case).image)
    np.testing.assert_array_equal(transforms.normalise(case, "median").image, transforms.median_normalise(case).image)
    assert transforms.normalise(case, "none") is case
    with pytest.raises(ValueError, match="normalise='z'; expected one of standardise, median, none"):
        transforms.normalise(case, "z")
