"""The claims of notebook 08 that stored runs decide: each check fails for a method that does not do what the claim says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from claim_cells import read_cells, run_cell, spoil_table

from medseg_lite import course

CELLS = read_cells("08")
BONES = ["metacarpal", "proximal", "middle", "distal"]
PULL = pd.DataFrame(
    {"cross-entropy": [0.06, 4.0], "Jaccard distance": [0.8, 85.0]},
    index=["pull of distal, %", "left after the best single answer, %"],
)


def run(last: str, monkeypatch, file: str = "", change=None, **given) -> dict:
    """Run the cells up to `last` on the stored tables; one file is changed. The cells that train or make hands are left out."""

    spoil_table(monkeypatch, file, change)
    names = {"BONES": BONES, "balance": PULL, "rare": course.puzzle("rare"), "display": lambda *_: None, "WORD": {}} | given
    names |= {"decoders": {}, "held_out": [None, None]}
    claims = ["unet-36", "unet-claims"]
    before = {"unet-claims": claims[:1], "unet-37-test": [*claims, "unet-37"], "unet-eq6": claims[:1], "unet-42": claims}
    for cell in ["unet-02", *before[last], last]:
        run_cell(CELLS, cell, names)
    return names


def copy(to: str, of: str, columns=tuple(BONES)):
    """Give a variant the results of another one, fold by fold and hand by hand."""

    def change(table):
        mine, other = table["variant"] == to, table["variant"] == of
        values = table.loc[other, list(columns)].to_numpy()
        table.loc[mine, list(columns)] = np.resize(values, (mine.sum(), len(columns)))

    return change


def exchange(a: str, b: str):
    return lambda table: table.__setitem__("variant", table["variant"].replace({a: b, b: a}))


def lift(variant: str, by: float, bones=tuple(BONES)):
    """Add to the Dice of a variant."""

    def change(table):
        table.loc[table["variant"] == variant, list(bones)] += by

    return change


def background(variant: str):
    """A network that says background everywhere."""
    return lambda table: table.__setitem__(BONES, table[BONES].mul(table["variant"] != variant, axis=0))


def test_all_claims_hold_on_the_stored_tables(monkeypatch):
    for cell in ("unet-claims", "unet-37-test", "unet-eq6", "unet-42"):
        run(cell, monkeypatch)


def fits(variant: str, by: float):
    """Add to the fit of a variant's feature maps."""
    return lambda table: table.__setitem__("dice", table["dice"] + by * (table["variant"] == variant))


CURVE = (*BONES, "jaccard_distance")


@pytest.mark.parametrize(
    ("cell", "file", "change"),
    [
        ("unet-claims", "hands_scores", copy("no skips", "Jaccard")),
        ("unet-claims", "hands_scores", exchange("Jaccard", "no skips")),
        ("unet-claims", "hands_scores", copy("cross-entropy", "Jaccard")),
        ("unet-claims", "hands_scores", exchange("Jaccard", "cross-entropy")),
        ("unet-claims", "hands_scores", background("cross-entropy")),
        ("unet-claims", "hands_scores", background("no skips")),
        ("unet-claims", "hands_scores", background("one map")),
        ("unet-claims", "hands_scores", copy("1/f", "Jaccard")),
        ("unet-claims", "hands_curves", exchange("Jaccard", "cross-entropy")),
        ("unet-claims", "hands_curves", copy("cross-entropy", "Jaccard", CURVE)),
        ("unet-37-test", "hands_curves", exchange("Jaccard", "one map")),
        ("unet-37-test", "hands_curves", copy("one map", "Jaccard", CURVE)),
        ("unet-37-test", "hands_scores", lift("sum", 0.2)),
        ("unet-37-test", "hands_scores", lift("sum", -0.2)),
        ("unet-37-test", "hands_scores", lift("one map", 0.2)),
        ("unet-37-test", "hands_scores", lift("one map", -0.2)),
        ("unet-42", "hands_maps", fits("sum", 0.4)),
        ("unet-42", "hands_maps", fits("Jaccard", -0.4)),
    ],
)
def test_a_spoilt_table_breaks_its_claim(cell, file, change, monkeypatch):
    with pytest.raises(AssertionError):
        run(cell, monkeypatch, file, change)


def test_a_loss_without_a_j_for_each_class_is_caught(monkeypatch):
    """Its pull is that of cross-entropy."""
    for spoilt in (PULL.assign(**{"Jaccard distance": PULL["cross-entropy"]}), PULL.iloc[:, ::-1].set_axis(list(PULL), axis=1)):
        with pytest.raises(AssertionError):
            run("unet-claims", monkeypatch, balance=spoilt)
