from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg_lite.models.layers import ConvBlock, RollingBatchNorm, scaled


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_rolling_batch_norm(shape):
    rng = np.random.default_rng(0)
    norm = RollingBatchNorm(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    channel = (slice(None), *(None,) * (len(shape) - 2))
    gamma, beta = (p.detach().numpy()[channel] for p in (norm.weight, norm.bias))
    axes = (0, *range(2, len(shape)))
    means, variances = [], []
    for n in range(70):
        x = rng.normal(n, 1 + n / 10, shape)
        y = norm.train()(torch.tensor(x, dtype=torch.float32)).detach().numpy()
        mean, biased = x.mean(axes), x.var(axes)
        np.testing.assert_allclose(y, gamma * (x - mean[channel]) / np.sqrt(biased + 1e-5)[channel] + beta, atol=1e-3)
        means.append(mean)
        variances.append(x.var(axes, ddof=1))
        if n + 1 in (1, 5, 60, 61, 70):
            average, spread = np.mean(means[-60:], 0), np.mean(variances[-60:], 0)
            np.testing.assert_allclose(norm.running_mean, average, rtol=1e-5)
            np.testing.assert_allclose(norm.running_var, spread, rtol=1e-4)
            z = rng.normal(size=shape)
            expected = gamma * (z - average[channel]) / np.sqrt(spread + 1e-5)[channel] + beta
            y = norm.eval()(torch.tensor(z, dtype=torch.float32)).detach().numpy()
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_rolling_batch_norm_before_any_training():
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(RollingBatchNorm(3).eval()(x), x, rtol=1e-4, atol=1e-5)


def test_rolling_batch_norm_needs_more_than_one_value():
    with pytest.raises(ValueError, match="single value per channel"):
        RollingBatchNorm(3).train()(torch.zeros(1, 3, 1, 1))
    assert RollingBatchNorm(3).eval()(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_rolling_batch_norm_resumes_in_the_middle_of_its_window():
    torch.manual_seed(0)
    whole, first = RollingBatchNorm(2, window=4), RollingBatchNorm(2, window=4)
    batches = torch.randn(7, 5, 2)
    for x in batches:
        whole(x)
    for x in batches[:3]:
        first(x)
    second = RollingBatchNorm(2, window=4)
    second.load_state_dict(first.state_dict())
    for x in batches[3:]:
        second(x)
    assert torch.equal(whole.running_mean, second.running_mean) and torch.equal(whole.running_var, second.running_var)


def test_conv_block():
    plain, normed = ConvBlock(2, 3, 3, batch_norm=False), ConvBlock(2, 3, 3, dropout=0.1)
    assert [n for n, _ in plain.named_children()] == ["conv", "act"] and plain.conv.bias is not None
    assert [n for n, _ in normed.named_children()] == ["drop", "conv", "norm", "act"] and normed.conv.bias is None
    assert normed.act.weight.shape == (3,) and plain(torch.zeros(1, 2, 5, 6, 7)).shape == (1, 3, 3, 4, 5)


def test_scaled_keeps_at_least_one_map():
    assert [scaled(30, w) for w in (1, 0.5, 0.1, 0.001)] == [30, 15, 3, 1]
