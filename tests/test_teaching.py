"""What TEACHING.md says of the notebooks: minutes, headings, exercises, cells and quoted lines are those of the notebooks."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "TEACHING.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NUMBERS = [path.name[:2] for path in NOTEBOOKS]
ROWS = ["Goals: can", "Core", "Skip", "Misconception", "Misconception", "Ask before", "Ask before", "Project"]


def part(title: str, text: str = TEXT) -> str:
    """Return what stands under a heading of the second level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def plain(text: str) -> str:
    return " ".join(text.split())


@dataclass
class Notebook:
    """A notebook as this page speaks of it."""

    title: str
    minutes: int
    headings: list[str]
    heading_of: dict[str, str]  # of each code cell that has an output, by id
    exercises: list[str]  # their checks
    words: dict[str, str]  # sources and stored texts of a cell, by its id; of a check and its exercise, by the check's name


def text_of(output: dict) -> str:
    found = output.get("text") or output.get("data", {}).get("text/plain") or ""
    return "".join(found)


def read(path: Path) -> Notebook:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    headings, heading_of, exercises, words = [], {}, [], {}
    for cell in cells:
        source, outputs = "".join(cell["source"]), cell.get("outputs", [])
        tags, text = cell["metadata"].get("tags", []), plain(source + "\n" + "".join(map(text_of, outputs)))
        if cell["cell_type"] == "markdown":
            headings += re.findall(r"^##+ (.*)$", source, re.MULTILINE)
        elif outputs and headings:
            heading_of[cell["id"]], words[cell["id"]] = headings[-1], text
        if "check" in tags or "exercise" in tags:
            name = re.findall(r"\bcheck_\w+(?=\()", source)[-1]
            words[name] = words.get(name, "") + text
            exercises += [name] if "exercise" in tags else []
    header = "".join(cells[0]["source"])
    minutes = int(re.search(r"\*\*In class\*\* (\d+) min", header)[1])
    return Notebook(header.split("\n")[0].removeprefix("# "), minutes, headings, heading_of, exercises, words)


BOOKS = {path.name[:2]: read(path) for path in NOTEBOOKS}
SECTIONS = dict(re.findall(r"^### (\d\d) (.*?)(?=^### |\Z)", part("The notebooks, one by one"), re.MULTILINE | re.DOTALL))


def rows(number: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| ([\w: ]+?) \| (.*) \|$", SECTIONS[number], re.MULTILINE)


def test_every_notebook_has_a_section():
    assert list(SECTIONS) == NUMBERS


@pytest.mark.parametrize("number", NUMBERS)
def test_title_minutes_and_what_comes_before(number):
    section, book = SECTIONS[number], BOOKS[number]
    assert f"{number} {section.splitlines()[0]}" == book.title
    name = next(path.name for path in NOTEBOOKS if path.name.startswith(number))
    assert f"[Notebook {number}](notebooks/{name}), {book.minutes} minutes. Before it: " in section
    before = re.findall(r"\b\d\d\b", re.search(r"Before it: (.*)\.", section)[1])
    assert all(other in NUMBERS and other < number for other in before) and bool(before) == (number != "00")


@pytest.mark.parametrize("number", NUMBERS)
def test_rows(number):
    found = rows(number)
    assert [name for name, _ in found] == ROWS
    assert 2 <= len(found[0][1].split("; ")) <= 4, "goals"
    assert "Done when" in found[-1][1]


@pytest.mark.parametrize("number", NUMBERS)
def test_headings_exist(number):
    core, skip = ([h.strip("*") for h in text.split("; ")] for name, text in rows(number) if name in ("Core", "Skip"))
    assert not set(core) & set(skip)
    unknown = [heading for heading in core + skip if heading not in BOOKS[number].headings]
    assert not unknown, f"notebook {number} has no headings {unknown}"


@pytest.mark.parametrize("number", NUMBERS)
def test_exercises_exist(number):
    exercises = BOOKS[number].exercises
    for place, check in re.findall(r"exercise (\d), `(check_\w+)`", SECTIONS[number]):
        assert exercises[int(place) - 1] == check
    assert set(re.findall(r"check_\w+", SECTIONS[number])) <= set(exercises)


@pytest.mark.parametrize("number", NUMBERS)
def test_cells_exist_and_stand_under_their_headings(number):
    where = BOOKS[number].heading_of
    for text in (text for name, text in rows(number) if name == "Ask before"):
        heading, cell = re.match(r"\*(.*?)\*, `([\w-]+)`\. ", text).groups()
        assert where.get(cell) == heading, f"{cell} stands under {where.get(cell)!r}"
    cells = re.findall(r"[Cc]ell `([\w-]+)`", SECTIONS[number])
    assert set(cells) <= set(where)
    for text in (text for name, text in rows(number) if name == "Misconception"):
        assert re.search(r"[Cc]ell `|`check_", text), "a cell or a check answers it"


@pytest.mark.parametrize("number", NUMBERS)
def test_quoted_text_stands_in_the_cell_or_check_that_is_named(number):
    words = BOOKS[number].words
    for name, text in rows(number):
        quoted = re.findall(r'"([^"]+)"', re.sub(r"`[^`]*`", "", text))
        named = " ".join(words[code] for code in re.findall(r"`([\w-]+)`", text) if code in words)
        missing = [found for found in quoted if found.rstrip(".") not in named]
        assert not missing, f"{name} of {number}: {missing}"


def test_term():
    table = re.findall(r"^\| (\d+) \| (.*?) \| (\d+) \| (.*) \| (.*) \|$", part("A term of 14 weeks"), re.MULTILINE)
    assert [int(week) for week, *_ in table] == list(range(1, 15))
    for _, book, minutes, read_before, handed_in in table:
        number = re.match(r"\[(\d\d)\]", book)[1]
        assert int(minutes) == BOOKS[number].minutes <= 90
        allowed = {check for other in [number, *re.findall(r"notebook (\d\d)", handed_in)] for check in BOOKS[other].exercises}
        assert set(re.findall(r"check_\w+", handed_in)) <= allowed
        assert not re.search(r"check_", read_before)
    taught = re.findall(r"\[(\d\d)\]", part("A term of 14 weeks"))
    assert sorted({*taught, *re.search(r"Notebooks (\d\d), (\d\d) and (\d\d)", part("A term of 14 weeks")).groups()}) == NUMBERS


def test_week():
    table = re.findall(r"^\| (\d) \| (.*?) \| (.*) \|$", part("One week"), re.MULTILINE)
    assert [int(day) for day, *_ in table] == list(range(1, 6))
    for _, morning, afternoon in table:
        for checks, number in re.findall(r"((?:`check_\w+`(?:, )?)+) of (\d\d)", afternoon):
            assert f"[{number}]" in morning and set(re.findall(r"check_\w+", checks)) <= set(BOOKS[number].exercises)
    taught = re.findall(r"\[(\d\d)\]", part("One week"))
    assert len(taught) == len(set(taught)) == 10
    left_out = [number for number in NUMBERS if number not in taught]
    assert left_out == ["02", "09", "10", "11", "12", "13", "16"] and "Left out are 02, 09 to 13 and 16." in part("One week")


def test_links():
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        page = ROOT / (name or "TEACHING.md")
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
    assert "(TEACHING.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_to_the_notebook_that_they_name():
    for number, target in re.findall(r"\[(\d\d)\]\(notebooks/([^)]+)\)", TEXT):
        assert target.startswith(f"{number}_") and (ROOT / "notebooks" / target).exists()


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:`|^    |wheelhouse )make ([a-z]+)", TEXT, re.MULTILINE))
    assert {"lab", "student", "grade"} <= targets
    assert targets <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_the_page_is_short():
    assert TEXT.count("\n") <= 450
