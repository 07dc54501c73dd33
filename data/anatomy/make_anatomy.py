"""Make icbm152_2009a.npz from the ICBM152 2009a (symmetric, nonlinear) T1, grey and white matter maps.

The three maps come with nilearn's wheel. Only this script needs it (`pip install nilearn`):

    python data/anatomy/make_anatomy.py

The maps are cropped to the brain and resampled from 1 mm to 1.5 mm, which is finer than the average of 152 brains can
resolve. Values stay uint8: 0 to 255 stand for 0 to 1.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from medseg_lite.paths import atomic_write

SPACING = 1.5  # mm
# Corners of the kept box in MNI millimetres: the brain with a margin of a few voxels.
FIRST = np.array([-75.0, -112.5, -72.0])
SHAPE = (101, 129, 107)


def resample(volume: np.ndarray, grid: list[np.ndarray]) -> np.ndarray:
    """Interpolate linearly, after just enough smoothing to avoid aliasing."""
    return ndimage.map_coordinates(ndimage.gaussian_filter(volume, 0.4), grid, order=1, mode="constant")


def main() -> None:
    """Write the file and print the extent of the brain in each map."""
    folder = Path(importlib.util.find_spec("nilearn").submodule_search_locations[0]) / "datasets" / "data"
    arrays = {}
    for name in ("t1", "gm", "wm"):
        source = nibabel.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
        volume = np.asarray(source.dataobj, np.float32)
        start = FIRST - source.affine[:3, 3]  # the source has 1 mm voxels along the world axes
        grid = np.meshgrid(*(o + SPACING * np.arange(n) for o, n in zip(start, SHAPE)), indexing="ij")
        sampled = resample(volume, grid)
        if name == "t1":  # 0 outside the brain, which must not bleed into the cortex
            inside = resample((volume > 0).astype(np.float32), grid)
            sampled = np.where(inside > 0.5, sampled / np.maximum(inside, 0.5), 0)
        arrays[name] = np.clip(np.rint(sampled), 0, 255).astype(np.uint8)
    affine = np.diag([SPACING] * 3 + [1.0])
    affine[:3, 3] = FIRST
    with atomic_write(Path(__file__).parent / "icbm152_2009a.npz") as path:
        np.savez_compressed(path, affine=affine, **arrays)
    for name, array in arrays.items():
        inside = np.argwhere(array > 0)
        print(name, array.shape, "brain from", inside.min(0), "to", inside.max(0))


if __name__ == "__main__":
    main()
