"""Notebook 04's claims about lesions and about class balance fail where the data or the scores are spoilt."""

from types import FunctionType

import numpy as np
import pytest
from claim_cells import read_cells, run_cell

CELLS = read_cells("04")


@pytest.fixture(scope="module")
def names() -> dict:
    found = {"display": lambda *_: None}
    for cell in ("cell-02", "cell-04", "fig1-claim", "balance-table"):
        run_cell(CELLS, cell, found)
    found["WORDS"] = {"half": "", "chosen": ""}  # of the figure
    run_cell(CELLS, "balance-claims", found)
    return found


def brighter(case):
    """Return a case whose lesions are far brighter than any tissue."""
    return case.replace(image=case.image + 20 * (case.label == 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda cases: [cases[0]] * len(cases), "sizes differ"),
        (
            lambda cases: [c.replace(label=cases[0].label if n else cases[9].label) for n, c in enumerate(cases)],
            "places differ",
        ),
        (lambda cases: [brighter(c) for c in cases], "they overlap"),
    ],
)
def test_figure_1(names, spoil, message):
    spoilt = spoil(names["train"] + names["held_out"])
    with pytest.raises(AssertionError, match=message):
        run_cell(CELLS, "fig1-claim", {**names, "train": spoilt[:-4], "held_out": spoilt[-4:]})


SCORES = ["sensitivity", "specificity", "precision", "dice"]


def constant(stored, method):
    """A network that calls every voxel healthy."""
    mine = stored.method == method
    stored.loc[mine, SCORES] = [0.0, 1.0, 0.0, 0.0]
    stored.loc[mine, "alive"] = False


def copied(stored, method, rival, cut=None):
    """Two schemes that are one, or two thresholds that are one."""
    mine, other = ((stored.method == m) & (stored.cut == c if c else True) for m, c in ((method, cut), (rival, cut and "half")))
    stored.loc[mine, SCORES] = stored.loc[other, SCORES].to_numpy()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: constant(s, "longer P_uni"),
        lambda s: copied(s, "longer P_uni", "longer P_eq"),
        lambda s: copied(s, "longer P_eq", "longer S-25"),
        lambda s: [copied(s, m, m, "chosen") for m in ("longer P_eq", "longer S-25")],
        lambda s: copied(s, "S-19", "S-29"),
    ],
    ids=["constant", "one kind of patches", "P_eq is S-25", "one threshold", "one size"],
)
def test_figure_6(names, spoil):
    stored = names["stored"].copy()
    spoil(stored)
    spoilt = {**names, "stored": stored}
    assert np.isfinite(stored[SCORES]).all(axis=None)
    spoilt["of_runs"] = FunctionType(names["of_runs"].__code__, spoilt)  # the cell's function, which reads the spoilt table
    with pytest.raises(AssertionError):
        run_cell(CELLS, "balance-claims", spoilt)
