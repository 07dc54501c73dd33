"""The learning-rate widget without a browser: its arithmetic, its verdicts, its static forms, its errors."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from medseg_lite.widgets import LearningRate

ROW = [0, 0, 1, 3, 3, 2, 0, 0, 2, 1]


@pytest.fixture
def widget() -> LearningRate:
    return LearningRate(ROW, [-1, 0, 1], rate=0.1)


def test_updates_are_those_of_pytorch(widget):
    x = torch.tensor(ROW, dtype=torch.float64)[None, None]
    hidden = torch.tensor([-1.0, 0, 1], dtype=torch.float64)[None, None]
    w = torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    for weights, loss in zip(widget.weights, widget.losses):
        value = (torch.nn.functional.conv1d(x, w) - torch.nn.functional.conv1d(x, hidden)).square().mean()
        np.testing.assert_allclose(weights, w.detach().numpy().ravel(), atol=1e-12)
        assert loss == pytest.approx(value.item(), abs=1e-12)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def test_the_verdict_knows_the_largest_rate(widget):
    """Descent on a quadratic loss grows beyond 2 / its largest curvature."""
    windows = np.lib.stride_tricks.sliding_window_view(np.array(ROW, float), 3)
    largest = 2 / np.linalg.eigvalsh(2 / len(windows) * windows.T @ windows).max()
    assert widget.verdict == "good"
    for factor, verdict in ((1.1, "too large"), (0.9, "good"), (0.002, "too small")):
        widget.rate = max(factor * largest, 0.001)
        assert widget.verdict == verdict


def test_state_and_picture(widget):
    assert repr(widget).startswith("LearningRate(rate 0.1: loss ")
    widget.updates = 999
    assert widget.updates == 60
    data, metadata = widget._repr_mimebundle_()
    assert "image/png" in data and "good" in metadata["image/png"]["alt"]
    text = widget.to_html()
    assert not re.search(r"(src|href)=|https?://", text)
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert state["rate"] == 0.1 and state["_scene"]["kernel"] == [-1, 0, 1]


@pytest.mark.parametrize(
    ["row", "options", "message"],
    [
        ([1, 2], {}, r"the row has shape \(2,\); expected a row of at least 3 finite numbers"),
        ([[1, 2, 3]], {}, r"the row has shape \(1, 3\)"),
        ([1, 2, np.nan, 4], {}, "finite numbers"),
        (ROW, dict(kernel=[1]), r"the kernel is \[1.0\]; expected 2 to 5 finite weights"),
        (ROW, dict(rate=2.0), "rate is 2; expected a number from 0.001 to 1"),
        (ROW, dict(rate=np.nan), "rate is nan"),
    ],
)
def test_bad_input(row, options, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(row, **options)
