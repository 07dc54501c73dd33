"""Intensity normalisation."""

from __future__ import annotations

import numpy as np

from .volume import Case


def standardise(case: Case) -> Case:
    """Zero mean and unit variance of each channel inside the mask (the whole image without one).

    The same shift and scale apply to the whole image, so a background of zero becomes a negative constant, as in the
    data that DeepMedic was trained on.

    Source: Kamnitsas et al. 2017, section 4.2.1.
    """
    inside = case.image[:, case.mask] if case.mask is not None else case.image.reshape(len(case.channels), -1)
    if not inside.size:
        raise ValueError(f"{case.name}: the mask is empty, so there is nothing to measure; correct it or leave it out")
    mean = inside.mean(axis=1, dtype=np.float64)
    std = inside.std(axis=1, dtype=np.float64)
    if (std == 0).any():
        flat = [c for c, s in zip(case.channels, std) if s == 0]
        raise ValueError(
            f"{case.name}: {', '.join(flat)} is constant inside the mask, so it has no variance to divide by"
        )
    image = (case.image - mean[:, None, None, None]) / std[:, None, None, None]
    return case.replace(image=image.astype(np.float32))
