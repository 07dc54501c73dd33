"""The stored results of experiments/deepmedic_balance.py: complete, alive, and with the shares and numbers that their rows promise."""

import numpy as np
import pandas as pd
import pytest
import torch
from scripts import load

from medseg_lite import paths

experiment = load("experiments", "deepmedic_balance")


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    return pd.read_csv(paths.shipped("results", "deepmedic_balance.csv"))


def test_stored_rows_are_complete(scores):
    networks, simple = scores[scores.seed.notna()], scores[scores.seed.isna()]
    key, cases = ["method", "seed", "cut"], experiment.COHORTS["test"][0]
    wanted = {(m, seed, cut) for m in experiment.SCHEMES for seed in experiment.SEEDS for cut in experiment.CUTS}
    assert set(networks.groupby(key).groups) == wanted and set(networks.groupby(key).size()) == {cases}
    assert list(simple.method.unique()) == ["nothing", "everything", "prior", "threshold", "blur + threshold", "rule"]
    assert set(simple.cut) == {"chosen"} and set(simple.groupby("method").size()) == {cases}
    assert scores[list(experiment.SCORES)].apply(lambda column: column.between(0, 1).all()).all()
    assert set(networks[~networks.alive.astype(bool)].method) <= {"P_uni"}, (
        "one of three found nothing at .5, which the page says"
    )
    curves = pd.read_csv(paths.shipped("results", "deepmedic_balance_curves.csv"))
    assert set(curves.groupby(["method", "seed"]).size()) == {experiment.VALIDATIONS}


def test_the_share_of_lesion_and_the_number_of_voxels_are_what_the_rows_say(scores):
    rows = scores[scores.seed.notna()].groupby("method")
    share, voxels = rows.lesion_share.mean(), rows.voxels.first()
    assert share["P_uni"] < 0.03 and share["uniform S-25"] < 0.03 and abs(share["P_eq"] - 0.5) < 0.03
    assert share["P_eq"] > share["S-19"] > share["S-25"] > share["S-29"] > share["P_uni"]
    assert abs(share["few S-25"] - share["S-25"]) < 0.02 and share["equal S-25"] == 0.5
    assert voxels["few S-25"] == voxels["P_eq"] == voxels["P_uni"] and voxels["uniform S-25"] == voxels["S-25"]


def test_one_update_of_each_scheme(monkeypatch):
    """The schemes as they are trained: the share in the loss, and a network that has moved."""
    monkeypatch.setitem(experiment.SETTINGS, "steps", 1)
    monkeypatch.setattr(experiment, "COHORTS", {"train": (2, 0), "validation": (1, 1000), "test": (1, 2000)})
    experiment.cohort.cache_clear()
    for scheme in ("S-25", "equal S-25", "few S-25", "P_eq", "P_uni"):
        model, share = experiment.train(scheme, 0)
        assert all(torch.isfinite(p).all() for p in model.parameters()) and 0 <= share <= 0.6
        assert share == 0.5 or scheme != "equal S-25"
    row = experiment.score(np.zeros(experiment.cohort("test")[0].shape, bool), experiment.cohort("test")[0])
    assert row["sensitivity"] == 0 and row["specificity"] == 1
    threshold, maps = experiment.best_threshold(model, experiment.cohort("validation"))
    assert np.isfinite(threshold) and np.isneginf(maps[0][~experiment.cohort("validation")[0].mask]).all()
    experiment.cohort.cache_clear()
