"""Score segmentations against the truth: Dice, precision, sensitivity, specificity, average and Hausdorff surface distance for each
region and case, and their mean and standard deviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from .. import metrics, statistics
from ..files import read_label
from ..recipes import RECIPES, regions_for, regions_in_data
from ..volume import Case
from ._data import add_data, open_recipe_cohort, read_cases


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    command.add_argument("--predictions", required=True, help="folder with CASE.nii.gz files, as `segment` writes them")
    add_data(command)
    command.add_argument(
        "--regions",
        choices=("classes", *sorted(metrics.regions), *RECIPES),
        metavar="REGIONS",
        help=f"classes (each by itself), {', '.join(sorted(metrics.regions))}, or the name of a recipe, whose data --data then is "
        "(default: BRATS 2015 for five classes, else each class)",
    )
    command.add_argument("--out", help="also write the table to this CSV file")


def run(options) -> None:
    """Print the scores of each case, and their means."""
    predictions, cases = zip(*_read_pairs(options))
    regions = _choose_regions(options.regions, predictions, cases)
    if regions == "cells":
        table = pd.concat([_score_cells(*pair) for pair in zip(predictions, cases)], ignore_index=True)
    else:
        table = metrics.evaluate_cohort(predictions, cases, regions=regions)
    print(table.round(3).to_string(index=False))
    print("\nmean (standard deviation) over cases; distances in mm")
    print(statistics.summary(table).to_string())
    if options.out:
        metrics.write_table(Path(options.out), table)
        print(f"\nwrote {options.out}")


def _read_pairs(options) -> Iterator[tuple[np.ndarray, Case]]:
    """Yield the prediction and the label of each case. The image is not kept."""
    if options.regions in RECIPES:
        cases = open_recipe_cohort(options, RECIPES[options.regions])
    else:
        cases = read_cases(options, label=True, normalise="none")
    for case in cases:
        prediction = read_label(Path(options.predictions) / f"{case.name}.nii.gz", case)
        yield prediction, case.replace(image=case.image[:0].copy(), channels=())


def _choose_regions(wanted: str | None, predictions, cases) -> str | dict[str, list[int]]:
    if wanted in RECIPES:
        return regions_in_data(RECIPES[wanted])
    found = sorted({int(k) for case, p in zip(cases, predictions) for array in (case.label, p) for k in np.unique(array)} - {0})
    if wanted == "classes":
        return {f"class_{k}": [k] for k in found or [1]}
    return wanted or regions_for(1 + max(found, default=1))


def _score_cells(prediction: np.ndarray, case: Case) -> pd.DataFrame:
    """Return V_rand and V_info of cells, which are where there is no membrane (class 1)."""
    scores = {m.__name__: [m(prediction == 0, case.label == 0)] for m in (metrics.v_rand, metrics.v_info)}
    return pd.DataFrame({"case": [case.name], "region": ["cells"], **scores})
