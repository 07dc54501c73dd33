"""Cells of a notebook, run by themselves on stored tables, of which one may be spoilt: then the claim must fail."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
READ = pd.read_csv


def read_cells(number: str) -> dict[str, str]:
    """Return the sources of a notebook's cells by their ids."""
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    return {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"]}


def run_cell(cells: dict[str, str], cell: str, names: dict) -> None:
    """Run a cell without its output; `names` are its variables, before and after."""
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(cells[cell], cell, "exec"), names)
    plt.close("all")


def spoil_table(monkeypatch, file: str, change: Callable | None) -> None:
    """Let `pandas.read_csv` change the stored table of this name. `change` changes a table in place, or returns another one."""

    def read(path, **options):
        table = READ(path, **options)
        if change is None or Path(path).name != f"{file}.csv":
            return table
        other = change(table)
        return table if other is None else other

    monkeypatch.setattr(pd, "read_csv", read)
