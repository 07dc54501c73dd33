"""Write the README's table of notebooks: titles, papers and minutes. `make readme` calls this script.

    python notebooks/readme.py                                        # the table
    python notebooks/readme.py notebooks/04_dense_training.ipynb      # and the minutes in class into this notebook's header

`make readme` does both, for all notebooks.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

from execute import write
from pages import find_notebooks, find_title, fold

from medseg_lite.paths import atomic_write

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin notebooks -->", "<!-- end notebooks -->"
WORDS_A_MINUTE, MINUTES_A_CELL, MINUTES_AN_EXERCISE = 120, 2, 6


def _cells(notebook: dict) -> list[dict]:
    return [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"]]


def _tagged(cell: dict, *tags: str) -> bool:
    return not set(tags).isdisjoint(cell["metadata"].get("tags", ()))


def counted_cells(notebook: dict) -> int:
    """Return the number of cells that a reader passes through: all but solutions and checks."""
    return sum(not _tagged(cell, "solution", "check") for cell in notebook["cells"])


def open_lines(notebook: dict) -> int:
    """Return the number of lines of code that a reader sees.

    Empty lines do not count, nor do folded cells and the first code cell, which is the same in all notebooks.
    """
    code = [cell for cell in _cells(notebook) if cell["cell_type"] == "code"][1:]
    seen = [cell["source"] for cell in code if not fold(cell) and not _tagged(cell, "solution", "check")]
    return sum(bool(line.strip()) for source in seen for line in source.split("\n"))


def class_minutes(notebook: dict) -> int:
    """Return the minutes that a reader needs, in steps of five.

    They are estimated: 120 words a minute, 2 minutes a code cell, 6 an exercise. Folded cells and the first cell, which is the
    same in all notebooks, take no time.
    """
    cells = _cells(notebook)
    words = sum(len(cell["source"].split()) for cell in cells[1:] if cell["cell_type"] == "markdown")
    code = [cell for cell in cells if cell["cell_type"] == "code"][1:]
    exercises = sum(_tagged(cell, "exercise") for cell in code)
    read = sum(not fold(cell) for cell in code) - exercises
    minutes = words / WORDS_A_MINUTE + MINUTES_A_CELL * read + MINUTES_AN_EXERCISE * exercises
    return 5 * math.ceil(minutes / 5)


def stored_class_minutes(notebook: dict) -> int | None:
    """Return the minutes in class that stand in a notebook's header, or None where the header has no such line."""
    found = re.search(r"\*\*In class\*\* (\d+) min", "".join(notebook["cells"][0]["source"]))
    return int(found[1]) if found else None


def store_class_minutes(path: Path) -> None:
    """Write `class_minutes` into a notebook's header, above the line **Time**. All else stays as it is.

    Raises:
        ValueError: for a header without a line **Time**.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    header = re.sub(r"^.*\*\*In class\*\*.*\n", "", "".join(notebook["cells"][0]["source"]), flags=re.MULTILINE)
    line = rf"\g<1>**In class** {class_minutes(notebook)} min\n\g<0>"
    header, times = re.subn(r"^([*-] )\*\*Time\*\* ", line, header, flags=re.MULTILINE)
    if times != 1:
        raise ValueError(f"the header of {path.name} has {times} lines that begin with * **Time**; expected one")
    notebook["cells"][0]["source"] = header
    write(path, notebook)


def machine_minutes(notebook: dict) -> float:
    """Return the minutes on two CPU cores that stand in a notebook's header."""
    header = "".join(notebook["cells"][0]["source"])
    found = re.search(r"\*\*Time\*\* ([\d.]+) min on a 2-core CPU", header)
    if not found:
        raise ValueError(f"the header of {find_title(notebook)!r} has no line **Time** N min on a 2-core CPU")
    return float(found[1])


def table(root: Path, papers: dict[str, str]) -> str:
    """Return the table of notebooks.

    Args:
        root: root of the repository.
        papers: what the column "paper" says, by number of the notebook.
    """
    rows = ["| notebook | paper | class | machine |", "|---|---|---|---|"]
    for path in find_notebooks(root):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        rows.append(
            f"| [{find_title(notebook)}](notebooks/{path.name}) | {papers.get(path.name[:2], '')} "
            f"| {class_minutes(notebook)} min | {machine_minutes(notebook):.1f} min |"
        )
    return "\n".join(rows)


def rewrite(root: Path) -> str:
    """Return README.md with a new table. The column "paper" stays as it is."""
    text = (root / "README.md").read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md lacks the lines {BEGIN} and {END}, between which the table of notebooks stands")
    before, inside, after = re.split(f"{BEGIN}|{END}", text)
    papers = dict(re.findall(r"^\| \[(\d\d)[^|]*\| ([^|]*?) *\|", inside, re.MULTILINE))
    return f"{before}{BEGIN}\n\n{table(root, papers)}\n\n{END}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        store_class_minutes(Path(name))
    made = rewrite(ROOT)
    with atomic_write(ROOT / "README.md") as temporary:
        temporary.write_text(made, encoding="utf-8")
