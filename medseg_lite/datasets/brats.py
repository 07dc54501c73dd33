"""BRATS as it was handed out from 2015 on: brain tumours in four sequences, skull-stripped, 240×240×155 voxels of 1 mm.

The data are handed out by registration only (https://www.synapse.org/brats). Give the folder that the files were unpacked to. Cite
Menze et al. 2015, "The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS)", IEEE Transactions on Medical Imaging 34(10),
and for the years from 2017 on also Bakas et al. 2017, Scientific Data 4:170117.

The class numbers changed over the years. Up to 2015 necrosis is 1 and the non-enhancing core is 3. From 2017 on both are 1. From
2023 on the enhancing core is 3 instead of 4 in the files; here it is 4 again. So `metrics.regions["brats2015"]` fits `brats2015`,
and "brats2017" fits `brats2017` for every year.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from ..files import is_nifti, read_case
from ..paths import real_data
from ..volume import BRATS_CLASSES, Case
from ._cohort import Cohort, add_found, choose, contents, nonzero_mask, some, stem, visible, visible_images

CHANNELS = ("flair", "t1", "t1c", "t2")
CLASSES_2017 = ("background", "necrosis and non-enhancing tumour", "oedema", "class 3", "enhancing tumour")
LICENCE = "terms of the challenge, by registration"
# Ends of the names of the files, without .nii or .nii.gz: from 2017 to 2021, and from 2023 on.
ENDINGS = (
    {"flair": "_flair", "t1": "_t1", "t1c": "_t1ce", "t2": "_t2", "label": "_seg"},
    {"flair": "-t2f", "t1": "-t1n", "t1c": "-t1c", "t2": "-t2w", "label": "-seg"},
)


def brats2015(
    root: str | Path | None = None,
    *,
    grades: Sequence[str] = ("HGG", "LGG"),
    label_optional: bool = False,
    cases: Iterable[str] | None = None,
) -> Cohort:
    """Find the cases of BRATS 2015. Each case is read when it is asked for.

    Args:
        root: folder with HGG/ and LGG/, each with a folder per case, or with the folders of the cases themselves. A case's folder
            holds a folder (or file) `VSD.Brain.XX.O.MR_Flair.<id>` for each of Flair, T1, T1c and T2, and the label
            `VSD.Brain_3more.XX.O.OT.<id>`, as MetaImages. Default: `$MEDSEG_DATA_DIR/brats2015`, or the cache.
        grades: grades to return, of HGG and LGG.
        label_optional: True accepts cases without a label, such as those of the test set.
        cases: names of the cases to return, in that order. None returns all.

    Returns:
        Cases with the channels ("flair", "t1", "t1c", "t2"), classes 0 to 4 as in BRATS 2013, and `info["grade"]`. The mask is where
        any channel is not 0.

    Raises:
        FileNotFoundError, ValueError: no case is found. Reading a case with a defect raises them too.
    """
    root = _root(root, "brats2015")
    found = {}
    for grade in grades:
        for place in _folders(root / grade) if (root / grade).is_dir() else ():
            add_found(found, place.name, (place, grade))
    if not any((root / grade).is_dir() for grade in ("HGG", "LGG")):
        found = {place.name: (place, None) for place in _folders(root) if len(visible(place, "**/*.MR_*.mha")) > 1}
    if not found:
        raise FileNotFoundError(
            f"{root} has no cases of BRATS 2015; it holds {contents(root)}. Expected {' and '.join(grades)} with a folder for each "
            "case"
        )
    return Cohort(
        {
            name: partial(_read_2015, name, place, grade, label_optional)
            for name, (place, grade) in choose(found, cases, root).items()
        }
    )


def brats2017(root: str | Path | None = None, *, label_optional: bool = False, cases: Iterable[str] | None = None) -> Cohort:
    """Find the cases of BRATS 2017 or a later year. Each case is read when it is asked for.

    Args:
        root: folder with a folder for each case, at any depth (in HGG/ and LGG/ in the first years). A case's folder holds
            `<case>_flair.nii.gz`, `_t1`, `_t1ce`, `_t2` and `_seg`, or from 2023 on `<case>-t2f.nii.gz`, `-t1n`, `-t1c`, `-t2w` and
            `-seg`. A label under another name with "seg" in it is found too, such as W39_1998.09.19_Segm.nii of
            BraTS20_Training_355. Default: `$MEDSEG_DATA_DIR/brats2017`, or the cache.
        label_optional: True accepts cases without a label, such as those of the validation set.
        cases: names of the cases to return, in that order. None returns all, sorted.

    Returns:
        Cases with the channels ("flair", "t1", "t1c", "t2") and the classes 1 necrosis and non-enhancing core, 2 oedema, 4
        enhancing core (also if the file has 3 for it). The mask is where any channel is not 0.

    Raises:
        FileNotFoundError, ValueError: no case is found. Reading a case with a defect raises them too.
    """
    root = _root(root, "brats2017")
    found = {}
    for path in (*visible(root, "**/*_flair.nii*"), *visible(root, "**/*-t2f.nii*")):
        # Some archives hold a folder that is called like the file, with the file in it.
        place = path.parent.parent if is_nifti(path.parent) else path.parent
        add_found(found, place.name, (place, ENDINGS[stem(path).endswith("-t2f")]))
    if not found:
        raise FileNotFoundError(
            f"{root} has no CASE_flair.nii.gz (2017 to 2021) and no CASE-t2f.nii.gz (from 2023 on); it holds {contents(root)}"
        )
    in_order = {name: found[name] for name in sorted(found)}
    return Cohort(
        {
            name: partial(_read_2017, name, place, endings, label_optional)
            for name, (place, endings) in choose(in_order, cases, root).items()
        }
    )


def _read_2015(name: str, place: Path, grade: str | None, label_optional: bool) -> Case:
    files: dict[str, list[Path]] = {channel: [] for channel in (*CHANNELS, "label")}
    for path in visible(place, "**/*.mha"):
        # The dot after the sequence tells T1 from T1c.
        match = re.search(r"\.(?:MR_(Flair|T1c|T1|T2)|(OT))\.", path.name)
        if match:
            files["label" if match[2] else match[1].lower()].append(path)
    chosen = _one_each(name, place, files, label_optional)
    case = _read(name, chosen, range(5), BRATS_CLASSES, "brats2015")
    if grade is not None:
        case.info["grade"] = grade
    return case


def _read_2017(name: str, place: Path, endings: dict[str, str], label_optional: bool) -> Case:
    paths = visible_images(place, "**/*")
    files = {role: [p for p in paths if stem(p).endswith(ending)] for role, ending in endings.items()}
    if not files["label"]:
        others = [p for p in paths if not any(p in found for found in files.values())]
        files["label"] = [p for p in others if "seg" in p.name.lower()]
    chosen = _one_each(name, place, files, label_optional)
    if endings == ENDINGS[1]:
        return _read(name, chosen, (0, 1, 2, 3), CLASSES_2017, "brats2023").relabelled({3: 4})
    return _read(name, chosen, (0, 1, 2, 4), CLASSES_2017, "brats2017")


def _one_each(name: str, place: Path, files: dict[str, list[Path]], label_optional: bool) -> dict[str, Path]:
    """Return the one file of each role. The label may be missing if it is optional."""
    for role, paths in files.items():
        if len(paths) == 1 or (not paths and role == "label" and label_optional):
            continue
        there = some([p.relative_to(place).as_posix() for p in visible(place, "**/*")])
        role = "the label" if role == "label" else role
        hint = ", or pass label_optional=True" if role == "the label" and not paths else ""
        raise ValueError(
            f"{name} has {len(paths)} files for {role}, expected one; {place} holds {there}: restore or rename the file, or leave "
            f"the case out{hint}"
        )
    return {role: paths[0] for role, paths in files.items() if paths}


def _read(name: str, files: dict[str, Path], labels, classes, dataset: str) -> Case:
    label = files.get("label")
    case = read_case({channel: files[channel] for channel in CHANNELS}, label=label, name=name, labels=labels)
    if label is not None and not case.label.any():
        raise ValueError(f"{label} is empty: no voxel is tumour; unpack it again, or leave {name} out")
    info = {"classes": classes, "licence": LICENCE, "dataset": dataset}
    return case.replace(mask=nonzero_mask(case), info=info)


def _root(root: str | Path | None, name: str) -> Path:
    root = Path(root) if root is not None else real_data(name)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a folder; expected the one that the data set was unpacked to. It is handed out by registration: see "
            "https://www.synapse.org/brats"
        )
    return root


def _folders(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith(("._", ".", "__")))
