"""PROMISE12: 50 T2-weighted volumes of the prostate from four hospitals, with the prostate labelled.

Litjens et al. 2014, "Evaluation of prostate segmentation algorithms for MRI: the PROMISE12 challenge", Medical Image Analysis
18:359. Drozdzal et al. 2018 train on it (section 4.3). The training data are at https://zenodo.org/records/8026660. They may be
used for research; cite the paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ..files import read_case
from ..paths import real_data
from ..volume import Case
from ._cohort import Cohort, add_found, choose, contents, visible
from ._download import fetch_archive

URL = "https://zenodo.org/records/8026660/files/training_data.zip"  # 324 MB
MD5 = "f6d23994117c989daf07e5291edd0aea"
CLASSES = ("background", "prostate")


def promise12(root: str | Path | None = None, *, cases: Iterable[str] | None = None) -> Cohort:
    """Find the cases. Each case is read when it is asked for.

    Args:
        root: folder with Case00.mhd, Case00.raw, Case00_segmentation.mhd, Case00_segmentation.raw and so on, directly or in
            sub-folders. Default: `$MEDSEG_DATA_DIR/promise12`, or the cache.
        cases: names of the cases to return, "Case00" to "Case49", in that order. None returns all that are there.

    Returns:
        Cases of one channel, "t2". The label is 1 in the prostate. The test cases of the challenge have no label.

    Raises:
        FileNotFoundError, ValueError: no case is found. Reading a case with a defect raises them too.
    """
    root = Path(root) if root is not None else real_data("promise12")
    files: dict[str, Path] = {}
    for path in sorted(visible(root, "**/Case*.mhd"), key=lambda path: path.name):
        add_found(files, path.stem, path)
    found = {name: path for name, path in files.items() if not name.endswith("_segmentation")}
    if not found:
        raise FileNotFoundError(
            f"{root} has no CaseNN.mhd; it holds {contents(root)}. Unpack training_data.zip there, or fetch it with "
            "`python -m medseg_lite download promise12`"
        )
    chosen = choose(found, cases, root)
    return Cohort({name: partial(_read, name, path, files.get(f"{name}_segmentation")) for name, path in chosen.items()})


def download_promise12(folder: str | Path | None = None) -> Path:
    """Fetch the training data (324 MB, twice that while they are unpacked) and return their folder.

    An interrupted download goes on where it stopped.

    Args:
        folder: folder to make for the data. Default: `$MEDSEG_DATA_DIR/promise12`, or the cache.

    Raises:
        ConnectionError: the server is not reached, refuses, or breaks off.
        OSError: the disk is full.
        ValueError: another file arrived.
    """
    folder = Path(folder) if folder is not None else real_data("promise12")
    return fetch_archive(URL, folder, md5=MD5, ready=lambda place: any(place.glob("**/Case*.mhd")))


def _read(name: str, image: Path, label: Path | None) -> Case:
    case = read_case({"t2": image}, label=label, name=name, labels=range(2))
    if case.label is not None and not case.label.any():
        raise ValueError(f"{label} is empty: no voxel is prostate; unpack it again")
    case.info.update(classes=CLASSES, dataset="promise12", licence="research use, cite Litjens et al. 2014")
    return case
