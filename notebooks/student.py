"""Write the student edition: the notebooks without their solutions. `make student` calls this script.

    python notebooks/student.py build/student
    python notebooks/student.py build/student --repository owner/class --branch main    # where the folder will be published

Starters, checks, figures and all other outputs stay. Badges open the folder's notebooks in the branch `student` of the course's
repository, or where `--repository` and `--branch` say. Links to other files lead to the course's pages on GitHub.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

from badges import ROOT, SLUG, notebooks, slug

MARKER = ".medseg-student-edition.json"  # the names and checksums of the files that this script wrote
# Sentences about solutions, and what stands there in an edition without any.
SENTENCES = {
    r", a check that tells you what is wrong, and a solution below it\. You can skip every solution: nothing else needs it\.": (
        ", and a check that tells you what is wrong. No cell below needs your answer. Only the cell of the exercise is graded, so "
        "keep everything in it that your answer needs: imports and helper functions too."
    ),
    r"Code that only draws a figure, the checks and the solutions are": "Code that only draws a figure and the checks are",
    r"there all code stands open, solutions too\.": "there all code stands open.",
    r"above the starter, the solution the folded one below it\.": "above the starter.",
    r"above the starters, solutions below them, both folded": "above the starters, folded",
    r"\(above the starters\) and the solutions \(below them\) are folded": "(above the starters) are folded",
}
README = """# {title}: the notebooks for students

{count} notebooks with exercises, without their solutions. Install the package and JupyterLab, then open the notebooks:

    pip install -r requirements.txt
    jupyter lab 00_start_here.ipynb

An exercise is a starter below a folded check. Change the starter until its check says that it is right. Only the cell of the
exercise is graded, so keep everything in it that your answer needs: imports and helper functions too.

Not for clinical use. The course: https://github.com/{slug}
"""


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def without_solutions(notebook: dict) -> dict:
    """Return a notebook without its solutions. Its cells are counted anew, and hidden code is hidden in JupyterLab and on Colab."""
    cells, count = [], 0
    for cell in notebook["cells"]:
        if "solution" in tags(cell):
            continue
        cell = json.loads(json.dumps(cell))
        if "check" in tags(cell) or cell["metadata"].get("jupyter", {}).get("source_hidden"):
            cell["metadata"].setdefault("jupyter", {})["source_hidden"] = True
            cell["metadata"]["cellView"] = "form"
        if cell["cell_type"] == "code" and cell["execution_count"]:
            count += 1
            cell["execution_count"] = count
            for output in cell["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = count
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            for pattern, sentence in SENTENCES.items():
                text = re.sub(pattern, sentence, text)
            cell["source"] = text
        cells.append(cell)
    return {**notebook, "cells": cells}


def with_links(text: str, name: str, home: str, repository: str, branch: str) -> str:
    """Return a text whose badges open the notebook `name` of the edition, and whose links to other files lead to GitHub."""
    text = re.sub(
        rf"colab\.research\.google\.com/github/{re.escape(home)}/blob/[\w.-]+/notebooks/{re.escape(name)}",
        f"colab.research.google.com/github/{repository}/blob/{branch}/{name}",
        text,
    )
    text = re.sub(
        rf"mybinder\.org/v2/gh/{re.escape(home)}/[\w.-]+\?labpath=notebooks(?:/|%2F){re.escape(name)}",
        f"mybinder.org/v2/gh/{repository}/{quote(branch, safe='')}?labpath={name}",
        text,
    )
    return re.sub(r"\]\(\.\./", f"](https://github.com/{home}/blob/main/", text)


def edition(root: Path, repository: str, branch: str) -> dict[str, str]:
    """Return the files of the student edition: their texts by their names."""
    home, files = slug(root), {}
    for path in notebooks(root):
        notebook = without_solutions(json.loads(path.read_text(encoding="utf-8")))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = with_links(cell["source"], path.name, home, repository, branch)
        files[path.name] = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    files["README.md"] = README.format(title=home.split("/")[1], count=len(files), slug=home)
    files["requirements.txt"] = f"medseg_lite[lab] @ git+https://github.com/{home}\n"
    return files


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def strangers(folder: Path) -> list[str]:
    """Return the files in a folder that this script did not write, or that changed since."""
    marker = folder / MARKER
    if not marker.is_file():
        return sorted(path.name for path in folder.iterdir())
    try:
        known = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        known = {}
    known = known if isinstance(known, dict) else {}
    found = {
        p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p != marker and (p.is_symlink() or not p.is_dir())
    }
    return sorted(n for n, p in found.items() if p.is_symlink() or known.get(n) != checksum(p.read_bytes()))


def write(out: Path, files: dict[str, str]) -> None:
    """Write files into a folder as a whole: into a temporary folder beside it, which then takes its name.

    Raises:
        FileExistsError: the folder holds something that this script did not write, such as answers.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise FileExistsError(f"{out} is a file or a link; expected the name of a folder")
    if out.is_dir() and (foreign := strangers(out)):
        raise FileExistsError(
            f"{out} holds files that `make student` did not write, or that were changed since: {', '.join(foreign[:5])}"
            f"{' …' if len(foreign) > 5 else ''}. Choose another folder (OUT=…), or move them away"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        data = {name: text.encode("utf-8") for name, text in files.items()}
        data[MARKER] = (json.dumps({n: checksum(d) for n, d in data.items()}, indent=1) + "\n").encode()
        for name, content in data.items():
            (new / name).write_bytes(content)
        if out.is_dir():
            out.rename(old)
        new.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--repository", help="owner/name of the repository that the folder is published in; the course's own")
    parser.add_argument("--branch", default="student", help="branch that holds the folder's files (%(default)s)")
    given = parser.parse_args()
    repository = given.repository or slug(ROOT)
    try:
        if not re.fullmatch(SLUG, repository):
            raise ValueError(f"--repository {repository!r}; expected owner/name as in github.com/owner/name")
        files = edition(ROOT, repository, given.branch)
        write(given.out, files)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    count = sum(name.endswith(".ipynb") for name in files)
    print(f"{count} notebooks without solutions are in {given.out}; push them as the branch {given.branch} of {repository}")


if __name__ == "__main__":
    main()
