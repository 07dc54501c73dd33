"""Generate brain phantoms. Writes them as NIfTI folders, ready for --data."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from .. import phantoms
from ..files import write_case
from ._data import positive


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `phantom`."""
    command.add_argument("--out", required=True, help="folder for the cases")
    command.add_argument("--count", type=positive, default=1, help="number of phantoms (1)")
    command.add_argument("--seed", type=int, default=0, help="seed of the first phantom; the others follow")
    command.add_argument("--sites", default="ABC", help="scanner sites, taken in turn (D is the held-out one)")
    command.add_argument("--spacing", type=float, default=2.0, help="voxel side in mm: 2 (fast) or 1 (full)")
    command.add_argument("--lesion", default="glioma", choices=("glioma", "contusions", "stroke", "none"))


def run(options) -> None:
    """Generate and write the phantoms."""
    for n in tqdm(range(options.count), desc="phantoms"):
        site = options.sites[n % len(options.sites)]
        lesion = None if options.lesion == "none" else options.lesion
        case = phantoms.brain(options.seed + n, site=site, spacing=options.spacing, lesion=lesion)
        write_case(Path(options.out) / case.name, case)
    print(f"wrote {options.count} cases to {options.out}")
