"""The game of two views: which voxels are asked, what is cut around them, the score, errors, static forms, the size of the state."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from medseg_lite import plotting
from medseg_lite.volume import Case
from medseg_lite.widgets import BeTheNetwork
from medseg_lite.widgets._base import to_bytes
from medseg_lite.widgets.be_the_network import cut_views, find_candidates


def make(seed: int = 0, **changes) -> Case:
    """A bright ball that is the lesion, and another, as bright, that is not."""
    d, h, w = np.indices((40, 36, 12))
    ball, other = ((d - a) ** 2 + (h - b) ** 2 + (2 * (w - 6)) ** 2 < 40 for a, b in ((10 + seed, 12), (28, 24)))
    noise = np.random.default_rng(seed).normal(0, 3, (2, 40, 36, 12))
    image = (100 + 80 * (ball | other) + noise).astype(np.float32)
    return Case(image=image, channels=("flair", "t2"), name=f"balls {seed}", label=ball.astype(np.uint8))


@pytest.fixture
def widget() -> BeTheNetwork:
    return BeTheNetwork([make(0), make(2)])


def test_half_of_the_voxels_are_lesion_and_all_are_bright(widget):
    assert len(widget.voxels) == 10 and sum(truth for *_, truth in widget.voxels) == 5
    for n, voxel, truth in widget.voxels:
        case = [make(0), make(2)][n]
        assert truth == (case.label[tuple(voxel)] == 1) and case.image[0][tuple(voxel)] > 150
    assert {n for n, *_ in widget.voxels} == {0, 1}, "both cases have their turn"
    assert BeTheNetwork(make(), seed=0).voxels == BeTheNetwork(make(), seed=0).voxels != BeTheNetwork(make(), seed=1).voxels


def test_others_are_as_bright_and_away_from_the_lesion():
    case = make()
    lesion, other = find_candidates(case.image[0], case)
    assert case.label[tuple(lesion.T)].all() and not case.label[tuple(other.T)].any()
    assert case.image[0][tuple(other.T)].mean() == pytest.approx(case.image[0][tuple(lesion.T)].mean(), abs=8)
    distance = np.abs(other[:, None] - np.argwhere(case.label)[None]).sum(-1).min()
    assert distance > 3
    masked = case.replace(mask=np.indices(case.shape)[0] < 20)
    assert not len(find_candidates(case.image[0], masked)[1])
    assert [len(a) for a in find_candidates(case.image[0], case.replace(label=0 * case.label))] == [0, 0]


def test_views_by_hand():
    """The middle of both views is the voxel; a step in the near view is one voxel, in the wide one three; outside is the lowest grey."""
    case = make()
    grey = to_bytes(case.image[0], *plotting.default_window(case.image[0], None))
    near, wide, near_lesion, wide_lesion = cut_views(case.image[0], case, (10, 12, 6))
    assert {view.shape for view in (near, wide, near_lesion, wide_lesion)} == {(17, 17, 1)}
    assert near[8, 8, 0] == wide[8, 8, 0] == grey[10, 12, 6]
    assert near[9, 6, 0] == grey[11, 10, 6] and wide[9, 6, 0] == grey[13, 6, 6]
    assert near_lesion[8, 8, 0] == 1 and near_lesion[16, 8, 0] == 0
    assert wide_lesion[8, 8, 0] == 1 and wide_lesion.sum() < near_lesion.sum()
    assert wide[0, 0, 0] == grey.min(), "beyond the volume"


def test_the_score_counts_answered_voxels_alone(widget):
    truth = widget._scene["truth"]
    widget.near, widget.wide = [not truth[0], truth[1], truth[2]], truth[:2]
    assert widget.score == {"near": 1, "wide": 2, "answered": 2}
    assert repr(widget) == "BeTheNetwork(2 of 10 voxels, right: 1 without the wide view, 2 with it)"
    widget.asked = 99
    assert widget.asked == 9
    with pytest.raises(ValueError, match="11 answers; there are 10 voxels"):
        widget.near = [True] * 11


@pytest.mark.parametrize(
    ["arguments", "message"],
    [
        ({"cases": []}, "there is no case"),
        ({"cases": make(), "count": 3}, "count is 3; expected an even number"),
        ({"cases": make(), "count": 2.0}, "count is 2.0"),
        ({"cases": make(), "channel": "t1"}, "balls 0 has no channel 't1'; there are 'flair', 't2'"),
        ({"cases": make().replace(label=None)}, "balls 0 has no label, so nobody knows the answers"),
        (
            {"cases": make().replace(label=np.zeros((40, 36, 12), np.uint8))},
            "the cases have 0 lesion voxels; expected at least 5",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        BeTheNetwork(**arguments)


def test_static_forms(widget):
    bundle, metadata = widget._repr_mimebundle_()
    picture = Image.open(io.BytesIO(widget.snapshot()))
    assert picture.width > 800 and "image/png" in bundle
    alt = metadata["image/png"]["alt"]
    assert alt.startswith("10 voxels, each with the 17 by 17 voxels around it") and alt.count("not a lesion") == 5
    page = widget.to_html()
    assert "You are the network" in page and "</script>" in page
    state = json.loads(page.split('id="state">')[1].split("</script>")[0])
    assert len(state["_views"]) == 10 and len(state["_views"][0]) == 4 and state["near"] == []
    assert len(page) < 100_000, "a game of ten voxels is small"
