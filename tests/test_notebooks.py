"""The contract that every notebook keeps; `make test` also runs each of them through nbval."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
sys.path.insert(0, str(FOLDER))
execute, readme = importlib.import_module("execute"), importlib.import_module("readme")
sys.path.remove(str(FOLDER))
FIELDS = ("Paper", "You will learn", "Before this", "In class", "Time", "On a GPU", "Data", "Last executed")
SECTIONS = ("Exercises", "Where our version departs from the paper", "What to take away", "Going further")

MOST = {"cells": 60, "open lines": 450, "minutes in class": 90}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def code(notebook: dict) -> list[dict]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def test_there_are_notebooks():
    assert [p.name[:2] for p in NOTEBOOKS][:1] == ["00"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(path) -> dict:
    return read(path)


def test_header(path, notebook):
    header = source(notebook["cells"][0])
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert re.match(rf"# {path.stem[:2]} \S", header), "the title starts with the notebook's number"
    for field in FIELDS:
        assert re.search(rf"\*\*{field}\*\* \S", header), f"the header lacks **{field}**"
    assert re.search(r"\*\*Last executed\*\* \d{4}-\d\d-\d\d", header)
    assert re.search(r"\*\*Time\*\* [\d.]+ min on a 2-core CPU;", header)
    assert f"/notebooks/{path.name}" in header, "the Colab badge points at another file"
    minutes = float(re.search(r"\*\*Time\*\* ([\d.]+) min", header)[1])
    assert minutes <= 2.0, "one notebook takes at most two minutes on two CPU cores"


def length(notebook: dict) -> tuple[int, int, int]:
    """Return cells, open lines and minutes in class, in the order of `MOST`."""
    return readme.counted_cells(notebook), readme.open_lines(notebook), readme.class_minutes(notebook)


def test_length(notebook):
    """A class gets through a notebook."""
    over = {what: (n, limit) for (what, limit), n in zip(MOST.items(), length(notebook)) if n > limit}
    assert not over, f"longer than allowed (found, allowed): {over}; split it, cut it, or fold code that only draws"


def test_minutes_in_class(notebook):
    """The header says how long a class needs: what its cells add up to."""
    assert readme.stored_class_minutes(notebook) == readme.class_minutes(notebook), "run `make readme`"


def test_scale(path, notebook):
    """A notebook says what the GPU scale changes, uses `machine` for it and asks Colab for a GPU; or it says why nothing changes."""
    header = source(notebook["cells"][0])
    same = bool(re.search(r"\*\*On a GPU\*\* the same: \S", header))
    asked = {key: value for key, value in notebook["metadata"].items() if key in execute.COLAB}
    assert asked == ({} if same else {"accelerator": "GPU", "colab": {"gpuType": "T4"}})
    assert same != any("machine." in source(cell) for cell in code(notebook)[1:])
    time = re.search(r"\*\*Time\*\* [\d.]+ min on a 2-core CPU; ([^\n]*?)\.?\n", header)[1]
    if same:
        assert time == "no faster with a GPU"
    elif not re.fullmatch(r"[\d.]+ min on a GPU", time):  # measured by `execute.py`
        assert time == f"about {max(1, round(minutes_on_a_t4()[path.stem]))} min on Colab's T4, estimated"


def minutes_on_a_t4() -> dict[str, float]:
    """Return the estimated minutes of each notebook that has a GPU scale."""
    page = (FOLDER.parent / "benchmarks" / "gpu_notebooks.md").read_text(encoding="utf-8")
    return {stem: float(minutes) for stem, minutes in re.findall(r"^\| (\d\d_\w+) \| ([\d.]+) \|", page, re.MULTILINE)}


def test_estimates_for_a_gpu():
    """Colab's T4 runs every notebook within 15 minutes and 12 GB, and the README says no less than the estimates."""
    page = (FOLDER.parent / "benchmarks" / "gpu_notebooks.md").read_text(encoding="utf-8")
    rows = [
        [float(cell) for cell in row.split(" | ")[1:5]] for row in re.findall(r"^\| (\d\d_\w+ \| .*) \|$", page, re.MULTILINE)
    ]
    assert set(minutes_on_a_t4()) == {path.stem for path in NOTEBOOKS if "accelerator" in read(path)["metadata"]}
    assert all(0 < t4 <= 15 and a100 <= t4 and max(gpu, main) <= 12 for t4, a100, gpu, main in rows)
    text = " ".join((FOLDER.parent / "README.md").read_text(encoding="utf-8").split())
    most = int(re.search(r"No GPU has been timed yet: on Colab's T4 a notebook should take (\d+) minutes at most", text)[1])
    assert most - 1 < max(minutes_on_a_t4().values()) <= most


def test_runs_are_kept_on_request_only(notebook):
    """On Colab `course.keep` asks for Google Drive, which would stop a run that nobody watches."""
    text = "\n".join(source(c) for c in code(notebook))
    assert text.count("course.keep(") == len(
        re.findall(r'^KEEP = False .*\nruns = course\.keep\("\w+"\) if KEEP else None$', text, re.M)
    )


def test_setup_is_first_and_touches_nothing_installed(notebook):
    first = source(code(notebook)[0])
    assert "find_spec" in first and "course.start()" in first
    assert not re.search(r"pip.*(torch|numpy)", first)


def test_sections(notebook):
    text = "\n".join(source(c) for c in notebook["cells"] if c["cell_type"] == "markdown")
    for section in SECTIONS:
        assert re.search(rf"^#+ {section}", text, re.MULTILINE), f"no section '{section}'"


def test_executed_in_order_without_errors(notebook):
    cells = [c for c in code(notebook) if source(c).strip()]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    assert not [o for c in cells for o in c["outputs"] if o.get("name") == "stderr"], "warnings or bars were stored"


def test_claims_are_checked(notebook):
    assert sum("assert" in source(c) for c in code(notebook)) >= 3
    assert sum("nbval-check-output" in tags(c) for c in code(notebook)) >= 2, "tag cells whose output nbval compares"


def test_exercises_have_checks_and_collapsed_solutions(notebook):
    cells = notebook["cells"]
    starters = [n for n, c in enumerate(cells) if "exercise" in tags(c)]
    solutions = [n for n, c in enumerate(cells) if "solution" in tags(c)]
    assert len(starters) >= 2 and len(solutions) == len(starters)
    for n in solutions:
        assert cells[n]["metadata"].get("jupyter", {}).get("source_hidden"), "solutions are collapsed"
        assert "check" in source(cells[n]), "the solution runs the exercise's own check"


def test_stored_size_and_metadata(path, notebook):
    assert path.stat().st_size < 3_000_000


def test_stored_widgets_are_pictures(notebook):
    before = json.dumps(notebook)
    execute.strip(notebook)
    assert json.dumps(notebook) == before, "run notebooks/execute.py --strip: JupyterLab shows an error instead of the picture"


def test_strip_leaves_the_picture():
    view = execute.WIDGET_VIEW
    widget = {
        "output_type": "display_data",
        "data": {view: {"model_id": "1"}, "image/png": "iVBO"},
        "metadata": {"image/png": {}},
    }
    text = {"output_type": "stream", "name": "stdout", "text": "1"}
    notebook = {"metadata": {"widgets": {}, "kernelspec": {}}, "cells": [{"outputs": [widget, text]}, {"source": "a text"}]}
    execute.strip(notebook)
    assert widget["data"] == {"image/png": "iVBO"} and notebook["metadata"] == {"kernelspec": {}}
    assert notebook["cells"][0]["outputs"] == [widget, text]


def test_strip_leaves_warnings_and_no_bars():
    bar = "\rtraining:   0%|          | 0/2 [00:00<?, ?it/s]\rtraining: 100%|██████████| 2/2 [00:00<00:00]\n"
    outputs = [{"output_type": "stream", "name": "stderr", "text": text} for text in (bar, f"{bar}a warning\n")]
    notebook = {"metadata": {}, "cells": [{"outputs": outputs}]}
    execute.strip(notebook)
    assert [output["text"] for output in notebook["cells"][0]["outputs"]] == ["a warning\n"]


def test_executing_keeps_what_asks_colab_for_a_gpu():
    asked = {"accelerator": "GPU", "colab": {"gpuType": "T4"}}
    kept = execute.metadata({**asked, "kernelspec": {"name": "mine"}, "widgets": {}, "vscode": 1})
    assert {key: kept[key] for key in asked} == asked and set(kept) == {*asked, "kernelspec", "language_info"}
    assert kept["kernelspec"]["name"] == "python3" and set(execute.metadata({})) == {"kernelspec", "language_info"}


def test_every_picture_has_alt_text(notebook):
    for cell in code(notebook):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
                assert len(alt) > 20, f"a picture of cell {cell['execution_count']} has no alt text"


def test_speaks_of_the_project_alone(notebook):
    text = json.dumps(notebook)
    clone = str(Path(__file__).resolve().parent.parent)
    assert clone not in text and not re.search(r"/root/|/home/\w|/tmp/|site-packages", text), (
        "a path of this machine was stored"
    )


TITLE = re.compile(
    r"# @title (Solution: open me when you have tried|Check of exercise \d|(Figure|Claims): \S.*) \{ display-mode: \"form\" \}\n"
)


def folded(cell: dict) -> bool:
    return bool(cell["metadata"].get("jupyter", {}).get("source_hidden"))


def test_patients_are_not_mirrored(notebook):
    text = "\n".join(source(c) for c in code(notebook))
    assert 'origin="lower"' not in text, "draw anatomy through plotting.cut or plotting.slices"
    assert not re.search(r"imshow\([^\n]*\.T\b", text), "draw anatomy through plotting.cut or plotting.slices"


def test_folded_cells_give_nothing_away(notebook):
    for cell in code(notebook):
        first = source(cell).split("\n")[0]
        if "solution" in tags(cell):
            assert folded(cell) and first.startswith("# @title Solution")
        elif re.search(r"^def check_", source(cell), re.MULTILINE) and "exercise" not in tags(cell):
            assert folded(cell) and first.startswith("# @title Check"), first
        if folded(cell):  # JupyterLab shows the first line, Colab the title
            assert TITLE.match(source(cell)) and cell["metadata"].get("cellView") == "form", first


def test_drawing_code_is_folded(notebook):
    drawing = [source(c) for c in code(notebook) if not folded(c) and re.search(r"\b(plt|figure|axes|ax)\.", source(c))]
    lines = sum(len(text.split("\n")) for text in drawing)
    assert lines <= 40, f"{lines} lines in {len(drawing)} open cells that draw; fold those that only make a figure"


def test_nothing_needs_a_solution(notebook):
    known: set[str] = set()  # what a student has who opens no solution
    hidden: set[str] = set()  # what only solutions define
    for cell in code(notebook):
        tree = ast.parse(re.sub(r"^[%!].*", "", source(cell), flags=re.MULTILINE))
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
        bound = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        bound |= {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        if "solution" in tags(cell):
            hidden |= bound - known
            continue
        needed = {n.id for n in names if isinstance(n.ctx, ast.Load)} & (hidden - known - bound)
        assert not needed, f"{sorted(needed)} come from a solution that a student may have skipped"
        known |= bound


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_tables_have_a_text_form(path):
    """Text is what terminals, screen readers and comparisons see: it must not be the address of an object."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            text = "".join((output.get("data") or {}).get("text/plain") or "")
            assert not re.search(r"<[\w.]+ (object )?at 0x[0-9a-f]+>", text), f"{cell['id']}: {text[:80]}"
