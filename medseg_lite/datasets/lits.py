"""LiTS: 131 abdominal CT volumes from seven hospitals, with the liver and its lesions labelled.

Bilic et al. 2023, "The Liver Tumor Segmentation Benchmark (LiTS)", Medical Image Analysis 84:102680. The data are handed out by
registration at https://competitions.codalab.org/competitions/17094. Give the folder that the files were unpacked to.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from ..files import read_case
from ..paths import real_data
from ..volume import Case
from ._cohort import Cohort, add_found, choose, contents, stem, visible

CLASSES = ("background", "liver", "lesion")


def lits(root: str | Path | None = None, *, cases: Iterable[str] | None = None, identity_affine: bool = False) -> Cohort:
    """Find the cases. Each case is read when it is asked for.

    Args:
        root: folder with volume-0.nii and segmentation-0.nii (or .nii.gz) and so on, directly or in sub-folders such as "Training
            Batch 1". Default: `$MEDSEG_DATA_DIR/lits`, or the cache.
        cases: names of the cases to return, "volume-0" to "volume-130", in that order. None returns all that are there.
        identity_affine: True accepts volumes whose files give no voxel size and orientation (28 to 47 in the first release),
            and takes 1 mm and RAS+ for them.

    Returns:
        Cases of one channel, "ct", in Hounsfield units as stored. Classes are 1 liver and 2 lesion; test volumes have no label. Some
        scanners wrote a value below -1024 where they did not measure. Then `info["padding"]` is that value, and `mask` is the rest.

    Raises:
        FileNotFoundError, ValueError: no case is found. Reading a case with a defect raises them too.
    """
    root = Path(root) if root is not None else real_data("lits")
    images, labels = {}, {}
    for kind, files in (("volume", images), ("segmentation", labels)):
        for path in (p for ending in ("nii", "nii.gz") for p in visible(root, f"**/{kind}-*.{ending}")):
            add_found(files, stem(path), path)
    if not images:
        raise FileNotFoundError(f"{root} has no volume-N.nii; it holds {contents(root)}. Unpack the training batches there")
    in_order = {name: images[name] for name in sorted(images, key=lambda name: (len(name), name))}
    chosen = choose(in_order, cases, root)
    return Cohort(
        {
            name: partial(_read, name, path, labels.get(name.replace("volume", "segmentation")), identity_affine)
            for name, path in chosen.items()
        }
    )


def _read(name: str, image: Path, label: Path | None, identity_affine: bool) -> Case:
    case = read_case({"ct": image}, label=label, name=name, labels=range(3))
    if np.array_equal(case.affine, np.eye(4)) and not identity_affine:
        raise ValueError(
            f"{image} has an identity affine: its voxel size and orientation were not stored, as in volumes 28 to 47 of the "
            "first release. Take the corrected files, or pass identity_affine=True to read it with voxels of 1 mm"
        )
    case.info.update(classes=CLASSES, dataset="lits", licence="terms of the challenge, by registration")
    lowest = float(case.image.min())
    if lowest < -1024:
        case.info["padding"] = lowest
        case.mask = case.image[0] > lowest
    return case
