"""The exported pages: what is folded, what the pictures are called, and what axe-core finds in Chromium."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("pages")
    sys.path.remove(str(FOLDER))


def show(page, text: str, tmp_path: Path) -> None:
    """Open a page without the network: it must be whole without its formulas."""
    page.route(re.compile("^http"), lambda route: route.abort())
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())


@pytest.mark.parametrize("number", ["00", "08"])
def test_notebook_as_a_page(pages, findings, page, tmp_path, number):
    paths = pages.find_notebooks()
    (path,) = [p for p in paths if p.name.startswith(number)]
    notebook = nbformat.read(path, as_version=4)
    show(page, pages.convert(path, paths), tmp_path)

    solutions = [c for c in notebook.cells if "solution" in c.metadata.get("tags", [])]
    folded = [c for c in notebook.cells if c.cell_type == "code" and pages.fold(c) and c not in solutions]
    assert page.locator("details.solution").count() == len(solutions) >= 2
    assert page.locator("details.folded").count() == len(folded) >= 1
    assert page.locator("details[open]").count() == 0
    assert not page.locator("details.solution pre").first.is_visible()

    outputs = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    alts = [o.metadata["image/png"]["alt"] for o in outputs if "text/html" not in o.data]
    assert page.eval_on_selector_all(".output > img", "all => all.map(i => i.alt)") == alts
    assert page.locator(".output > img").first.is_visible()

    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert not findings(page)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390, "the page scrolls sideways on a phone"
    assert not findings(page, "scrollable-region-focusable", "target-size")


def test_first_page(pages, findings, page, tmp_path):
    paths = pages.find_notebooks()
    show(page, pages.make_index(paths, list(pages.LIVE)), tmp_path)
    assert page.locator("main li a").count() == len(paths) + len(pages.LIVE)
    assert not findings(page)


def test_folding(pages):
    def cell(source, *tags, hidden=False):
        return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags), "jupyter": {"source_hidden": hidden}})

    assert pages.fold(cell("x = 1")) == pages.fold(cell("# a comment\nx = 1")) == ""
    assert pages.fold(cell("# figure: three brains\nplot()")) == "Code of the figure: three brains"
    assert pages.fold(cell('# @title Figure: a brain { display-mode: "form" }\nplot()')) == "Code of the figure: a brain"
    assert pages.fold(cell("def check(): ...", hidden=True)) == "Code"
    assert pages.fold(cell('# @title Check of exercise 1 { display-mode: "form" }', hidden=True)) == "Check of exercise 1"
    assert pages.fold(cell("answer = 1", "solution")) == "Solution"
    assert pages.fold(cell('# @title Solution: open me { display-mode: "form" }', "solution")) == "Solution: open me"


def test_mended_tables_and_links(pages):
    head = '<thead><tr><th></th><th class="a">mean</th></tr></thead><tbody><tr><th>whole</th><td>1</td></tr></tbody>'
    assert pages.mend(head) == (
        '<thead><tr><td></td><th scope="col" class="a">mean</th></tr></thead>'
        '<tbody><tr><th scope="row">whole</th><td>1</td></tr></tbody>'
    )
    assert pages.mend('<a href="07_dense_crf.ipynb#search">') == '<a href="07_dense_crf.html#search">'
    experiment = pages.mend('<a href="../experiments/em.md">')
    assert re.fullmatch(r'<a href="https://github.com/[\w./-]+/blob/main/experiments/em.md">', experiment)


def test_a_picture_without_alt_text_is_refused(pages, tmp_path):
    picture = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    path = tmp_path / "00_bare.ipynb"
    cells = [nbformat.v4.new_markdown_cell("# 00 Bare"), nbformat.v4.new_code_cell("show()", outputs=[picture])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    with pytest.raises(ValueError, match=r"00_bare\.ipynb shows a picture without alt text"):
        pages.convert(path, [path])
