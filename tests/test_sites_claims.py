"""Notebook 11's claims fail where the stored runs are spoilt: each mutation is a method that does not do what the claim says."""

from __future__ import annotations

import pandas as pd
import pytest
from claim_cells import read_cells, run_cell, spoil_table

CELLS = read_cells("11")
BEFORE = ["sites-imports", "sites-02", "sites-05", "sites-07b"]
STANDARD, LEARNED = "FC-ResNet, standardised", "FCN + FC-ResNet, ÷ 1000"


def run(last: str, monkeypatch, file: str = "", change=None) -> None:
    """Run the cells up to `last` without their output. One stored table is changed where it is read."""

    spoil_table(monkeypatch, file, change)
    names: dict = {"live": {}, "display": lambda *_: None}
    needed = BEFORE[: BEFORE.index(last)] if last in BEFORE else BEFORE
    for cell in [*needed, last]:
        run_cell(CELLS, cell, names)


def exchange(table: pd.DataFrame) -> None:
    """Give the pipeline the scores of standardised input, and the other way round."""
    table["system"] = table.system.replace({STANDARD: LEARNED, LEARNED: STANDARD})


def lift(system: str, by: float):
    """Add to the Dice of a system."""

    def change(table):
        table["dice"] += by * (table.system == system)

    return change


def usual_place(table: pd.DataFrame) -> None:
    """A pipeline that calls the usual place prostate, whatever the image."""
    table.loc[table.system == LEARNED, "dice"] = 0.39


def far_specks(table: pd.DataFrame, sign: float = 1) -> None:
    """Specks far from the prostate, which the largest component takes away; or, with -1, a prostate that it takes away."""
    table.loc[table.system == LEARNED, "distance_largest"] = table.distance - sign * (5 + 0.1 * table.patient)


def wrong_piece(table: pd.DataFrame) -> None:
    far_specks(table, -1)


def no_training(table: pd.DataFrame) -> None:
    """A pre-processor whose range before training is that after it, and the other way round."""
    table["when"] = table.when.replace({"start": "trained", "trained": "start"})


def member(table: pd.DataFrame) -> None:
    """An "average" that is the worst member."""
    worst = table[(table.system == LEARNED) & (table.seed != "average")].groupby("seed").dice.mean().idxmin()
    rows = (table.system == LEARNED) & (table.seed == "average")
    table.loc[rows, "dice"] = table[(table.system == LEARNED) & (table.seed == worst)].dice.to_numpy() - 0.05


def even(table: pd.DataFrame) -> None:
    """A network that errs as little at the ends as in the middle, and below the truth everywhere."""
    table["found_ml"] = 0.9 * table.true_ml


def lean_ends(table: pd.DataFrame) -> None:
    """A network that finds too little at the ends and too much in the middle."""
    table["found_ml"] = table.true_ml * (
        0.5 + table.place.isin(["second", "third", "fourth"]) * (0.7 + 0.01 * table.patient / 100)
    )


CHECKED = ["sites-07b", "sites-start", "sites-ends", "sites-16"]


@pytest.mark.parametrize("cell", CHECKED)
def test_the_claims_hold(cell, monkeypatch):
    run(cell, monkeypatch)


def run_pieces(monkeypatch, change=None) -> None:
    monkeypatch.setitem(CELLS, "sites-14", CELLS["sites-14"].replace("live.values()", "[]"))
    run("sites-14", monkeypatch, "normalisation_prostate", change)


def test_the_largest_component(monkeypatch):
    run_pieces(monkeypatch)


@pytest.mark.parametrize("change", [far_specks, wrong_piece])
def test_the_largest_component_of_other_networks(change, monkeypatch):
    with pytest.raises(AssertionError):
        run_pieces(monkeypatch, change)


@pytest.mark.parametrize(
    ("cell", "file", "change"),
    [
        ("sites-07b", "normalisation_prostate", lift(LEARNED, 0.3)),
        ("sites-07b", "normalisation_prostate", lift(LEARNED, -0.3)),
        ("sites-07b", "normalisation_prostate", usual_place),
        ("sites-start", "normalisation_range", no_training),
        ("sites-ends", "normalisation_places", lean_ends),
        ("sites-ends", "normalisation_places", even),
        ("sites-16", "normalisation_prostate", member),
    ],
)
def test_spoilt_runs_are_seen(cell, file, change, monkeypatch):
    with pytest.raises(AssertionError):
        run(cell, monkeypatch, file, change)
