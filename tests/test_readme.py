"""What the README claims: its numbers stand in stored results, its table follows from the notebooks, its links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from medseg_lite import models

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FLAT = " ".join(TEXT.split())  # a claim may run over the end of a line


@pytest.fixture(scope="module")
def readme():
    sys.path.insert(0, str(ROOT / "notebooks"))
    yield importlib.import_module("readme")
    sys.path.remove(str(ROOT / "notebooks"))


def short(value: float) -> str:
    return f"{value:.3f}".lstrip("0")


@pytest.fixture(scope="module")
def whole() -> pd.DataFrame:
    """Mean, lowest and highest whole-tumour Dice of four real cases, by training."""
    scores = pd.read_csv(ROOT / "data" / "results" / "real_brats.csv").query("region == 'whole'")
    assert set(scores.groupby("trained on").size()) == {4}
    return scores.groupby("trained on").dice.agg(["mean", "min", "max"])


def test_dice_on_real_brains(whole):
    real, phantoms, both = (whole.loc[name].map(short) for name in ("real", "phantoms", "phantoms+real"))
    assert f"mean whole-tumour Dice {real['mean']} over four cases" in FLAT
    assert f"a mean whole-tumour Dice of {real['mean']} ({real['min']} to {real['max']})" in FLAT
    assert f"generated brains only and reaches {phantoms['mean']}" in FLAT
    assert f"on real and generated ones, it reaches {both['mean']} ({both['min']} to {both['max']})" in FLAT


def test_every_score_is_one_of_these(whole):
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    scores = set(re.findall(r"(?<![\w./])\.\d{3}\b", prose))
    assert scores == scores & set(whole.stack().map(short)), "a score without a test"


def test_minutes_of_training():
    """The card of the network that was trained so says how long it took."""
    card = (ROOT / "data" / "checkpoints" / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `deepmedic_brats2013\.safetensors` .*$", card, re.MULTILINE)
    updates, minutes = re.search(r"(\d+) updates, seed 0, (\d+) minutes on one CPU core", row).groups()
    assert f"after {minutes} minutes of training on one CPU core" in FLAT
    assert f"--steps {updates} --halvings" in FLAT and f"# one CPU core: {minutes} min of training" in FLAT


def test_parameters():
    network = models.deepmedic(in_channels=2)
    count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert f"DeepMedic ({count:,} parameters with two sequences)" in FLAT


def test_downloads():
    listed = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"medseg_lite download (\w+) +# ([\d.]+ [MG]B), (CC [\w .-]+?)\n", TEXT)
    assert len(commands) == 2
    for name, size, licence in commands:
        (row,) = re.findall(rf"^\| `{name}` .*$", listed, re.MULTILINE)
        assert f"| {size} |" in row and licence in row


def test_versions_of_python():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tested = re.search(r"python: \[(.*?)\]", (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))[1]
    versions = re.findall(r"[\d.]+", tested)
    assert f'requires-python = ">={versions[0]}"' in project
    assert f"You need Python {versions[0]} to {versions[-1]}" in FLAT
    assert f"Python-{versions[0]}%20to%20{versions[-1]}" in TEXT and f"![Python {versions[0]} to {versions[-1]}]" in TEXT


def test_table_of_notebooks(readme):
    assert readme.rewrite(ROOT) == TEXT, "make readme writes the table anew"


def test_minutes_in_class(readme):
    """The estimate, by hand: 240 words are 2 minutes, two open cells 4, an exercise 6: 12, which is 15 in steps of five."""

    def cell(kind, source, *tags, **metadata):
        return {"cell_type": kind, "source": [source], "metadata": {"tags": list(tags), **metadata}}

    cells = [
        cell("markdown", "# 99 A title\n\n**Time** 1.5 min on a 2-core CPU; not yet measured on a GPU " + "header " * 500),
        cell("code", "setup"),
        cell("markdown", "word " * 240),
        cell("code", "x = 1"),
        cell("code", "y = 1"),
        cell("code", "# figure: folded"),
        cell("code", "x = None", "exercise"),
        cell("code", "check()", jupyter={"source_hidden": True}),
        cell("code", "x = 3", "solution", jupyter={"source_hidden": True}),
    ]
    assert readme.class_minutes({"cells": cells}) == 15
    assert readme.counted_cells({"cells": cells}) == 8  # all but the solution; the cell before it has no tag "check"
    assert readme.open_lines({"cells": cells}) == 3
    assert readme.machine_minutes({"cells": cells}) == 1.5
    cells[0]["source"] = ["# 99 A title"]
    with pytest.raises(ValueError, match=r"'99 A title' has no line \*\*Time\*\*"):
        readme.machine_minutes({"cells": cells})


def test_minutes_in_class_are_written_into_the_header(readme, tmp_path):
    path = tmp_path / "99_a_title.ipynb"
    rest = [{"cell_type": "code", "source": source, "metadata": {}} for source in ("setup", "x = 1\n\ny = 2")]
    header = (
        "# 99 A title\n\n* **Before this** nothing\n* **Time** 1 min on a 2-core CPU; no faster with a GPU\n* **Data** none"
    )
    written = header.replace("* **Time**", "* **In class** 5 min\n* **Time**")
    for before in (header, written, written.replace("5 min", "80 min")):
        cells = [{"cell_type": "markdown", "source": before, "metadata": {}}, *rest]
        path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
        readme.store_class_minutes(path)
        found = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert found[0]["source"] == written and found[1:] == rest
        assert readme.stored_class_minutes({"cells": found}) == 5 and readme.open_lines({"cells": found}) == 2
    assert readme.stored_class_minutes({"cells": cells[1:]}) is None
    path.write_text(json.dumps({"cells": rest}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"99_a_title\.ipynb has 0 lines"):
        readme.store_class_minutes(path)


def test_links_and_pictures():
    linked = re.findall(r'(?:\]\(|src="|srcset=")([^)"\s]+)', TEXT)
    for target in linked:
        if not target.startswith(("http", "#")):
            assert (ROOT / target).exists(), target
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}
    assert {t[1:] for t in linked if t.startswith("#")} <= headings
    assert all(re.findall(r"!\[([^\]]*)\]", TEXT)) and all(len(alt) > 20 for alt in re.findall(r'alt="([^"]*)"', TEXT))


def test_live_pages_are_made(readme):
    pages = importlib.import_module("pages")
    assert 4 <= len(set(re.findall(r"/live/(\w+)\.html", TEXT)) & set(pages.LIVE))
    assert set(re.findall(r"/live/(\w+)\.html", TEXT)) <= set(pages.LIVE)


def test_hero():
    """The animated picture is light enough for a first screen, and both pictures are sharp at twice the size."""
    width = int(re.search(r'hero\.webp" width="(\d+)"', TEXT)[1])
    path = ROOT / "data" / "pictures" / "hero.webp"
    assert path.stat().st_size <= 700_000
    with Image.open(path) as moving, Image.open(path.with_suffix(".png")) as still:
        assert moving.n_frames > 20
        assert moving.width >= 2 * width and still.size == moving.size
        assert moving.convert("RGBA").getpixel((0, 0))[3] == still.convert("RGBA").getpixel((0, 0))[3] == 0, "no white slab"
