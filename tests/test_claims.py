"""The ledger of the papers' claims: its rules, its numbers, its tags and cards in the notebooks, and what is made of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from scripts import load

from medseg_lite import claims, course

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "data" / "results" / "claims.csv"
LEDGER = claims.table(TABLE)
BOOKS = {p.name[:2]: json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
HEAD = ",".join(LEDGER["kamnitsas-eq1"].__dict__)
GOOD = 'finzel-x,Finzel,figure 1,"A claim, with a comma",,01,,not tried,not applicable,,0,,nothing'

# Stored table, rows, groups, column, factor and digits of each effect, and its groups in the order of the numbers.
RECIPES = {
    "kamnitsas-table5-havaei": (
        "systems_scores.csv",
        "region == 'whole' and set == 'seen'",
        "system",
        "dice",
        100,
        1,
        ["two_path", "deepmedic"],
    ),
    "kamnitsas-sec4.3-centres": (
        "systems_scores.csv",
        "region == 'whole'",
        ["system", "set"],
        "dice",
        100,
        1,
        [("deepmedic", "seen"), ("deepmedic", "unseen"), ("forest", "seen"), ("forest", "unseen")],
    ),
    "kayalibay-fw-healthy": (
        "brains_healthy.csv",
        "variant == 'healthy beside' and set == 'healthy'",
        "fold",
        "false_ml_whole",
        1,
        1,
        [0, 1, 2],
    ),
    "kayalibay-sec2.1-downsample": ("brains_memory.csv", "", "variant", "dice_whole", 1, 2, ["down-sampled", "crops"]),
    "drozdzal-table3-generated": (
        "em_scores.csv",
        "what == 'inputs'",
        "variant",
        "v_rand",
        1,
        3,
        ["learned", "standardised", "rescaled"],
    ),
    "drozdzal-table6": (
        "normalisation_prostate.csv",
        "seed != 'average'",
        "system",
        "dice",
        1,
        3,
        ["FCN + FC-ResNet, ÷ 1000", "FC-ResNet, standardised", "FC-ResNet, raw"],
    ),
    "mlynarski-sec2.2-robust": (
        "missing_test.csv",
        "",
        ["variant", "missing"],
        "dice_whole",
        100,
        1,
        [("full", "none"), ("full", "flair"), ("dropped", "flair")],
    ),
    "finzel-fw-cascade": ("deepmedic_future_work.csv", "", "variant", "Dice whole", 1, 1, ["cascade", "plain"]),
    "finzel-fw-two-phases": (
        "deepmedic_future_work.csv",
        "",
        "variant",
        "expected / true volume",
        1,
        2,
        ["equal classes", "equal, then natural"],
    ),
}


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tagged() -> dict[str, list[tuple[str, dict]]]:
    """Return the cells of each claim's tag, with their notebooks' numbers."""
    found: dict[str, list[tuple[str, dict]]] = {}
    for number, book in BOOKS.items():
        for cell in book["cells"]:
            for tag in cell["metadata"].get("tags", []):
                if tag.startswith("claim:"):
                    found.setdefault(tag, []).append((number, cell))
    return found


@pytest.fixture(scope="module")
def made():
    """The module notebooks/claims.py."""
    return load("notebooks", "claims")


# --------------------------------------------------------------------------------------------------------- the table


def test_every_paper_has_claims_and_ids_begin_with_its_author():
    assert {claim.paper for claim in LEDGER.values()} == set(claims.PAPERS)
    assert all(name.startswith(claim.paper.lower() + "-") for name, claim in LEDGER.items())


def test_trainings_decide_on_anatomy_only_with_three_seeds():
    """A verdict without any training is one about data or about a sampler."""
    few = [c.id for c in LEDGER.values() if c.rung2 in claims.DECIDED and c.seeds in (1, 2)]
    assert not few, f"fewer than three training runs decide nothing: {few}"


def test_what_is_decided_has_a_source():
    assert not [c.id for c in LEDGER.values() if c.decided and not c.source]


def test_sources_and_notebooks_exist():
    for claim in LEDGER.values():
        assert claim.source in ("", "live") or (ROOT / claim.source).is_file(), f"{claim.id}: {claim.source}"
        assert claim.source in ("", "live") or claim.source.startswith("data/results/"), claim.id
        assert claim.notebook in ("", *BOOKS), f"{claim.id}: notebook {claim.notebook} does not exist"


@pytest.mark.parametrize("name", RECIPES)
def test_effects_are_those_of_the_stored_tables(name):
    """Each number of the effect, in the words that stand before it, is computed anew."""
    file, query, by, column, scale, digits, groups = RECIPES[name]
    rows = pd.read_csv(ROOT / "data" / "results" / file)
    means = scale * (rows.query(query) if query else rows).groupby(by)[column].mean()
    expected = [f"{means[group]:.{digits}f}" for group in groups]
    found = re.findall(rf"-?\d+\.\d{{{digits}}}(?!\d)", LEDGER[name].effect.split(": ")[-1])
    assert LEDGER[name].source == f"data/results/{file}" and found == expected


def test_every_effect_of_a_stored_table_is_computed_here_or_by_a_cell():
    stored = [c for c in LEDGER.values() if c.source.startswith("data/") and re.search(r"\d", c.effect)]
    assert not [c.id for c in stored if c.id not in RECIPES and not c.tag]


NUMBER = re.compile(r"(?<![\d.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?|(?<!\d)\.\d+")


def numbers(text: str) -> list[str]:
    return [n.replace(",", "") for n in NUMBER.findall(text)]


@pytest.mark.parametrize("number", BOOKS)
def test_live_effects_are_printed_by_their_notebook(number):
    """Each number with a decimal point or three digits is that of an output, rounded."""
    outputs = [
        o
        for cell in BOOKS[number]["cells"]
        if cell["cell_type"] == "code" and "course.card(" not in source(cell)
        for o in cell["outputs"]
    ]
    texts = ["".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", "")) for o in outputs]
    printed = [float(n) for n in numbers(" ".join(texts)) if n not in ("", ".")]
    lost = {}
    for claim in LEDGER.values():
        if claim.source == "live" and claim.notebook == number:
            for n in numbers(claim.effect):
                digits = len(n.partition(".")[2]) if "e" not in n else 300
                if ("." in n or len(n) > 2) and not any(abs(p - float(n)) <= 0.5001 * 10.0**-digits for p in printed):
                    lost.setdefault(claim.id, []).append(n)
    assert not lost, "numbers in `effect` that no output of the notebook has"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("finzel-x", "Finzel X", "line 2: the id is 'Finzel X'; expected something like 'kamnitsas-fig8'"),
        (",Finzel", ",Nobody", "the paper of finzel-x is 'Nobody'; expected one of Kamnitsas"),
        ("not tried", "perhaps", "the verdict rung1 of finzel-x is 'perhaps'; expected one of shows"),
        ("not applicable", "", "the verdict rung2 of finzel-x is ''; expected one of shows"),
        ("01,,", "01,claim:other,", "the tag of finzel-x is 'claim:other'; expected 'claim:finzel-x' or nothing"),
        (",0,", ",few,", "the seeds of finzel-x are 'few'; expected the number of training runs"),
        ("01", "one", "the notebook of finzel-x is 'one'; expected two digits or nothing"),
        ("nothing", " ", "finzel-x lacks change; fill in"),
        ('"A claim, with a comma"', "A claim, with a comma", "more or fewer fields than there are columns"),
        (GOOD, f"{GOOD}\n{GOOD}", "line 3: the id 'finzel-x' stands twice"),
    ],
)
def test_faults_of_a_table_are_named(tmp_path, old, new, message):
    path = tmp_path / "claims.csv"
    path.write_text(f"{HEAD}\n{GOOD}\n", encoding="utf-8")
    assert list(claims.table(path)) == ["finzel-x"]
    path.write_text(f"{HEAD}\n{GOOD.replace(old, new, 1)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        claims.table(path)


def test_a_missing_column_is_named(tmp_path):
    (tmp_path / "claims.csv").write_text("id,paper\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has the columns id, paper; expected id, paper, place, claim"):
        claims.table(tmp_path / "claims.csv")


# --------------------------------------------------------------------------------------------------------- notebooks


def test_every_decided_claim_has_a_tag():
    assert not [c.id for c in LEDGER.values() if c.decided and not c.tag]


def test_each_tag_is_in_exactly_one_cell_that_asserts():
    cells = tagged()
    for claim in LEDGER.values():
        if claim.tag:
            found = cells.get(claim.tag, [])
            assert len(found) == 1, f"{claim.tag} is in {len(found)} cells"
            number, cell = found[0]
            assert number == claim.notebook, f"{claim.tag} is in notebook {number}, the table says {claim.notebook}"
            assert cell["cell_type"] == "code" and re.search(r"^ *(assert |.*\bassert_\w+\()", source(cell), re.MULTILINE), (
                claim.tag
            )


def test_every_tag_has_its_row():
    assert set(tagged()) <= {claim.tag for claim in LEDGER.values()}


@pytest.mark.parametrize("number", [n for n in BOOKS if "04" <= n <= "16"])
def test_notebooks_have_cards_of_claims(made, number):
    """A card is a cell of its own and shows the table as it is now."""
    ids = [
        made.ids_of(cell) for cell in BOOKS[number]["cells"] if "course.card(" in source(cell) and cell["cell_type"] == "code"
    ]
    assert ids and all(ids) and {name for card in ids for name in card} <= set(LEDGER)
    assert not made.refresh(json.loads(json.dumps(BOOKS[number]))), "make claims stores the cards anew"


# ------------------------------------------------------------------------------------------------- pages and cards


def test_claims_md_and_readme_are_what_the_command_makes(made):
    assert made.page(ROOT) == (ROOT / "CLAIMS.md").read_text(encoding="utf-8"), "make claims writes it anew"
    assert made.rewrite(ROOT) == (ROOT / "README.md").read_text(encoding="utf-8"), "make claims writes it anew"


def test_counts(made):
    """Three claims with these verdicts, whatever theirs are today."""
    verdicts = (("shows", "not applicable"), ("not tried", "not tried"), ("opposite", "not applicable"))
    three = [replace(claim, rung1=a, rung2=b) for claim, (a, b) in zip(LEDGER.values(), verdicts)]
    lines = [line.split(" | ") for line in made.counts(three).splitlines()]
    assert lines[-2] == ["| all", "by construction", "1", "0", "1", "1", "0", "3 |"]
    assert lines[-1] == ["| all", "on anatomy", "0", "0", "0", "1", "2", "3 |"]


def test_a_readme_without_markers_is_refused(made, tmp_path):
    (tmp_path / "README.md").write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md lacks the lines <!-- begin claims -->"):
        made.rewrite(tmp_path)


def test_a_notebook_that_does_not_exist_is_refused(made, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "claims.csv").write_text(f"{HEAD}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="names notebook 01, which does not exist"):
        made.page(tmp_path)


def test_links_of_claims_md_lead_somewhere():
    text = (ROOT / "CLAIMS.md").read_text(encoding="utf-8")
    links = set(re.findall(r"(?<!\\)\]\(([^)]+)\)", text))
    assert links and all((ROOT / link).is_file() for link in links)


def test_a_card_shows_both_verdicts_and_what_is_missing():
    claim = LEDGER["kamnitsas-fig8"]
    shown = course.card("kamnitsas-fig8", "kamnitsas-eq1")
    for text in (shown._repr_html_(), shown._repr_markdown_(), repr(shown)):
        assert claim.claim in text and claim.place in text and claim.change in text and claim.number in text
        assert claim.rung2 in text and f"{claim.seeds} training runs" in text and "nothing trained" in text
    assert [len(row) for row in shown.rows()] == [3] * 7


def test_cards_are_escaped():
    hostile = claims.Claim(**{**LEDGER["kamnitsas-fig8"].__dict__, "claim": "<b>a & b</b> | `c` *d*", "effect": "p < .05"})
    html, text = claims.Card([hostile])._repr_html_(), claims.Card([hostile])._repr_markdown_()
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in html and "<b>" not in html and "p &lt; .05" in html
    assert r"\<b\>a & b\</b\> \| \`c\` \*d\*" in text and len({line.count(" | ") for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [((), "no id is given"), (("finzel-fig0",), r"'finzel-fig0' is given; .*ids of that paper: finzel-fig1,")],
)
def test_unknown_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        claims.card(*ids)
