from __future__ import annotations

import numpy as np
import pytest

from medseg_lite.postprocess import largest_component, remove_flat_components
from medseg_lite.volume import Case


def ball(shape, centre, radius) -> np.ndarray:
    grid = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return (grid**2).sum(0) <= radius**2


@pytest.fixture
def brain() -> Case:
    """A ball of 30 mm radius in voxels of 2 mm."""
    mask = ball((36, 36, 36), (18, 18, 18), 15)
    return Case(np.zeros((1, *mask.shape), np.float32), ("flair",), "ball", mask=mask, affine=np.diag([2.0, 2, 2, 1]))


def cap(brain: Case, deep: int, *, voxels: int = 4) -> np.ndarray:
    """A curved patch of class 1 under the top of the surface, `deep` voxels thick."""
    shell = brain.mask & ~ball(brain.shape, (18, 18, 18), 15 - deep)
    box = np.zeros(brain.shape, bool)
    box[18 - voxels : 18 + voxels, 18 - voxels : 18 + voxels, 20:] = True
    return (shell & box).astype(np.uint8)


def test_a_thin_cap_goes_and_a_tumour_stays(brain):
    label = cap(brain, 2)
    tumour = 2 * ball(brain.shape, (18, 18, 10), 4).astype(np.uint8)
    assert label.any() and tumour.any()
    given = label + tumour
    before = given.copy()
    assert np.array_equal(remove_flat_components(given, brain), tumour)
    assert np.array_equal(given, before)


@pytest.mark.parametrize("thickness, voxels", [(4, 2), (6, 2), (8, 4), (11, 4), (12, 6)])
def test_flat(thickness, voxels):
    """The middle of a sheet of 1, 2, 3, 4, 5, 6 voxels of 2 mm is 2, 2, 4, 4, 6, 6 mm deep."""
    mask = np.zeros((30, 30, 20), bool)
    mask[1:-1, 1:-1, :-1] = True
    case = Case(np.zeros((1, *mask.shape), np.float32), ("flair",), mask=mask, affine=np.diag([2.0, 2, 2, 1]))
    for sheet in range(1, 8):
        label = np.zeros(mask.shape, np.uint8)
        label[8:22, 8:22, 19 - sheet : 19] = 1
        cleaned = remove_flat_components(label, case, thickness=thickness, depth=40, volume=100)
        assert cleaned.any() == (sheet > voxels)


def test_thick_pieces_stay(brain):
    label = ball(brain.shape, (18, 18, 29), 3).astype(np.uint8)  # 14 mm thick, under the surface
    assert np.array_equal(remove_flat_components(label, brain), label)
    assert not remove_flat_components(label, brain, thickness=16, depth=20).any()


def test_deep_pieces_stay(brain):
    label = np.zeros(brain.shape, np.uint8)
    label[14:22, 14:22, 18] = 1  # as flat as can be, in the middle of the brain
    assert np.array_equal(remove_flat_components(label, brain), label)
    assert not remove_flat_components(label, brain, depth=31).any()


def test_large_pieces_stay(brain):
    label = cap(brain, 1, voxels=12)
    volume = label.sum() * 8 / 1000
    assert np.array_equal(remove_flat_components(label, brain, depth=40, volume=volume - 0.01), label)
    assert not remove_flat_components(label, brain, depth=40, volume=volume + 0.01).any()


def test_pieces_that_touch_at_a_corner_are_one(brain):
    label = ball(brain.shape, (18, 18, 27), 3).astype(np.uint8)
    assert label[18, 18, 30]
    label[19, 19, 31] = 3
    assert np.array_equal(remove_flat_components(label, brain), label)
    label[19, 19, 31], label[20, 20, 32] = 0, 3
    assert remove_flat_components(label, brain).max() == 1


def test_the_edge_of_the_volume_is_outside(brain):
    """A scan cut off through the brain: a sheet along the cut is thin, but its mask distance decides as for any other."""
    cut = brain.crop((slice(None), slice(None), slice(0, 33)))
    label = np.zeros(cut.shape, np.uint8)
    label[18, 18, 32] = 1
    assert not remove_flat_components(label, cut).any()


def test_unequal_voxels(brain):
    label = cap(brain, 2)
    tall = brain.replace(affine=np.diag([2.0, 2, 8, 1]))
    assert not remove_flat_components(label, brain).any()
    assert remove_flat_components(label, tall, depth=5).any()


def test_nothing_to_clean(brain):
    assert not remove_flat_components(np.zeros(brain.shape, np.uint8), brain).any()


def test_errors(brain):
    label = cap(brain, 1)
    checks = [
        (label[1:], brain, {}, r"the label is \(35, 36, 36\) but ball is \(36, 36, 36\)"),
        (label, brain.replace(mask=None), {}, "ball has no mask that ends at the skull"),
        (label, brain.replace(mask=np.ones(brain.shape, bool)), {}, "ball has no mask that ends at the skull"),
        (label, brain, {"depth": 0}, r"depth=0, .*all must be positive"),
    ]
    for given, case, options, message in checks:
        with pytest.raises(ValueError, match=message):
            remove_flat_components(given, case, **options)


def test_the_largest_component_stays_with_all_its_classes():
    label = np.zeros((8, 8, 4), np.uint8)
    label[1:4, 1:4, 1:3] = 1
    label[2, 2, 1] = 2
    label[4, 4, 3] = 1  # touches at a corner only
    label[6:, 6:, :2] = 1
    kept = largest_component(label)
    assert kept.dtype == np.uint8 and kept.sum() == 18 + 1 and kept[2, 2, 1] == 2
    np.testing.assert_array_equal(kept[:5, :5, :3], label[:5, :5, :3] * (label[:5, :5, :3] > 0))
    assert not kept[4, 4, 3] and not kept[6:].any()
    assert label[6, 6, 0] == 1  # a copy


@pytest.mark.parametrize("pieces", [0, 1])
def test_the_largest_component_of_one_or_none(pieces):
    label = np.zeros((5, 5), np.int64)
    label[1:3, 1:3] = 3 * pieces
    np.testing.assert_array_equal(largest_component(label), label)
