"""The stored results of experiments/normalisation_sites.py and its small network: complete, and what the network really scores."""

import numpy as np
import pandas as pd
import pytest

from medseg_lite import inference, metrics, models, paths, phantoms

PIPELINE = "FCN + FC-ResNet, raw"


def stored(name: str) -> pd.DataFrame:
    return pd.read_csv(paths.shipped("results", f"normalisation_{name}.csv"), dtype={"seed": str})


@pytest.mark.parametrize("name, rows", [("prostate", 40), ("volumes", 40), ("gain", 24), ("liver", 6)])
def test_stored_scores_are_complete(name, rows):
    scores = stored(name)
    assert set(scores.groupby(["system", "seed"]).size()) == {rows}
    assert scores.system.nunique() == (4 if name == "liver" else 3)
    if name == "liver":
        assert scores[["dice_lesion", "dice_liver"]].stack().between(0, 1).all()
        return
    which = ["system", "seed", "patient", "site"] + ["gain"] * (name == "gain")
    assert not scores.duplicated(which).any()
    assert scores.dice.between(0, 1).all() and scores[["distance", "volume"]].min(axis=None) >= 0
    # A single piece is its own largest; more than one can only lose voxels.
    same = scores.dice == scores.dice_largest
    assert (scores.volume == scores.volume_largest)[same].mean() > 0.9


def test_every_patient_was_at_every_site():
    scores = stored("prostate")
    for _, rows in scores.groupby(["system", "seed"]):
        assert (rows.groupby("patient").site.apply("".join) == "ABCD").all()
    assert scores[scores.site == "D"].coil.sum() * 2 == (scores.site == "D").sum()


def test_standardising_takes_out_any_gain():
    gains = stored("gain").pivot_table(index=["system", "patient", "seed"], columns="gain", values="dice")
    assert np.ptp(gains.xs("FC-ResNet, standardised"), axis=1).max() < 0.01
    assert np.ptp(gains.xs(PIPELINE), axis=1).mean() > 0.05


def test_the_shipped_pipeline_scores_what_is_stored():
    model = models.load(paths.shipped("checkpoints", "drozdzal_prostate.safetensors"))
    scores = stored("prostate").query("system == @PIPELINE and seed == '0'").set_index(["patient", "site"])
    for site in "AD":
        case = phantoms.prostate(102, site=site, size=64)
        found = inference.predict(model, case, progress=False)
        assert metrics.dice(found > 0, case.label > 0) == pytest.approx(scores.dice[102, site], abs=0.02)
