"""Six BRATS 2013 cases that come with DeepMedic's example: FLAIR and T1 with contrast, on 240x240x155 voxels of 1 mm.

The images come normalised, so air is not 0 but a negative number. `case.mask` is the brain. Inside the mask, their mean is only
near 0 (-0.23 to 0.14 in the four cases checked) and their standard deviation is above 1 (1.27 to 1.75). Standardise them again
with `transforms.standardise` where it matters.
Classes are those of BRATS 2012 to 2015: 0 healthy, 1 necrosis, 2 oedema, 3 non-enhancing core, 4 enhancing core.

Source: https://github.com/deepmedic/deepmedic, examples/dataForExamples. Licence of the data: CC BY-NC-SA 3.0; cite Menze
et al. 2015, "The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS)", IEEE Transactions on Medical Imaging
34(10). A short licence text comes with each case.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from ..files import read_case, read_nifti
from ..paths import real_data
from ..volume import BRATS_CLASSES, Case
from ._cohort import contents
from ._download import fetch

URL = (
    "https://raw.githubusercontent.com/deepmedic/deepmedic/e10ba7c3570d06194f5dadca91d99d5e7bba7de5"
    "/examples/dataForExamples/brats2015TrainingData"
)
LICENCE = "CC BY-NC-SA 3.0"
CHANNELS = {"flair": "Flair_subtrMeanDivStd.nii.gz", "t1c": "T1c_subtrMeanDivStd.nii.gz"}
LABEL = "OTMultiClass.nii.gz"
MASK = "brainmask.nii.gz"  # holds 0.99999997 inside
LICENCE_FILE = "License_CC_BY_NC_SA_3.0.txt"
FILES = (*CHANNELS.values(), LABEL, MASK, LICENCE_FILE)
# The folder of each case in DeepMedic's example.
SPLITS = {
    "brats_2013_pat0001_1": "test",
    "brats_2013_pat0002_1": "test",
    "brats_2013_pat0003_1": "validation",
    "brats_2013_pat0004_1": "validation",
    "brats_2013_pat0005_1": "train",
    "brats_2013_pat0006_1": "train",
}
_LICENCE_SHA256 = "e112a28c1877c57a505a6ded17a5e517ea51b48b81dba9356b80f660b79c06c7"
# In the order of FILES. The checksums of cases 1 and 2 are not known.
SHA256 = {
    "brats_2013_pat0003_1": (
        "77e66334143ad3c502259832855968e9c3e1c1c050aeb0b56c0a3b48d1123021",
        "464032dd12cb82eccb39a6860aedac3dd1dedda549b1acf2114a2924cf62d38b",
        "5ec4cd18bc7e0f98745631bdd9ed3dd6c2e6f4e475ad0c8bb5e4947f4df7a533",
        "b262035cea104f04b6a4873f17c1c2e670adb902ce45b352d5230e1f9b70ff40",
        _LICENCE_SHA256,
    ),
    "brats_2013_pat0004_1": (
        "93c76c5af1c9c1644e3b8ff4f86f08a1684b49d19eabb78d12736bf0a42a5bc1",
        "c50f360e9d96e42d1ff3195e326a2c6a23a827b0bf09b9b31ecdfafd209dd698",
        "5457e8dfa75d1870065df16511ea7cad83f187380fcc43be0bb46e1927d6b47b",
        "17829e0a5946529a2137f46e14860472f2158155f4932ecf6591bcbc6a581d8b",
        _LICENCE_SHA256,
    ),
    "brats_2013_pat0005_1": (
        "fb0b51dadf56c2768e12338bb7db96ea75ce60a0a0729380f7e4f6d14099e54b",
        "df2f76e615f15b0027056288928885404a62c94f0b38094d4d1be00a9ead1f13",
        "77f62400fcdda37238f98c9031c99257c8fa3011694d847b40ba066e4df70b90",
        "a48131df1431f3e6fd188a458550d4526404b4e708cb29b6945658a3c56c0073",
        _LICENCE_SHA256,
    ),
    "brats_2013_pat0006_1": (
        "3c6941679cd85611dc580addce20f6cc04c5ab2d83713798a04536e7ff36e646",
        "a8e3a767f2fb29803592f436c29bbf58e56c7f5d7ad8ee638177173c6d305435",
        "b5a559c904da6597717e5b0616d47b30e6c357a829c5b06f494d0b35d0937e2e",
        "8256e366047acd77fff55de187f585a1987f57f7662e8e0fea412abaf8a31cc4",
        _LICENCE_SHA256,
    ),
}


def brats2013_deepmedic(
    folder: str | Path | None = None, *, cases: Iterable[str] | None = None, download: bool = False, unverified: bool = False
) -> list[Case]:
    """Read the cases into memory, about 90 MB each.

    Args:
        folder: folder with one sub-folder per case, directly or under train/, validation/ and test/ as in DeepMedic's
            repository. Default: `$MEDSEG_DATA_DIR/brats2013_deepmedic`, or the cache.
        cases: names of the cases to read, "brats_2013_pat0001_1" to "brats_2013_pat0006_1". None reads those that are there.
        download: True fetches what is missing first, see `download_brats2013_deepmedic`.
        unverified: True allows the download of cases whose checksum is not known.

    Returns:
        Cases with the channels ("flair", "t1c"), classes 0 to 4, and the brain as mask.
    """
    folder = Path(folder) if folder is not None else real_data("brats2013_deepmedic")
    if cases is not None:
        cases = _known(cases)
    if download:
        download_brats2013_deepmedic(folder, cases=cases, unverified=unverified)
    wanted = cases if cases is not None else [name for name in SPLITS if _locate(folder, name)]
    if not wanted:
        raise FileNotFoundError(
            f"{folder} has none of the cases ({', '.join(SPLITS)}), neither directly nor under train/, validation/ or "
            f"test/. {_remedy()}"
        )
    return [_read(folder, name) for name in wanted]


def download_brats2013_deepmedic(
    folder: str | Path | None = None, *, cases: Iterable[str] | None = None, unverified: bool = False
) -> Path:
    """Fetch cases from DeepMedic's repository (24 MB for the default four, CC BY-NC-SA 3.0) and return their folder.

    Files that are complete already are kept, so an interrupted download goes on where it stopped.

    Args:
        folder: folder for the cases. Default: `$MEDSEG_DATA_DIR/brats2013_deepmedic`, or the cache.
        cases: names of the cases. None takes brats_2013_pat0003_1 to brats_2013_pat0006_1, whose checksums are known.
        unverified: True allows brats_2013_pat0001_1 and brats_2013_pat0002_1. What arrives is then only checked to be readable
            images, not to be the files of the repository.
    """
    folder = Path(folder) if folder is not None else real_data("brats2013_deepmedic")
    names = _known(cases) if cases is not None else list(SHA256)
    unknown = [name for name in names if name not in SHA256]
    if unknown and not unverified:
        raise ValueError(
            f"the checksums of {', '.join(unknown)} are not known, so a download cannot be verified; "
            "pass unverified=True to fetch them all the same"
        )
    files = [(name, file) for name in names for file in FILES]
    for name, file in tqdm(files, desc="brats2013_deepmedic", unit="file"):
        fetch(
            f"{URL}/{SPLITS[name]}/{name}/{file}",
            (_locate(folder, name) or folder / name) / file,
            sha256=SHA256[name][FILES.index(file)] if name in SHA256 else None,
            check=read_nifti if file.endswith(".nii.gz") else None,
        )
    return folder


def _read(folder: Path, name: str) -> Case:
    place = _locate(folder, name)
    if place is None:
        raise FileNotFoundError(f"{folder} has no {name}. {_remedy()}")
    missing = [file for file in (*CHANNELS.values(), LABEL, MASK) if not (place / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{place} lacks {', '.join(missing)}; it holds {contents(place)}. {_remedy()}")
    case = read_case(
        {channel: place / file for channel, file in CHANNELS.items()},
        label=place / LABEL,
        mask=place / MASK,
        name=name,
        labels=range(5),
    )
    case.info.update(classes=BRATS_CLASSES, dataset="brats2013_deepmedic", split=SPLITS[name], licence=LICENCE)
    return case


def _locate(folder: Path, name: str) -> Path | None:
    places = (folder / name, *(folder / split / name for split in ("train", "validation", "test")))
    return next((place for place in places if place.is_dir()), None)


def _known(cases: Iterable[str]) -> list[str]:
    cases = [cases] if isinstance(cases, str) else list(cases)
    unknown = [name for name in cases if name not in SPLITS]
    if unknown or not cases:
        raise ValueError(f"cases is {cases}; expected some of {', '.join(SPLITS)}")
    return cases


def _remedy() -> str:
    return (
        f"Fetch them (24 MB, {LICENCE}) with `python -m medseg_lite download brats2013_deepmedic` or download=True, "
        "or set MEDSEG_DATA_DIR to the folder that holds brats2013_deepmedic/"
    )
