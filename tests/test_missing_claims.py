"""The claims of notebook 13 that rest on stored tables: their cells hold on the tables, and fail on spoilt ones."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from claim_cells import read_cells, run_cell, spoil_table

CELLS = read_cells("13")
REGIONS = {"enhancing": [3], "core": [1, 3], "whole": [1, 2, 3]}
DICE = [f"dice_{region}" for region in REGIONS]
BEFORE = {"vote-12": [], "vote-13": ["vote-12"], "vote-41v": [], "vote-43": ["vote-42"]}


def run(last: str, monkeypatch, file: str = "", change=None) -> dict:
    """Run the cells up to `last` on the stored tables; one table is changed."""
    spoil_table(monkeypatch, file, change)
    names = {"REGIONS": REGIONS, "SQUARES": {"output": 32, "batch_size": 8}, "display": lambda *_: None}
    for cell in ["vote-02", *BEFORE[last], last]:
        run_cell(CELLS, cell, names)
    return names


def lift(variant: str, by: float):
    """Add to the Dice of a variant."""

    def change(table):
        table.loc[table["variant"] == variant, DICE] += by

    return change


def copy(to: str, of: str):
    """Give a variant the results of another one, draw by draw and person by person."""

    def change(table):
        table.loc[table["variant"] == to, DICE] = table.loc[table["variant"] == of, DICE].to_numpy()

    return change


def exchange(column: str, a, b):
    """Exchange the names of two groups of runs."""
    return lambda table: table.__setitem__(column, table[column].replace({a: b, b: a}))


def test_all_claims_hold_on_the_stored_tables(monkeypatch):
    for cell in BEFORE:
        run(cell, monkeypatch)


@pytest.mark.parametrize(
    ("cell", "file", "change"),
    [
        ("vote-13", "missing_training", lift("pretrained", 0.3)),
        ("vote-13", "missing_training", lift("pretrained", -0.3)),
        ("vote-13", "missing_training", lift("full", 0.3)),
        ("vote-13", "missing_training", lift("full", -0.3)),
        ("vote-13", "missing_training", lambda table: table.assign(alive=table["variant"] != "control")),
        ("vote-12", "missing_noise", exchange("settings", "first", "today")),
        ("vote-43", "normalised_steps", lambda table: table.assign(loss=table["constant"])),
        ("vote-43", "normalised_steps", lambda table: table.assign(lowest_recall=0.0)),
        ("vote-43", "normalised_steps", lambda table: table.assign(learned=table["method"] == "plain")),
        ("vote-43", "normalised_steps", lambda table: table.assign(learned=table["method"] == "normalised")),
    ],
)
def test_a_spoilt_table_breaks_its_claim(cell, file, change, monkeypatch):
    with pytest.raises(AssertionError):
        run(cell, monkeypatch, file, change)


def test_the_effects_are_those_of_the_stored_tables(monkeypatch):
    """The ledger's differences and intervals are those that the notebook computes."""
    names = run("vote-13", monkeypatch)
    for claim, pairs in {
        "mlynarski-table2": [("pretrained", "control"), ("pretrained", "complete")],
        "mlynarski-table2-full": [("full", "pretrained")],
    }.items():
        for pair in pairs:
            found = names["gain"][pair]
            assert f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})" in names["ledger"][claim].effect
            assert names["ledger"][claim].seeds == found.runs


def test_a_valley_without_its_steps_is_caught(monkeypatch):
    """Steps that do not have a fixed length, or a rate that does not fall, break the cell's claims."""
    for old, new in (
        ("gradient / np.linalg.norm(gradient) if fixed else gradient", "gradient"),
        ("if falling else rate", "if False else rate"),
        ("scale * CURVATURE", "CURVATURE"),
    ):
        assert CELLS["vote-41v"].count(old) == 1
        monkeypatch.setitem(CELLS, "vote-41v", CELLS["vote-41v"].replace(old, new))
        with pytest.raises(AssertionError):
            run("vote-41v", monkeypatch)
        monkeypatch.undo()


def test_votes_of_one_network_are_caught(monkeypatch):
    """If what is merged is a single network, it is not ahead of the best one."""
    names = {"display": lambda *_: None}
    for cell in ("vote-02", "vote-04"):
        run_cell(CELLS, cell, names)
    stored = np.load

    def spoil(path, **options):
        found = dict(stored(path, **options))
        found["maps"] = np.repeat(found["maps"][:, :1], 6, axis=1)
        return contextlib.nullcontext(found)

    for load, raises in ((stored, contextlib.nullcontext()), (spoil, pytest.raises(AssertionError))):
        monkeypatch.setattr(np, "load", load)
        for cell in ("vote-22", "vote-28", "vote-32", "vote-34"):
            if load is spoil and cell == "vote-32":
                continue  # whose own claim fails, too
            run_cell(CELLS, cell, names)
        with raises:
            run_cell(CELLS, "vote-36", names)
