"""The valley: its paths against PyTorch and the package's optimiser, where balls diverge and circle, errors and static forms."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from medseg_lite.optimizers import NormalizedSGD
from medseg_lite.widgets import Valley
from medseg_lite.widgets.valley import BALLS, MOST, START

SETTINGS = [
    {"rate": 0.5, "factor": 0.01, "stretch": 4.0},
    {"rate": 2.5, "factor": 0.1, "stretch": 1.0, "falls": True},
    {"rate": 0.07, "factor": 10.0, "stretch": 8.0, "falls": True},
]


@pytest.mark.parametrize("state", SETTINGS)
def test_paths_are_those_of_the_optimisers(state):
    valley = Valley(**state)
    for ball, (make, factor) in enumerate([(torch.optim.SGD, 1), (torch.optim.SGD, valley.factor), (NormalizedSGD, 1)]):
        w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
        optimizer = make([w], lr=valley.rate, momentum=0)
        for n, expected in enumerate(valley.paths[BALLS[ball]]):
            assert w.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
            optimizer.param_groups[0]["lr"] = valley.rate * (1 - n / MOST if valley.falls else 1)
            optimizer.zero_grad()
            (factor * (w[0] ** 2 / valley.stretch**2 + w[1] ** 2) / 2).backward()
            optimizer.step()


def test_plain_descent_grows_beyond_two_over_the_curvature():
    plain, factor, fixed = BALLS
    for rate, by, grows in [
        (1.9, 1.05, (False, False)),
        (2.1, 0.9, (True, False)),
        (0.5, 3.9, (False, False)),
        (0.5, 4.1, (False, True)),
    ]:
        distances = Valley(rate=rate, factor=by).distances
        assert tuple(distances[name][-1] > distances[name][0] for name in (plain, factor)) == grows
        assert distances[fixed][-1] < distances[fixed][0]


@pytest.mark.parametrize("stretch", [1, 2, 4])
@pytest.mark.parametrize("rate", [0.5, 0.8, 1, 2, 3])
def test_a_fixed_length_circles_half_a_step_away_until_the_rate_falls(stretch, rate):
    valley = Valley(rate=rate, stretch=stretch)
    assert valley.distances["fixed length"][-20:].mean() == pytest.approx(rate / 2, rel=0.05)
    steps = np.diff(valley.paths["fixed length"], axis=0)
    assert np.hypot(*steps.T) == pytest.approx(rate)
    valley.falls = True
    assert valley.distances["fixed length"][-1] < 0.03


def test_the_factor_changes_only_its_own_ball():
    one, other = Valley(factor=0.01).paths, Valley(factor=5.0).paths
    assert [np.array_equal(one[name], other[name]) for name in BALLS] == [True, False, True]
    same = Valley(factor=1.0).paths
    assert np.array_equal(same["plain descent"], same["loss × factor"])


@pytest.mark.parametrize(("name", "value"), [("rate", 0), ("rate", float("nan")), ("factor", 11), ("stretch", 0.5)])
def test_bad_input(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value:g}; expected a number from"):
        Valley(**{name: value})


def test_static_forms(tmp_path):
    valley = Valley(updates=30)
    assert repr(valley).startswith("Valley(rate 0.5, factor 0.01, after 30 updates at distance: plain descent ")
    valley.updates = 999
    assert valley.updates == MOST
    valley.updates = 30
    pictures = [np.asarray(Image.open(io.BytesIO(valley.snapshot())))]
    for name, value in {"rate": 2.5, "factor": 2.0, "stretch": 8.0, "falls": True, "updates": 10}.items():
        setattr(valley, name, value)
        pictures.append(np.asarray(Image.open(io.BytesIO(valley.snapshot()))))
        assert (pictures[-1] != pictures[-2]).any(), name
    assert "falling" in repr(valley) and "10 updates" in valley._repr_mimebundle_()[1]["image/png"]["alt"]
    text = valley.to_html(tmp_path / "v.html")
    assert not re.search(r"(src|href)=|https?://", text) and len(text) < 60_000
    assert json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])["falls"] is True
