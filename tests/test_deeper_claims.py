"""The claims of notebook 05 that stored trainings decide: each check fails for a method that does not do what the claim says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from claim_cells import read_cells

from medseg_lite import plotting, statistics

ROOT = Path(__file__).resolve().parent.parent
CELLS = read_cells("05")
CAUSES, LONGER, TIME = "deeper-causes", "cell-19", "deeper-time"


def run(cell: str, change=lambda scores, times: None) -> None:
    """Run a claim's cell on the stored tables, after a change of them."""
    tables = {name: pd.read_csv(ROOT / "data" / "results" / f"deepmedic_start{name}.csv") for name in ("", "_layers", "_time")}
    change(tables[""], tables["_time"])
    names = {"scores": tables[""], "layers": tables["_layers"], "times": tables["_time"]}
    names |= {"np": np, "pd": pd, "plotting": plotting, "statistics": statistics}
    definition = CELLS[CAUSES].split("\n\n\n")[0]  # of `grid`
    exec(compile(definition, "grid", "exec"), names)
    exec(compile(CELLS[cell], cell, "exec"), names)


def like(variant: str, other: str, columns=("dice", "dice_chosen", "found_voxels")):
    """Give a row the results of another row."""

    def change(scores, times):
        for column in columns:
            scores.loc[scores.variant == variant, column] = scores.loc[scores.variant == other, column].to_numpy()

    return change


def always(value: float, *variants: str):
    """Give every network, or some, one and the same Dice."""

    def change(scores, times):
        rows = scores.variant.isin(variants) if variants else scores.seed.notna()
        scores.loc[rows, ["dice", "dice_chosen"]] = value

    return change


@pytest.mark.parametrize("cell", [CAUSES, LONGER, TIME])
def test_the_claims_hold(cell):
    run(cell)


@pytest.mark.parametrize(
    ("cell", "change"),
    [
        (CAUSES, like("as in the paper", "epsilon 1e-16")),
        (CAUSES, like("He", "as in the paper")),
        (CAUSES, like("epsilon 1e-16", "as in the paper")),
        (CAUSES, always(0.0)),
        (LONGER, always(0.3)),
        (
            TIME,
            lambda scores, times: times.__setitem__("cpu_seconds", times.cpu_seconds * (1 + (times.network == "deep_plus"))),
        ),
    ],
)
def test_a_method_that_does_not_work_breaks_them(cell, change):
    with pytest.raises(AssertionError):
        run(cell, change)


@pytest.mark.parametrize("change", [always(0.95, "He", "epsilon 1e-16")])
def test_a_better_result_breaks_nothing(change):
    run(CAUSES, change)
