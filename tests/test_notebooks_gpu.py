"""The GPU scale of every notebook on a pretended GPU: its own sizes, two updates a training, and zeros in place of convolutions.

So shapes, devices, number types and memory are tested, and claims are not: an `assert` is evaluated, and its value ignored.
Notebooks that are the same at both scales have nothing to test here.
"""

from __future__ import annotations

import ast
import json
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import fake_device
import IPython.display
import matplotlib.pyplot as plt
import pytest
import torch
from torch.testing import assert_close

from medseg_lite import devices, plotting

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SCALED = [p for p in sorted(FOLDER.glob("[0-9][0-9]_*.ipynb")) if '"accelerator"' in p.read_text(encoding="utf-8")]
MEMORY = 12e9  # of Colab's T4, with room for what cuDNN and CUDA need


class Unenforced(ast.NodeTransformer):
    """Turns `assert test, message` into `test`, and `raise AssertionError(...)` into what is raised."""

    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        return ast.copy_location(ast.Expr(node.test), node)

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        claim = isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "AssertionError"
        return ast.copy_location(ast.Expr(node.exc), node) if claim else node


def cells(path: Path) -> list[tuple[int, str]]:
    """Return the number and the source of every cell with code."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [(n, "".join(cell["source"])) for n, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"]


def run(path: Path) -> dict:
    """Run the cells of a notebook, one after the other, in one namespace, and return it. An error is told with its cell."""
    names = {"__name__": "__main__", "display": IPython.display.display}
    for number, source in cells(path):
        tree = ast.fix_missing_locations(Unenforced().visit(ast.parse(source)))
        try:
            exec(compile(tree, f"{path.name}, cell {number}", "exec"), names)
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__)[1:])
            raise RuntimeError(f"{path.name}, cell {number}: {type(error).__name__}: {error}\n{where}") from None
    return names


def compare(*tensors, **options) -> None:
    """Compare as `torch.testing.assert_close` does, but tell no difference in numbers."""
    try:
        assert_close(*tensors, **options)
    except AssertionError as error:
        if "attribute 'device'" in str(error):
            raise


@contextmanager
def lenient() -> Iterator[None]:
    """Within the block numbers may differ, nothing is displayed, and figures are drawn and not encoded."""
    with (
        mock.patch.object(torch.testing, "assert_close", compare),
        mock.patch.object(IPython.display, "display", lambda *_, **__: None),
        mock.patch.object(plotting, "show", lambda figure, alt, caption=None: plt.close(figure)),
    ):
        yield


def test_an_assert_is_evaluated_and_not_enforced(tmp_path):
    path = tmp_path / "99_small.ipynb"
    source = "def f():\n    assert seen.append(1), 'no'\n    raise AssertionError('no')\nseen = []\nassert f() == 3\nf()"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": source}]}), encoding="utf-8")
    assert run(path)["seen"] == [1, 1]


def test_an_error_names_its_cell(tmp_path):
    path = tmp_path / "99_small.ipynb"
    found = [{"cell_type": "markdown", "source": "a text"}, {"cell_type": "code", "source": "x = 1\nassert y"}]
    path.write_text(json.dumps({"cells": found}), encoding="utf-8")
    with pytest.raises(RuntimeError, match=re.escape("99_small.ipynb, cell 1: NameError: name 'y'")):
        run(path)


def test_two_devices_are_told_and_numbers_are_not():
    with fake_device.cuda(), lenient():
        torch.testing.assert_close(torch.zeros(2, device="cuda"), torch.ones(2, device="cuda"))
        with pytest.raises(AssertionError, match="device"):
            torch.testing.assert_close(torch.zeros(2, device="cuda"), torch.zeros(2))


@pytest.mark.slow
@pytest.mark.parametrize("path", SCALED, ids=lambda p: p.stem)
def test_runs_on_a_gpu(path, monkeypatch):
    monkeypatch.setenv("MEDSEG_SCALE", "gpu")
    monkeypatch.setenv("MEDSEG_STEPS", "2")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(devices, "fault_of", lambda device: None)  # zeros would look like a broken GPU
    with fake_device.cuda("T4", compute=False) as gpu, lenient():
        machine = run(path)["machine"]
    assert (machine.device, machine.scale) == ("cuda", "gpu")
    assert gpu.flops.total() > 0, "nothing was computed on the GPU"
    assert gpu.peak < MEMORY
