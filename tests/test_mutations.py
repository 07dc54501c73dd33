"""Notebook 03's claims fail where its method is broken.

Beside each claim the notebook says which change makes it fail. Here its cells are run once, figures and exercises left out; then each
change is made in the text of the cells that it touches, and these cells are run again.
"""

import contextlib
import io
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "03_fair_comparisons.ipynb"
LEFT_OUT = {"figure", "exercise", "check", "solution"}
SHOWN_ONLY = {"fair-01", "fair-widget"}  # the setup, and the widget
CELLS = {
    cell["id"]: "".join(cell["source"])
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code" and not LEFT_OUT & set(cell["metadata"].get("tags", ())) and cell["id"] not in SHOWN_ONLY
}

# What is broken: the cells that are run again, and the texts that are replaced in them.
MUTATIONS = {
    "the two methods are one seed, a millionth off": (
        ["fair-hook"],
        {"scores = np.array([dice(run) for run in seven])": "scores = np.array([dice(run) for run in (seven[0], *copies)])"},
    ),
    "the dumb methods get no threshold": (
        ["fair-baselines"],
        {
            "simple = baselines.fit(train, validation)": 'simple = baselines.fit(train, validation)\nsimple["threshold"] = simple["nothing"]'
        },
    ),
    "the dumb methods change places": (
        ["fair-baselines"],
        {"rows = plain.mean(axis=1)": "plain.index = plain.index[::-1]\nrows = plain.mean(axis=1)"},
    ),
    "the networks are beginners": (["fair-baselines"], {"means.mean()}": "dice(beginner).mean()}"}),
    "the perturbed runs get other seeds": (["fair-noise"], {"study(0, perturbed=k)": "seven[k]"}),
    "a score is reported on fresh patients": (["fair-flattery"], {"reported_on = chosen_on": "reported_on = fresh"}),
    "all thresholds stay at .5": (
        ["fair-threshold"],
        {"gain = statistics.two_way(scores - at_half)": "gain = statistics.two_way(at_half - at_half)"},
    ),
    "thresholds are chosen on test cases": (
        ["fair-threshold"],
        {"names = {": 'names = {"validation": {c.name for c in test}, "test": {c.name for c in test}}\n_ = {'},
    ),
    "the patients of one run are shuffled": (
        ["fair-two-way"],
        {
            "(scores[i] - scores[j]).std()": "(scores[i] - rng.permutation(scores[j])).std()",
            "closer =": "rng = np.random.default_rng(0)\ncloser =",
        },
    ),
    "the seven runs are one seed": (
        ["fair-two-way"],
        {"duels = [": "seeds, scores = scores, np.concatenate([same_start, same_start[:3]])\nduels = ["},
    ),
    "only patients are drawn again": (
        ["fair-two-way"],
        {
            "return statistics.two_way(a, b, draws=1000)": "return statistics.two_way(*[np.stack([x.mean(axis=0)] * 2) for x in (a, b)])"
        },
    ),
    "nothing is corrected": (["fair-holm"], {"corrected += holm(p).min()": "corrected += p.min()"}),
    "Holm's rule forgets to multiply": (["fair-holm"], {"(len(p) - j) * p[i]": "p[i]"}),
    "the costs are unequal": (["fair-costs"], {"longer = [study(seed, steps=MEMBERS * 80)": "longer = [seven[seed]"}),
    "the longer networks are beginners": (
        ["fair-costs"],
        {
            "longer = [study(seed, steps=MEMBERS * 80) for seed in range(3)]": "",
            "np.array([dice(run) for run in longer])": "np.array([dice(beginner)] * 3)",
            'assert costs.Dice["one, three': 'True or costs.Dice["one, three',
        },
    ),
    "the control has other seeds too": (
        ["fair-control"],
        {"dice(average(copies)).mean() - same_start[1:].mean()": "with_seeds"},
    ),
    "the dying network is trained with care": (["fair-dead"], {"lr=0.3, momentum=0.9": "lr=0.03, momentum=0.9"}),
    "bright is called membrane": (["fair-blur"], {"dark=True": "dark=False"}),
}
# The mean of seven seeds and of three are not one number: the control's own members are what it is compared with.
MUTATIONS["the control has other seeds too"][1]["causes = {"] = (
    "with_seeds = dice(average(seven[4:7])).mean() - means[4:7].mean()\ncauses = {"
)


def run(cell: str, names: dict, replaced: dict | None = None) -> None:
    """Run a cell of the notebook with texts replaced in it, and without its output."""
    text = CELLS[cell]
    for old, new in (replaced or {}).items():
        text = text.replace(old, new)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, cell, "exec"), names)


@pytest.fixture(scope="module")
def trained() -> dict:
    """Return the names of the whole notebook, whose claims all hold."""
    names = {"display": lambda *_: None}
    for cell in CELLS:
        run(cell, names)
    return names


@pytest.mark.slow
def test_every_claim_holds(trained):
    assert {"seven", "copies", "longer", "blur"} <= set(trained)


def test_every_claim_has_a_mutation():
    """A cell with a claim, which says when it fails, is broken by a mutation at least once."""
    claiming = {cell for cell, text in CELLS.items() if "# fails " in text}
    assert claiming - {cells[-1] for cells, _ in MUTATIONS.values()} <= {"fair-constant"}
    for what, (cells, replaced) in MUTATIONS.items():
        text = "".join(CELLS[cell] for cell in cells)
        assert all(old in text for old in replaced), f"{what}: the notebook no longer says {list(replaced)}"


@pytest.mark.slow
@pytest.mark.parametrize("what", MUTATIONS)
def test_a_broken_method_breaks_the_claim(trained, what):
    cells, replaced = MUTATIONS[what]
    names = dict(trained)
    for cell in cells[:-1]:
        run(cell, names, replaced)
    with pytest.raises(AssertionError):
        run(cells[-1], names, replaced)
