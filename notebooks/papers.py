"""Write the tables "from the paper to the code" in PAPERS.md: what `make papers` calls.

The tables are made of docstrings in medseg_lite. A docstring names its sources, and then the notebooks that teach it:

    Source: Kamnitsas et al. 2017, section 2.3 and eq. 6; Kayalibay et al. 2017, table 7.
    Taught in notebooks 04 and 07.

A semicolon ends a source. Sources other than the five papers of the course stand in docstrings only.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medseg_lite.paths import atomic_write

ROOT = Path(__file__).resolve().parent.parent
# First authors, by whom docstrings cite the five papers, and the word that marks the paper's table in PAPERS.md.
AUTHORS = {
    "Kamnitsas": "deepmedic",
    "Finzel": "havaei",
    "Havaei": "havaei",
    "Kayalibay": "kayalibay",
    "Drozdzal": "drozdzal",
    "Mlynarski": "mlynarski",
}
KINDS = {"s": "section", "a": "appendix", "e": "eq.", "f": "figure", "t": "table"}
ITEM = r"(?:[A-Z]\.\d+|\d+(?:\.\d+)*|[IVX]+|[A-Z])\b"
PLACE = re.compile(
    rf"\b((?i:sections?|append\w+|eqs?\.|equations?|figures?|tables?)) ({ITEM}(?:(?:, and |, | and | to ){ITEM})*)"
)
ROMAN = dict(zip("I II III IV V VI VII VIII IX X".split(), range(1, 11)))


@dataclass(frozen=True)
class Entry:
    """The docstring of a module, class or function of the package.

    Args:
        path: path of the file, in the repository.
        name: the name as a reader types it, without "medseg_lite.".
        line: line of the definition; 1 for a module.
        text: the docstring with each paragraph on one line.
        builders: names of the functions beside a class that are annotated to return it; notebooks use a network by these.
    """

    path: str
    name: str
    line: int
    text: str
    builders: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The text after "Source:", or "" where there is none."""
        found = re.search(r"\bSource: (.*?)(?= Taught in notebook|$)", self.text, re.MULTILINE)
        return found[1] if found else ""

    @property
    def taught(self) -> list[str]:
        """The numbers of the notebooks after "Taught in"."""
        found = re.search(r"\bTaught in notebooks? ([\d ,and]+)\.", self.text)
        return re.findall(r"\d\d", found[1]) if found else []

    @property
    def pattern(self) -> re.Pattern:
        """The pattern that finds the name, or that of a builder, in a notebook.

        A name with an underscore or with capitals inside is found alone, any other only behind its module: `losses.dice`. A
        module is found before a dot.
        """
        if "." not in self.name:
            return re.compile(rf"\b{self.name}\.\w")
        return re.compile("|".join(map(_pattern, (self.name, *self.builders))))


def _pattern(name: str) -> str:
    last = name.split(".")[-1]
    alone = "_" in last.strip("_") or re.search(r".[A-Z]", last)
    return rf"\b{last if alone else re.escape(name)}\b"


def entries(root: Path) -> Iterator[Entry]:
    """Yield every docstring of the package."""
    for path in sorted((root / "medseg_lite").rglob("*.py")):
        parts = path.relative_to(root / "medseg_lite").with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        front = path.with_name("__init__.py")
        exported = {} if len(parts) == 1 else {name: parts[0] for name in _imported(front)}
        yield from _entries(ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(root)), module, exported)


def _imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}


def _entries(node: ast.AST, path: str, name: str, exported: dict[str, str], builders: tuple[str, ...] = ()) -> Iterator[Entry]:
    text = ast.get_docstring(node)
    if text:
        yield Entry(path, name, getattr(node, "lineno", 1), re.sub(r"(?<=\S)\n *(?=\S)", " ", text), builders)
    inside = {
        child: ".".join(filter(None, (exported.get(child.name, name), child.name)))
        for child in node.body
        if isinstance(child, (ast.ClassDef, ast.FunctionDef))
    }
    for child, full in inside.items():
        made = (f for f in inside if isinstance(f, ast.FunctionDef) and f.returns and ast.unparse(f.returns) == child.name)
        yield from _entries(child, path, full, {}, tuple(inside[f] for f in made if not f.name.startswith("_")))


def citations(source: str) -> list[tuple[str, str]]:
    """Return the places in the five papers that a source names: ("Kamnitsas", "eq. 6"), …

    The place is "" where a paper is cited as a whole.
    """
    found = []
    for clause in source.split(";"):
        authors = [(m.start(), m[0]) for m in re.finditer(rf"\b({'|'.join(AUTHORS)})\b", clause)]
        cited = {author: [] for _, author in authors}
        for m in PLACE.finditer(clause) if authors else ():
            before = [author for start, author in authors if start < m.start()]
            cited[before[-1] if before else authors[0][1]] += _split(m[1], m[2])
        found += [(author, place) for author, places in cited.items() for place in places or [""]]
    return list(dict.fromkeys(found))


def _split(kind: str, items: str) -> list[str]:
    """Return the places one by one: ("equations", "1 to 3") gives "eq. 1", "eq. 2", "eq. 3"."""
    items = re.sub(r"(\d+) to (\d+)", lambda m: ", ".join(map(str, range(int(m[1]), int(m[2]) + 1))), items)
    return [f"{KINDS[kind[0].lower()]} {item}" for item in re.findall(ITEM, items)]


def order(place: str) -> tuple:
    """Return the key that sorts places: sections, appendices, equations, figures, tables, and each kind by number."""
    kind, _, number = place.partition(" ")
    parts = [ROMAN.get(part, 100 + ord(part[0])) if part.isalpha() else int(part) for part in number.split(".") if part]
    return list(KINDS.values()).index(kind) if kind else -1, parts


def lessons(root: Path) -> dict[str, tuple[str, list[dict]]]:
    """Return the file name and the cells of each notebook, by number."""
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return {path.name[:2]: (path.name, json.loads(path.read_text(encoding="utf-8"))["cells"]) for path in paths}


def heading(cells: list[dict], pattern: re.Pattern) -> str:
    """Return the heading above the first code that uses a name, or above the first text that mentions it where no code does."""
    above, first = "", {}
    for cell in cells:
        lines = "".join(cell["source"]).splitlines()
        for line in lines:
            title = re.match(r"#+ (.*)", line) if cell["cell_type"] == "markdown" else None
            above = title[1] if title else above
            if pattern.search(line) and not line.startswith(("from ", "import ")):
                first.setdefault(cell["cell_type"], above)
    return first.get("code", first.get("markdown", ""))


def tables(root: Path) -> dict[str, str]:
    """Return the table of each paper. Where two papers share a table, each place begins with the author's name."""
    rows = {table: [] for table in AUTHORS.values()}
    notebooks = lessons(root)
    for entry in entries(root):
        links = "; ".join(_link(number, notebooks, entry) for number in entry.taught)
        for author, place in citations(entry.source):
            table = AUTHORS[author]
            shown = place if list(AUTHORS.values()).count(table) == 1 else f"{author}, {place}".rstrip(", ")
            row = f"| {shown} | [`{entry.name}`]({entry.path}) | {links} |"
            rows[table].append((author, order(place), row))
    head = "| place | in the package | taught in notebook |\n|---|---|---|\n"
    return {table: head + "\n".join(row for *_, row in sorted(found)) for table, found in rows.items()}


def _link(number: str, notebooks: dict[str, tuple[str, list[dict]]], entry: Entry) -> str:
    if number not in notebooks:
        raise ValueError(f"{entry.path}, line {entry.line}: {entry.name} is taught in notebook {number}, which does not exist")
    name, cells = notebooks[number]
    return f"[{number}](notebooks/{name}) {heading(cells, entry.pattern)}".rstrip()


def rewrite(root: Path) -> str:
    """Return PAPERS.md with new tables."""
    text = (root / "PAPERS.md").read_text(encoding="utf-8")
    for name, table in tables(root).items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"PAPERS.md lacks the lines {begin} and {end}, between which the table of {name} stands")
        text = text[: text.index(begin)] + f"{begin}\n\n{table}\n\n" + text[text.index(end) :]
    return text


if __name__ == "__main__":
    made = rewrite(ROOT)
    with atomic_write(ROOT / "PAPERS.md") as temporary:
        temporary.write_text(made, encoding="utf-8")
