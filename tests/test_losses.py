from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from medseg_lite import losses, metrics, models

# Three voxels, three classes: the probabilities of each class, the true class, and -log p of it by hand.
PROBABILITIES = [[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]
TARGET = [0, 2, 1]
NEGATIVE_LOG = [0.356675, 1.386294, 2.302585]


def table() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(1, 3, 3)` that softmax to PROBABILITIES (any constant may be added), and the target `(1, 3)`."""
    logits = torch.tensor(PROBABILITIES).log().T + torch.tensor([3.0, -1.0, 0.5])
    return logits[None].requires_grad_(), torch.tensor([TARGET])


def test_cross_entropy_by_hand():
    logits, target = table()
    assert float(losses.cross_entropy(logits.detach(), target)) == pytest.approx(sum(NEGATIVE_LOG) / 3, abs=1e-5)


def test_cross_entropy_gradient_by_hand():
    logits, target = table()
    losses.cross_entropy(logits, target).backward()
    one_hot = np.eye(3)[TARGET]
    np.testing.assert_allclose(logits.grad[0].T, (np.array(PROBABILITIES) - one_hot) / 3, atol=1e-6)


def test_cross_entropy_is_the_mean_over_segments_and_voxels():
    """Equation 4: 1 / (B V) times the sum over B segments and V voxels of -log p of the true class."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 3, 2, 5), torch.randint(4, (2, 3, 2, 5))
    total = 0.0
    for s in range(2):
        for v in np.ndindex(3, 2, 5):
            scores = logits[(s, slice(None), *v)].double().exp()
            total -= math.log(scores[target[(s, *v)]] / scores.sum())
    assert float(losses.cross_entropy(logits, target)) == pytest.approx(total / (2 * 30), rel=1e-5)


def test_uniform_prediction_costs_log_of_the_class_count():
    assert float(losses.cross_entropy(torch.zeros(2, 5, 4), torch.randint(5, (2, 4)))) == pytest.approx(math.log(5))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masked_cross_entropy(dtype):
    logits, target = table()
    mask = torch.tensor([[1, 0, 1]]).to(dtype)
    value = losses.cross_entropy(logits, target, mask=mask)
    assert value.item() == pytest.approx((NEGATIVE_LOG[0] + NEGATIVE_LOG[2]) / 2, abs=1e-5)
    value.backward()
    assert not logits.grad[..., 1].any() and logits.grad[..., 0].any() and logits.grad[..., 2].any()


def test_a_full_mask_changes_nothing():
    logits, target = table()
    full = losses.cross_entropy(logits, target, mask=torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(full, losses.cross_entropy(logits, target))


def test_an_empty_mask_costs_nothing():
    logits, target = table()
    value = losses.cross_entropy(logits, target, mask=torch.zeros(1, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("shape", [(2, 25, 25, 25), (1, 9, 9, 9), (2, 9, 9), (2, 3, 9, 9, 9)])
def test_target_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"predict \(2, 9, 9, 9\) voxels but the target is .*crop the label"):
        losses.cross_entropy(torch.zeros(2, 3, 9, 9, 9), torch.zeros(shape, dtype=torch.long))


def test_mask_of_another_shape():
    logits, target = table()
    with pytest.raises(ValueError, match=r"mask has shape \(3,\); expected .*\(1, 3\)"):
        losses.cross_entropy(logits, target, mask=torch.ones(3))


def test_weight_penalty_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 3)), nn.BatchNorm2d(1), nn.PReLU(), nn.Conv3d(1, 2, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(100)  # what must not count
        model[0].weight.copy_(torch.tensor([1.0, -2.0, 3.0]).view(1, 1, 1, 3))
        model[3].weight.copy_(torch.tensor([-0.5, 0.0]).view(2, 1, 1, 1, 1))
    assert losses.weight_penalty(model, l1=10).item() == pytest.approx(10 * 6.5)
    assert losses.weight_penalty(model, l2=10).item() == pytest.approx(10 * 14.25)
    both = losses.weight_penalty(model, l1=2, l2=3)
    assert both.item() == pytest.approx(2 * 6.5 + 3 * 14.25)
    both.backward()
    assert model[0].weight.grad.flatten().tolist() == pytest.approx([2 + 6, -2 - 12, 2 + 18])
    assert model[0].bias.grad is None and model[1].weight.grad is None
    assert losses.weight_penalty(model).item() == 0


def test_weight_penalty_covers_every_kernel_of_a_network():
    model = models.deepmedic(width=0.1)
    kernels = [p for name, p in model.named_parameters() if p.ndim == 5]
    assert len(kernels) == 19
    expected = sum(float(k.detach().double().square().sum()) for k in kernels)
    assert losses.weight_penalty(model, l2=1).item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------- class weights and Jaccard


def test_weighted_cross_entropy_by_hand():
    logits, target = table()  # true classes 0, 2, 1
    value = losses.cross_entropy(logits, target, class_weights=[1, 2, 5])
    expected = (1 * NEGATIVE_LOG[0] + 5 * NEGATIVE_LOG[1] + 2 * NEGATIVE_LOG[2]) / (1 + 5 + 2)
    assert value.item() == pytest.approx(expected, abs=1e-5)
    masked = losses.cross_entropy(logits, target, class_weights=[1, 2, 5], mask=torch.tensor([[True, False, True]]))
    assert masked.item() == pytest.approx((NEGATIVE_LOG[0] + 2 * NEGATIVE_LOG[2]) / 3, abs=1e-5)
    full = losses.cross_entropy(logits, target, class_weights=[1, 2, 5], mask=torch.ones(1, 3))
    torch.testing.assert_close(full, value)
    equal = losses.cross_entropy(logits, target, class_weights=torch.full((3,), 7.0))
    torch.testing.assert_close(equal, losses.cross_entropy(logits, target))


@pytest.mark.parametrize("weights", [[1, 2], [1, 2, -1], [[1, 2, 3]]])
def test_wrong_class_weights(weights):
    with pytest.raises(ValueError, match="expected 3 numbers, none of them negative"):
        losses.cross_entropy(*table(), class_weights=weights)


def test_jaccard_distance_by_hand():
    """Class by class: Σpt, Σp², Σt² of the table above."""
    logits, target = table()
    sums = [(0.7, 0.49 + 0.0625 + 0.01, 1), (0.1, 0.04 + 0.25 + 0.01, 1), (0.25, 0.01 + 0.0625 + 0.64, 1)]
    expected = [1 - pt / (pp + tt - pt) for pt, pp, tt in sums]
    np.testing.assert_allclose(losses.jaccard_distance(logits, target, per_class=True).detach(), expected, atol=1e-5)
    assert losses.jaccard_distance(logits, target).item() == pytest.approx(sum(expected), abs=1e-5)


def one_hot_logits(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return 200 * nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


def test_jaccard_of_binary_maps_is_the_union_formula_and_twice_it_is_dice():
    torch.manual_seed(0)
    target, predicted = torch.randint(4, (2, 6, 5, 4)), torch.randint(4, (2, 6, 5, 4))
    distances = losses.jaccard_distance(one_hot_logits(predicted, 4), target, per_class=True)
    for c, distance in enumerate(distances.tolist()):
        p, t = predicted.numpy() == c, target.numpy() == c
        false, union = (p != t).sum(), (p | t).sum()
        assert distance == pytest.approx(false / union, abs=1e-5)  # equation 4
        j = 1 - distance
        assert 2 * j / (1 + j) == pytest.approx(metrics.dice(p, t), abs=1e-5)


def test_jaccard_distance_is_bounded():
    target = torch.tensor([[0, 1, 1, 0]])
    assert losses.jaccard_distance(one_hot_logits(target, 2), target).item() == pytest.approx(0, abs=1e-5)
    assert losses.jaccard_distance(one_hot_logits(1 - target, 2), target).item() == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target_class", [0, 1, None])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0, -300.0])
def test_jaccard_distance_is_finite(dtype, target_class, scale):
    """Targets without a class, or of one class only, and predictions from undecided to certain, right and wrong."""
    torch.manual_seed(0)
    shape = (1, 48, 40, 40)  # 76,800 voxels, more than float16 can count to
    target = torch.randint(3, shape) if target_class is None else torch.full(shape, target_class)
    logits = (scale * nn.functional.one_hot(target, 3).movedim(-1, 1)).to(dtype).requires_grad_()
    value = losses.jaccard_distance(logits, target)
    value.backward()
    assert value.isfinite() and -1e-3 <= value.item() <= 3.001
    assert logits.grad.isfinite().all()
    if target_class is not None and scale == 1:
        absent = losses.jaccard_distance(logits, target, per_class=True)[2]
        assert absent.item() == pytest.approx(1)


def test_jaccard_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (1, 4, 2))
    assert torch.autograd.gradcheck(lambda x: losses.jaccard_distance(x, target), logits)


def test_jaccard_under_autocast():
    logits, target = table()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = losses.jaccard_distance(logits, target)
    assert value.dtype == torch.float32 and value.item() == losses.jaccard_distance(logits, target).item()


def test_minmax_jaccard_depends_on_the_names_of_classes():
    target = torch.tensor([0, 1, 2, 2])
    slightly, badly = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 2, 0])
    assert losses.minmax_jaccard(slightly, target).item() == pytest.approx(4 / 5)
    assert losses.minmax_jaccard(badly, target).item() == pytest.approx(3 / 5)
    renamed = torch.tensor([2, 1, 0])  # the same mistakes under other names
    assert losses.minmax_jaccard(renamed[badly], renamed[target]).item() == pytest.approx(3 / 5)
    assert losses.minmax_jaccard(renamed[slightly], renamed[target]).item() == pytest.approx(3 / 4)
    binary, other = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0])
    assert losses.minmax_jaccard(binary, other).item() == pytest.approx(metrics.jaccard(binary.numpy(), other.numpy()))
    assert losses.minmax_jaccard(torch.zeros(3), torch.zeros(3)).item() == 1
    with pytest.raises(ValueError, match=r"shape \(4,\); expected that of the target, \(3,\)"):
        losses.minmax_jaccard(target, torch.zeros(3))


# --------------------------------------------------------------------------------------------------------------- Dice


def test_dice_loss_by_hand():
    o = torch.tensor([[0.9, 0.4], [0.2, 0.1]])  # two images of two pixels
    y = torch.tensor([[1, 1], [0, 0]])
    both, total = 0.9 + 0.4, 1.6 + 2
    for smooth in (0.0, 1.0):
        expected = -(2 * both + smooth) / (total + smooth)
        sigmoid = losses.dice_loss(o.logit()[:, None], y, smooth=smooth)
        softmax = losses.dice_loss(torch.stack([1 - o, o], dim=1).log(), y, smooth=smooth)
        assert float(sigmoid) == pytest.approx(expected, abs=1e-6) == float(softmax)


def test_dice_loss_is_minus_dice_on_binary_maps():
    rng = np.random.default_rng(0)
    p, t = rng.random((3, 5, 6)) < 0.4, rng.random((3, 5, 6)) < 0.3
    logits = torch.tensor(np.where(p, 50.0, -50.0))[:, None]
    assert float(losses.dice_loss(logits, torch.tensor(t).long(), smooth=0)) == pytest.approx(-metrics.dice(p, t))
    three = torch.randint(3, (2, 4, 4))
    perfect = 100 * torch.nn.functional.one_hot(three).movedim(-1, 1).float()
    assert float(losses.dice_loss(perfect, three)) == pytest.approx(-1)


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64])
def test_dice_loss_is_finite_on_empty_and_full_masks(target, kind):
    logits = (30 * torch.randn(2, 1, 40, 40)).to(kind).requires_grad_()
    loss = losses.dice_loss(logits, torch.full((2, 40, 40), target))
    loss.backward()
    assert -1 <= loss.item() <= 0 and logits.grad.isfinite().all()
    nothing = losses.dice_loss(torch.full((1, 1, 4, 4), -100.0), torch.zeros(1, 4, 4, dtype=torch.long))
    assert float(nothing) == pytest.approx(-1)  # rightly found nothing


def test_dice_loss_checks_shapes():
    with pytest.raises(ValueError, match=r"predict .* voxels but the target"):
        losses.dice_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 5))


# ----------------------------------------------------------------------------------- balanced classes, deep supervision


def test_balanced_cross_entropy_by_hand():
    logits, target = table()  # true classes 0, 2, 1: one voxel each
    weights = (0.6, 0.3, 0.1)
    expected = 0.6 * NEGATIVE_LOG[0] + 0.1 * NEGATIVE_LOG[1] + 0.3 * NEGATIVE_LOG[2]
    assert losses.balanced_cross_entropy(logits, target, target_weights=weights).item() == pytest.approx(expected, abs=1e-5)


def test_weights_of_a_batch_sum_to_one_and_absent_classes_add_nothing():
    torch.manual_seed(0)
    uniform, t = torch.zeros(2, 4, 6, 5), (0.4, 0.3, 0.2, 0.1)  # -log p is log 4 everywhere
    target = torch.randint(4, (2, 6, 5))
    assert losses.balanced_cross_entropy(uniform, target, target_weights=t).item() == pytest.approx(math.log(4), rel=1e-5)
    target[target == 1] = 0
    found = losses.balanced_cross_entropy(uniform, target, target_weights=t)
    assert found.item() == pytest.approx(0.7 * math.log(4), rel=1e-5)


def test_balanced_cross_entropy_does_not_mind_how_rare_a_class_is():
    """The same mistakes, in a batch with ten times as much background."""
    logits = torch.tensor([[[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]]])
    target = torch.tensor([[0, 0, 1]])
    more = torch.cat([logits[..., :2].repeat(1, 1, 10), logits[..., 2:]], dim=2)
    t = (0.7, 0.3)
    torch.testing.assert_close(
        losses.balanced_cross_entropy(more, torch.tensor([[0] * 20 + [1]]), target_weights=t),
        losses.balanced_cross_entropy(logits, target, target_weights=t),
    )
    for bad in ((0.5, 0.4), (1.0,), (1.5, -0.5)):
        with pytest.raises(ValueError, match="expected 2 numbers, none negative, that sum to 1"):
            losses.balanced_cross_entropy(logits, target, target_weights=bad)


def test_deep_supervision():
    torch.manual_seed(0)
    main, *auxiliary = torch.randn(6, 1, 4, 3, 3)
    target = torch.randint(4, (1, 3, 3))
    expected = 0.75 * losses.cross_entropy(main, target) + 0.05 * sum(losses.cross_entropy(a, target) for a in auxiliary)
    torch.testing.assert_close(losses.deep_supervision((main, auxiliary), target), expected)
    only = losses.deep_supervision((main, auxiliary), target, main=1.0, loss=losses.dice_loss)
    torch.testing.assert_close(only, losses.dice_loss(main, target))
    with pytest.raises(ValueError, match="with 0 auxiliary outputs"):
        losses.deep_supervision((main, []), target)
