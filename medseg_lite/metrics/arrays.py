"""The arrays that metrics take: conversions from lists and tensors, and checks that say what is wrong."""

from __future__ import annotations

import numpy as np

from ..arrays import as_array


def as_voxels(array, what: str) -> np.ndarray:
    """Return voxels as a NumPy array; `what` names them in errors."""
    array = as_array(array, f"the {what}")
    if array.size == 0 or array.ndim == 0:
        raise ValueError(f"the {what} has shape {array.shape}; expected an array of voxels")
    return array


def as_binary(array, what: str) -> np.ndarray:
    """Return an array of 0 and 1 as bool."""
    array = as_voxels(array, what)
    if array.dtype == bool:
        return array
    inside = array != 0
    if not np.array_equal(inside, array):
        odd = array[inside != array].flat[0]
        raise ValueError(
            f"the {what} holds {odd}; expected only 0 and 1, or a bool array. "
            f"Compare it first, for example {what} == 4 or {what} > 0.5"
        )
    return inside


def as_labels(array, what: str) -> np.ndarray:
    """Return an array of class numbers as uint8."""
    array = as_voxels(array, what)
    if array.dtype.kind not in "bui":
        raise ValueError(f"the {what} is {array.dtype}; expected integer class numbers (of logits, take the argmax)")
    if array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"the {what} holds classes {array.min()} to {array.max()}; expected 0 to 255")
        array = array.astype(np.uint8)
    return array


def as_pair(prediction, truth) -> tuple[np.ndarray, np.ndarray]:
    """Return prediction and truth as bool arrays of the same shape."""
    prediction, truth = as_binary(prediction, "prediction"), as_binary(truth, "truth")
    check_same_shape(prediction, truth)
    return prediction, truth


def check_same_shape(array: np.ndarray, truth: np.ndarray, what: str = "prediction") -> None:
    """Raise a ValueError unless an array and the truth have the same shape."""
    if array.shape != truth.shape:
        raise ValueError(f"the {what} has shape {array.shape} but the truth {truth.shape}; they must share one grid")
