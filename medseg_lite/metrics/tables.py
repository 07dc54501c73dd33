"""Tables of metrics: one row for each region of each case."""

from __future__ import annotations

import csv
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from ..paths import atomic_write
from ..volume import Case, new_name
from .arrays import as_binary, as_labels, check_same_shape
from .overlap import dice, jaccard, precision, sensitivity, specificity, volume_difference
from .surfaces import largest_distance, mean_distance, surface_distances

# Label numbers that make up each region of the BRATS challenges. 2012 to 2015: 1 necrosis, 2 oedema, 3 non-enhancing
# core, 4 enhancing core. From 2017 on: 1 necrosis and non-enhancing core, 2 oedema, 4 enhancing core.
regions: dict[str, dict[str, frozenset[int]]] = {
    "brats2015": {"whole": frozenset({1, 2, 3, 4}), "core": frozenset({1, 3, 4}), "enhancing": frozenset({4})},
    "brats2017": {"whole": frozenset({1, 2, 4}), "core": frozenset({1, 4}), "enhancing": frozenset({4})},
}

DEFAULT_METRICS = ("dice", "precision", "sensitivity", "specificity", "assd", "hausdorff")

OVERLAP = {metric.__name__: metric for metric in (dice, jaccard, precision, sensitivity, specificity)}
# Metrics of the two arrays of `surface_distances`.
SURFACE = {
    "assd": mean_distance,
    "boundary_distance": mean_distance,
    "hausdorff": largest_distance,
    "hausdorff95": partial(largest_distance, percentile=95),
}


def evaluate(
    prediction,
    truth,
    *,
    regions: str | Mapping[str, Iterable[int] | int] = "brats2015",
    spacing: Sequence[float] | None = None,
    mask=None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    empty: float = 1.0,
    case: str = "case",
) -> pd.DataFrame:
    """Compute the metrics of each region of one case, as a table with one row per region.

    Args:
        prediction: class of each voxel, integers.
        truth: true class of each voxel, of the same shape.
        regions: "brats2015", "brats2017", or label numbers by region, `{"tumour": {1, 4}, "oedema": 2}`.
        spacing: voxel size in mm along each axis (`case.spacing`), or the steps of a sheared grid (`case.affine[:3, :3]`). Only
            surface metrics need it.
        mask: voxels that count, for example those inside the brain, bool. The others are background in both arrays.
        metrics: columns to compute, among dice, jaccard, precision, sensitivity, specificity, assd, boundary_distance,
            hausdorff, hausdorff95 (mm) and volume_difference (%).
        empty: value of overlap metrics where a region is in neither array; see `metrics`.
        case: value of the column `case`.

    Returns:
        A DataFrame with the columns case, region and one per metric. `pandas.concat` joins the tables of several cases, and
        `evaluate_cohort` makes them at once.
    """
    known, metrics = [*OVERLAP, *SURFACE, "volume_difference"], tuple(dict.fromkeys(metrics))
    unknown = [m for m in metrics if m not in known]
    if unknown:
        raise ValueError(f"metrics holds {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}")
    surfaces = any(m in SURFACE for m in metrics)
    if surfaces and spacing is None:
        raise ValueError("surface metrics need spacing=(mm, mm, mm), for example case.spacing; or leave them out")
    prediction, truth = as_labels(prediction, "prediction"), as_labels(truth, "truth")
    check_same_shape(prediction, truth)
    wanted = as_regions(regions)
    if isinstance(regions, str):
        _check_covered(prediction, "prediction", wanted, regions)
        _check_covered(truth, "truth", wanted, regions)
    if mask is not None:
        mask = as_binary(mask, "mask")
        check_same_shape(mask, truth, "mask")
        if not mask.any():
            raise ValueError("the mask is empty: no voxel would be evaluated; pass mask=None for the whole volume")

    rows = []
    for region, labels in wanted.items():
        p, t = _lookup(labels)[prediction], _lookup(labels)[truth]
        counted = (p, t) if mask is None else (p[mask], t[mask])
        if surfaces:
            distances = surface_distances(*((p, t) if mask is None else (p & mask, t & mask)), spacing=spacing)
        row = {"case": case, "region": region}
        for metric in metrics:
            if metric in OVERLAP:
                row[metric] = OVERLAP[metric](*counted, empty=empty)
            elif metric in SURFACE:
                row[metric] = SURFACE[metric](*distances)
            else:
                row[metric] = volume_difference(*counted)
        rows.append(row)
    return pd.DataFrame(rows, columns=["case", "region", *metrics])


def evaluate_cohort(predictions: Iterable, cases: Iterable[Case], *, use_mask: bool = False, **options) -> pd.DataFrame:
    """Apply `evaluate` to a cohort and return one row per case and region.

    `statistics.summary` turns the result into means and standard deviations. Cases of one name are numbered: "case", "case 2".

    Args:
        predictions: class maps `(D, H, W)`, one per case, in the order of `cases`.
        cases: cases with a label; `evaluate` gets their spacing and name.
        use_mask: whether to count only the voxels inside each case's mask.
        options: further arguments of `evaluate`.
    """
    tables, names = [], set()
    for prediction, case in zip_longest(predictions, cases):
        if prediction is None or case is None:
            raise ValueError(
                f"{'predictions' if prediction is None else 'cases'} ended after {len(tables)}; "
                "expected as many predictions as cases, in the same order"
            )
        if case.label is None:
            raise ValueError(f"{case.name} has no label to compare with; leave it out of the evaluation")
        if use_mask and case.mask is None:
            raise ValueError(f"{case.name} has no mask; pass use_mask=False")
        name, mask = new_name(case.name, names), case.mask if use_mask else None
        names.add(name)
        try:
            table = evaluate(prediction, case.label, spacing=case.steps, mask=mask, case=name, **options)
        except ValueError as error:
            raise ValueError(f"{case.name}: {error}") from error
        tables.append(table)
    if not tables:
        raise ValueError("the cohort is empty: there are no predictions to evaluate")
    return pd.concat(tables, ignore_index=True)


def write_table(path: str | Path, table: pd.DataFrame) -> Path:
    """Write a table as a CSV file, complete or not at all. `read_table` reads it."""
    path = Path(path)
    texts = table.select_dtypes(exclude="number")
    # The writer does not put a text into quotes for a carriage return, which would end the row when it is read.
    odd = any("\r" in str(text) for column in texts.columns for text in texts[column])
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC if odd else csv.QUOTE_MINIMAL)
    return path


def read_table(path: str | Path, *, text: Sequence[str] = ("case", "region")) -> pd.DataFrame:
    """Read a table of scores from a CSV file.

    pandas by itself would take a case called 001 for the number 1, and one called NA for a missing value.

    Args:
        path: file that `write_table`, or the command line, wrote.
        text: columns of names. They are read as they are. Other columns of numbers become numbers, and what is empty there NaN.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False)
    return table.assign(**{name: _read_numbers(table[name]) for name in table if name not in text})


def _read_numbers(column: pd.Series) -> pd.Series:
    try:
        return pd.to_numeric(column) if (column != "").all() else column.replace("", "nan").astype(float)
    except ValueError:
        return column


def as_regions(wanted: str | Mapping[str, Iterable[int] | int]) -> dict[str, list[int]]:
    """Return the label numbers of each region, for the name of a scheme in `regions` or for label numbers by region."""
    if isinstance(wanted, str):
        if wanted not in regions:
            raise ValueError(f"regions is {wanted!r}; expected {' or '.join(map(repr, regions))} or labels by name")
        wanted = regions[wanted]
    named = {name: _as_numbers(labels) for name, labels in wanted.items()}
    for name, labels in named.items():
        if not labels or min(labels) < 0 or max(labels) > 255:
            raise ValueError(f"region {name!r} has the labels {labels}; expected one or more from 0 to 255")
    return named


def _as_numbers(labels: Iterable[int] | int) -> list[int]:
    try:
        return [operator.index(labels)]
    except TypeError:
        return sorted(operator.index(label) for label in labels)


def _check_covered(array: np.ndarray, what: str, named: dict[str, list[int]], scheme: str) -> None:
    found = set(np.flatnonzero(np.bincount(array.reshape(-1), minlength=1)).tolist())
    stray = sorted(found - {0}.union(*named.values()))
    if stray:
        raise ValueError(
            f"the {what} holds label {', '.join(map(str, stray))}, which no region of {scheme} has; "
            "map its labels first or pass the regions as a dict"
        )


def _lookup(labels: list[int]) -> np.ndarray:
    table = np.zeros(256, bool)
    table[labels] = True
    return table
