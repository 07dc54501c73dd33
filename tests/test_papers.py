"""The tables of PAPERS.md are those that `make papers` makes, and the sources of docstrings are read correctly."""

from pathlib import Path

import pytest
from scripts import load

ROOT = Path(__file__).resolve().parent.parent
papers = load("notebooks", "papers")


def test_the_stored_tables_are_those_of_the_docstrings():
    assert (ROOT / "PAPERS.md").read_text(encoding="utf-8") == papers.rewrite(ROOT), "run `make papers`"


def test_every_paper_has_a_table():
    tables = papers.tables(ROOT)
    assert set(tables) == set(papers.AUTHORS.values())
    assert all(table.count("\n") > 5 for table in tables.values())


SOURCES = [
    ("Kamnitsas et al. 2017, section 2.3, eq. 6; Kayalibay et al. 2017, eq. 7.", "K section 2.3, K eq. 6, Y eq. 7"),
    (
        "Kamnitsas et al. 2017, eq. 3 (one voxel) and eq. 4; the weights, Kayalibay et al. 2017, sections 4.1 and 5.2.",
        "K eq. 3, K eq. 4, Y section 4.1, Y section 5.2",
    ),
    ("He et al. 2015, section 2; tables III and IV of Drozdzal et al. 2018.", "D table III, D table IV"),
    ("Mlynarski et al. 2019, equations 1 to 3. The other factor is left out.", "M eq. 1, M eq. 2, M eq. 3"),
    (
        "Kamnitsas et al. 2017, sections 4.1.2, 4.2.2, and 4.3.2, appendix B and Table B.1.",
        "K section 4.1.2, K section 4.2.2, K section 4.3.2, K appendix B, K table B.1",
    ),
    ("Finzel 2017, section 3.1; Havaei et al. 2017, section 3.", "F section 3.1, H section 3"),
    ("Zheng et al. 2015, which Kamnitsas et al. name as future work (section 5).", "K section 5"),
    ("Havaei et al. 2017.", "H "),
    ("Holm 1979, table 2.", ""),
]
LETTERS = {"Kamnitsas": "K", "Kayalibay": "Y", "Drozdzal": "D", "Mlynarski": "M", "Finzel": "F", "Havaei": "H"}


@pytest.mark.parametrize(("source", "expected"), SOURCES)
def test_places_of_a_source(source, expected):
    assert ", ".join(f"{LETTERS[author]} {place}" for author, place in papers.citations(source)) == expected


def test_places_are_sorted_as_numbers():
    places = [
        "section 2",
        "section 2.3",
        "section 10",
        "appendix B",
        "eq. 2",
        "eq. 10",
        "figure 1",
        "table IV",
        "table IX",
        "table B.1",
    ]
    assert sorted(reversed(places), key=papers.order) == places


PACKAGE = {
    "medseg_lite/losses.py": '''
def dice(a):
    """Return the overlap.

    Source: Drozdzal et al. 2018, section 3.3 and
    eq. 2.
    Taught in notebooks 00 and 01.
    """
    def inner(): "Source: Holm 1979."
''',
    "medseg_lite/crf/__init__.py": "from .dense import DenseCRF, build",
    "medseg_lite/crf/dense.py": '''
class DenseCRF:
    """A CRF. Source: Kamnitsas et al. 2017, eq. 5. Taught in notebook 00."""

def build() -> DenseCRF:
    pass
''',
}
CELLS = [
    ("markdown", "# 00 Start"),
    ("code", "from medseg_lite import losses"),
    ("markdown", "## Dice\n`losses.dice` is the overlap.\n### In code"),
    ("code", "losses.dice(a)"),
    ("markdown", "## Exercises"),
    ("code", "losses.dice(b)\ncrf.build()"),
]


def test_tables_of_a_small_package(tmp_path):
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    cells = [{"cell_type": kind, "source": text.splitlines(True)} for kind, text in CELLS]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_start.ipynb").write_text(papers.json.dumps({"cells": cells}))
    with pytest.raises(ValueError, match=r"losses\.dice is taught in notebook 01, which does not exist"):
        papers.tables(tmp_path)
    (tmp_path / "notebooks" / "01_next.ipynb").write_text(papers.json.dumps({"cells": cells[2:3]}))
    tables = papers.tables(tmp_path)
    links = "[00](notebooks/00_start.ipynb) In code; [01](notebooks/01_next.ipynb) Dice"
    assert tables["drozdzal"].splitlines()[2:] == [
        f"| section 3.3 | [`losses.dice`](medseg_lite/losses.py) | {links} |",
        f"| eq. 2 | [`losses.dice`](medseg_lite/losses.py) | {links} |",
    ]
    assert tables["deepmedic"].splitlines()[2:] == [
        "| eq. 5 | [`crf.DenseCRF`](medseg_lite/crf/dense.py) | [00](notebooks/00_start.ipynb) Exercises |"
    ]
