"""Write CLAIMS.md, the README's paragraph about it and the notebooks' stored cards: what `make claims` calls.

All of them are made from data/results/claims.csv.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from textwrap import fill

from execute import write
from pages import find_notebooks

from medseg_lite.claims import PAPERS, VERDICTS, Claim, card, markdown, table
from medseg_lite.paths import atomic_write

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin claims -->", "<!-- end claims -->"
TITLES = {
    "Kamnitsas": "Kamnitsas et al. 2017: DeepMedic and its CRF",
    "Kayalibay": "Kayalibay et al. 2017: a 3D U-Net for hands and brains",
    "Drozdzal": "Drozdzal et al. 2018: learned normalisation",
    "Mlynarski": "Mlynarski et al. 2018: long-range 2D context",
    "Finzel": "Finzel 2017: the survey",
    "Havaei": "Havaei et al. 2017: two pathways and cascades, as far as the survey reports them",
}
OPENING = """# Which of the papers' claims hold up here

This page lists the claims of the papers, in our words, and what we found about each. It is made from
[data/results/claims.csv](data/results/claims.csv) by `make claims`; the table is kept by hand.

Every claim is judged on two rungs.

* **By construction** (rung 1): a small task in which the method must win if it does what the paper says, or a mechanism that is exact,
  such as a parameter count. It shows that the mechanism works. It does not show how often real images need it.
* **On anatomy** (rung 2): trainings on brains, hands, membranes or prostates that are long enough, with at least three seeds and with
  the control that decides.

The verdicts:

* *shows*: we see what the paper says.
* *does not show*: we looked with enough runs, and it is not there.
* *opposite*: we see the contrary.
* *not tried*: there is no run, or none that counts. A run does not count if it has fewer than three seeds, has not converged, or was
  overturned by a control. What we measured all the same stands beside it, and the last column says what is missing.
* *not applicable*: the rung does not apply, as anatomy does not to a parameter count.

*Runs* is the number of trainings behind what we measured; 0 means that nothing was trained. *Live* numbers are printed by a notebook,
all others stand in a stored table. Our data are generated unless it says otherwise, so our numbers and the paper's are of different
patients.
"""


def counts(claims: list[Claim]) -> str:
    """Return the table of verdicts, one row for each paper and rung."""
    rows = ["| paper | rung | " + " | ".join(VERDICTS) + " | claims |", "|---|---|" + "---:|" * (len(VERDICTS) + 1)]
    for paper in (*PAPERS, "all"):
        chosen = [claim for claim in claims if paper in (claim.paper, "all")]
        for rung, name in (("rung1", "by construction"), ("rung2", "on anatomy")):
            found = Counter(getattr(claim, rung) for claim in chosen)
            numbers = " | ".join(str(found[verdict]) for verdict in VERDICTS)
            rows.append(f"| {paper} | {name} | {numbers} | {len(chosen)} |")
    return "\n".join(rows)


def section(claims: list[Claim], notebooks: dict[str, str]) -> str:
    """Return the table of one paper.

    Args:
        claims: claims of the paper.
        notebooks: file name of each notebook, by number.
    """
    head = "| place | claim | in the paper | by construction | on anatomy | we measured | runs | notebook | what would change our mind |"
    rows = [head, "|---|---|---|---|---|---|---:|---|---|"]
    for claim in claims:
        link = f"[{claim.notebook}](notebooks/{notebooks[claim.notebook]})" if claim.notebook else ""
        effect = markdown(claim.effect)
        if effect and claim.source:
            effect += " (live)" if claim.source == "live" else f" ([table]({claim.source}))"
        texts = (claim.place, claim.claim, claim.number, claim.rung1, claim.rung2)
        before = " | ".join(map(markdown, texts))
        rows.append(f"| {before} | {effect} | {claim.seeds} | {link} | {markdown(claim.change)} |")
    return "\n".join(rows)


def page(root: Path) -> str:
    """Return CLAIMS.md.

    Raises:
        ValueError: a claim names a notebook that does not exist.
    """
    claims = list(table(root / "data" / "results" / "claims.csv").values())
    notebooks = {path.name[:2]: path.name for path in find_notebooks(root)}
    lost = sorted({claim.notebook for claim in claims if claim.notebook} - set(notebooks))
    if lost:
        raise ValueError(f"claims.csv names notebook {', '.join(lost)}, which does not exist; correct the column notebook")
    parts = [OPENING, "## Verdicts by paper\n\n" + counts(claims) + "\n"]
    for paper in PAPERS:
        chosen = [claim for claim in claims if claim.paper == paper]
        parts.append(f"## {TITLES[paper]}\n\n{section(chosen, notebooks)}\n")
    return "\n".join(parts)


def paragraph(claims: list[Claim]) -> str:
    """Return the README's paragraph."""
    first, second = (Counter(getattr(claim, rung) for claim in claims) for rung in ("rung1", "rung2"))
    sentences = f"""[CLAIMS.md](CLAIMS.md) lists {len(claims)} claims of the papers, one by one, with what would change our mind. By
        construction, in small tasks and exact mechanisms, {first["shows"]} show, {first["does not show"]} do not, and {first["opposite"]}
        are the opposite of what we see. On anatomy, {second["shows"]} show, {second["does not show"]} do not, and {second["opposite"]} are
        the opposite; {second["not tried"]} have not been tried with enough seeds, long enough, or at all."""
    return "## Which of the papers' claims hold up here\n\n" + fill(" ".join(sentences.split()), 120)


def rewrite(root: Path) -> str:
    """Return README.md with a new paragraph about the claims.

    Raises:
        ValueError: the lines between which the paragraph stands are missing.
    """
    text = (root / "README.md").read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md lacks the lines {BEGIN} and {END}, between which the paragraph about the claims stands")
    claims = list(table(root / "data" / "results" / "claims.csv").values())
    return text[: text.index(BEGIN)] + f"{BEGIN}\n\n{paragraph(claims)}\n\n" + text[text.index(END) :]


def ids_of(cell: dict) -> list[str]:
    """Return the ids that a cell `course.card("id", "id")` shows, below its title, or an empty list for any other cell."""
    shown = re.fullmatch(r"# @title [^\n]*\ncourse\.card\(([^()]*)\)\s*", "".join(cell["source"]))
    return re.findall(r'"([^"]*)"', shown[1]) if shown else []


def refresh(notebook: dict) -> bool:
    """Store the cards of a notebook as the table has them now, and return whether that changed one."""
    changed = False
    for cell in notebook["cells"]:
        ids = ids_of(cell)
        if ids:
            shown = card(*ids)
            data = {"text/html": shown._repr_html_(), "text/markdown": shown._repr_markdown_(), "text/plain": repr(shown)}
            output = {"data": data, "execution_count": cell["execution_count"], "metadata": {}, "output_type": "execute_result"}
            old = [{kind: "".join(text) for kind, text in o.get("data", {}).items()} for o in cell["outputs"]]
            changed |= old != [data]
            cell["outputs"] = [output]
    return changed


if __name__ == "__main__":
    for name, made in (("CLAIMS.md", page(ROOT)), ("README.md", rewrite(ROOT))):
        with atomic_write(ROOT / name) as temporary:
            temporary.write_text(made, encoding="utf-8")
    for path in find_notebooks(ROOT):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if refresh(notebook):
            write(path, notebook)
