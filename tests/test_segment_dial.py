"""The segment dial: its numbers are the package's own formulas and what a sampler draws, and its state is checked."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from medseg_lite import models, receptive_field
from medseg_lite.sampling import SegmentSampler
from medseg_lite.volume import Case
from medseg_lite.widgets import SegmentDial
from medseg_lite.widgets.segment_dial import LARGEST_OUTPUT, LARGEST_RADIUS, captured_share


def make(name="brain") -> Case:
    """A blurred ellipsoid with noise, in voxels that are twice as high as wide."""
    d, h, w = np.indices((36, 44, 30)) - np.reshape([18, 22, 15], (3, 1, 1, 1))
    mask = (d / 16) ** 2 + (h / 20) ** 2 + (w / 13) ** 2 < 1
    image = (50 * mask + np.random.default_rng(0).normal(0, 4, mask.shape)).astype(np.float32)
    return Case(image=image[None], channels=("flair",), name=name, mask=mask, affine=np.diag([2, 2, 4, 1]))


@pytest.fixture
def dial() -> SegmentDial:
    return SegmentDial(make(), centre=(14, 22, 15))


@pytest.mark.parametrize("output", [1, 3, 9, 13])
def test_sizes_and_cost_are_those_of_the_paper_s_network(dial, output):
    network, kernels = models.shallow(in_channels=4, classes=2).eval(), [5, 5, 5, 5, 1]
    dial.output = output
    n = dial.numbers
    assert n["seen"] == output + 2 * network.margin == output + receptive_field.receptive_field(network).side[0] - 1
    assert receptive_field.output_size(n["seen"], kernels) == output and n["predicted"] == output**3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert network(torch.zeros(1, 4, *[n["seen"]] * 3)).shape[2:] == (output,) * 3
    assert 2 * dial.multiplications(output) == counter.get_total_flops()
    assert n["multiplications"] * output**3 == pytest.approx(dial.multiplications(output))
    assert n["cheaper"] == pytest.approx(dial.multiplications(1) / n["multiplications"]) and dial.numbers["cheaper"] >= 1


def test_another_network_has_other_costs():
    small = SegmentDial(make(), kernels=[3] * 4, maps=[4, 6, 8, 8, 10], output=9)
    network = models.shallow(in_channels=4, classes=2, kernel=3, widths=(6, 8, 8, 10))
    assert small.numbers["seen"] == 9 + 2 * network.margin == 17
    assert small.multiplications(1) == 4 * 6 * 27 * 7**3 + 6 * 8 * 27 * 5**3 + 8 * 8 * 27 * 3**3 + 8 * 10 * 27


@pytest.mark.parametrize(("radius", "output"), [(3, 5), (4, 9), (2, 1)])
def test_shares_are_those_of_a_ball_and_of_a_sampler(dial, radius, output):
    dial.radius, dial.output = radius, output
    ball = ((np.indices(make().shape) - np.reshape([14, 22, 15], (3, 1, 1, 1))) ** 2).sum(axis=0) <= radius**2
    half = output // 2
    for position in [(14, 22, 15), (16, 20, 15), (14, 22, 18)]:
        dial.position = position
        here = tuple(slice(p - half, p + half + 1) for p in position)
        assert dial.numbers["share"] == ball[here].mean()
    case = make().replace(label=ball.astype(np.uint8), mask=ball)  # so that every segment is centred on the ball
    drawn = SegmentSampler([case], output=output, scheme="uniform", batch_size=3000, flip=False, seed=0).batch(0).label
    assert dial.numbers["mean share"] == pytest.approx(drawn.float().mean().item(), abs=0.02)


def test_the_browser_gets_the_same_numbers(dial):
    scene = dial._scene
    assert scene["costs"] == [dial.multiplications(output) for output in range(1, LARGEST_OUTPUT + 1, 2)]
    assert np.shape(scene["shares"]) == (LARGEST_RADIUS, (LARGEST_OUTPUT + 1) // 2)
    assert scene["shares"][3][4] == captured_share(4, 9) and scene["shares"][0][0] == 1
    falls = np.diff(scene["shares"], axis=1)
    assert (falls < 0).all() and (np.diff(scene["shares"], axis=0)[:, 1:] > 0).all()


def test_state(dial):
    assert (dial.output, dial.radius, dial.position) == (9, 4, (14, 22, 15))
    dial.position = (0, 99, 15)
    assert dial.position[0] == dial._box[0].start and dial.position[1] == dial._box[1].stop - 1
    assert SegmentDial(make()).position[0] < 18


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("output", 8, "output is 8; expected an odd number from 1 to 29"),
        ("output", 31, "output is 31"),
        ("radius", 0, "radius is 0; expected a number from 1 to 12"),
        ("position", (1, 2), "position"),
    ],
)
def test_bad_state_is_refused(dial, name, value, message):
    before = getattr(dial, name)
    with pytest.raises(ValueError, match=message):
        setattr(dial, name, value)
    assert getattr(dial, name) == before


def test_bad_input():
    with pytest.raises(ValueError, match=r"2 numbers of maps for 2 kernels; expected one more, the input's first"):
        SegmentDial(make(), kernels=[3, 3], maps=[4, 8])
    with pytest.raises(ValueError, match="NaN"):
        SegmentDial(make().replace(image=np.full((1, 36, 44, 30), np.nan, np.float32)))


def test_static_forms(dial, tmp_path):
    data, metadata = dial._repr_mimebundle_()
    alt = metadata["image/png"]["alt"]
    assert f"{100 * dial.numbers['share']:.0f} % of these are lesion" in alt and "82 times less" in alt
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))))]
    for name, value in {"output": 13, "radius": 2, "position": (18, 24, 16)}.items():
        setattr(dial, name, value)
        pictures.append(np.asarray(Image.open(io.BytesIO(dial.snapshot()))))
        assert (pictures[-1] != pictures[-2]).any()
    text = SegmentDial(make("</script><b>")).to_html(tmp_path / "s.html")
    assert "</script><b>" not in text and not re.search(r"(src|href)=|https?://", text)
    assert json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])["_scene"]["title"] == "</script><b>"
