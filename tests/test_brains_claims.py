"""Notebook 09's claims fail where the stored runs, the data or the method are spoilt."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from claim_cells import read_cells, run_cell, spoil_table

CELLS = read_cells("09")
BEFORE = {
    "contrast-claims": [],
    "shares-claim": ["contrast-claims"],
    "brains-24": ["contrast-claims", "brains-08"],
    "alarm-claims": ["contrast-claims", "brains-08"],
}


def run(last: str, monkeypatch, file: str = "", change=None) -> None:
    """Run a cell, and those that it needs, on the stored tables; one of them is changed."""

    spoil_table(monkeypatch, f"brains_{file}", change)
    names: dict = {"SITES": "ABC", "REGIONS": {"whole": [1, 2, 3, 4], "core": [1, 3, 4], "enhancing": [4]}}
    for cell in ["brains-02", *BEFORE[last], last]:
        run_cell(CELLS, cell, names)


def exchanged(column: str, a: str, b: str, where=lambda table: table[table.columns[0]].notna()):
    """Give the rows of a the name of b, and the other way round."""

    def change(table):
        rows = where(table)
        return table.assign(**{column: table[column].where(~rows, table[column].replace({a: b, b: a}))})

    return change


@pytest.mark.parametrize("cell", BEFORE)
def test_stored_claims_hold(cell, monkeypatch):
    run(cell, monkeypatch)


def real(table):
    return table["kind"] == "real"


def whole_box(table):
    """The brain's box is the whole volume."""
    wide = table[table["volume"] == "whole"]
    return pd.concat([wide, wide.assign(volume="brain")])


def scaled(column: str, factor: float, **where):
    """Multiply a score of some rows."""

    def change(table):
        rows = np.logical_and.reduce([table[name] == value for name, value in where.items()])
        return table.assign(**{column: table[column].where(~rows, factor * table[column])})

    return change


MUTATIONS = {
    "the real sequences exchanged": ("contrast-claims", "contrasts", exchanged("channel", "flair", "t1c", real)),
    "no crop": ("shares-claim", "shares", whole_box),
    "other people": ("brains-24", "healthy", lambda t: t[(t["set"] != "healthy") | (t["person"] != 100)]),
    "networks that find nothing": ("alarm-claims", "healthy", scaled("false_ml_whole", 0, set="stroke")),
    "dead networks": ("alarm-claims", "healthy", scaled("dice_whole", 0, variant="ill")),
    "a scanner taken for a disease": ("alarm-claims", "healthy", scaled("false_ml_whole", 30, set="mirrored", site="B")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_spoilt_table_breaks_its_claim(name, monkeypatch):
    cell, file, change = MUTATIONS[name]
    with pytest.raises(AssertionError):
        run(cell, monkeypatch, file, change)


def test_the_mirror_replaces_the_ill_half_and_nothing_else():
    names: dict = {"SITES": "ABC", "LOOK": {"spacing": 4, "spots": 1}}
    run_cell(CELLS, "brains-02", names)
    names["trio"] = [names["phantoms"].brain(100, site="B", spacing=4, lesion=lesion) for lesion in ("glioma", "glioma", None)]
    names["trio"][1] = names["transforms"].mirror_healthy(names["trio"][0])
    run_cell(CELLS, "brains-22b", names)
    ill, mirrored, _ = names["trio"]
    midline = ill.extra["midline"]
    right = 1 if ill.label[midline >= 0].any() else -1
    mirror = names["transforms"].mirror_hemisphere
    wrong_half = ill.replace(
        image=np.stack([mirror(c, midline, -right) for c in ill.image]),
        mask=mirror(ill.mask, midline, -right),
        label=mirrored.label,
    )
    outside = mirrored.replace(image=np.where(mirrored.mask, mirrored.image, 1).astype(np.float32))
    for spoilt in (wrong_half, outside, mirrored.replace(label=ill.label), ill):
        with pytest.raises(AssertionError):
            names["test_mirror"](ill, spoilt)
