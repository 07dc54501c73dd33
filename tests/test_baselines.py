from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg_lite import baselines, losses, metrics, phantoms
from medseg_lite.volume import Case


def blob(seed: int, *, bright: float = 4.0, place=(5, 8, 6), speck: bool = True, size: int = 16) -> Case:
    """A bright ball in noise, the same ball dark in a second channel, and a bright speck that is no object."""
    rng = np.random.default_rng(seed)
    grid = np.indices((size, size, size))
    label = (sum((g - c) ** 2 for g, c in zip(grid, place)) <= 9).astype(np.uint8)
    marks = label.copy()
    if speck:
        marks[12:, 12:, 12:] = 1
    image = np.stack([bright * marks, -bright * marks]) + rng.normal(0, 1, (2, size, size, size))
    mask = np.ones(label.shape, bool)
    mask[:, :, 0] = False
    return Case(image=image.astype(np.float32), channels=("a", "b"), name=f"blob{seed}", label=label, mask=mask)


def test_nothing_and_everything():
    case = blob(0)
    assert not baselines.nothing(case).any()
    np.testing.assert_array_equal(baselines.everything(case), case.mask)


def test_the_prior_knows_the_place_and_not_the_image():
    cases = [blob(seed) for seed in range(4)]
    prior = baselines.Prior(cases)
    scores = prior.scores(blob(9, bright=0.0))
    assert metrics.dice(scores > 0.5, cases[0].label) > 0.9
    assert scores[:, :, 0].max() == 0  # outside the mask


def test_the_prior_follows_the_mask_of_another_grid():
    small, large = blob(0), blob(0, size=32, place=(10.5, 16.5, 12.5))
    scores = baselines.Prior([small]).scores(large)
    centre = [
        float((np.arange(n) * scores.sum(axis=tuple({0, 1, 2} - {k}))).sum() / scores.sum()) for k, n in enumerate(scores.shape)
    ]
    np.testing.assert_allclose(centre, (10.5, 16.5, 12.5), atol=0.8)


def test_each_baseline_is_better_than_the_one_before_where_what_it_adds_is_needed():
    cases = [blob(seed, bright=2.0) for seed in range(8)]
    methods = baselines.fit(cases[:3], cases[3:5])
    table = baselines.table(methods, cases[5:])
    dice = table.groupby("method", sort=False)["dice"].mean()
    assert list(dice.index) == ["nothing", "everything", "prior", "threshold", "blur + threshold", "rule"]
    assert dice["nothing"] == 0 and dice["everything"] < 0.1
    assert dice["threshold"] < 0.6 < dice["blur + threshold"] < dice["rule"]
    assert set(table.columns) == {"method", "case", "dice", "precision", "sensitivity"}


def test_dark_objects_are_found_too():
    cases = [blob(seed, speck=False).select(["b"]) for seed in range(5)]
    methods = baselines.fit(cases[:2], cases[2:4])
    assert metrics.dice(methods["threshold"](cases[4]), cases[4].label) > 0.8


def test_slices_that_stand_alone():
    cases = [phantoms.em(seed) for seed in range(3)]
    methods = baselines.fit(cases[:1], cases[1:2])
    table = baselines.table(methods, cases[2:])
    assert table["dice"].between(0, 1).all()


def test_another_target():
    case = blob(0)
    case = case.replace(label=np.where(case.label, 2, 0).astype(np.uint8))
    methods = baselines.fit([case], [case], target=lambda label: label == 2)
    assert metrics.dice(methods["rule"](case), case.label == 2) > 0.9


def test_components():
    mask = np.zeros((6, 6, 1), bool)
    mask[0, 0], mask[2:4, 2:4] = True, True
    assert baselines.without_small_components(mask, 4).sum() == 4
    assert baselines.without_small_components(mask, 5).sum() == 0
    assert not baselines.without_small_components(np.zeros_like(mask), 5).any()


@pytest.mark.parametrize("frequency", [0.5, 0.1, 0.01])
def test_the_best_constant_of_cross_entropy_is_the_entropy(frequency):
    labels = torch.zeros(2, 10, 100, dtype=torch.long)
    labels[:, :, : int(100 * frequency)] = 1
    p = torch.tensor([1 - frequency, frequency])
    entropy = float(-(p * p.log()).sum())
    assert baselines.constant_loss(losses.cross_entropy, labels, 2) == pytest.approx(entropy, abs=1e-4)


def test_the_best_constant_of_jaccard_by_search():
    labels = torch.zeros(1, 10, 10, dtype=torch.long)
    labels[:, 0] = 1
    grid = torch.linspace(-6, 6, 400)
    values = [
        float(losses.jaccard_distance(torch.stack([0 * t, t]).view(1, 2, 1, 1).expand(1, 2, 10, 10), labels)) for t in grid
    ]
    assert baselines.constant_loss(losses.jaccard_distance, labels, 2) == pytest.approx(min(values), abs=2e-3)
