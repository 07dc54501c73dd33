"""The electron-microscopy stack of the ISBI 2012 challenge: a piece of fly nerve cord, with its membranes labelled.

30 slices (some copies hold 20) of 512×512 pixels, 4 nm in the slice and 50 nm from one to the next, as a TIFF file of many
pages. The challenge's label file holds 0 on membranes and 255 in cells; here `label` is 1 on membranes and 0 in cells, as in
`phantoms.em`. Drozdzal et al. 2018 train on it (section 4.1).

Source: https://imagej.net/events/isbi-2012-segmentation-challenge; cite Arganda-Carreras et al. 2015, "Crowdsourcing the
creation of image segmentation algorithms for connectomics", Frontiers in Neuroanatomy 9:142, and Cardona et al. 2010, PLoS
Biology 8(10).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from ..paths import atomic_write, real_data
from ..phantoms.em import CLASSES, PIXEL, THICKNESS
from ..volume import Case
from ._alone import alone
from ._download import fetch

URL = "https://downloads.imagej.net/ISBI-2012-challenge.zip"
FILES = {"train": ("train-volume.tif", "train-labels.tif"), "test": ("test-volume.tif", None)}
ARCHIVE = "ISBI-2012-challenge.zip"
LARGEST = 2**28  # bytes that a member of the archive may unpack to; the real ones have 8 million bytes


def isbi2012(
    folder: str | Path | None = None, *, split: str = "train", download: bool = False, unverified: bool = False
) -> Case:
    """Read one stack.

    Args:
        folder: folder with train-volume.tif and train-labels.tif. Default: `$MEDSEG_DATA_DIR/isbi2012`, or the cache.
        split: "train", or "test" for test-volume.tif, whose labels were never published.
        download: True fetches what is missing first, see `download_isbi2012`.
        unverified: True allows that download.

    Returns:
        A case of one channel, "em", with one page per voxel along W. Rows and columns run against H and D. Viewers show the
        patient's left on the right, so they show the page as it is, also in a file that `write_nifti` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has a defect. The message says what was found, what was expected and what to do.
    """
    folder = Path(folder) if folder is not None else real_data("isbi2012")
    if split not in FILES:
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    volume, labels = FILES[split]
    if download:
        download_isbi2012(folder, unverified=unverified)
    missing = [name for name in FILES[split] if name and not (folder / name).is_file()]
    if missing:
        there = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)} ({there or 'it is empty'}). Fetch them with download=True, "
            "unverified=True, or set MEDSEG_DATA_DIR to the folder that holds isbi2012/"
        )
    image = _read(folder / volume)
    flat = [n for n, page in enumerate(image, 1) if page.min() == page.max()]
    if flat:
        raise ValueError(
            f"page {flat[0]} of {folder / volume} is {image[flat[0] - 1].flat[0]} everywhere: there is no image in it; "
            "download the file again"
        )
    membrane = None if labels is None else _read_labels(folder / labels, image, volume)
    corner = -PIXEL * (np.array(image.shape[:0:-1]) - 1)  # of voxel 0, the page's last column and row
    affine = np.diag([PIXEL, PIXEL, THICKNESS, 1])
    affine[:2, 3] = corner
    return Case(
        image=_turn(image).astype(np.float32)[None],
        channels=("em",),
        name=f"isbi2012-{split}",
        label=None if membrane is None else _turn(membrane).astype(np.uint8),
        affine=affine,
        native_axes="LPS",
        info={"classes": CLASSES, "dataset": "isbi2012", "split": split, "licence": "challenge terms: research, cite"},
    )


def download_isbi2012(folder: str | Path | None = None, *, unverified: bool = False) -> Path:
    """Fetch the challenge's archive, take the stacks out of it and return their folder. Stacks that are there are kept.

    Args:
        folder: folder for the stacks. Default: `$MEDSEG_DATA_DIR/isbi2012`, or the cache.
        unverified: True accepts that no checksum of the archive is known. What arrives is only checked to be an archive that holds
            readable stacks.
    """
    folder = Path(folder) if folder is not None else real_data("isbi2012")
    wanted = [name for files in FILES.values() for name in files if name]

    def complete() -> bool:
        return all((folder / name).is_file() for name in wanted)

    if complete():
        return folder
    if not unverified:
        raise ValueError(
            f"the checksum of {URL} is not known, so a download cannot be verified; pass unverified=True to fetch it all "
            "the same"
        )
    with alone(folder / "stacks"):
        if complete():  # another process was faster
            return folder
        archive = fetch(URL, folder / ARCHIVE, sha256=None, check=_members)
        for name, member in _members(archive).items():
            if (folder / name).is_file():
                continue
            with atomic_write(folder / name) as temporary:
                with zipfile.ZipFile(archive) as file:
                    temporary.write_bytes(file.read(member))
                _read(temporary)
        archive.unlink()
    return folder


def _members(archive: Path) -> dict[str, str]:
    """Return the name in the archive of each stack. Only these are unpacked, under our own names, wherever theirs point."""
    try:
        with zipfile.ZipFile(archive) as file:
            sizes = {info.filename: info.file_size for info in file.infolist()}
            damaged = file.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a complete zip archive ({error}); remove it and download it again") from error
    if damaged:
        raise ValueError(f"{archive} is damaged at {damaged}; remove it and download it again")
    found = {}
    for name in [name for files in FILES.values() for name in files if name]:
        matches = [m for m in sizes if m.split("/")[-1] == name and "__MACOSX" not in m]
        if not matches and name in FILES["test"]:
            continue
        if len(matches) != 1:
            some = ", ".join(list(sizes)[:8]) or "nothing"
            raise ValueError(f"{archive} holds {len(matches)} files called {name}, expected one; it holds {some}")
        if sizes[matches[0]] > LARGEST:
            raise ValueError(f"{matches[0]} in {archive} unpacks to {sizes[matches[0]]} bytes; expected about 8 million")
        found[name] = matches[0]
    return found


def _read(path: Path) -> np.ndarray:
    """Return all pages, `(pages, rows, columns)` uint8."""
    again = "download it again"
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git-LFS pointer, not the data; run `git lfs pull` in its repository")
    if start.startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{path} is a web page, not an image (a login or error page was saved); {again}")
    try:
        with Image.open(path, formats=["TIFF"]) as file:
            pages = [(page.mode, np.array(page)) for page in ImageSequence.Iterator(file)]
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a TIFF file; {again}") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it is truncated or damaged: {again}") from error
    for number, (mode, page) in enumerate(pages, 1):
        if mode not in ("L", "1"):
            raise ValueError(f"page {number} of {path} has pixels of kind {mode!r}; expected grey values of 8 bits: convert it")
        if page.shape != pages[0][1].shape:
            raise ValueError(
                f"page {number} of {path} is {_size(page)} but page 1 is {_size(pages[0][1])}; the slices of a stack "
                f"share one size: {again}"
            )
    return np.stack([page * np.uint8(255) if mode == "1" else page for mode, page in pages])


def _read_labels(path: Path, image: np.ndarray, volume: str) -> np.ndarray:
    """Return `(pages, rows, columns)` bool, True on membranes."""
    labels = _read(path)
    if labels.shape != image.shape:
        found, expected = (f"{len(stack)} pages of {_size(stack[0])}" for stack in (labels, image))
        raise ValueError(f"{path} has {found} but {volume} has {expected}; take both files from the same copy")
    values = np.unique(labels)
    if not np.isin(values, (0, 255)).all():
        wrong = ", ".join(map(str, values[~np.isin(values, (0, 255))][:5]))
        raise ValueError(f"{path} holds {wrong}; expected 0 (membrane) and 255 (cell) only: it was smoothed or renumbered")
    if len(values) == 1:
        raise ValueError(f"{path} is {values[0]} everywhere; expected 0 on membranes and 255 in cells")
    membrane = labels == 0
    if image[membrane].mean() > image[~membrane].mean():
        raise ValueError(
            f"{path} is inverted or belongs to other images: the pixels that it calls membrane (0) are brighter than the "
            "others (255), but membranes are dark"
        )
    return membrane


def _turn(pages: np.ndarray) -> np.ndarray:
    """Return `(pages, rows, columns)` as `(D, H, W)`. Columns and rows run against D and H."""
    return np.ascontiguousarray(pages.transpose(2, 1, 0)[::-1, ::-1])


def _size(page: np.ndarray) -> str:
    return "×".join(map(str, page.shape))
