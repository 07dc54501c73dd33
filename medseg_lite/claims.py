"""The ledger of the papers' claims: the table `data/results/claims.csv`, checked, and cards of it for notebooks.

The table is made by hand. Each row is a claim in our words, with two verdicts. Rung 1 is a task in which the claim must show if the
method does what the paper says, or mechanics that are exact by construction. Rung 2 is anatomy: trainings that are long enough, with
at least three seeds. `make claims` makes CLAIMS.md from the table.
"""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from . import paths

PAPERS = ("Kamnitsas", "Kayalibay", "Drozdzal", "Mlynarski", "Finzel", "Havaei")
VERDICTS = ("shows", "does not show", "opposite", "not tried", "not applicable")
DECIDED = VERDICTS[:3]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and what we found about it.

    Attributes:
        id: unique name, such as "kamnitsas-fig8".
        paper: first author, one of PAPERS.
        place: section, figure, table or equation of the paper.
        claim: the claim in our words, one sentence.
        number: the paper's own number for it, with its unit; "" if it gives none.
        notebook: number of the notebook that is about it, such as "05"; "" if none is.
        tag: "claim:" and the id, which the cell that asserts it carries; "" if no cell does.
        rung1: verdict by construction, one of VERDICTS.
        rung2: verdict on anatomy, one of VERDICTS.
        effect: what we measured; "" if nothing.
        seeds: number of training runs behind it; 0 where nothing is trained.
        source: "data/results/x.csv" for a stored table, "live" for a cell's own output, or "".
        change: what would change our mind, or what is missing.
    """

    id: str
    paper: str
    place: str
    claim: str
    number: str
    notebook: str
    tag: str
    rung1: str
    rung2: str
    effect: str
    seeds: int
    source: str
    change: str

    @property
    def decided(self) -> bool:
        """True where one of the verdicts says that the claim shows, does not show, or is the opposite of what we see."""
        return self.rung1 in DECIDED or self.rung2 in DECIDED


def table(path: str | Path | None = None) -> dict[str, Claim]:
    """Read the claims, by id, in the order of the table.

    Args:
        path: the table; None for the one that ships with the project.

    Raises:
        ValueError: a column is missing or too many, or a row breaks a rule. The message names the line and the rule.
    """
    path = paths.shipped("results", "claims.csv") if path is None else Path(path)
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        expected, found = [f.name for f in fields(Claim)], list(reader.fieldnames or [])
        if found != expected:
            raise ValueError(f"{path} has the columns {', '.join(found)}; expected {', '.join(expected)}, in this order")
        claims: dict[str, Claim] = {}
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where} has more or fewer fields than there are columns; put texts with commas in quotes")
            fault = _fault(row, claims)
            if fault:
                raise ValueError(f"{where}: {fault}")
            claims[row["id"]] = Claim(**{**row, "seeds": int(row["seeds"])})
    return claims


def _fault(row: dict[str, str], before: dict[str, Claim]) -> str:
    """Return what is wrong with a row, or ""."""
    name = row["id"]
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        return f"the id is {name!r}; expected something like 'kamnitsas-fig8': lower case, digits, dots and hyphens"
    if name in before:
        return f"the id {name!r} stands twice; ids are unique"
    if row["paper"] not in PAPERS:
        return f"the paper of {name} is {row['paper']!r}; expected one of {', '.join(PAPERS)}"
    for rung in ("rung1", "rung2"):
        if row[rung] not in VERDICTS:
            return f"the verdict {rung} of {name} is {row[rung]!r}; expected one of {', '.join(VERDICTS)}"
    if row["tag"] not in ("", f"claim:{name}"):
        return f"the tag of {name} is {row['tag']!r}; expected 'claim:{name}' or nothing"
    if not re.fullmatch(r"\d+", row["seeds"]):
        return f"the seeds of {name} are {row['seeds']!r}; expected the number of training runs, 0 where nothing is trained"
    if not re.fullmatch(r"(\d\d)?", row["notebook"]):
        return f"the notebook of {name} is {row['notebook']!r}; expected two digits or nothing"
    missing = [column for column in ("place", "claim", "change") if not row[column].strip()]
    if missing:
        return f"{name} lacks {' and '.join(missing)}; fill in every row's place, claim and change"
    return ""


@dataclass(frozen=True)
class Card:
    """Claims side by side, which a notebook shows as a table.

    Args:
        claims: the claims, one a column.
    """

    claims: Sequence[Claim]

    def rows(self) -> list[list[str]]:
        """Return the table: names in the first column, then a column for each claim. The first row has the claims themselves."""
        columns = [_column(claim) for claim in self.claims]
        return [[name, *(column[name] for column in columns)] for name in columns[0]]

    def __repr__(self) -> str:
        columns = [_column(claim) for claim in self.claims]
        return "\n\n".join("\n".join(f"{name}: {text}" for name, text in column.items()) for column in columns)

    def _repr_html_(self) -> str:
        style = 'style="text-align: left; vertical-align: top; white-space: normal; max-width: 26em"'
        head, *body = [[html.escape(text) for text in row] for row in self.rows()]
        first = "".join(f'<th scope="col" {style}>{text}</th>' for text in head)
        lines = [
            f'<tr><th scope="row" {style}>{row[0]}</th>' + "".join(f"<td {style}>{text}</td>" for text in row[1:]) + "</tr>"
            for row in body
        ]
        return f"<table><thead><tr>{first}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def _repr_markdown_(self) -> str:
        head, *body = [[markdown(text) for text in row] for row in self.rows()]
        return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def _column(claim: Claim) -> dict[str, str]:
    runs = {0: "nothing trained", 1: "1 training run"}.get(claim.seeds, f"{claim.seeds} training runs")
    return {
        "claim": claim.claim,
        "where": f"{claim.paper} et al., {claim.place}" if claim.paper != "Finzel" else f"Finzel, {claim.place}",
        "in the paper": claim.number or "no number",
        "by construction": claim.rung1,
        "on anatomy": claim.rung2,
        "we measured": f"{claim.effect or 'no number'} ({runs})",
        "what would change our mind": claim.change,
    }


def markdown(text: str) -> str:
    """Return a text that Markdown shows as it is, inside a table as well."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def card(*ids: str) -> Card:
    """Return a card with claims of the ledger, which the last line of a cell shows.

    Args:
        ids: ids of claims, such as "kamnitsas-fig8".

    Raises:
        ValueError: no id is given, or one is unknown.
    """
    claims = table()
    unknown = [name for name in ids if name not in claims]
    if unknown or not ids:
        near = sorted({other for name in unknown for other in claims if other.split("-")[0] == name.split("-")[0]})
        hint = f"; ids of that paper: {', '.join(near)}" if near else ""
        raise ValueError(f"{', '.join(map(repr, unknown)) or 'no id'} is given; expected ids of data/results/claims.csv{hint}")
    return Card(tuple(claims[name] for name in ids))
