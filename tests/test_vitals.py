from __future__ import annotations

import pytest
import torch

from medseg_lite import models
from medseg_lite.vitals import examine


@pytest.fixture
def network(stir):
    torch.manual_seed(0)
    return stir(models.deep_plus(in_channels=2, classes=2, width=0.2)).eval()


def test_a_network_that_answers_everywhere_alike_is_dead(network, noise_case):
    with torch.no_grad():
        list(network.parameters())[-1].copy_(torch.tensor([50.0, -50.0]))
    signs = examine(network, [noise_case((20, 20, 6))])
    assert signs.constant and not signs.alive and signs.recall == {0: 1.0, 1: 0.0}
    assert str(signs).startswith("dead: one class everywhere; recall 0: 100%, 1: 0%")


def test_a_live_network(network, noise_case):
    cases = [noise_case((20, 20, 6), seed=seed) for seed in range(2)]
    signs = examine(network, cases)
    assert signs.alive and not signs.constant and set(signs.recall) == {0, 1}
    assert signs.silent == 0 and str(signs).startswith("alive; recall 0: ")


def test_a_class_that_is_never_found(network, noise_case):
    case = noise_case((20, 20, 6))
    label = case.label.copy()
    label[:4] = 2
    signs = examine(network, [case.replace(label=label)])
    assert signs.recall[2] == 0 and not signs.alive and str(signs).startswith("blind to a class")


def test_silent_channels_are_counted(network, noise_case):
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv3d))
    with torch.no_grad():
        first.weight[:2] = 0
    before = examine(network, [noise_case((20, 20, 6))]).silent
    assert 0 < before < 0.2


def test_labels_are_needed(network, noise_case):
    with pytest.raises(ValueError, match="recall needs the truth"):
        examine(network, [noise_case().replace(label=None)])
    with pytest.raises(ValueError, match="at least one case"):
        examine(network, [])
