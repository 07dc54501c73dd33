"""Steps that clean a segmentation after the network."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .arrays import as_array
from .volume import Case


def remove_flat_components(
    label: np.ndarray, case: Case, *, thickness: float = 6.0, depth: float = 12.0, volume: float = 5.0
) -> np.ndarray:
    """Set small, flat components near the skull to background.

    A network that sees little of its surroundings takes bright meninges, vessels and sinuses at the brain's surface for
    tumour. Components are connected by faces, edges or corners; all classes but the background count together. A component is
    removed when it is

    * flat: none of its voxels lies deeper inside it than half of `thickness`,
    * near the skull: none of its voxels lies deeper in the brain than `depth`, and
    * small: its volume is at most `volume`.

    Depths are distances from voxel centre to voxel centre, so the middle of a sheet of one or two voxels is one voxel deep.

    Args:
        label: class numbers `(D, H, W)`, as `inference.predict` returns them.
        case: case with a `mask` that ends at the skull.
        thickness: largest thickness in mm.
        depth: largest depth in mm below the surface of the mask.
        volume: largest volume in ml.

    Returns:
        A cleaned copy.

    Source: Havaei et al. 2017, section 3 (flat blobs near the skull, by connected components); the three limits are ours.
    Taught in notebook 02.
    """
    label = as_array(label, "the label")
    if label.shape != case.shape:
        raise ValueError(f"the label is {label.shape} but {case.name} is {case.shape}; they must share one grid")
    if case.mask is None or case.mask.all():
        raise ValueError(f"{case.name} has no mask that ends at the skull, so nothing is near it; give the case a brain mask")
    if min(thickness, depth, volume) <= 0:
        raise ValueError(f"thickness={thickness}, depth={depth}, volume={volume}; all must be positive")
    thickness, depth, volume = float(thickness), float(depth), float(volume)
    cleaned = label.copy()
    if not label.any():
        return cleaned
    pieces, count = ndimage.label(label > 0, np.ones((3, 3, 3)))
    numbers = np.arange(1, count + 1)
    # The padding makes the edge of the volume an outside too.
    inside = ndimage.distance_transform_edt(np.pad(label > 0, 1), sampling=case.spacing)[1:-1, 1:-1, 1:-1]
    below = ndimage.distance_transform_edt(case.mask, sampling=case.spacing)
    sizes = np.bincount(pieces.ravel())[1:] * np.prod(case.spacing) / 1000
    flat = ndimage.maximum(inside, pieces, numbers) <= thickness / 2
    near = ndimage.maximum(below, pieces, numbers) <= depth
    cleaned[np.isin(pieces, numbers[flat & near & (sizes <= volume)])] = 0
    return cleaned


def largest_component(label: np.ndarray) -> np.ndarray:
    """Keep the largest component of a segmentation and set the others to background.

    This suits organs of which there is one: a network that sees single slices now and then finds a second prostate. Components
    are connected by faces; all classes but the background count together.

    Args:
        label: class numbers `(D, H, W)` or `(D, H)`, as `inference.predict` returns them.

    Returns:
        A cleaned copy. An empty label stays empty. Of components of the same size the first is kept.

    Source: Drozdzal et al. 2018, section 4.3.
    Taught in notebook 11.
    """
    label = as_array(label, "the label")
    pieces, count = ndimage.label(label > 0)
    if count < 2:
        return label.copy()
    largest = np.bincount(pieces.ravel())[1:].argmax() + 1
    return np.where(pieces == largest, label, 0).astype(label.dtype)
