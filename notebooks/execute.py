"""Run notebooks from top to bottom and store their outputs. `make notebooks` calls this script.

    python notebooks/execute.py notebooks/04_dense_training.ipynb
    python notebooks/execute.py --strip notebooks/04_dense_training.ipynb    # run nothing, only take widgets out

The header gets the date, and the minutes at the scale that it ran at. A notebook that fails is not changed.
"""

import argparse
import json
import os
import re
import sys
import time
from datetime import date
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from medseg_lite.course import start
from medseg_lite.paths import atomic_write

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
COLAB = ("accelerator", "colab")  # metadata that asks Colab for a GPU


def strip(notebook: dict) -> None:
    """Take out of a notebook what needs a running kernel: widget views, the state of widgets, and progress bars.

    A widget's stored output keeps its picture. JupyterLab would show "Error displaying widget" instead of the picture where it
    finds a widget view, and GitHub and nbconvert show nothing where they find a state. A live run shows live widgets as before.
    Long trainings show bars at the GPU scale. A warning on the same stream stays.
    """
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            for part in (output.get("data", {}), output.get("metadata", {})):
                part.pop(WIDGET_VIEW, None)
            if output.get("name") == "stderr":
                lines = "".join(output["text"]).split("\n")
                output["text"] = "\n".join(line for line in lines if "\r" not in line)  # a bar goes back to the line's start
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr" or output["text"].strip()]


def metadata(found: dict) -> dict:
    """Return the metadata to store: the kernel that every machine has, and what asks Colab for a GPU."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"kernelspec": kernel, "language_info": {"name": "python"}} | {key: found[key] for key in COLAB if key in found}


def write(path: Path, notebook: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def execute(path: Path, scale: str) -> float:
    """Run one notebook in its own folder, store it, and return the minutes that it took."""
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": path.parent}}).execute()
    minutes = (time.perf_counter() - began) / 60
    header = notebook.cells[0]
    header.source = re.sub(r"(\*\*Last executed\*\*) .*", rf"\1 {date.today()}", header.source)
    number = f"{minutes:.1f} min"
    pattern = r"(\*\*Time\*\* )[^;]*(;.*)" if scale == "cpu" else r"(\*\*Time\*\* [^;]*; ).*()"
    where = "on a 2-core CPU" if scale == "cpu" else "on a GPU"
    header.source = re.sub(pattern, rf"\g<1>{number} {where}\g<2>", header.source)
    notebook.metadata = metadata(notebook.metadata)
    for cell in notebook.cells:
        for key in ("execution", "collapsed"):
            cell.metadata.pop(key, None)
    strip(notebook)
    write(path, notebook)
    return minutes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--strip", action="store_true", help="run nothing; only take widget views and states out")
    options = parser.parse_args()
    for path in options.notebooks if options.strip else ():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        strip(notebook)
        write(path, notebook)
    if options.strip:
        sys.exit()
    os.environ["MEDSEG_SCALE"] = start().scale
    failed = False
    for path in options.notebooks:
        try:
            print(f"{path.name}: {execute(path, os.environ['MEDSEG_SCALE']):.1f} min")
        except CellExecutionError as error:
            failed = True
            print(f"{path.name} failed and was left as it was:\n{error}", file=sys.stderr)
    sys.exit(failed)
