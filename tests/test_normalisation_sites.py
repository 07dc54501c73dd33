"""The stored results of experiments/normalisation_sites.py and its small networks: complete, and what the networks really score."""

import numpy as np
import pandas as pd
import pytest

from medseg_lite import inference, metrics, models, paths, phantoms, transforms

STANDARD, LEARNED, RAW = "FC-ResNet, standardised", "FCN + FC-ResNet, ÷ 1000", "FC-ResNet, raw"
INSTANCE = "instance norm + FC-ResNet"
SHIPPED = {"": LEARNED, "_raw": RAW, "_standardised": STANDARD}


def stored(name: str) -> pd.DataFrame:
    return pd.read_csv(paths.shipped("results", f"normalisation_{name}.csv"), dtype={"seed": str})


@pytest.mark.parametrize("name, rows, keys", [("prostate", 40, ["site"]), ("gain", 24, ["gain"]), ("places", 70, ["place"])])
def test_stored_scores_are_complete(name, rows, keys):
    scores = stored(name)
    assert set(scores.groupby(["system", "seed"]).size()) == {rows} and scores.system.nunique() == 5
    assert set(scores.seed) - {"average"} == set("012")
    assert not scores.duplicated(["system", "seed", "patient", *keys]).any()
    if name == "places":
        assert (scores.both_ml <= scores[["found_ml", "true_ml"]].min(axis=1) + 1e-3).all()
        return
    assert scores.dice.between(0, 1).all() and scores[["distance", "volume"]].min(axis=None) >= 0
    # A single piece is its own largest; more than one can only lose voxels.
    same = scores.dice == scores.dice_largest
    assert (scores.volume == scores.volume_largest)[same].mean() > 0.9


def test_volumes_along_the_prostate_are_those_of_the_whole():
    """The ml of all places give the Dice of a patient at all sites together, which lies among those of the sites."""
    sums = stored("places").groupby(["system", "seed", "patient"])[["found_ml", "true_ml", "both_ml"]].sum()
    whole = 2 * sums.both_ml / (sums.found_ml + sums.true_ml)
    sites = stored("prostate").query("seed != 'average'").groupby(["system", "seed", "patient"]).dice.agg(["min", "max"])
    assert ((whole > sites["min"] - 0.01) & (whole < sites["max"] + 0.01)).all()


def test_every_patient_was_at_every_site():
    scores = stored("prostate")
    for _, rows in scores.groupby(["system", "seed"]):
        assert (rows.groupby("patient").site.apply("".join) == "ABCD").all()
    assert scores[scores.site == "D"].coil.sum() * 2 == (scores.site == "D").sum()


def test_normalising_takes_out_any_gain():
    gains = stored("gain").pivot_table(index=["system", "patient", "seed"], columns="gain", values="dice")
    assert all(np.ptp(gains.xs(system), axis=1).max() < 0.01 for system in (STANDARD, INSTANCE))
    assert np.ptp(gains.xs(LEARNED), axis=1).mean() > 0.05


@pytest.mark.parametrize("ending", SHIPPED)
def test_the_shipped_networks_score_what_is_stored(ending):
    """They take raw or standardised intensities; the division by 1000 is in the kernels of the first layer."""
    model = models.load(paths.shipped("checkpoints", f"drozdzal_prostate{ending}.safetensors"))
    scores = stored("prostate").query("system == @SHIPPED[@ending] and seed == '0'").set_index(["patient", "site"])
    for site in "AD":
        case = phantoms.prostate(102, site=site, size=64, vary=True)
        seen = transforms.standardise(case) if model.card["input"] == "standardised" else case
        found = inference.predict(model, seen, output="probabilities", progress=False)[1] > model.card["threshold"]
        assert metrics.dice(found, case.label > 0) == pytest.approx(scores.dice[102, site], abs=0.02)


def test_the_usual_place_says_little():
    """A network that looks at the image has something to gain over one guess for all patients."""
    table = pd.read_csv(paths.shipped("results", "baselines.csv")).query("experiment == 'normalisation_sites'")
    assert table[table.method == "prior"].groupby("score").value.mean().between(0.3, 0.45).all()
