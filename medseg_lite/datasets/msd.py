"""Medical Segmentation Decathlon: a reader for all its ten tasks, and downloads of four of them.

Antonelli et al. 2022, "The Medical Segmentation Decathlon", Nature Communications 13:4128; CC BY-SA 4.0. The other archives are
at http://medicaldecathlon.com. Unpack one and give its folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath

from ..files import read_case
from ..paths import real_data
from ..volume import Case, new_name
from ._cohort import Cohort, add_found, choose, contents, nonzero_mask, stem
from ._download import fetch_archive
from .brats import CHANNELS, CLASSES_2017

URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com"
# Our name: name of the archive, its md5.
TASKS = {
    "msd01_brain": ("Task01_BrainTumour", "240a19d752f0d9e9101544901065d872"),  # 7.1 GB
    "msd03_liver": ("Task03_Liver", "a90ec6c4aa7f6a3d087205e23d4e6397"),  # 27 GB
    "msd04_hippocampus": ("Task04_Hippocampus", "9d24dba78a72977dbd1d2e110310f31b"),  # 27 MB
    "msd05_prostate": ("Task05_Prostate", "35138f08b1efaef89d7424d2bcc928db"),  # 229 MB
}
# Task01 in the numbers of BRATS: oedema 1 to 2, non-enhancing (with necrosis) 2 to 1, enhancing 3 to 4.
_BRATS_LABELS = {1: 2, 2: 1, 3: 4}
_BRATS_CHANNELS = {"t1w": "t1", "t1gd": "t1c", "t2w": "t2"}


def msd(root: str | Path, *, split: str = "training", as_brats: bool = False, cases: Iterable[str] | None = None) -> Cohort:
    """Find the cases of one task. Each case is read when it is asked for.

    Args:
        root: folder of the task, with dataset.json, imagesTr, labelsTr and imagesTs. Or the name of a download, such as
            "msd01_brain", which stands for that folder in `$MEDSEG_DATA_DIR`, or in the cache.
        split: "training", or "test", whose labels were not published.
        as_brats: True returns Task01 with the channels ("flair", "t1", "t1c", "t2"), the classes of `brats2017` (1 necrosis and
            non-enhancing core, 2 oedema, 4 enhancing core), and a mask where any channel is not 0. Both
            `metrics.regions["brats2017"]` and ["brats2015"] fit them.
        cases: names of the cases to return, such as "prostate_00", in that order. None returns all that dataset.json lists.

    Returns:
        Cases with the channels and classes that dataset.json names, channels in lower case ("t2" and "adc" for Task05). Channels of
        one name are numbered: "ct" and "ct 2". Task01
        has the classes 1 oedema, 2 non-enhancing and 3 enhancing tumour, which are not the numbers of BRATS. Test cases have no
        label.

    Raises:
        FileNotFoundError, ValueError: dataset.json is missing or damaged. Reading a case with a defect raises them too.
    """
    root = real_data(root) if isinstance(root, str) and root in TASKS and not Path(root).is_dir() else Path(root)
    if split not in ("training", "test"):
        raise ValueError(f"split is {split!r}; expected 'training' or 'test'")
    path = root / "dataset.json"
    if not path.is_file():
        fetch = f", or fetch it with `python -m medseg_lite download {root.name}`" if root.name in TASKS else ""
        raise FileNotFoundError(f"{path} does not exist; {root} holds {contents(root)}: point at the task's own folder{fetch}")
    channels, classes, listed = _read_description(path, split)
    task = Path(os.path.abspath(root)).name  # also of "."
    names = tuple(classes.get(k, f"class {k}") for k in range(max(classes) + 1))
    readers = {}
    for name, (image, label) in choose(listed, cases, root).items():
        files = _inside(root, image, path), None if label is None else _inside(root, label, path)
        readers[name] = partial(_read, name, *files, channels, names, sorted(classes), task, split)
    if as_brats:
        if set(channels) != {"flair", *_BRATS_CHANNELS} or sorted(classes) != [0, *_BRATS_LABELS]:
            raise ValueError(
                f"as_brats=True is for Task01_BrainTumour; {path} has channels {', '.join(channels)} and classes {sorted(classes)}"
            )
        readers = {name: partial(_read_as_brats, reader) for name, reader in readers.items()}
    return Cohort(readers)


def _read_description(path: Path, split: str) -> tuple[tuple[str, ...], dict[int, str], dict[str, tuple[str, str | None]]]:
    """Return the channels, the classes and their names, and image and label of each case that dataset.json lists."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
        channels: tuple[str, ...] = ()
        for key in sorted(content["modality"], key=int):
            channels += (new_name(str(content["modality"][key]).lower(), channels),)
        classes = {int(k): str(name) for k, name in content["labels"].items()}
        if not 0 <= min(classes) <= max(classes) <= 255:
            raise ValueError(f"labels {sorted(classes)}")
        entries = [(e["image"], e["label"]) if split == "training" else (e, None) for e in content[split]]
        # macOS left `._name.nii.gz` beside the images of some archives, and lists may have been made from them.
        listed: dict[str, tuple[str, str | None]] = {}
        for image, label in entries:
            if not (name := stem(image)).startswith("._"):
                add_found(listed, name, (image, label))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a description of a Decathlon task ({type(error).__name__}: {error}); expected JSON with modality, "
            "labels, training and test: unpack the archive again"
        ) from error
    if not listed:
        raise ValueError(f"{path} lists no {split} cases; expected some: unpack the archive again")
    return channels, classes, listed


def download_msd(name: str, folder: str | Path | None = None) -> Path:
    """Fetch one task's archive, check it, unpack it and return its folder. An interrupted download goes on where it stopped.

    Args:
        name: "msd01_brain" (7.1 GB), "msd03_liver" (27 GB), "msd04_hippocampus" (27 MB) or "msd05_prostate" (229 MB). Unpacking
            takes twice that.
        folder: folder to make for the task. Default: `$MEDSEG_DATA_DIR/<name>`, or the cache.

    Raises:
        ConnectionError: the server is not reached, refuses, or breaks off.
        OSError: the disk is full.
        ValueError: another file arrived.
    """
    if name not in TASKS:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(TASKS)}")
    task, md5 = TASKS[name]
    folder = Path(folder) if folder is not None else real_data(name)
    return fetch_archive(f"{URL}/{task}.tar", folder, md5=md5, ready=lambda place: (place / "dataset.json").is_file())


def _inside(root: Path, name: str, source: Path) -> Path:
    """Return the path of a file that dataset.json lists. Raise ValueError if it lies outside the task's folder."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise ValueError(f"{source} lists {name!r}, which lies outside {root}; expected a path such as './imagesTr/a.nii.gz'")
    return root / relative


def _read(name, image: Path, label: Path | None, channels, classes, numbers, task: str, split: str) -> Case:
    for path in (image, label):
        if path is not None and not path.is_file():
            there = contents(path.parent)
            raise FileNotFoundError(
                f"dataset.json lists {path}, which does not exist (there is {there}); unpack the archive again"
            )
    case = read_case(image, channels=channels, label=label, name=name, labels=numbers)
    case.info.update(classes=classes, dataset=task, split=split, licence="CC BY-SA 4.0")
    return case


def _read_as_brats(read: partial) -> Case:
    """Return a case of Task01 with the channels and classes of BRATS."""
    case = read().relabelled(_BRATS_LABELS)
    names = [_BRATS_CHANNELS.get(channel, channel) for channel in case.channels]
    case = case.replace(channels=names).select(CHANNELS)
    return case.replace(mask=nonzero_mask(case), info=case.info | {"classes": CLASSES_2017})
