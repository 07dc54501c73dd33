"""A case and its parts: names, grids and labels that fit each other, boxes and mirrored borders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import inv_ornt_aff, io_orientation
from scipy.spatial.transform import Rotation
from small_files import affine_of, noise

from medseg_lite.volume import Case, as_label, bounding_box, mirrored, orientation, padded_region


def case(**changes) -> Case:
    options = {"image": noise((2, 4, 5, 6)), "channels": ("flair", "t1c"), "name": "p1", "affine": affine_of()}
    return Case(**{**options, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": noise((4, 5, 6))}, r"p1: the image has shape \(4, 5, 6\); expected \(channels, D, H, W\)"),
        ({"channels": ("flair",)}, "p1: 2 channels but 1 names"),
        ({"affine": np.eye(3)}, r"affine has shape \(3, 3\)"),
        ({"label": np.zeros((4, 5, 7), np.uint8)}, "p1: the label is 4×5×7 but the image is 4×5×6"),
        ({"mask": np.ones((4, 5), bool)}, "p1: the mask is 4×5 but the image is 4×5×6"),
    ],
)
def test_a_case_whose_parts_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        case(**changes)


def test_select_keeps_the_order_asked_for():
    picked = case().select(("t1c", "flair"))
    assert picked.channels == ("t1c", "flair") and np.array_equal(picked.image, case().image[::-1])
    with pytest.raises(ValueError, match="p1 has no t2; its channels are flair, t1c"):
        case().select(("t2",))


def test_crop_moves_everything_along():
    whole = case(label=noise((4, 5, 6), np.uint8), mask=noise((4, 5, 6)) > 0, extra={"map": noise((4, 5, 6))})
    box = (slice(1, 3), slice(2, None), slice(0, 4))
    part = whole.crop(box)
    assert part.shape == (2, 3, 4)
    assert np.array_equal(part.label, whole.label[box]) and np.array_equal(part.mask, whole.mask[box])
    assert np.array_equal(part.extra["map"], whole.extra["map"][box])
    assert np.allclose(part.affine @ (0, 0, 0, 1), whole.affine @ (1, 2, 0, 1))


def test_bounding_box():
    mask = np.zeros((6, 7, 8), bool)
    mask[2, 3:5, 7] = True
    assert bounding_box(mask) == (slice(2, 3), slice(3, 5), slice(7, 8))
    assert bounding_box(mask, border=3) == (slice(0, 6), slice(0, 7), slice(4, 8))
    with pytest.raises(ValueError, match="the mask is empty"):
        bounding_box(np.zeros((2, 2), bool))


@given(
    shape=st.tuples(*[st.integers(1, 5)] * 2),
    before=st.tuples(*[st.integers(0, 9)] * 2),
    after=st.tuples(*[st.integers(0, 9)] * 2),
)
@settings(max_examples=60, deadline=None)
def test_padded_region_mirrors_like_numpy(shape, before, after):
    array = noise((2, *shape))
    region = padded_region(array, [-b for b in before], [n + a for n, a in zip(shape, after)])
    pad = [(0, 0), *zip(before, after)]
    assert np.array_equal(region, np.pad(array, pad, mode="reflect"))


def test_padded_region_inside_and_beyond():
    array = np.arange(5.0)[None]
    assert padded_region(array, [1], [4]).tolist() == [[1, 2, 3]]
    assert padded_region(array, [-2], [2]).tolist() == [[2, 1, 0, 1]]
    assert padded_region(array, [4], [7]).tolist() == [[4, 3, 2]]


def test_allowed_labels_may_come_from_a_generator():
    with pytest.raises(ValueError, match="holds label 7; expected only 0, 1, 2"):
        as_label(np.array([0, 7]), (i for i in range(3)))


@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    start=st.tuples(*[st.integers(-15, 12)] * 3),
    size=st.tuples(*[st.integers(1, 20)] * 3),
)
@settings(max_examples=100, deadline=None)
def test_padded_region_mirrors_any_distance_beyond_the_border(shape, start, size):
    array, stop = noise((2, *shape)), [a + n for a, n in zip(start, size)]
    expected = array[:, *np.ix_(*(mirrored(a, b, n) for a, b, n in zip(start, stop, shape)))]
    assert np.array_equal(padded_region(array, start, stop), expected)


def test_classes_are_renumbered_in_one_step():
    whole = case(label=np.arange(120, dtype=np.uint8).reshape(4, 5, 6) % 5)
    swapped = whole.relabelled({1: 2, 2: 1, 4: 3})
    assert swapped.label.dtype == np.uint8
    assert np.array_equal(swapped.label, np.array([0, 2, 1, 3, 3])[whole.label])
    assert whole.label.max() == 4 and swapped.image is whole.image
    for same in (whole.relabelled({}), whole.relabelled(None)):
        assert np.array_equal(same.label, whole.label)
    assert case().relabelled({1: 2}).label is None
    for wrong in ({4: 300}, {-1: 0}):
        with pytest.raises(ValueError, match=r"label_map holds .*; expected classes from 0 to 255"):
            case().relabelled(wrong)


@pytest.mark.parametrize("masked", [True, False])
def test_voxels_of_a_group_are_counted(masked):
    label, mask = noise((4, 5, 6), np.uint8) % 3, noise((4, 5, 6)) > 0
    whole = case(label=label, mask=mask if masked else None)
    inside = mask if masked else np.ones_like(mask)
    counts = {g: whole.count(g) for g in ("mask", "labelled", "background", "class 2")}
    assert counts == {
        "mask": inside.sum(),
        "labelled": (label > 0).sum(),
        "background": (inside & (label == 0)).sum(),
        "class 2": (label == 2).sum(),
    }
    np.testing.assert_allclose(whole.std, whole.image[:, inside].std(1), rtol=1e-6)


@pytest.mark.parametrize("steps", [np.diag([1, 0, 1]), np.ones((3, 3)), np.zeros((3, 3)), [[1, 0, 1], [0, 1, 0], [0, 0, 1e-9]]])
def test_an_affine_that_places_no_voxels(steps):
    affine = np.eye(4)
    affine[:3, :3] = steps
    for make in (lambda: case(affine=affine), lambda: case().replace(affine=affine)):
        with pytest.raises(ValueError, match=r"p1: the affine .* places no voxels; expected three axes"):
            make()


def test_the_orientation_of_a_turned_grid_is_that_of_its_array():
    """Whatever the angles: permuting and flipping the axes of a grid permutes and flips its orientation, and RAS wins ties."""
    rng = np.random.default_rng(0)
    for angles in [*itertools.product((0, 45, 90, 180), repeat=3), *rng.uniform(-180, 180, (200, 3))]:
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(rng.uniform(0.3, 5, 3))
        turned = affine @ inv_ornt_aff(orientation(affine), (4, 5, 6))
        np.testing.assert_array_equal(orientation(turned), [[0, 1], [1, 1], [2, 1]])
        cosines = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
        if np.sort(cosines, axis=0)[2].min() > 0.8:  # where nobody is in doubt, nibabel says the same
            np.testing.assert_array_equal(orientation(affine), io_orientation(affine))
