from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from medseg_lite import inference, models
from medseg_lite.ensembles import Ensemble, hierarchical_vote


@pytest.fixture
def members(stir):
    def build(seed):
        torch.manual_seed(seed)
        return stir(models.dm2d_seg(in_channels=2, classes=3, width=0.1), seed)

    return [build(seed) for seed in range(3)]


def test_averages_probabilities(members):
    x = torch.randn(2, 2, 51, 54)
    average = torch.stack([m(x).softmax(1) for m in members]).mean(0)
    logits = Ensemble(members)(x)
    torch.testing.assert_close(logits.softmax(1), average, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(2, 3, 6))
    assert not torch.allclose(average, torch.stack([m(x) for m in members]).mean(0).softmax(1), atol=1e-3)


def test_single_outputs_are_averaged_after_their_sigmoid(noise_case):
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(models.unet2d(classes=1, width=1 / 16).eval())
    case = noise_case((16, 32, 2), channels=("t2",))
    each = [inference.predict(m, case, output="probabilities", progress=False)[1] for m in members]
    together = inference.predict(Ensemble(members), case, output="probabilities", progress=False)
    np.testing.assert_allclose(together[1], np.mean(each, 0), atol=1e-5)
    assert np.ptp(np.stack(each), axis=0).max() > 0.01
    np.testing.assert_array_equal(inference.predict(Ensemble(members), case, progress=False), together[1] > 0.5)


def test_one_member_is_itself(members):
    x = torch.randn(1, 2, 51, 51)
    torch.testing.assert_close(Ensemble(members[:1])(x).softmax(1), members[0](x).softmax(1), rtol=1e-4, atol=1e-6)


def test_for_inference(members):
    ensemble, x = Ensemble(members), torch.randn(1, 2, 54, 51)
    torch.testing.assert_close(ensemble.for_inference()(x), ensemble(x), rtol=1e-4, atol=1e-4)


def test_predict_takes_an_ensemble(members, noise_case):
    case = noise_case((10, 7, 3))
    each = [inference.predict(m, case, output="probabilities", progress=False) for m in members]
    together = inference.predict(Ensemble(members), case, output="probabilities", progress=False)
    np.testing.assert_allclose(together, np.mean(each, 0), atol=1e-5)
    labels = inference.predict(Ensemble(members), case, progress=False)
    assert np.array_equal(labels, together.argmax(0))


def test_certain_members_do_not_give_infinities(members):
    with torch.no_grad():
        for m in members:
            m.classifier.bias.copy_(torch.tensor([500.0, 0.0, -500.0]))
    assert Ensemble(members)(torch.randn(1, 2, 51, 51)).isfinite().all()


def test_card_and_needs_are_the_members(members):
    for m in members:
        m.card = {"channels": ["flair", "t1c"]}
    ensemble = Ensemble(members)
    assert (ensemble.margin, ensemble.multiple, ensemble.spatial_dims) == (24, 3, 2)
    assert (ensemble.classes, ensemble.in_channels, ensemble.reach) == (3, 2, 8) and ensemble.card == members[0].card


def test_no_members():
    with pytest.raises(ValueError, match="at least one network"):
        Ensemble([])


@pytest.mark.parametrize(
    "other, what",
    [
        (lambda: models.deepmedic(in_channels=2, classes=3, width=0.1), "spatial_dims"),
        (lambda: models.large2d_seg(in_channels=2, classes=3, width=0.1), "margin are .24, 36"),
        (lambda: models.dm2d_seg(in_channels=2, classes=4, width=0.1), "classes are .3, 4"),
        (lambda: models.dm2d_seg(in_channels=1, classes=3, width=0.1), "in_channels are .2, 1"),
    ],
)
def test_members_must_agree(members, other, what):
    with pytest.raises(ValueError, match=f"must agree, but their {what}"):
        Ensemble([members[0], other()])


def test_members_must_agree_on_their_channels(members):
    members[0].card = {"channels": ["flair", "t1c"]}
    members[1].card = {"channels": ["t1c", "flair"]}
    with pytest.raises(ValueError, match="trained on different channels"):
        Ensemble(members[:2])


def test_an_ensemble_of_padded_networks_keeps_their_halo():
    ensemble = Ensemble([models.kayalibay_unet3d(width=0.1), models.kayalibay_unet3d(width=0.2)])
    assert ensemble.halo == ensemble.members[0].halo
    assert Ensemble([models.dm2d_seg(width=0.1)]).halo is None


# ---------------------------------------------------------------------------------------------------------------- votes


def vote_of_one_voxel(v1: int, v2: int, v3: int, n: int) -> int:
    """Figure 7 read aloud, in whole numbers: .4 = 2/5, .3 = 3/10."""
    tumour = v1 + v2 + v3
    if tumour == 0 or 5 * tumour < 2 * n:
        return 0
    if 10 * (v1 + v3) < 3 * tumour:
        return 2
    return 3 if 5 * v3 >= 2 * (v1 + v3) else 1


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_hierarchical_vote_for_every_possible_vote(n):
    votes = [v for v in itertools.product(range(n + 1), repeat=3) if sum(v) <= n]
    maps = np.array([[0] * (n - sum(v)) + [1] * v[0] + [2] * v[1] + [3] * v[2] for v in votes]).T  # (networks, voxels)
    expected = [vote_of_one_voxel(*v, n) for v in votes]
    for order in (slice(None), slice(None, None, -1)):
        assert hierarchical_vote(maps[order]).tolist() == expected
    assert set(expected) == {0, 1, 2, 3}
    brats = np.array([0, 1, 2, 4])[maps]
    assert hierarchical_vote(brats, labels=(1, 2, 4)).tolist() == [{3: 4}.get(e, e) for e in expected]


def test_hierarchical_vote_refuses():
    with pytest.raises(ValueError, match="at least one"):
        hierarchical_vote([])
    with pytest.raises(ValueError, match=r"hold \[4\] beside 0"):
        hierarchical_vote([np.array([0, 4])])
