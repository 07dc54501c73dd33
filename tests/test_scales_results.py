"""The stored results of experiments/deepmedic_scales.py: complete, alive, and made by the networks that ship."""

import numpy as np
import pandas as pd
import pytest
from scripts import load

from medseg_lite import models, paths

experiment = load("experiments", "deepmedic_scales")


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    return pd.read_csv(paths.shipped("results", "deepmedic_scales.csv"))


def test_stored_runs_are_complete(scores):
    key = ["task", "method", "seed", "copy"]
    curves = pd.read_csv(paths.shipped("results", "deepmedic_scales_curves.csv"))
    networks = scores[scores.parameters.notna()]
    wanted = {
        (task, method, seed, 0)
        for task, methods in experiment.TASKS.items()
        for method in methods
        for seed in experiment.SEEDS
        if method not in experiment.NOT_RUN
    }
    wanted |= {("stroke", experiment.BASELINE, 0, copy) for copy in experiment.COPIES}
    assert set(networks.groupby(key).groups) == set(curves.groupby(key).groups) == wanted
    assert set(networks.groupby(key).size()) == {experiment.COUNT["test"]}
    assert set(curves.groupby(key).size()) == {experiment.VALIDATIONS}
    assert networks.alive.all() and (networks.cpu_seconds > 0).all() and not scores.duplicated([*key, "case"]).any()
    assert scores[scores.method == "forest"].seed.nunique() == len(experiment.SEEDS)
    kinds = ["nothing", "everything", "prior", "threshold", "blur + threshold", "rule"]
    assert list(scores[scores.seed.isna()].method.unique()) == kinds


def test_networks_are_ahead_of_all_that_learns_nothing(scores):
    means = scores[(scores.task == "stroke") & (scores["copy"] == 0)].groupby("method").dice.mean()
    assert means[["Deep+", "DeepMedic", "BigDeep+"]].min() > means[scores[scores.seed.isna()].method.unique()].max()


def test_two_and_three_dimensions_had_the_same_time(scores):
    seconds = scores[scores.task == "isotropic"].groupby("method").cpu_seconds.mean()
    assert seconds.max() < 1.25 * seconds.min()


def test_no_person_has_two_uses():
    uses = [range(experiment.FIRST[part], experiment.FIRST[part] + count) for part, count in experiment.COUNT.items()]
    assert len(set().union(*uses)) == sum(experiment.COUNT.values())


@pytest.mark.parametrize("method", experiment.SHIPPED)
def test_a_shipped_network_has_the_stored_score(scores, method, monkeypatch):
    monkeypatch.setitem(experiment.COUNT, "test", 1)
    experiment.cohort.cache_clear()
    (case,) = experiment.cohort("stroke", "test")
    experiment.cohort.cache_clear()
    model = models.load(paths.shipped("checkpoints", f"{experiment.SHIPPED[method]}.safetensors"))
    found = experiment.score(experiment.lesion(model, case) > model.card["threshold"], case)
    rows = scores[(scores.task == "stroke") & (scores.method == method) & (scores.seed == 0) & (scores["copy"] == 0)]
    (stored,) = rows[rows.case == case.name].to_dict("records")
    assert {name: found[name] for name in experiment.COLUMNS} == pytest.approx(
        {name: stored[name] for name in experiment.COLUMNS}, abs=2e-3, nan_ok=True
    )
    assert np.isclose(stored["threshold"], model.card["threshold"], atol=1e-3)
