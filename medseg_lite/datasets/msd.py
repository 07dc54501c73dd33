"""Medical Segmentation Decathlon: the layout of all its ten tasks, among them liver (03) and prostate (05).

Antonelli et al. 2022, "The Medical Segmentation Decathlon", Nature Communications 13:4128; CC BY-SA 4.0. The archives are at
http://medicaldecathlon.com and, for instance, https://msd-for-monai.s3-us-west-2.amazonaws.com/Task05_Prostate.tar (229 MB, md5
35138f08b1efaef89d7424d2bcc928db) and Task03_Liver.tar (27 GB, md5 a90ec6c4aa7f6a3d087205e23d4e6397): unpack one and give its
folder here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath

from ..volume import Case, read_case
from ._cohort import Cohort, choose, some, visible


def msd(root: str | Path, *, split: str = "training", cases: Iterable[str] | None = None) -> Cohort:
    """Find the cases of one task; each is read when it is asked for.

    Args:
        root: the task's folder, which holds dataset.json, imagesTr, labelsTr and imagesTs.
        split: "training", or "test", whose labels were not published.
        cases: names of the cases wanted, such as "prostate_00", in that order; by default all that dataset.json lists.

    Returns:
        Cases with the channels and classes that dataset.json names ("T2" and "ADC" for Task05, in lower case; for Task01 labels
        1 oedema, 2 non-enhancing and 3 enhancing tumour, not the numbers of BRATS). `label` is None for test cases.

    Raises:
        FileNotFoundError, ValueError: here where dataset.json is not what it should be, and on reading a case with a defect.
    """
    root = Path(root)
    if split not in ("training", "test"):
        raise ValueError(f"split is {split!r}; expected 'training' or 'test'")
    path = root / "dataset.json"
    if not path.is_file():
        there = some(sorted(p.name for p in root.iterdir())) if root.is_dir() else "nothing, it does not exist"
        raise FileNotFoundError(f"{path} does not exist; {root} holds {there}: point at the task's own folder")
    try:
        content = json.loads(path.read_text("utf-8"))
        channels = tuple(str(content["modality"][k]).lower() for k in sorted(content["modality"], key=int))
        classes = {int(k): str(name) for k, name in content["labels"].items()}
        if not 0 <= min(classes) <= max(classes) <= 255:
            raise ValueError(f"labels {sorted(classes)}")
        entries = [(e["image"], e["label"]) if split == "training" else (e, None) for e in content[split]]
        names = tuple(classes.get(k, f"class {k}") for k in range(max(classes) + 1))
        listed = {_stem(image): (image, label) for image, label in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a description of a Decathlon task ({type(error).__name__}: {error}); expected JSON with modality, "
            "labels, training and test: unpack the archive again"
        ) from error
    # macOS left `._name.nii.gz` beside the images of some archives, and lists may have been made from them.
    listed = {name: files for name, files in listed.items() if not name.startswith("._")}
    if not listed:
        raise ValueError(f"{path} lists no {split} cases; expected some: unpack the archive again")
    readers = {}
    for name, (image, label) in choose(listed, cases, root).items():
        files = _inside(root, image, path), None if label is None else _inside(root, label, path)
        readers[name] = partial(_read, name, *files, channels, names, sorted(classes), root.name, split)
    return Cohort(readers)


def _stem(image: str) -> str:
    return PurePosixPath(image).name.removesuffix(".gz").removesuffix(".nii")


def _inside(root: Path, name: str, source: Path) -> Path:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise ValueError(
            f"{source} lists {name!r}, which lies outside {root}; expected a path such as './imagesTr/a.nii.gz'"
        )
    return root / relative


def _read(name, image: Path, label: Path | None, channels, classes, numbers, task: str, split: str) -> Case:
    for path in (image, label):
        if path is not None and not path.is_file():
            there = some([p.name for p in visible(path.parent, "*.nii*")]) if path.parent.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"dataset.json lists {path}, which does not exist ({there}); unpack the archive again"
            )
    case = read_case(image, channels=channels, label=label, name=name, labels=numbers)
    case.info.update(classes=classes, dataset=task, split=split, licence="CC BY-SA 4.0")
    return case
