"""Grade submissions by the exercises' checks, with secret seeds. `make grade` calls this script.

    python notebooks/grade.py submissions                      # grades.csv, and the seed that was drawn
    python notebooks/grade.py submissions --seed 7 --out week3.csv

A submission is a notebook, `submissions/alice_05_deeper.ipynb`, or a folder of notebooks, `submissions/alice/05_deeper.ipynb`. Only
the cells of exercises count. Each runs after the course's own cells, in a process that is shut in (`judge.py`, `sandbox.py`).
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import os
import re
import secrets
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from badges import ROOT, notebooks
from student import tags

from medseg_lite.paths import atomic_write

COLUMNS = ("student", "notebook", "exercise", "passed", "reason")
LARGEST_SUBMISSION = 50_000_000  # bytes
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")


@dataclass
class Exercise:
    """An exercise of a notebook.

    Attributes:
        name: its place among the notebook's exercises, and the name of its check: "1 voxel".
        cell: `id` of its cell.
        check: name of its check, a function.
        arguments: what the starter gives to the check, as source.
        starter: source of its cell.
    """

    name: str
    cell: str
    check: str
    arguments: list[str]
    starter: str


@dataclass
class Submission:
    """A notebook that somebody handed in.

    Attributes:
        student: name of the student, that of the folder or the beginning of the file's name.
        notebook: name of the course's notebook that it is, such as "05_deeper".
        cells: its code cells.
        fault: why it cannot be graded, or "".
    """

    student: str
    notebook: str
    cells: list[dict] = field(default_factory=list)
    fault: str = ""


def source(cell: dict) -> str:
    text = cell.get("source", "")
    return text if isinstance(text, str) else "".join(map(str, text))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def exercises(notebook: dict) -> list[Exercise]:
    """Return the exercises of a course's notebook.

    Raises:
        ValueError: an exercise calls no check, or two checks have one name.
    """
    found = []
    for cell in notebook["cells"]:
        if "exercise" not in tags(cell):
            continue
        calls = [
            node.value if isinstance(node, (ast.Expr, ast.Assign)) else None
            for node in ast.parse(re.sub(r"^[%!].*", "", source(cell), flags=re.MULTILINE)).body
        ]
        calls = [c for c in calls if isinstance(c, ast.Call) and getattr(c.func, "id", "").startswith("check_")]
        if len(calls) != 1:
            raise ValueError(f"the exercise in cell {cell['id']} calls {len(calls)} checks; expected one")
        check = calls[0].func.id
        name = f"{len(found) + 1} {check.removeprefix('check_')}"
        found.append(Exercise(name, cell["id"], check, [ast.unparse(a) for a in calls[0].args], source(cell)))
    if len({e.check for e in found}) < len(found):
        raise ValueError("two exercises have checks of the same name; rename one, so that answers can be told apart")
    return found


def answer(cells: list[dict], exercise: Exercise, solutions: set[str]) -> str | None:
    """Return the source of a submission's answer to an exercise.

    It is the exercise's own cell. Where that is gone or as it was, it is the last cell that calls the check: Colab and careless hands
    make new cells. The course's own solutions do not count.
    """
    cells = [c for c in cells if c.get("id") not in solutions and "solution" not in _tags(c)]
    calls = re.compile(rf"^\s*(_\s*=\s*|assert\s+)?{exercise.check}\s*\(", re.MULTILINE)
    asking = [source(c) for c in cells if calls.search(source(c))]
    own = [source(c) for c in cells if c.get("id") == exercise.cell]
    changed = [text for text in own if text.strip() != exercise.starter.strip()]
    for kind in (changed, [text for text in asking if text.strip() != exercise.starter.strip()], own, asking):
        if kind:
            return kind[-1]
    return None


def _tags(cell: dict) -> list:
    metadata = cell.get("metadata")
    found = metadata.get("tags") if isinstance(metadata, dict) else None
    return found if isinstance(found, list) else []


def submission(path: Path, student: str | None, course: dict[str, list[Exercise]]) -> Submission | None:
    """Read a submission. None stands for a notebook that is none of the course's."""
    stem = next((s for s in sorted(course, reverse=True) if s in path.stem), None)
    cells, fault = [], ""
    try:
        if path.stat().st_size > LARGEST_SUBMISSION:
            raise ValueError(f"it has {path.stat().st_size / 1e6:.0f} MB, more than {LARGEST_SUBMISSION / 1e6:.0f}")
        cells = [c for c in read(path)["cells"] if isinstance(c, dict) and c.get("cell_type") == "code"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fault = f"the notebook cannot be read ({type(error).__name__}: {error}); hand in the .ipynb file that JupyterLab or Colab saves"
    if stem is None:
        text = "\n".join(source(c) for c in cells)
        known = {s: sum(e.check in text for e in listed) for s, listed in course.items()}
        stem = max(known, key=known.get)
        if not known[stem]:
            return None
    name = student or path.stem.replace(stem, "").strip(" _-") or path.stem
    return Submission(name, stem, cells, fault)


def collect(folder: Path, course: dict[str, list[Exercise]]) -> tuple[list[Submission], list[Path]]:
    """Return the submissions in a folder, and the notebooks in it that are none of the course's. Links are not followed."""
    found, unknown = [], []
    for path in sorted(folder.rglob("*.ipynb")):
        inside = path.relative_to(folder).parts
        if any(part.startswith(".") for part in inside) or any(p.is_symlink() for p in [path, *path.parents][: len(inside)]):
            continue
        one = submission(path, inside[0] if len(inside) > 1 else None, course)
        if one is None:
            unknown.append(path)
        else:
            found.append(one)
    return found, unknown


def grade(path: Path, submissions: list[Submission], seed: int, limits: dict) -> tuple[list[dict], str]:
    """Return a row of `COLUMNS` for each submission of one notebook and each of its exercises, and a fault of the course or "".

    Args:
        path: notebook of the course, with its solutions.
        submissions: what was handed in for it.
        seed: secret seed of the checks.
        limits: `seconds`, and `memory` in bytes, for each answer.
    """
    notebook = read(path)
    listed, rows = exercises(notebook), []
    solutions = {c["id"] for c in notebook["cells"] if "solution" in tags(c)}
    answers = {e.name: [] for e in listed}
    for one in submissions:
        for e in listed:
            text = answer(one.cells, e, solutions)
            row = {"student": one.student, "notebook": path.stem, "exercise": e.name, "passed": False}
            if one.fault or text is None:
                row["reason"] = one.fault or f"no cell answers this exercise: none calls {e.check}"
            else:
                answers[e.name].append((row, text))
            rows.append(row)
    cells, of_cell = [], {e.cell: e for e in listed}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "solution" not in tags(cell):
            e = of_cell.get(cell["id"])
            cells.append({"source": source(cell), "exercise": vars(e) | {"answers": len(answers[e.name])} if e else None})
    asked = [pair for e in listed for pair in answers[e.name]]
    fault = judged(asked, {"cells": cells, "limits": limits}, seed) if asked else ""
    return rows, fault


def judged(asked: list[tuple[dict, str]], plan: dict, seed: int) -> str:
    """Write verdict and reason into the rows of all answers to one notebook. Return a fault of the course itself, or ""."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "MEDSEG_SCALE": "cpu", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "notebooks"))), "PYTHONDONTWRITEBYTECODE": "1"}
    fault = "the process of the course ended early"
    with tempfile.TemporaryFile() as tasks, tempfile.TemporaryDirectory() as folder:
        for message in (json.dumps(plan), *(part for _, text in asked for part in (text, str(seed)))):
            data = message.encode("utf-8", "replace")
            tasks.write(struct.pack("Q", len(data)) + data)  # as `judge.receive` reads it
        tasks.seek(0)
        command = [sys.executable, "-c", "import judge; judge.main()", str(tasks.fileno())]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=folder, env=environment, pass_fds=[tasks.fileno()], encoding="utf-8"
        ) as process:
            waiting = iter(asked)
            for line in process.stdout:
                said = json.loads(line)
                if "error" in said:
                    fault = said["error"]
                    break
                row, _ = next(waiting)
                row.update(passed=said["passed"], reason=said["reason"])
    left = [row for row, _ in asked if "reason" not in row]
    for row in left:
        row["reason"] = f"not graded: {fault}"
    return fault if left else ""


def plain(text: str) -> str:
    """Return a text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text


def write(path: Path, rows: list[dict]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([plain(row["student"]), row["notebook"], row["exercise"], int(row["passed"]), plain(row["reason"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submissions", type=Path, help="folder of notebooks, or of a folder for each student")
    parser.add_argument("--seed", type=int, help="secret seed; without it one is drawn, and printed")
    parser.add_argument("--out", type=Path, default=Path("grades.csv"), help="table to write (%(default)s)")
    parser.add_argument("--seconds", type=int, default=120, help="for each answer (%(default)s)")
    parser.add_argument(
        "--memory", type=float, default=2.0, help="GB that an answer may take beyond the course's (%(default)s)"
    )
    given = parser.parse_args()
    if not hasattr(os, "fork"):
        sys.exit(
            "grading needs Linux or macOS, because answers run in processes that this system cannot shut in; use WSL or Docker"
        )
    if not given.submissions.is_dir():
        sys.exit(f"{given.submissions} is no folder; expected notebooks, or a folder of notebooks for each student")
    import sandbox

    paths = {path.stem: path for path in notebooks(ROOT)}
    submissions, unknown = collect(given.submissions, {stem: exercises(read(path)) for stem, path in paths.items()})
    for path in unknown:
        print(f"{path}: none of the course's notebooks; left out")
    if not submissions:
        sys.exit(f"{given.submissions} holds no submission: no .ipynb file that is one of the course's notebooks")
    seed = secrets.randbits(31) if given.seed is None else given.seed
    print(f"seed {seed}; {sandbox.Walls()}")
    rows, faults = [], []
    for stem in sorted({s.notebook for s in submissions}):
        those = [s for s in submissions if s.notebook == stem]
        found, fault = grade(paths[stem], those, seed, {"seconds": given.seconds, "memory": int(given.memory * 1e9)})
        rows += found
        faults += [f"{stem}: {fault}"] if fault else []
        for one in those:
            passed = [row["passed"] for row in found if row["student"] == one.student]
            print(f"{one.student}: {stem} {sum(passed)} of {len(passed)}")
    write(given.out, rows)
    print(f"{len(rows)} rows are in {given.out}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
