"""The seconds that a reader waits: for imports, the command line, a notebook's first picture, a widget, a phantom.

    python benchmarks/waiting.py [--repeats 7] [--before FOLDER] [--only WORD ...]

Each wait is measured in a process of its own, on one thread, and told as the least seconds of the repeats: by the clock, and of the
processor, because other work on the machine adds to the clock. With `--before` an older copy of the repository is measured by turns with
this one; it lies in the folder that holds its `medseg_lite`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pandas as pd
import torch
from _measure import fill, markdown, options
from ipywidgets.widgets.widget import _remove_buffers

from medseg_lite import models, paths, phantoms, transforms, widgets
from medseg_lite.widgets._base import Widget

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = {  # arguments of Python; the whole process is the wait
    "`import torch`, for scale": ["-c", "import torch"],
    "`import medseg_lite`": ["-c", "import medseg_lite"],
    "`import medseg_lite.course`": ["-c", "import medseg_lite.course"],
    "`python -m medseg_lite --help`": ["-m", "medseg_lite", "--help"],
    "`python -m medseg_lite recipes`": ["-m", "medseg_lite", "recipes"],
}
NOTEBOOK = "notebook 00, from its kernel's start to its first picture"
PHANTOMS = ("brain", "hand", "em", "prostate", "liver")
WIDGETS = {  # made from a case, a network and class probabilities
    "SliceViewer": lambda case, model, p: widgets.SliceViewer(case),
    "CompareSegmentations": lambda case, model, p: widgets.CompareSegmentations(case, {"a": np.roll(case.label, 2, 0)}),
    "CRFExplorer": lambda case, model, p: widgets.CRFExplorer(case, np.stack([1 - p, p])),
    "FeatureExplorer": lambda case, model, p: widgets.FeatureExplorer(model, case),
    "KernelEditor": lambda case, model, p: widgets.KernelEditor(case.image[0, :, :, case.shape[2] // 2]),
    "OperatingPoint": lambda case, model, p: widgets.OperatingPoint(case, {"a": p, "b": p**2}, label=[1, 2, 3, 4]),
    "TrainingMonitor": lambda case, model, p: widgets.TrainingMonitor(model, case),
}


class Stopwatch:
    """Seconds since its start, by the clock and of the processor."""

    def __init__(self):
        self.start = time.perf_counter(), time.process_time()

    def read(self) -> list[float]:
        return [time.perf_counter() - self.start[0], time.process_time() - self.start[1]]


def measure_process(arguments: list[str], folder: Path) -> tuple[dict[str, list[float]], str]:
    """Run Python on the package in a folder; return the seconds of the whole process, and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MEDSEG_SCALE": "cpu"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"": [wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime]}, done.stdout


def measure_notebook() -> dict[str, list[float]]:
    """Run notebook 00 of the present folder until its first picture."""
    path = Path("notebooks/00_start_here.ipynb").resolve()
    notebook = nbformat.read(path, as_version=4)
    has_picture = [any("image/png" in o.get("data", {}) for o in cell.get("outputs", [])) for cell in notebook.cells]
    del notebook.cells[has_picture.index(True) + 1 :]
    times = "import os\nimport resource\nprint(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))"
    notebook.cells.append(nbformat.v4.new_code_cell(times))
    client, clock = (
        nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": path.parent}}),
        Stopwatch(),
    )
    client.execute()
    return {"": [clock.read()[0], float(notebook.cells[-1].outputs[0].text)]}


def measure_phantom(name: str) -> dict[str, list[float]]:
    """Make phantoms: the first of the process, and the mean of those after it."""
    make, clock = getattr(phantoms, name), Stopwatch()
    make(0)
    first, clock = clock.read(), Stopwatch()
    for seed in range(1, 9):
        make(seed)
    return {", the first": first, ", each further one": [seconds / 8 for seconds in clock.read()]}


def measure_widget(name: str) -> dict[str, list[float]]:
    """Make a widget, its state and its picture, as the first of its kind in the process; add the bytes of the state."""
    case = transforms.standardise(phantoms.brain(102))
    model = models.load(paths.shipped("checkpoints", "deepmedic_phantoms.safetensors"))
    noise = np.random.default_rng(0).normal(0, 0.2, case.shape)
    probability = np.clip(np.where(case.label > 0, 0.7, 0.2) + noise, 0, 1).astype(np.float32)
    clock = Stopwatch()
    widget: Widget = WIDGETS[name](case, model, probability)
    widget._repr_mimebundle_()
    state, _, buffers = _remove_buffers(widget.get_state())
    size = len(json.dumps(state, default=str)) + sum(memoryview(buffer).nbytes for buffer in buffers)
    return {"": [*clock.read(), size]}


def waits() -> list[str]:
    return [*PROCESSES, NOTEBOOK, *(f"phantoms.{name}" for name in PHANTOMS), *(f"widgets.{name}" for name in WIDGETS)]


def measure(what: str, folder: Path) -> dict[str, list[float]]:
    """Measure one wait on the package in a folder."""
    if what in PROCESSES:
        return measure_process(PROCESSES[what], folder)[0]
    return json.loads(measure_process([__file__, "--alone", what], folder)[1].splitlines()[-1])


def measure_here(what: str) -> dict[str, list[float]]:
    """Measure one wait in this process."""
    torch.set_num_threads(1)
    if what == NOTEBOOK:
        return measure_notebook()
    kind, _, name = what.partition(".")
    return measure_phantom(name) if kind == "phantoms" else measure_widget(name)


def parse() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--before", type=Path, help="folder of an older copy of the repository, to be measured too")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="only waits whose name has one of these words")
    parser.add_argument("--alone", help="measure this in the present process")
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.alone:
        print(json.dumps(measure_here(given.alone)))
        return
    torch.set_num_threads(1)
    folders = {"before": given.before.resolve()} if given.before else {}
    folders["now"] = ROOT
    rows = []
    for what in (what for what in waits() if any(word in what for word in given.only)):
        runs = {name: [] for name in folders}
        for _ in range(given.repeats):
            for name, folder in folders.items():
                runs[name].append(measure(what, folder))
        for part in runs["now"][0]:
            least = {name: np.min([run[part] for run in found], axis=0) for name, found in runs.items()}
            now, before = least["now"], least.get("before", np.full(3, np.nan))
            kilobytes = [f"{side[2] / 1e3:.0f}" if len(side) > 2 and side[2] > 0 else "" for side in (before, now)]
            rows.append([what + part, before[0], now[0], before[1], now[1], before[1] / now[1], *kilobytes])
            print(*rows[-1], file=sys.stderr)
    columns = ["wait", "clock before", "clock now", "processor before", "processor now", "ratio", "kB before", "kB now"]
    about = f", least seconds of {given.repeats} runs in processes of their own"
    fill(__file__, given.results, about, {"seconds": markdown(pd.DataFrame(rows, columns=columns))})


if __name__ == "__main__":
    main()
