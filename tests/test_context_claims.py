"""The claims of notebook 12 that stored runs decide: each check fails for a method that does not do what the claim says."""

from __future__ import annotations

import pytest
from claim_cells import read_cells, run_cell, spoil_table
from scripts import load

from medseg_lite import features

CELLS = read_cells("12")
NEEDED = ("context-02", "context-31", "context-34")  # imports, the table, the pairs


def run(last: str, monkeypatch, file: str = "", change=None) -> None:
    """Run the cells up to `last` on the stored tables; one file is changed. No network is run."""
    spoil_table(monkeypatch, file, change)
    names = {"full": [], "found": []}
    for cell in (*NEEDED, last):
        run_cell(CELLS, cell, names)


def values(row: str, column: str, function):
    """Replace a column of a row."""

    def change(table):
        mine = table["row"] == row
        table.loc[mine, column] = function(table.loc[mine, column])

    return change


def keep_stripes(table):
    """A 3D network that keeps its 2D network's stripes."""
    flat = table.loc[(table["row"] == "2D axial") & (table["set"] == "test"), "stripes_axial"].to_numpy()
    table.loc[table["row"] == "A", "stripes_axial"] = flat


def no_outliers(table):
    table["dice_core"] = 0.8


def a_run_less(table):
    return table[(table["row"] != "B") | (table["seed"] < 2)]


def no_rise(table):
    table["dice_enhancing"] = 0.1


def losses_rise(table):
    table["loss"] = table["step"] / 100


def wide_floor(table):
    table.loc[(table["method"] == "A") & (table["copy"] == 1), "dice_core"] -= 0.05


def test_the_control_sees_no_farther_than_the_3d_network():
    experiment = load("experiments", "context")
    near = features.receptive_field(experiment.near_sighted().eval()).side
    solid = features.receptive_field(experiment.solid("standard"), voxel=0, size=28).side
    assert near == (23, 23) and solid == (26, 26, 26)
    assert min(features.receptive_field(experiment.FLATS["far"]().eval()).side) > 200


def test_all_claims_hold_on_the_stored_tables(monkeypatch):
    for cell in ("context-32b", "context-35", "context-35b"):
        run(cell, monkeypatch)


@pytest.mark.parametrize(
    ("cell", "file", "change"),
    [
        ("context-32b", "context_noise", wide_floor),
        ("context-35", "context", a_run_less),
        ("context-35", "context", values("A", "dice_core", lambda dice: dice / 2)),  # below a threshold
        ("context-35b", "context", keep_stripes),
        ("context-35b", "context", no_outliers),
        ("context-35b", "context_curves", no_rise),
        ("context-35b", "context_curves", losses_rise),
    ],
)
def test_spoilt_tables_fail(cell, file, change, monkeypatch):
    with pytest.raises(AssertionError):
        run(cell, monkeypatch, file, change)
