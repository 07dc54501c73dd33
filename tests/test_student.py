"""A student who opens no solution can run every notebook to its end."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
sys.path.insert(0, str(ROOT / "notebooks"))
student = importlib.import_module("student")
sys.path.remove(str(ROOT / "notebooks"))


def is_solution(cell: nbformat.NotebookNode) -> bool:
    return "solution" in cell.metadata.get("tags", [])


def bound_and_read(source: str) -> tuple[set[str], set[str]]:
    """Return the names that a cell binds at its top level, and those that it reads before it binds them.

    A function's body counts as read where the function is defined. A name that a cell binds before it reads it is its own.
    """
    bound, read = set(), set()
    for statement in ast.parse(source).body:
        inside = {a.arg for n in ast.walk(statement) if isinstance(n, ast.arguments) for a in [*n.args, *n.kwonlyargs]}
        stored, loaded = set(), set()
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                (loaded if isinstance(node.ctx, ast.Load) else stored).add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                stored.add(node.name)
            elif isinstance(node, ast.alias):
                stored.add((node.asname or node.name).partition(".")[0])
        # In "for x in …: use(x)" and in comprehensions the name is bound by the statement that reads it.
        own = set() if isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else stored
        comprehended = {
            n.id
            for c in ast.walk(statement)
            if isinstance(c, ast.comprehension)
            for n in ast.walk(c.target)
            if isinstance(n, ast.Name)
        }
        read |= loaded - bound - inside - own - comprehended
        bound |= stored
    return bound, read


def borrowed(cells: list[nbformat.NotebookNode]) -> list[str]:
    """Return what cells take from a solution: "cell 40 reads `model` of the solution in cell 38"."""
    owner, found = {}, []
    for number, cell in enumerate(cells):
        if cell.cell_type != "code":
            continue
        bound, read = bound_and_read(cell.source)
        if is_solution(cell):
            owner |= dict.fromkeys(bound, number)
        else:
            found += [
                f"cell {number} reads `{name}` of the solution in cell {owner[name]}" for name in sorted(read & set(owner))
            ]
            for name in bound:
                owner.pop(name, None)
    return found


def test_borrowed_names_are_found():
    def cell(source, *tags):
        return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})

    cells = [
        cell("answer = None"),
        cell("def f(x):\n    y = x\n    return y\nanswer = [y for y in f(3)]", "solution"),
        cell("for y in range(3):\n    print(y)\ny = 3\nz = y"),
        cell("print(answer)"),
        cell("answer = 1"),
        cell("print(answer, f)"),
    ]
    assert borrowed(cells) == ["cell 3 reads `answer` of the solution in cell 1", "cell 5 reads `f` of the solution in cell 1"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_needs_a_solution(path):
    assert not borrowed(nbformat.read(path, as_version=4).cells)


def run_without_solutions(path: Path) -> None:
    """Run a notebook without its solutions, in its own folder and in JupyterLab's kernel."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not is_solution(cell)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEDSEG_SCALE": "cpu", "PYTHONPATH": str(ROOT)}
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute(env=environment)


@pytest.fixture(scope="session")
def student_runs(request) -> dict[Path, Future]:
    """The runs of all notebooks that this session asks for, two at a time, each on one core."""
    asked = [
        item.callspec.params["path"] for item in request.session.items if "student_runs" in getattr(item, "fixturenames", ())
    ]
    with ThreadPoolExecutor(2) as pool:
        futures = {path: pool.submit(run_without_solutions, path) for path in dict.fromkeys(asked)}
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_without_solutions(path, student_runs):
    try:
        student_runs[path].result()
    except CellExecutionError as error:
        pytest.fail(f"{path.name} stops where no solution was run:\n{error}", pytrace=False)


@pytest.fixture(scope="module")
def edition() -> dict[str, str]:
    """The files of the student edition, as if published in another repository."""
    return student.edition(ROOT, "someone/class", "spring")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_student_edition_has_no_solution(path, edition):
    """Nothing of a solution is left, and all else is as it was: code, pictures and texts but for the words on solutions."""
    text = edition[path.name]
    made, whole = nbformat.reads(text, as_version=4), nbformat.read(path, as_version=4)
    nbformat.validate(made)
    kept = [cell for cell in whole.cells if not is_solution(cell)]
    assert [cell.id for cell in made.cells] == [cell.id for cell in kept] and len(kept) < len(whole.cells)
    starter: set[str] = set()
    for cell in whole.cells:
        lines = [line.strip() for line in cell.source.split("\n")]
        if "exercise" in cell.metadata.get("tags", []):
            starter = set(lines)
        elif is_solution(cell):
            own = [line for line in lines if line not in starter and not re.match(r"#|(assert )?check_|$", line)]
            assert own and not any(set(own[:3]) <= {line.strip() for line in c.source.split("\n")} for c in made.cells)
    for cell, before in zip(made.cells, kept):
        if cell.cell_type == "code":
            assert cell.source == before.source
            assert [o.get("data") for o in cell.outputs] == [o.get("data") for o in before.outputs]
        else:
            assert not re.search(r"\b[Ss]olutions?\b", cell.source), "see SENTENCES in notebooks/student.py"
            assert cell.get("attachments") == before.get("attachments")
        if "check" in cell.metadata.get("tags", []):
            assert cell.metadata.cellView == "form" and cell.metadata.jupyter.source_hidden
    counts = [cell.execution_count for cell in made.cells if cell.cell_type == "code" and cell.execution_count]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_student_edition_links(path, edition):
    text = edition[path.name]
    header = json.loads(text)["cells"][0]["source"]
    assert f"colab.research.google.com/github/someone/class/blob/spring/{path.name}" in header
    assert f"mybinder.org/v2/gh/someone/class/spring?labpath={path.name}" in header
    markdown = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    local = [a for a in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"`[^`]*`|\$[^$]*\$", "", markdown)) if "://" not in a]
    assert not [a for a in local if a.endswith((".md", ".ipynb", ".py", ".csv")) and a not in edition]


def test_student_edition_is_written_again_but_over_nothing_else(tmp_path):
    out, files = tmp_path / "out", {"00_a.ipynb": "{}\n", "README.md": "read\n"}
    student.write(out, files)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    student.write(out, files)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    student.write(out, {"README.md": "read\n"})
    assert not (out / "00_a.ipynb").exists()

    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"did not write, or that were changed since: mine\.txt"):
        student.write(out, files)
    (out / "mine.txt").unlink()
    (out / "README.md").write_text("my answers")
    with pytest.raises(FileExistsError, match="README"):
        student.write(out, files)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="expected the name of a folder"):
        student.write(tmp_path / "file", files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"], "nothing temporary is left"
