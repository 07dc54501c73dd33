"""The claims of notebook 02 that stored runs decide: each check fails for a method that does not do what the claim says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from claim_cells import NOTEBOOKS, read_cells, run_cell, spoil_table

from medseg_lite import claims, inference, metrics, models, paths, plotting, postprocess, statistics
from medseg_lite.volume import Case

sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))
import cascades

CELLS = read_cells("02")
FIRST, LONGER = cascades.FIRST, cascades.LONGER
PHASE1, BAYES, BOTH = cascades.READINGS
MINE = [
    "havaei-table1-phases",
    "finzel-sec3.1-phases",
    "havaei-table1-paths",
    "finzel-sec3.1-two-paths",
    "havaei-table2-cascades",
    "finzel-sec3.1-joint",
    "havaei-sec3-flat",
]


def brain() -> tuple[Case, np.ndarray]:
    """Return a round brain with a round tumour, and a prediction with a flat piece near the skull besides."""
    where = np.indices((48, 48, 48)) - 24
    mask, tumour = (np.sqrt((where**2).sum(axis=0)) < r for r in (22, 6))
    found = tumour.astype(np.uint8)
    found[43, 16:32, 16:32] = 1  # one voxel thick
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    image = np.zeros((1, 48, 48, 48), np.float32)
    return Case(image=image, channels=("flair",), label=tumour.astype(np.uint8), mask=mask, affine=affine), found * mask


def run(last: str, monkeypatch, file: str = "", change=None, rule=postprocess.remove_flat_components) -> dict:
    """Run a cell on the stored tables; one file is changed, or the rule. Of the cells that train, only the names are given."""
    spoil_table(monkeypatch, file, change)
    case, label = brain()
    names = {"np": np, "pd": pd, "claims": claims, "paths": paths, "statistics": statistics, "metrics": metrics}
    names |= {"plotting": plotting, "postprocess": SimpleNamespace(remove_flat_components=rule)}
    names |= {"three": [case], "found": {("both paths", n): [label] for n in (1, 2)}, "pair": {"input cascade": [label]}}
    for cell in ("two-27-phases", *([last] if last != "two-27-phases" else [])):
        run_cell(CELLS, cell, names)
    return names


def rows(table: pd.DataFrame, network: str, reading: str = BOTH) -> pd.Series:
    return (table["network"] == network) & (table["reading"] == reading)


def copy(to: tuple, of: tuple):
    """Give a network the results of another one, seed by seed and brain by brain."""

    def change(table):
        numbers = table.select_dtypes("number").columns.drop("seed")
        table.loc[rows(table, *to), numbers] = table.loc[rows(table, *of), numbers].to_numpy()

    return change


def add(by: float, column: str, *which: tuple):
    """Add to a score of some networks."""

    def change(table):
        for one in which:
            table.loc[rows(table, *one), column] += by

    return change


def puzzle(of: str, by: float = 0.0):
    """Give the network of both paths the results of one of them on the textures, and add to them."""

    def change(table):
        mine, other = ((table["puzzle"] == "textures") & (table["method"] == m) for m in ("two paths", of))
        table.loc[mine, "dice"] = table.loc[other, "dice"].to_numpy() + by

    return change


def cleaned(by: float):
    """Let the rule against flat pieces change the Dice by so much, in every brain."""
    return lambda table: table.__setitem__("Dice whole, cleaned", table["Dice whole"] + by)


@pytest.mark.parametrize("cell", ["two-27-phases", "two-29", "two-43", "two-46"])
def test_all_claims_hold_on_the_stored_tables(cell, monkeypatch):
    run(cell, monkeypatch)


ALL = [(name, BOTH) for name in cascades.SINGLE]
SPOILT = [
    ("two-27-phases", "cascades", copy((FIRST, BOTH), (FIRST, PHASE1))),
    ("two-27-phases", "cascades", add(1, "expected / true volume", (FIRST, BOTH))),
    ("two-27-phases", "cascades", add(30, "Dice", *ALL)),
    ("two-27-phases", "cascades", add(-30, "Dice", *ALL)),
    ("two-29", "puzzles", puzzle("local path")),
    ("two-29", "puzzles", puzzle("global path", 0.2)),
    ("two-43", "cascades", copy(("input cascade", BOTH), (LONGER, BOTH))),
    ("two-43", "cascades", add(30, "Dice", *((name, BOTH) for name in cascades.CASCADES))),
    ("two-43", "cascades", add(-30, "Dice", *((name, BOTH) for name in cascades.CASCADES))),
    ("two-43", "cascades", add(-200, "updates", (LONGER, BOTH))),
    ("two-46", "cascades_readings", cleaned(0)),
    ("two-46", "cascades_readings", cleaned(-5)),
]


@pytest.mark.parametrize(("cell", "file", "change"), SPOILT)
def test_a_spoilt_table_breaks_its_claim(cell, file, change, monkeypatch):
    with pytest.raises(AssertionError):
        run(cell, monkeypatch, file, change)


@pytest.mark.parametrize("rule", [lambda label, case: label, lambda label, case: np.zeros_like(label)])
def test_a_rule_that_removes_nothing_or_everything_is_caught(rule, monkeypatch):
    with pytest.raises(AssertionError):
        run("two-46", monkeypatch, rule=rule)


def test_numbers_of_the_ledger_are_printed_by_the_notebook():
    (path,) = NOTEBOOKS.glob("02_*.ipynb")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    printed = " ".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", "")) for o in outputs)
    printed = set(re.findall(r"\d+\.\d+", printed))
    ledger = claims.table()
    lost = {name: set(re.findall(r"\d+\.\d+", ledger[name].effect)) - printed for name in MINE}
    assert not {name: numbers for name, numbers in lost.items() if numbers}


# ------------------------------------------------------------------------------------------------------- the experiment


@pytest.mark.parametrize("joins", cascades.BUILDERS)
def test_a_second_network_with_stored_probabilities_is_that_of_the_cascade(joins):
    torch.manual_seed(0)
    first = models.two_path_cnn(width=cascades.SETTINGS["width"], init="he").eval()
    cascade = cascades.build_second(joins, first, 0).eval()
    for network in (cascade.first, cascade.second):
        torch.nn.init.normal_(network.output.weight, std=0.02)
    image = torch.randn(1, 4, 70, 73)
    with torch.no_grad():
        heard = torch.cat([image[..., 16:-16, 16:-16], cascade.first(image).softmax(dim=1)], dim=1)
        mine, whole = cascades.Second(cascade.second)(heard), cascade(image)
    rim = 32 - cascade.margin
    theirs = whole[..., rim : rim + mine.shape[2], rim : rim + mine.shape[3]]
    assert mine.std() > 0.1 and torch.allclose(mine, theirs, atol=1e-4)


def test_probabilities_slice_by_slice_are_those_of_inference(noise_case):
    torch.manual_seed(0)
    model = models.two_path_cnn(width=0.1, init="he").eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    case = noise_case((40, 44, 3), channels=("flair", "t1", "t1c", "t2"))
    mask = np.zeros(case.shape, bool)
    mask[5:30, 9:40, :2] = True
    case = case.replace(mask=mask)
    expected = inference.predict(model, case, output="probabilities", progress=False)
    assert expected.std() > 0.1 and np.allclose(cascades.segment(model, case), expected, atol=1e-4)
