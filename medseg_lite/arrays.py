"""The kinds of arrays that functions take: conversions from any numbers to the one kind that is computed with, and checks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch


def as_array(values: object, source: object = "the array") -> np.ndarray:
    """Return numbers as an array of this machine's byte order that PyTorch can take. It is a view where that is possible.

    Args:
        values: array of any memory layout, tensor on any device, or list.
        source: name of the values in error messages.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).resolve_conj().resolve_neg().numpy()
    if np.ma.is_masked(values):
        raise ValueError(f"{source} is a masked array; fill the masked voxels first: array.filled(0)")
    array = np.asarray(values)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(step < 0 or step % max(array.itemsize, 1) for step in array.strides):
        array = np.ascontiguousarray(array)
    return array


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return the tensor of an array. They share memory, unless the array is read-only, which no tensor is."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def as_names(names: str | Iterable[object]) -> tuple[str, ...]:
    """Return names as texts. A single text is one name."""
    return (str(names),) if isinstance(names, str) else tuple(str(name) for name in names)


def as_image(array: object, source: object = "the image") -> np.ndarray:
    """Return intensities as float32. Raise ValueError for what is no real number, or too large."""
    array = as_array(array, source)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{source} holds {array.dtype}; expected real numbers")
    with np.errstate(over="ignore"):
        image = array.astype(np.float32, copy=False)
    if array.dtype.itemsize > 4 and np.isinf(image).any() and np.isfinite(array).all():
        raise ValueError(
            f"{source} has intensities up to {np.abs(array).max():g}, too large for float32; divide them by a factor"
        )
    return image


def as_mask(array: object, source: object = "the mask") -> np.ndarray:
    """Return a mask as bool. Raise ValueError unless its values are 0 and 1, or 0 and 255, give or take a thousandth."""
    array = as_array(array, source)
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{source} holds {array.dtype}; expected 0 and 1, or a bool array")
    top = 255 if array.max(initial=0) > 2 else 1
    inside = array > top / 2
    right = np.where(inside, np.abs(array - np.float64(top)), np.abs(array.astype(np.float64))) <= 1e-3 * top
    if not right.all():
        raise ValueError(
            f"{source} holds {array[~right].flat[0]:g}; expected 0 and 1, or 0 and 255, or a bool array. "
            "Compare it first, for example mask > 0.5"
        )
    return inside


def as_label(array: object, labels: Iterable[int] | None = None, source: object = "the label") -> np.ndarray:
    """Check class numbers and return them as uint8. An array of uint8 is not copied.

    Args:
        array: class numbers, integers or floats.
        labels: classes that are allowed. None allows 0 to 255.
        source: name of the array's file in error messages.

    Raises:
        ValueError: a value is not finite, not whole, or not among `labels`.
    """
    array = as_array(array, source)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{source} holds {array.dtype}; expected whole class numbers")
    if array.dtype.kind == "f":
        whole = np.rint(array)
        if not np.isfinite(array).all():
            raise ValueError(f"{source} has NaN or infinite values; a label holds whole class numbers")
        if np.abs(array - whole).max(initial=0) > 1e-3:
            odd = float(array[np.abs(array - whole) > 1e-3].flat[0])
            raise ValueError(
                f"{source} holds {odd:g}, not a whole class number; it was interpolated: resample labels with nearest neighbour"
            )
        array = whole
    if array.dtype not in (np.uint8, bool) and array.size and (array.min() < 0 or array.max() > 255):
        raise ValueError(f"{source} holds classes {array.min():g} to {array.max():g}; expected 0 to 255")
    array = array.astype(np.uint8, copy=False)
    if labels is not None:
        labels = tuple(labels)
        wrong = sorted(set(np.flatnonzero(np.bincount(array.ravel())).tolist()) - set(labels))
        if wrong:
            raise ValueError(
                f"{source} holds label {', '.join(map(str, wrong))}; expected only {', '.join(map(str, labels))}. "
                "Map its labels first, or say which ones you use"
            )
    return array
