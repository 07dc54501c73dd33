"""PROMISE12: 50 T2-weighted volumes of the prostate from four hospitals, with the prostate labelled.

Litjens et al. 2014, "Evaluation of prostate segmentation algorithms for MRI: the PROMISE12 challenge", Medical Image Analysis
18:359. Drozdzal et al. 2017 train on it (section 4.3). The training data are at https://zenodo.org/records/8026660; for research,
cite the paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ..files import read_case
from ..paths import real_data
from ..volume import Case
from ._cohort import Cohort, choose, some, visible
from ._download import fetch_archive

URL = "https://zenodo.org/records/8026660/files/training_data.zip"  # 324 MB
MD5 = "f6d23994117c989daf07e5291edd0aea"
CLASSES = ("background", "prostate")


def promise12(root: str | Path | None = None, *, cases: Iterable[str] | None = None) -> Cohort:
    """Find the cases; each is read when it is asked for.

    Args:
        root: holds Case00.mhd, Case00.raw, Case00_segmentation.mhd, Case00_segmentation.raw and so on, directly or in
            sub-folders. Default: `$MEDSEG_DATA_DIR/promise12`, or the cache.
        cases: names of the cases wanted, "Case00" to "Case49", in that order; by default all that are there.

    Returns:
        Cases of one channel, "t2"; `label` is 1 in the prostate, or None for the challenge's test cases, which have none.

    Raises:
        FileNotFoundError, ValueError: here where no case is found, and on reading a case that has a defect.
    """
    root = Path(root) if root is not None else real_data("promise12")
    files = {p.stem: p for p in sorted(visible(root, "**/Case*.mhd"), key=lambda p: p.name)}
    found = {name: path for name, path in files.items() if not name.endswith("_segmentation")}
    if not found:
        raise FileNotFoundError(
            f"{root} has no CaseNN.mhd; it holds {some(sorted(p.name for p in root.iterdir()))}. Unpack training_data.zip there, or fetch it "
            "with `python -m medseg_lite download promise12`"
        )
    chosen = choose(found, cases, root)
    return Cohort({name: partial(_read, name, path, files.get(f"{name}_segmentation")) for name, path in chosen.items()})


def download_promise12(folder: str | Path | None = None) -> Path:
    """Fetch the training data (324 MB, twice that while they are unpacked) and return their folder. An interrupted download goes
    on where it stopped.

    Args:
        folder: what becomes the data's folder. Default: `$MEDSEG_DATA_DIR/promise12`, or the cache.

    Raises what `_download.fetch` and `unpack` do: ConnectionError, OSError (a full disk), ValueError (another file).
    """
    folder = Path(folder) if folder is not None else real_data("promise12")
    return fetch_archive(URL, folder, md5=MD5, ready=lambda place: any(place.glob("**/Case*.mhd")))


def _read(name: str, image: Path, label: Path | None) -> Case:
    case = read_case({"t2": image}, label=label, name=name, labels=range(2))
    if case.label is not None and not case.label.any():
        raise ValueError(f"{label} is empty: no voxel is prostate; unpack it again")
    case.info.update(classes=CLASSES, dataset="promise12", licence="research use, cite Litjens et al. 2014")
    return case
