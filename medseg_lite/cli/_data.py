"""Options that several sub-commands share, and the cases that they name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from .. import context, datasets, phantoms, transforms
from ..engine import distributed
from ..recipes import Recipe, load_cases
from ..volume import Case, new_name

# Names that --data accepts in place of a folder: `datasets` looks for these by itself.
LOADERS = {
    "brats2013_deepmedic": datasets.brats2013_deepmedic,
    "brats2015": datasets.brats2015,
    "brats2017": datasets.brats2017,
    "lits": datasets.lits,
    "promise12": datasets.promise12,
    "msd03_liver": partial(datasets.msd, "msd03_liver"),
    "msd04_hippocampus": partial(datasets.msd, "msd04_hippocampus"),
    "msd05_prostate": partial(datasets.msd, "msd05_prostate"),
    "msd01_brain": partial(datasets.msd, "msd01_brain", as_brats=True),
}


def positive(text: str) -> int:
    """Return a whole number above zero, for `argparse`."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above zero")
    return int(text)


def add_data(command: argparse.ArgumentParser) -> None:
    """Add the options that say which cases are meant."""
    group = command.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        help=f"a folder with one sub-folder per case, or phantoms, or a data set that was fetched: {', '.join(LOADERS)}",
    )
    group.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="only these cases")
    group.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME[=PATTERN]",
        help="the sequences to read from each case's folder, in this order; PATTERN finds the file (default NAME.nii.gz)",
    )
    group.add_argument("--label", metavar="PATTERN", help="finds the file with the true classes (default label.nii.gz)")
    group.add_argument(
        "--classes", type=positive, metavar="K", help="labels must lie in 0 to K - 1 (default: whatever the files hold)"
    )
    group.add_argument(
        "--mask",
        metavar="PATTERN",
        help="finds the brain mask; 'all' for the whole volume; default: mask.nii.gz, or else where the image is not 0",
    )
    group.add_argument("--scores", metavar="FOLDER", help="with the scores of 2D networks as further channels (see `scores`)")
    group.add_argument("--spacing", type=float, default=2.0, help="voxel side in mm of --data phantoms (2)")
    group.add_argument("--count", type=positive, default=24, help="phantoms to generate with --data phantoms (24)")


def add_device(command: argparse.ArgumentParser) -> None:
    """Add the option that says where to compute."""
    command.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, mps, xpu, or auto: a CUDA GPU if there is one that works, else the CPU",
    )


def is_name(data: str) -> bool:
    """Return whether --data is a name and not a folder."""
    return data in LOADERS or data == "phantoms"


def open_cohort(options, *, label: bool) -> Sequence[Case]:
    """Return the cases that --data and its companions name, as they are. They are read when they are asked for."""
    if options.data in LOADERS:
        return LOADERS[options.data](cases=options.cases or None)
    if options.data == "phantoms":
        return phantoms.brain_cohort(options.count, spacing=options.spacing, progress=distributed.rank() == 0)
    if not options.channels:
        raise ValueError("--channels is needed to read a folder, for example --channels flair t1c or 'flair=*flair.nii.gz'")
    channels: dict[str, str] = {}
    for name, pattern in (c.split("=", 1) if "=" in c else (c, f"{c}.nii.gz") for c in options.channels):
        if name in channels:
            raise ValueError(
                f"--channels names {name} twice; give each file a channel of its own, as in {name}={channels[name]} "
                f"{new_name(name, channels).replace(' ', '')}={pattern}"
            )
        channels[name] = pattern
    folder = Path(options.data)
    return datasets.nifti_folder(
        folder,
        channels=channels,
        label=(options.label or "label.nii.gz") if label else None,
        mask=options.mask or ("mask.nii.gz" if any(folder.glob("*/mask.nii.gz")) else None),
        labels=range(options.classes) if label and options.classes else None,
        cases=options.cases or None,
    )


def open_recipe_cohort(options, recipe: Recipe) -> Sequence[Case]:
    """Return the cases of a named recipe, by the reader of its data set unless --channels says how the files are named."""
    own = options.channels or options.data in ("brats2013_deepmedic", "phantoms")
    return open_cohort(options, label=True) if own else load_cases(recipe.name, options.data, cases=options.cases)


def read_cases(options, *, label: bool, normalise: str, shared: bool = False, stored: str | None = None) -> Iterator[Case]:
    """Yield the cases, ready for a network.

    Args:
        options: what was typed.
        label: whether labels are needed.
        normalise: "standardise", "median" or "none".
        shared: whether each of several processes gets a part of the cases.
        stored: folder to keep the cases in as the network sees them, or None.
    """
    cases = open_cohort(options, label=label)
    ready = partial(_make_ready, channels=options.channels if is_name(options.data) else None, normalise=normalise)
    if stored:
        store = partial(datasets.store, cases, stored, normalise=ready, progress=distributed.rank() == 0)
        if distributed.rank() == 0:
            store()
        distributed.barrier()
        cases, ready = store(), None
    start, step = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    for n in range(start, len(cases), step):
        case = cases[n] if ready is None else ready(cases[n])
        yield context.with_scores(case, options.scores) if options.scores else case


def _make_ready(case: Case, *, channels: Sequence[str] | None, normalise: str) -> Case:
    return transforms.normalise(case.select(channels) if channels else case, normalise)
