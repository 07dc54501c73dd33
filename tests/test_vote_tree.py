"""The vote tree: its vote and scores against a count voxel by voxel, its path, its state, errors and static forms."""

from __future__ import annotations

import io
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from medseg_lite.ensembles import hierarchical_vote
from medseg_lite.volume import Case
from medseg_lite.widgets import VoteTree

SHAPE, NAMES = (14, 16, 6), ("background", "non-enhancing core", "oedema", "other", "enhancing core")


def make_case(name="ball") -> Case:
    """A ball of oedema with a core and an enhancing middle, classes 2, 1, 4, inside a mask."""
    away = np.abs(np.indices(SHAPE) - np.reshape([7, 8, 3], (3, 1, 1, 1))).sum(axis=0)
    label = np.select([away < 2, away < 4, away < 6], [4, 1, 2]).astype(np.uint8)
    image = (10 * away + np.random.default_rng(0).normal(0, 1, SHAPE)).astype(np.float32)
    return Case(image[None], ("flair",), name=name, label=label, mask=away < 12, info={"classes": NAMES})


def make_maps(case: Case, count: int = 5) -> dict[str, np.ndarray]:
    """Return the label with a third of its voxels drawn anew, a map for each of several networks."""
    rng, maps = np.random.default_rng(1), {}
    for n in range(count):
        anew = rng.random(SHAPE) < 0.35
        maps[f"net {n}"] = np.where(anew, rng.choice([0, 1, 2, 4], SHAPE), case.label).astype(np.uint8)
    return maps


@pytest.fixture
def tree() -> VoteTree:
    case = make_case()
    return VoteTree(case, make_maps(case), labels=(1, 2, 4))


def vote(said: list[int], one: float, two: float, three: float) -> int:
    """Return the class of one voxel, by the paper's three quotients."""
    v1, v2, v3 = (said.count(k) for k in (1, 2, 4))
    if v1 + v2 + v3 == 0 or (v1 + v2 + v3) / len(said) < one:
        return 0
    if (v1 + v3) / (v1 + v2 + v3) < two:
        return 2
    return 4 if v3 / (v1 + v3) >= three else 1


SETTINGS = [(0.4, 0.3, 0.4), (0.01, 0.01, 0.01), (1, 1, 1), (0.7, 0.55, 0.45), (0.35, 0.9, 0.05)]


@pytest.mark.parametrize("thresholds", SETTINGS)
def test_vote_and_scores_are_those_of_a_count(tree, thresholds):
    tree.thresholds = thresholds
    case, maps = make_case(), [*make_maps(make_case()).values()]
    expected = np.array([vote([m[v] for m in maps], *thresholds) for v in np.ndindex(SHAPE)]).reshape(SHAPE)
    assert np.array_equal(tree.merged, expected) and np.unique(expected).size >= 3
    counted = case.mask | (case.label > 0) | np.any([m > 0 for m in maps], axis=0)
    for region, classes in {"whole tumour": {1, 2, 4}, "core": {1, 4}, "enhancing core": {4}}.items():
        p, t = (np.isin(a[counted], [*classes]) for a in (expected, case.label))
        both, found, real = (p & t).sum(), p.sum(), t.sum()
        row = [2 * both / (found + real), both / real, 1 - (found - both) / (counted.sum() - real)]
        assert tree.scores.loc[region].tolist() == pytest.approx(row)


def test_the_histogram_counts_every_voxel_once(tree):
    maps = np.stack([*make_maps(make_case()).values()])
    histogram = np.array(tree._scene["histogram"])
    assert histogram[:, 4].sum() == tree._counted.sum() < np.prod(SHAPE)
    votes = ((maps > 0).sum(0), np.isin(maps, (1, 4)).sum(0), (maps == 4).sum(0))
    for tumour, core, enhancing, truth, count in histogram:
        same = (votes[0] == tumour) & (votes[1] == core) & (votes[2] == enhancing) & (make_case().label == [0, 1, 2, 4][truth])
        assert (same & tree._counted).sum() == count


def test_the_path_ends_where_the_vote_does(tree):
    ends = {(): "background", ("tumour",): "oedema", ("tumour", "core"): "non-enhancing core"}
    ends[("tumour", "core", "enhancing")] = "enhancing core"
    seen = set()
    for position in [(7, 8, 3), (7, 8, 5), (3, 8, 3), (9, 9, 3), (0, 0, 0), (6, 7, 2), (8, 10, 3), (7, 11, 3)]:
        tree.position = position
        position = tree.position
        path, said = tree.path, [m[position] for m in make_maps(make_case()).values()]
        assert tree.votes == {f"net {n}": NAMES[k] for n, k in enumerate(said)}
        yes = tuple(path.index[path["answer"]])
        assert ends[yes] == NAMES[tree.merged[position]]
        assert path["for"].tolist() == [sum(k in s for k in said) for s in ({1, 2, 4}, {1, 4}, {4})]
        assert path["of"].tolist() == [5, *path["for"][:2]]
        assert path["asked"].tolist() == [True, *path["answer"][:2]]
        seen.add(yes)
    assert len(seen) >= 3


def test_it_opens_on_a_voxel_that_is_disputed(tree):
    assert len(set(tree.votes.values())) >= 3 and tree.thresholds == [0.4, 0.3, 0.4]


def test_the_browser_gets_the_part_with_brain_and_tumour(tree):
    shape = tuple(tree._scene["shape"])
    arrays = [np.frombuffer(zlib.decompress(v, 31), np.uint8).reshape(shape) for v in tree._volumes]
    assert len(arrays) == 7
    for sent, array in zip(arrays[1:], [make_case().label, *make_maps(make_case()).values()]):
        assert np.array_equal(np.array([0, 1, 2, 4])[sent], array[tree._box])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, m: (c.replace(label=None), m, {}), "ball has no label to compare with"),
        (lambda c, m: (c, m, {"channel": "t2"}), "or no channel 't2'"),
        (lambda c, m: (c, dict([*m.items()][:1]), {}), "with two to 10 entries"),
        (lambda c, m: (c, m | {"odd": np.zeros((2, 2, 2))}, {}), r"prediction 'odd' has shape \(2, 2, 2\)"),
        (lambda c, m: (c, m, {"labels": (1, 2, 3)}), r"the predictions hold \[4\]"),
        (
            lambda c, m: (c, m, {"thresholds": (0.4, 0.3)}),
            r"thresholds are \[0.4, 0.3\]; expected three numbers from 0.01 to 1",
        ),
        (lambda c, m: (c, m, {"thresholds": (0.4, 0, 0.4)}), "thresholds are"),
        (lambda c, m: (c, m, {"thresholds": (0.4, float("nan"), 0.4)}), "thresholds are"),
        (lambda c, m: (c, m, {"position": (1, 2)}), "position is"),
    ],
)
def test_bad_input(change, message):
    case = make_case()
    given, maps, options = change(case, make_maps(case))
    with pytest.raises(ValueError, match=message):
        VoteTree(given, maps, **({"labels": (1, 2, 4)} | options))


def test_static_forms(tree, tmp_path):
    assert repr(tree).startswith("VoteTree('ball', 5 networks, thresholds 0.4, 0.3, 0.4, Dice: whole tumour 0.")
    data, metadata = tree._repr_mimebundle_()
    assert data["image/png"] and "the votes on one voxel: tumour: " in metadata["image/png"]["alt"]
    before = np.asarray(Image.open(io.BytesIO(tree.snapshot())))
    tree.thresholds = (1, 1, 1)
    assert (np.asarray(Image.open(io.BytesIO(tree.snapshot()))) != before).any()
    nasty, case = "</script><b>", make_case(name="</script><i>")
    maps = dict(zip((nasty, "two"), make_maps(case).values()))
    text = VoteTree(case, maps, labels=(1, 2, 4)).to_html(tmp_path / "v.html")
    assert nasty not in text and case.name not in text and not re.search(r"(src|href)=|https?://", text)
    assert json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])["_scene"]["names"] == [nasty, "two"]
    assert len(text) < 120_000
    assert np.array_equal(tree.merged, hierarchical_vote([*tree._maps.values()], labels=(1, 2, 4), thresholds=(1, 1, 1)))
