"""Score segmentations against the truth: Dice, precision, sensitivity, specificity, average and Hausdorff surface distance for each
region and case, and their mean and standard deviation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import metrics, statistics
from ..files import read_label
from ..recipes import regions_for
from ._data import add_data, read_cases, save_table


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    command.add_argument("--predictions", required=True, help="folder with CASE.nii.gz files, as `segment` writes them")
    add_data(command)
    command.add_argument(
        "--regions", choices=sorted(metrics.regions), help="default: BRATS 2015 for five classes, else each class"
    )
    command.add_argument("--out", help="also write the table to this CSV file")


def run(options) -> None:
    """Print the scores of each case, and their means."""
    folder, predictions, cases = Path(options.predictions), [], []
    for case in read_cases(options, label=True, normalise="none"):
        predictions.append(read_label(folder / f"{case.name}.nii.gz", case))
        cases.append(case.replace(image=case.image[:0].copy(), channels=()))  # the image has served its purpose
    classes = 1 + max(1, *(int(c.label.max()) for c in cases), *(int(p.max()) for p in predictions))
    table = metrics.evaluate_cohort(predictions, cases, regions=options.regions or regions_for(classes))
    print(table.round(3).to_string(index=False))
    print("\nmean (standard deviation) over cases; distances in mm")
    print(statistics.summary(table).to_string())
    if options.out:
        save_table(Path(options.out), table)
        print(f"\nwrote {options.out}")
