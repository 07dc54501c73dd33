"""Grading: solutions pass, starters do not, and hostile answers harm nobody. The notebooks themselves are graded in slow tests."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
TRIED = (
    "00",
    "01",
    "05",
)  # numbers of notebooks whose grading is tried from end to end; 03 and 07 were tried too, and take longer
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
sys.path.insert(0, str(FOLDER))
grade = importlib.import_module("grade")
sys.path.remove(str(FOLDER))
LIMITS = {"seconds": 60, "memory": 1 << 30}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="grading needs processes that can be copied")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux shuts a process in")

CONTEXT = """
import numpy as np, torch
from medseg_lite import course
scale = 3.0
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
"""
CHECKS = {
    "scaled": """
@course.check
def check_scaled(function, seed=0):
    x = np.random.default_rng(seed).normal(size=5)
    found = function(x)
    if found.shape != x.shape or not np.allclose(found, scale * x):
        print("not yet: expected", scale * x)
        return False
    print("right")
    return True
""",
    "slope": """
def check_slope(function):
    x = torch.arange(3.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    print("slope", gradient.tolist())
    return torch.allclose(gradient, 2 * x)
""",
    "net": """
def check_net(net, optimizer):
    before = net.layer.weight.clone()
    net.layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    print("the weights moved" if (net.layer.weight != before).any() else "the weights did not move")
    return bool((net.layer.weight != before).any())
""",
}
STARTERS = {
    "scaled": "def scaled(x):\n    return x  # not yet\n\n\n_ = check_scaled(scaled)",
    "slope": "def square(x):\n    return x\n\n\ncheck_slope(square)",
    "net": "net = Net()\noptimizer = torch.optim.SGD(net.parameters(), lr=0)\n_ = check_net(net, optimizer)",
}
SOLUTIONS = {
    "scaled": "def scaled(x):\n    return scale * x\n\n\nassert check_scaled(scaled)",
    "slope": "def square(x):\n    return x**2\n\n\ncheck_slope(square)",
    "net": "optimizer = torch.optim.SGD(net.parameters(), lr=1)  # net is the starter's\nassert check_net(net, optimizer)",
}


def notebook(path: Path, answers: dict[str, str], *, solutions: bool = False) -> Path:
    """Write a small notebook of the exercises that have answers here."""
    cells = [nbformat.v4.new_code_cell(CONTEXT, id="context")]
    for name in answers:
        cells.append(nbformat.v4.new_code_cell(CHECKS[name], id=f"check-{name}", metadata={"tags": ["check"]}))
        cells.append(nbformat.v4.new_code_cell(answers[name], id=name, metadata={"tags": ["exercise"]}))
        if solutions:
            cells.append(nbformat.v4.new_code_cell(SOLUTIONS[name], id=f"s-{name}", metadata={"tags": ["solution"]}))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def graded(tmp_path: Path, answers: dict[str, dict[str, str]], limits: dict = LIMITS, seed: int = 5) -> dict[str, dict]:
    """Return the rows of grading, by student and exercise: `rows["alice"]["scaled"]`."""
    master = notebook(tmp_path / "course" / "90_small.ipynb", STARTERS, solutions=True)
    for student, given in answers.items():
        notebook(tmp_path / "submissions" / student / "90_small.ipynb", given)
    submissions, unknown = grade.collect(tmp_path / "submissions", {"90_small": grade.exercises(grade.read(master))})
    assert not unknown
    rows, fault = grade.grade(master, submissions, seed, limits)
    assert not fault
    found: dict[str, dict] = {}
    for row in rows:
        found.setdefault(row["student"], {})[row["exercise"].split()[1]] = row
    return found


def test_solutions_pass_and_starters_do_not(tmp_path):
    rows = graded(tmp_path, {"perfect": SOLUTIONS, "empty": STARTERS})
    assert all(row["passed"] for row in rows["perfect"].values()), rows
    assert not any(row["passed"] for row in rows["empty"].values()), rows
    assert rows["perfect"]["scaled"]["reason"] == "right" and rows["empty"]["scaled"]["reason"].startswith("not yet: expected")
    assert rows["empty"]["slope"]["reason"] == "slope [1.0, 1.0, 1.0]"
    assert rows["empty"]["net"]["reason"] == "the weights did not move"


def hostile(victim: Path) -> dict[str, str]:
    """Return answers to the first exercise that do harm or cheat, by name."""
    call = "\n_ = check_scaled(scaled)"
    wrong = "def scaled(x):\n    return x" + call
    known = [3 * float(x) for x in __import__("numpy").random.default_rng(0).normal(size=5)]
    return {
        "remove": f"import os\nos.remove({str(victim)!r})\n{wrong}",
        "overwrite": f"def scaled(x):\n    open({str(victim)!r}, 'w').write('mine')\n    return 3 * x{call}",
        "system": f"import os\nos.system('rm -f {victim}')\n{wrong}",
        "exit": f"import sys\nsys.exit(0)\n{wrong}",
        "leave": f"import os\n\n\ndef scaled(x):\n    os._exit(0){call}",
        "memory": f"def scaled(x):\n    return np.ones(1 << 32) + x[0]{call}",
        "forged check": f"from medseg_lite.course import Verdict\ncheck_scaled = lambda f: Verdict(True, 'right')\n{wrong}",
        "forged numpy": f"np.allclose = lambda *a, **k: True\ncourse.check = lambda f: (lambda *a, **k: True)\n{wrong}",
        "forged pickle": (
            "class Evil:\n    def __reduce__(self):\n        return eval, ('print(1)',)\n\n\n"
            f"def scaled(x):\n    return Evil(){call}"
        ),
        "table of known answers": f"def scaled(x):\n    return np.array({known}){call}",
        "equal to all": ("class All(np.ndarray):\n    pass\n\n\ndef scaled(x):\n    y = x.view(All)\n    return y" + call),
        "kill": f"import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n{wrong}",
        "fork": f"import os\nwhile True:\n    os.fork()\n{wrong}",
        "network": f"import socket\nsocket.create_connection(('127.0.0.1', 9))\n{wrong}",
        "syntax": "def scaled(x) return x",
        "another's name": "scaled = helper\n_ = check_scaled(scaled)",
        "=HYPERLINK(0)": "raise ValueError('=1+1')",
    }


@linux
def test_hostile_answers_fail_and_harm_nothing(tmp_path):
    """Whatever an answer does, it fails, and the student's next answer is graded as if it had not been."""
    victim = tmp_path / "victim.txt"
    victim.write_text("whole")
    answers = {name: {"scaled": cell} for name, cell in hostile(victim).items()}
    for name in ("kill", "forged numpy"):
        answers[name]["net"] = SOLUTIONS["net"]
    rows = graded(tmp_path, answers)
    assert victim.read_text() == "whole" and set(p.name for p in tmp_path.iterdir()) == {"victim.txt", "course", "submissions"}
    reasons = {student: row["scaled"]["reason"] for student, row in rows.items()}
    assert not [student for student, row in rows.items() if row["scaled"]["passed"]], reasons
    assert all(rows[name]["net"]["passed"] for name in ("kill", "forged numpy")), rows
    expected = {
        "remove": "not allowed",
        "exit": "SystemExit",
        "leave": "left Python",
        "memory": "Memory",
        "forged check": "not yet",
        "forged numpy": "not yet",
        "forged pickle": "cannot take",
        "table of known answers": "not yet",
        "syntax": "SyntaxError",
        "another's name": "name 'helper' is not defined",
    }
    assert not {student: reasons[student] for student, text in expected.items() if text not in reasons[student]}


def test_answers_that_never_end_are_ended(tmp_path):
    late = "import time\n\n\ndef scaled(x):\n    time.sleep(600)\n\n\n_ = check_scaled(scaled)"
    loop = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    rows = graded(tmp_path, {"loop": {"scaled": loop}, "late": {"scaled": late}}, limits={"seconds": 3, "memory": 1 << 30})
    assert not any(row["passed"] for of_one in rows.values() for row in of_one.values())
    assert all(re.match("took (longer|more) than 3 s", rows[name]["scaled"]["reason"]) for name in rows)


def test_cells_of_answers_are_found():
    exercise = grade.Exercise("1 a", "id", "check_a", ["a"], "a = 0\n_ = check_a(a)")

    def found(*cells):
        made = [{"source": text, "id": name, "metadata": {"tags": tags}} for text, name, *tags in cells]
        return grade.answer(made, exercise, {"s"})

    starter = ("a = 0\n_ = check_a(a)", "id", "exercise")
    assert found(starter) == starter[0] and found(("b = 1", "x")) is None
    assert found(starter, ("a = 1\ncheck_a(a)", "new")) == "a = 1\ncheck_a(a)", "a cell of one's own"
    assert found(("a = 2", "id"), ("a = 1\ncheck_a(a)", "new")) == "a = 2", "the exercise's own cell, if it was changed"
    assert found(starter, ("a = 9\nassert check_a(a)", "s")) == starter[0], "the course's solution is nobody's answer"
    assert found(starter, ("a = 9\nassert check_a(a)", "t", "solution")) == starter[0]
    assert found(("def check_a(a):\n    return True", "c")) is None


def test_submissions_are_found(tmp_path):
    course = {p.stem: grade.exercises(grade.read(p)) for p in NOTEBOOKS[:2]}
    for name in ("alice_00_start_here.ipynb", "bob/00_start_here.ipynb", "bob/copy of 01_what_a_cnn_computes (1).ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(NOTEBOOKS[int("01_" in name)].read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "carol.ipynb").write_text(NOTEBOOKS[1].read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "dave_00_start_here.ipynb").write_text("{", encoding="utf-8")
    (tmp_path / "other.ipynb").write_text('{"cells": []}', encoding="utf-8")
    (tmp_path / "bob" / "link.ipynb").symlink_to(tmp_path / "carol.ipynb")
    found, unknown = grade.collect(tmp_path, course)
    assert {(s.student, s.notebook[:2], bool(s.fault)) for s in found} == {
        ("alice", "00", False),
        ("bob", "00", False),
        ("bob", "01", False),
        ("carol", "01", False),
        ("dave", "00", True),
    }
    assert [p.name for p in unknown] == ["other.ipynb"]


def test_table(tmp_path):
    row = {"student": "=cmd", "notebook": "90_small", "exercise": "1 a", "passed": True, "reason": "right, and\nmore"}
    grade.write(tmp_path / "grades.csv", [row])
    with (tmp_path / "grades.csv").open(encoding="utf-8", newline="") as file:
        header, line = csv.reader(file)
    assert tuple(header) == grade.COLUMNS and line == ["'=cmd", "90_small", "1 a", "1", "right, and\nmore"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_exercise_can_be_graded(path):
    read = json.loads(path.read_text(encoding="utf-8"))
    listed = grade.exercises(read)
    assert len(listed) == sum("exercise" in grade.tags(cell) for cell in read["cells"]) >= 2
    checks = "\n".join(grade.source(cell) for cell in read["cells"] if "check" in grade.tags(cell))
    assert all(f"def {e.check}(" in checks for e in listed)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.name[:2] in TRIED], ids=lambda p: p.stem)
def test_notebooks_solutions_pass_and_starters_do_not(path):
    """With a secret seed, all solutions pass all checks, and no starter passes any."""
    course = grade.read(path)
    listed, cells = grade.exercises(course), course["cells"]
    solved = [
        {**cells[n], "source": grade.source(cells[n + 1])} for n, cell in enumerate(cells) if "exercise" in grade.tags(cell)
    ]
    starters = [cell for cell in cells if "exercise" in grade.tags(cell)]
    handed_in = [grade.Submission(n, path.stem, list(c)) for n, c in (("solved", solved), ("empty", starters))]
    rows, fault = grade.grade(path, handed_in, 20261130, {"seconds": 600, "memory": 4 << 30})
    assert not fault
    assert not [row for row in rows if row["passed"] != (row["student"] == "solved")]
    assert len(rows) == 2 * len(listed)
