"""The claims of notebook 06 that stored runs decide: each check fails for a method that does not do what the claim says."""

from __future__ import annotations

import numpy as np
import pytest
from claim_cells import read_cells, run_cell, spoil_table

CELLS = read_cells("06")
IN_ORDER = ["cell-02", "variants", "strokes", "cell-37", "cell-39", "cell-40", "cell-44", "acquisition", "place"]


def run(last: str, monkeypatch, file: str = "", change=None) -> None:
    """Run the cells up to `last` on the stored tables; one file is changed for that cell and those before it."""

    spoil_table(monkeypatch, file, change)
    names: dict = {}
    needed = {"cell-37": ["strokes"], "cell-40": ["cell-39"], "cell-44": ["cell-39"], "place": ["strokes"]}
    needed["acquisition"] = ["strokes", "cell-39", "cell-44"]
    for cell in ["cell-02", *needed.get(last, []), last]:
        run_cell(CELLS, cell, names)


def copy(where: dict, source: dict, columns: list[str]):
    """Give the rows with some values the results of others, seed by seed and case by case."""

    def change(table):
        to, of = (np.logical_and.reduce([table[k] == v for k, v in values.items()]) for values in (where, source))
        table.loc[to, columns] = np.resize(table.loc[of, columns].to_numpy(), (to.sum(), len(columns)))

    return change


def lift(method: str, by: float):
    """Add to the Dice of a method."""
    return lambda table: table.__setitem__(
        "dice", table["dice"] + by * ((table["method"] == method) & (table["task"] == "stroke"))
    )


def all_set(column: str, value):
    return lambda table: table.__setitem__(column, value(table))


TABLE_1 = ["dice", "precision", "sensitivity", "assd", "hausdorff"]
NETWORK, ENSEMBLE = {"classifier": "DeepMedic"}, {"classifier": "ensemble of 3"}
PAPER, KNOWN = {"variant": "as in the paper"}, {"set": "known"}


@pytest.mark.parametrize("cell", IN_ORDER[1:])
def test_the_claims_hold(cell, monkeypatch):
    run(cell, monkeypatch)


@pytest.mark.parametrize(
    ("cell", "file", "change"),
    [
        ("variants", "deepmedic_variants", copy({"variant": "low resolution alone"}, PAPER, ["dice"])),
        ("variants", "deepmedic_variants", all_set("dice", lambda t: t.dice + 0.2 * (t.variant == "interpolated features"))),
        ("strokes", "deepmedic_scales", lift("DeepMedic", 0.1)),
        ("strokes", "deepmedic_scales", lift("DeepMedic", -0.2)),
        ("strokes", "deepmedic_scales", lift("BigDeep+", -0.1)),
        ("cell-37", "deepmedic_scales", all_set("cpu_seconds", lambda t: t.cpu_seconds * (1 + (t.method == "Large2dSeg")))),
        ("cell-40", "deepmedic_table1", copy(NETWORK | {"variant": "threshold"}, NETWORK | {"variant": "half"}, TABLE_1)),
        ("cell-40", "deepmedic_table1", copy(NETWORK | {"variant": "CRF"}, NETWORK | {"variant": "threshold"}, TABLE_1)),
        ("cell-40", "deepmedic_table1", copy(ENSEMBLE | {"variant": "CRF"}, ENSEMBLE | {"variant": "threshold"}, TABLE_1)),
        ("cell-40", "deepmedic_table1", copy(ENSEMBLE, NETWORK | {"seed": 0.0}, TABLE_1)),
        ("cell-44", "deepmedic_table1", all_set("found_ml", lambda t: t.true_ml)),
        ("cell-44", "deepmedic_table1_lesions", all_set("found", lambda t: 0.5 + 0 * t.found)),
        ("acquisition", "deepmedic_acquisition", copy({"set": "D"}, KNOWN, ["dice"])),
        ("acquisition", "deepmedic_acquisition", all_set("dice", lambda t: t.dice + 0.2 * (t.training == "random scanners"))),
        (
            "place",
            "deepmedic_scales_place",
            all_set("pathway", lambda t: t.pathway.map({"normal": "low resolution"}).fillna("normal")),
        ),
    ],
)
def test_a_method_that_does_not_work_breaks_them(cell, file, change, monkeypatch):
    with pytest.raises(AssertionError):
        run(cell, monkeypatch, file, change)


@pytest.mark.parametrize(
    ("cell", "file", "change"),
    [
        ("variants", "deepmedic_variants", all_set("dice", lambda t: t.dice + 0.04 * (t.variant == "as in the paper"))),
        # Networks and their ensembles gain alike.
        (
            "cell-40",
            "deepmedic_table1",
            all_set("dice", lambda t: t.dice + 0.05 * t.classifier.str.contains("DeepMedic|ensemble")),
        ),
    ],
)
def test_a_better_result_breaks_nothing(cell, file, change, monkeypatch):
    run(cell, monkeypatch, file, change)
