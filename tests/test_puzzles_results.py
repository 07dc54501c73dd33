"""The stored results of experiments/puzzles.py: complete, alive, and what the page says of them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scripts import load

from medseg_lite import models, paths, receptive_field, statistics

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SEPARATE = ["ring", "tube", "far_plate", "rare", "decoys"]  # puzzles in which the method wins where it is needed

experiment = load("experiments", "puzzles")


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    return pd.read_csv(paths.shipped("results", "puzzles.csv"))


@pytest.fixture(scope="module")
def curves() -> pd.DataFrame:
    return pd.read_csv(paths.shipped("results", "puzzles_curves.csv"))


def intervals(scores: pd.DataFrame, puzzle: str, end: int) -> dict:
    """Return the interval of each method's Dice at one end of the dial, 0 where it is needed and 1 where it is not."""
    rows = scores[(scores.puzzle == puzzle) & (scores.needed == experiment.PUZZLES[puzzle]["ends"][end])]
    return {method: experiment.interval(part) for method, part in rows.groupby("method", sort=False)}


def test_stored_puzzles_are_complete(scores, curves):
    networks, baselines = scores[scores.seed.notna()], scores[scores.seed.isna()]
    key = ["puzzle", "needed", "method", "seed"]
    wanted = {
        (puzzle, needed, method, seed)
        for puzzle, about in experiment.PUZZLES.items()
        for needed in about["ends"]
        for method in about["methods"]
        for seed in experiment.SEEDS
    }
    assert set(networks.groupby(key).size()) == {experiment.COUNT["test"]}
    assert set(networks.groupby(key).groups) == set(curves.groupby(key).groups) == wanted
    assert not scores.duplicated([*key, "case"]).any() and scores.dice.between(0, 1).all()
    facts = ["parameters", "updates", "cpu_seconds", "alive", "date", "torch", "medseg_lite"]
    assert networks[facts].notna().all(axis=None) and (networks.cpu_seconds > 0).all()
    kinds = ["nothing", "everything", "prior", "threshold", "blur + threshold", "rule"]
    assert all(list(rows) == kinds for _, rows in baselines.groupby(key[:2]).method.unique().items())
    for puzzle, rows in networks.groupby("puzzle"):
        classes = [f"dice_{k}" for k in experiment.PUZZLES[puzzle]["scored"]]
        np.testing.assert_allclose(rows.dice, rows[classes].mean(axis=1), atol=1e-4)


def test_no_case_has_two_uses():
    for puzzle, about in experiment.PUZZLES.items():
        parts = [{c.name for c in experiment.cohort(puzzle, part, about["ends"][0])} for part in experiment.FIRST]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


@pytest.mark.parametrize("puzzle", SEPARATE)
def test_the_method_wins_where_it_is_needed_and_only_there(scores, puzzle):
    """A method that gave random classes to the objects that it finds would fail at the first end."""
    *rivals, best = experiment.PUZZLES[puzzle]["methods"]
    needed, simpler = (intervals(scores, puzzle, end) for end in (0, 1))
    assert all(needed[best].low > found.high for method, found in needed.items() if method != best)
    assert any(simpler[rival].high > simpler[best].low for rival in rivals)


def test_the_textures_do_not_need_two_paths(scores):
    """Both pathways see 33 pixels, so nothing that one of them sees is hidden from the other."""
    needed = intervals(scores, "textures", 0)
    assert needed["global path"].high > needed["two paths"].low
    for build in (models.local_path_cnn, models.global_path_cnn):
        field = receptive_field.receptive_field(build(in_channels=1, classes=5, width=0.1))
        assert set(field.side) == {33}


def test_the_winners_are_alive_and_trained_to_the_end(scores, curves):
    vitals = pd.read_csv(paths.shipped("results", "vitals.csv")).query("experiment == 'puzzles'").set_index("row")
    assert len(vitals) == scores[scores.seed.notna()].groupby(["puzzle", "needed", "method", "seed"]).ngroups
    for puzzle in SEPARATE:
        best, needed = list(experiment.PUZZLES[puzzle]["methods"])[-1], experiment.PUZZLES[puzzle]["ends"][0]
        for seed in experiment.SEEDS:
            assert vitals.loc[f"{puzzle}, {needed}, {best}, {seed}", "alive"]
        mine = curves[(curves.puzzle == puzzle) & (curves.needed == needed) & (curves.method == best)]
        assert len(mine) == len(experiment.SEEDS) * mine.groupby("seed").size().iloc[0]
    assert not vitals.constant.any()


def test_the_noise_floor_is_below_every_difference(scores):
    """Runs from weights changed by a millionth differ by less than the method and its best rival do."""
    noise = pd.read_csv(paths.shipped("results", "puzzles_noise.csv"))
    for puzzle in SEPARATE:
        *rivals, best = experiment.PUZZLES[puzzle]["methods"]
        copies = noise[noise.puzzle == puzzle].pivot(index="copy", columns="case", values="dice")
        assert list(copies.index) == list(experiment.COPIES) and len(copies.columns) == experiment.COUNT["test"]
        needed = intervals(scores, puzzle, 0)
        assert statistics.noise_floor(copies) < needed[best].mean - max(needed[rival].mean for rival in rivals), puzzle


def test_the_far_plate_is_what_helps(scores):
    """Scores of a 2D network that cannot see the plate do not help: it is not the longer training, nor the further channels."""
    needed = intervals(scores, "far_plate", 0)
    assert needed["2D-3D A, plate hidden"].high < needed["2D-3D A"].low
    case = experiment.cohort("far_plate", "test", 1.0)[0]
    hidden = experiment.hide_plate(case)
    assert not (case.label[: experiment.PLATE] > 0).any() and (hidden.image[:, : experiment.PLATE] == 0).all()
    assert (hidden.image[:, experiment.PLATE :] == case.image[:, experiment.PLATE :]).all()


def test_the_answer_has_the_numbers_of_the_table(scores):
    text = (EXPERIMENTS / "puzzles.md").read_text("utf-8")
    (answer,) = (line for line in text.splitlines() if line.startswith("**Answer.**"))
    for puzzle in experiment.PUZZLES:
        found = intervals(scores, puzzle, 0)
        named = experiment.PUZZLES[puzzle]["methods"].keys() - {"local path"}
        assert all(f"{found[method].mean:.2f}"[1:] in answer for method in named), puzzle
