"""The stored results and small networks of notebooks 05, 06, 10 and 13: complete, and what the networks really score."""

import numpy as np
import pandas as pd
import pytest

from medseg_lite import inference, metrics, models, paths, phantoms, transforms


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    return pd.read_csv(paths.shipped("results", "deepmedic_scores.csv"), dtype={"section": str})


def test_stored_scores_are_complete(scores):
    sizes = scores.groupby(["run", "network"]).size()
    assert set(sizes) == {4, 6, 12}  # a fold's subjects, section 3's validation cases, brains with contusions
    assert not scores.duplicated(["run", "network", "case"]).any()
    assert scores.dice.between(0, 1).all() and (scores.true_ml > 0).all()
    both = scores[(scores.precision > 0) & (scores.sensitivity > 0)]
    dice = 2 * both.precision * both.sensitivity / (both.precision + both.sensitivity)
    np.testing.assert_allclose(both.dice, dice, atol=2e-4)


def test_stored_curves_end_where_the_scores_are(scores):
    curves = pd.read_csv(paths.shipped("results", "deepmedic_curves.csv"))
    last = curves.groupby("run").dice.last()
    assert len(last) >= 5
    np.testing.assert_allclose(last, scores.groupby("run").dice.mean()[last.index], atol=1e-3)


@pytest.mark.parametrize("network", ["deep_plus", "deepmedic"])
def test_shipped_networks_score_what_is_stored(scores, network):
    model = models.load(paths.shipped("checkpoints", f"analysis_{network}.safetensors"))
    case = transforms.standardise(phantoms.brain(104, site="C"))
    found = inference.predict(model, case, progress=False)
    rows = scores[(scores.network == network) & scores.section.isin(["3.3", "3.4"]) & (scores.case == case.name)]
    assert len(rows) == 1
    assert metrics.dice(found, case.label > 0) == pytest.approx(rows.dice.item(), abs=0.01)


# ------------------------------------------------------------------------------------- notebook 10, electron microscopy


@pytest.fixture(scope="module")
def em_scores() -> pd.DataFrame:
    return pd.read_csv(paths.shipped("results", "em_scores.csv"))


def test_stored_em_scores_are_complete(em_scores):
    run = ["what", "variant", "seed"]
    sizes = em_scores.groupby(run).size()
    assert set(sizes.loc["inputs"]) == {6}
    assert not em_scores.duplicated([*run, "case"]).any()
    assert em_scores[["v_rand", "v_info", "dice"]].min(axis=None) > 0 and em_scores.dice.max() < 1
    curves = pd.read_csv(paths.shipped("results", "em_curves.csv"))
    np.testing.assert_allclose(
        curves.groupby(run).dice.last().sort_index(), em_scores.groupby(run).dice.mean().sort_index(), atol=1e-3
    )


@pytest.mark.parametrize(
    "name, variant, prepare",
    [
        ("learned", "learned", lambda case: case),
        ("learned_1000", "learned/1000", lambda case: case.replace(image=case.image / 1000)),
        ("standardised", "standardised", transforms.standardise),
        ("unet", "u-net", transforms.standardise),
    ],
)
def test_shipped_em_networks_score_what_is_stored(em_scores, name, variant, prepare):
    model = models.load(paths.shipped("checkpoints", f"em_inputs_{name}.safetensors"))
    case = phantoms.em(102, slices=2, size=256, counts=True)
    found = inference.predict(model, prepare(case), progress=False)
    row = em_scores.query("what == 'inputs' and variant == @variant and seed == 0 and case == @case.name")
    assert metrics.dice(found == 1, case.label == 1) == pytest.approx(row.dice.item(), abs=0.01)


def test_stored_missing_sequences_are_complete():
    training = pd.read_csv(paths.shipped("results", "missing_training.csv"))
    runs = training.groupby(["variant", "draw"]).size().unstack()
    assert (runs == 20).all().all() and set(runs.index) == {"complete", "control", "pretrained", "full"}
    at_test = pd.read_csv(paths.shipped("results", "missing_test.csv"), keep_default_na=False)
    runs = at_test.groupby(["variant", "missing"]).size().unstack()
    assert (runs == 20).all().all() and set(runs.columns) == {"none", "flair", "t1", "t1c", "t2"}
    for table in (training, at_test):
        assert table.filter(like="dice").stack().between(0, 1).all()


def test_stored_votes_are_of_the_phantoms_that_they_name():
    with np.load(paths.shipped("results", "vote_predictions.npz")) as stored:
        seed, maps, averages, truth = stored["seeds"][3], stored["maps"], stored["averages"], stored["truth"]
        assert maps.shape == (12, len(stored["networks"]), *truth.shape[1:]) and averages.shape == truth.shape
    assert maps.max() == averages.max() == truth.max() == 3
    case = phantoms.brain(int(seed), site="ABC"[seed % 3])
    assert np.array_equal(np.array([0, 1, 2, 1, 3])[case.label], truth[3])
    assert all(metrics.dice(m > 0, t > 0) > 0.4 for m, t in zip(averages, truth))
    assert not maps[3][:, ~case.mask].any()
