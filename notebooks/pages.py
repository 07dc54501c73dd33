"""Write the notebooks as web pages, without running them. `make site` calls this script.

python notebooks/pages.py build/site
python notebooks/pages.py build/site --live         # and pages of live widgets, which need no kernel (a minute)
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import nbformat
import numpy as np
from badges import slug
from nbconvert import HTMLExporter
from traitlets.config import Config

from medseg_lite import inference, models, phantoms, plotting, recipes, transforms, widgets
from medseg_lite.paths import atomic_write, shipped
from medseg_lite.sampling import SegmentSampler

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "notebooks" / "template"


def find_notebooks(root: Path = ROOT) -> list[Path]:
    """Return the notebooks, in their order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def find_title(notebook: dict) -> str:
    """Return the title of a notebook: "00 Start here: …"."""
    return "".join(notebook["cells"][0]["source"]).splitlines()[0].removeprefix("# ")


def fold(cell: dict) -> str:
    """Return the words under which a cell's code is folded, or "" where it stands open.

    Folded are solutions, cells whose source is hidden in JupyterLab, and cells that begin with "# figure: …". The words are the
    cell's first line: "# figure: three brains", or "# @title Check of exercise 1 { … }", which Colab reads.
    """
    first = cell["source"].strip().partition("\n")[0]
    title = re.match(r"#\s*(?:@title\s+)?([^{]*)", first) if first.startswith("#") else None
    words = title[1].strip() if title else ""
    if re.match("figure:", words, re.IGNORECASE):
        return f"Code of the figure: {words.partition(':')[2].strip()}"
    if "solution" in cell["metadata"].get("tags", ()):
        return words if words.startswith("Solution") else "Solution"
    return (words or "Code") if cell["metadata"].get("jupyter", {}).get("source_hidden") else ""


def mend(html: str) -> str:
    """Mend what nbconvert and pandas leave: empty heads of tables become cells, heads say what they head, links lead to pages."""
    html = re.sub(r"<th(?=[\s>])([^>]*)>\s*</th>", r"<td\1></td>", html)
    parts = re.split(r"(?=<t(?:head|body)\b)", html)
    for n, part in enumerate(parts):
        scope = "row" if part.startswith("<tbody") else "col" if part.startswith("<thead") else ""
        parts[n] = re.sub(r"<th(?=[\s>])(?![^>]*scope=)", f'<th scope="{scope}"', part) if scope else part
    html = re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', "".join(parts))
    return re.sub(r'href="\.\./', f'href="https://github.com/{slug(ROOT)}/blob/main/', html)


def make_exporter() -> HTMLExporter:
    """Return nbconvert's exporter with the template of this project."""
    order = ["text/html", "text/markdown", "image/png", "text/latex", "text/plain"]
    settings = Config({"NbConvertBase": {"display_data_priority": order}})
    exporter = HTMLExporter(
        config=settings, template_name=TEMPLATE.name, extra_template_basedirs=[str(TEMPLATE.parent)], embed_images=True
    )
    exporter.filters = {"fold": fold, "mend": mend}
    return exporter


def convert(path: Path, paths: list[Path]) -> str:
    """Return a notebook as a page with links to its neighbours among `paths`.

    Raises:
        ValueError: for a picture without alt text.
    """
    notebook = nbformat.read(path, as_version=4)
    for output in (o for cell in notebook.cells for o in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}) and not output.metadata.get("image/png", {}).get("alt"):
            raise ValueError(f"{path.name} shows a picture without alt text; use plotting.show(figure, alt)")
    here = paths.index(path)
    links = [{"address": "index.html", "text": "All notebooks"}]
    for rel, there in (("prev", here - 1), ("next", here + 1)):
        if 0 <= there < len(paths):
            title = find_title(nbformat.read(paths[there], as_version=4)).partition(":")[0]
            links.append({"address": f"{paths[there].stem}.html", "text": title, "rel": rel})
    resources = {
        "title": f"{find_title(notebook)} · medseg_lite",
        "css": (TEMPLATE / "page.css").read_text(encoding="utf-8"),
        "navigation": links,
    }
    page, _ = make_exporter().from_notebook_node(notebook, resources)
    return page


LIVE = {
    "slices": "Slice viewer: one brain, four sequences, its tumour and the network's prediction",
    "paint": "Segment it yourself: paint a tumour, then compare with the truth, a network and three readers",
    "compare": "Two networks compared: found, missed and made up",
    "crf": "CRF explorer: pull the sliders, and specks go while the tumour stays",
    "kernel": "Sliding kernel: nine numbers, and the edges that they find",
    "rate": "Learning rate: one kernel learns, too slowly, well, or not at all",
    "segment": "Segment dial: what a training segment sees, predicts and costs",
    "signals": "Signals: why a deep network trains or does not, layer by layer",
    "bench": "Loss bench: how hard four losses push on a large class, a tiny one and the background",
    "progress": "Training scrubber: five networks learn the bones of a hand, update by update",
    "game": "You are the network: lesion or not, with and without a wider view",
    "cells": "Merged and split cells: move the threshold, close a gap, and watch V_rand",
    "blocks": "Block switchboard: 47 residual blocks, switched off one by one, or read one after the other",
    "gains": "Gain and offset: who minds another scanner, the raw, the standardised or the learned input",
    "votes": "Vote tree: six networks vote on a voxel, and three thresholds decide what counts",
    "valley": "Valley of two weights: plain descent, another scale of the loss, and steps of a fixed length",
    "training": "Training monitor: a network that learns, update by update",
}


def make_widgets() -> Iterator[tuple[str, widgets.Widget]]:
    """Yield the name and the widget of each page that works without a kernel."""
    case = transforms.standardise(phantoms.brain(seed=104, site="B"))
    trained = models.load(shipped("checkpoints", "deepmedic_phantoms.safetensors"))
    found = inference.predict(trained, case, progress=False)
    yield "slices", widgets.SliceViewer(case, overlays={"prediction": found})
    habits, tumour = ("generous", "cautious", "unsteady"), case.label > 0
    readers = {habit: phantoms.draw_as_reader(tumour, habit, spacing=case.spacing) for habit in habits}
    yield "paint", widgets.SegmentYourself(case, found, readers)
    cascade = models.load(shipped("checkpoints", "havaei_input_cascade.safetensors"))
    twice = {"DeepMedic": found, "InputCascade": inference.predict(cascade, case, progress=False)}
    yield "compare", widgets.CompareSegmentations(case, twice, regions="brats2015")
    probabilities = inference.predict(trained, case, output="probabilities", progress=False)
    lesion = np.stack([probabilities[0], 1 - probabilities[0]])
    yield "crf", widgets.CRFExplorer(case.select(["flair", "t2"]), lesion, smoothness_weight=1, appearance_weight=3)
    flair, axial = case.image[case.channels.index("flair")], plotting.find_plane("axial")
    middle = plotting.busiest_position(case.label, case.shape)[axial.cut]
    image, tumour = (plotting.cut(array, axial, middle) for array in (flair, case.label))
    yield "kernel", widgets.KernelEditor(image, preset="Sobel x", truth=tumour)
    yield "rate", widgets.LearningRate([0, 0, 1, 3, 3, 2, 0, 0, 2, 1], rate=0.02, updates=6)
    healthy = transforms.standardise(phantoms.brain(7, lesion=None))
    yield "segment", widgets.SegmentDial(healthy, output=9, radius=4)
    yield "signals", widgets.SignalExplorer(*SegmentSampler([case], output=3, margin=12, batch_size=1).batch(0))
    yield "bench", widgets.LossBench()
    with np.load(shipped("results", "hands_progress.npz")) as stored:
        arrays = [stored[name] for name in ("image", "truth", "labels", "steps", "variants")]
    yield "progress", widgets.TrainingScrubber(*arrays, ("background", "metacarpal", "proximal", "middle", "distal"))
    strokes = [phantoms.brain(seed, site="A", lesion="stroke").select(["flair", "t2"]) for seed in (100, 103, 104, 105)]
    yield "game", widgets.BeTheNetwork(strokes)
    resnet = models.load(shipped("checkpoints", "em_inputs_standardised.safetensors"))
    tissue, larger = (transforms.standardise(phantoms.em(103, slices=1, size=s, counts=True)) for s in (128, 256))
    inside = inference.predict(resnet, larger, output="probabilities", progress=False)[0]
    yield "cells", widgets.VRandExplorer(larger, inside, threshold=0.9)
    yield "blocks", widgets.BlockSwitchboard(resnet, tissue)
    raw, standard, learned = (
        models.load(shipped("checkpoints", f"drozdzal_prostate{n}.safetensors")) for n in ("_raw", "_standardised", "")
    )
    ways = {"raw": raw, "standardised": (standard, transforms.standardise), "learned": learned}
    yield "gains", widgets.GainOffset(ways, phantoms.prostate(101, site="A", size=64, vary=True))
    with np.load(shipped("results", "vote_predictions.npz")) as stored:
        seed, voters, maps, truth = int(stored["seeds"][4]), stored["networks"], stored["maps"][4], stored["truth"][4]
    voted = transforms.standardise(phantoms.brain(seed, site="ABC"[seed % 3]))
    classes = ("background", "non-enhancing core", "oedema", "enhancing core")
    voted = voted.replace(label=truth, info=voted.info | {"classes": classes})
    yield "votes", widgets.VoteTree(voted, dict(zip(voters.tolist(), maps)), channel="t1c")
    yield "valley", widgets.Valley(updates=30)
    few = [transforms.standardise(c) for c in phantoms.brain_cohort(3, spacing=3.0)]
    small = models.deepmedic(width=0.2, classes=5)
    monitor = widgets.TrainingMonitor(small, few[2], every=10)
    recipes.deepmedic(few[:2], network=small, steps=120, progress=False, engine={"on_update": monitor})
    yield "training", monitor


def make_index(paths: list[Path], live: list[str]) -> str:
    """Return the first page: the live widgets and the notebooks."""
    css = (TEMPLATE / "page.css").read_text(encoding="utf-8")
    shown = "".join(f'<li><a href="live/{name}.html">{escape(LIVE[name])}</a></li>' for name in live)
    titles = ((path, find_title(nbformat.read(path, as_version=4))) for path in paths)
    listed = "".join(f'<li><a href="{path.stem}.html">{escape(title)}</a></li>' for path, title in titles)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>medseg_lite</title>
<style>{css}</style>
</head>
<body>
<nav aria-label="Project"><a href="https://github.com/{slug(ROOT)}">The repository</a></nav>
<main class="index">
<h1>medseg_lite</h1>
<p>A course in medical image segmentation: five papers, their networks at full size, and notebooks that run on your laptop.
Not for clinical use.</p>
{f"<h2>Try it here</h2><p>These pages compute in your browser. Nothing is sent anywhere.</p><ul>{shown}</ul>" if live else ""}
<h2>Read the notebooks</h2>
<ul>{listed}</ul>
</main>
</body>
</html>
"""


def write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{path}  {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that the pages are written to")
    parser.add_argument("--live", action="store_true", help="also write the pages of live widgets")
    options = parser.parse_args()
    notebooks = find_notebooks()
    for notebook in notebooks:
        write(options.folder / f"{notebook.stem}.html", convert(notebook, notebooks))
    live = []
    for name, widget in make_widgets() if options.live else ():
        write(options.folder / "live" / f"{name}.html", widget.to_html())
        live.append(name)
    write(options.folder / "index.html", make_index(notebooks, live))
