"""The variants of DeepMedic's second pathway: each differs from the network in the one place that its name says; the stored runs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scripts import load
from torch.testing import assert_close

from medseg_lite import models, paths

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
experiment = load("experiments", "deepmedic_variants")
SIZES = {"widths": (3, 3, 4, 4), "hidden": (5, 5)}


def build(variant: str, seed: int = 0):
    torch.manual_seed(seed)
    return experiment.VARIANTS[variant](1, 3, dropout=0.0, **SIZES).eval()


@pytest.fixture
def patch() -> torch.Tensor:
    return torch.randn(1, 1, 33, 33, 33, generator=torch.Generator().manual_seed(1))  # 9 predictions and 12 voxels on each side


def test_the_first_variant_is_the_papers_network(patch):
    torch.manual_seed(0)
    network = models.deepmedic(in_channels=1, classes=3, dropout=0.0, **SIZES).eval()
    assert_close(build("as in the paper")(patch), network(patch))


def test_averaged_input_is_the_mean_round_every_voxel_that_the_papers_network_sees(patch):
    plain, averaged = (build(name).cut(patch) for name in ("as in the paper", "averaged input"))
    assert_close(averaged[0], plain[0])
    for array in (patch, patch.numpy()):  # samplers cut arrays
        low = build("averaged input").cut(array)[1]
        assert tuple(low.shape) == tuple(plain[1].shape)
        for place in ((0, 0, 0), (2, 5, 10), (10, 10, 10)):
            middle = [3 * p + 1 for p in place]
            assert float(plain[1][(0, 0, *place)]) == float(patch[(0, 0, *middle)])
            around = patch[(0, 0, *(slice(m - 1, m + 2) for m in middle))]
            assert float(low[(0, 0, *place)]) == pytest.approx(float(around.mean()), abs=1e-6)


def test_interpolation_changes_only_what_varies(patch):
    repeated, interpolated = (build(name) for name in ("as in the paper", "interpolated features"))
    flat = torch.full_like(patch, 0.7)
    assert_close(repeated(flat), interpolated(flat))
    assert (repeated(patch) - interpolated(patch)).abs().max() > 1e-3


def test_low_resolution_alone_ignores_the_first_pathway(patch):
    """Its answer is the same for three neighbours, and does not change with a voxel that the second pathway leaves out."""
    network = build("low resolution alone")
    out, unseen = network(patch), patch.clone()
    assert_close(out, out[..., 1::3, 1::3, 1::3].repeat_interleave(3, 2).repeat_interleave(3, 3).repeat_interleave(3, 4))
    unseen[0, 0, 15, 15, 15] += 5  # 15 is no place of the form 3 k + 1
    assert_close(network(unseen), out)
    assert (build("as in the paper")(unseen) - build("as in the paper")(patch)).abs().max() > 1e-3


def test_stored_runs_are_complete_and_the_answer_has_their_numbers():
    scores = pd.read_csv(paths.shipped("results", "deepmedic_variants.csv"))
    runs = scores.groupby(["variant", "seed"]).size()
    assert set(runs.index) == {(v, s) for v in experiment.VARIANTS for s in experiment.SEEDS} and set(runs) == {8}
    assert scores["alive"].all()
    means = scores.groupby("variant")["dice"].mean()
    text = (EXPERIMENTS / "deepmedic_variants.md").read_text("utf-8")
    (answer,) = (line for line in text.splitlines() if line.startswith("**Answer.**"))
    for number in (means["as in the paper"], means["low resolution alone"]):
        assert f"{number:.2f}"[1:] in answer
    gain = means["interpolated features"] - means["as in the paper"]
    assert f"{abs(gain):.3f}"[1:] in answer and gain < 0
    assert np.isfinite(means).all()
