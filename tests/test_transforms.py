from __future__ import annotations

import numpy as np
import pytest

from medseg_lite.transforms import standardise
from medseg_lite.volume import Case


def small(values, mask=None, channels=("flair",)) -> Case:
    image = np.asarray(values, np.float32).reshape(len(channels), 1, 1, -1)
    return Case(
        image=image, channels=channels, name="small", mask=None if mask is None else np.reshape(mask, (1, 1, -1))
    )


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
