"""The vote tree in a page of its own: votes and scores are those of the package, mouse, keys and fingers work."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg_lite import paths
from medseg_lite.ensembles import hierarchical_vote
from medseg_lite.volume import Case
from medseg_lite.widgets import VoteTree
from medseg_lite.widgets._base import script

CLASSES = ("background", "non-enhancing core", "oedema", "enhancing core")
SETTINGS = [(0.4, 0.3, 0.4), (0.01, 0.01, 0.01), (1, 1, 1), (0.34, 0.67, 0.5), (0.67, 0.17, 0.34)]


@pytest.fixture(scope="module")
def stored() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, maps and truth of the six stored networks on one person."""
    with np.load(paths.shipped("results", "vote_predictions.npz")) as stored:
        return stored["networks"].tolist(), stored["maps"][4], stored["truth"][4]


@pytest.fixture
def widget(stored) -> VoteTree:
    names, maps, truth = stored
    image = 100 + 40 * truth + np.random.default_rng(0).normal(0, 5, truth.shape)
    case = Case(image[None].astype(np.float32), ("flair",), label=truth, mask=np.ones_like(truth), info={"classes": CLASSES})
    return VoteTree(case, dict(zip(names, maps)))


@pytest.fixture
def opened(exported, widget):
    return exported(widget)


def slider(page, name: str):
    return page.get_by_role("slider", name=f"Threshold of {name}")


def told(page) -> list[str]:
    return page.locator("figure .number, figure .fact").all_inner_texts()


def expected(widget: VoteTree) -> list[str]:
    mean = np.mean([[row[0] for row in one] for one in widget._scene["single"]], axis=0)
    rows = zip(widget.scores.itertuples(index=False), mean)
    return [
        text
        for s, dice in rows
        for text in (
            f"Dice {s.dice:.3f}",
            f"sensitivity {100 * s.sensitivity:.1f} %, specificity {100 * s.specificity:.1f} %; mean Dice of the networks {dice:.3f}",
        )
    ]


def picture(page) -> str:
    return page.eval_on_selector("[data-view=vote] canvas", "c => c.toDataURL()")


def verdict(page) -> str:
    return page.locator(".verdict").inner_text()


def place(page, widget, d: int, h: int) -> tuple[float, float]:
    """Return where the middle of a voxel of the slice lies in the page."""
    box, (start, shape) = page.locator("[data-view=vote]").bounding_box(), (widget._scene["start"], widget._scene["shape"])
    shares = [(n - (p - s) - 0.5) / n for p, s, n in zip((d, h), start, shape)]
    return box["x"] + shares[0] * box["width"], box["y"] + shares[1] * box["height"]


def test_every_voxel_and_every_score_is_that_of_the_package(page, stored, widget):
    """Voxels of a stored person with every way to vote behind them, for thresholds at and between the shares of votes."""
    _, maps, truth = stored
    there = (maps > 0).any(0) | (truth > 0)
    ways = np.array([v for v in itertools.combinations_with_replacement(range(4), 6)]).T
    votes = np.concatenate([maps[:, there], ways], axis=1)
    page.goto("about:blank")
    page.evaluate(script("vote_tree.js").replace("export default { render };", "window.tools = [countVotes, tabulate, score];"))
    page.evaluate(
        "([maps, scene]) => { window.codes = tools[0](maps); window.scene = scene; }", [votes.tolist(), _plain(widget)]
    )
    rng = np.random.default_rng(0)
    for thresholds in [*SETTINGS, *np.round(rng.uniform(0.01, 1, (20, 3)), 2).tolist()]:
        code = "t => { const table = tools[1](6, t); return [[...codes].map((c) => table[c]), tools[2](scene, t)]; }"
        merged, scores = page.evaluate(code, list(thresholds))
        assert np.array_equal(merged, hierarchical_vote(list(votes), thresholds=tuple(thresholds)))
        widget.thresholds = list(thresholds)
        assert scores == widget.scores.to_numpy().tolist()


def _plain(widget: VoteTree) -> dict:
    return {key: widget._scene[key] for key in ("histogram", "regions", "names")}


def test_sliders_move_slice_and_scores(opened, widget):
    assert told(opened) == expected(widget)
    for thresholds in SETTINGS[1:]:
        before = picture(opened)
        for name, value in zip(("tumour", "core", "enhancing"), thresholds):
            slider(opened, name).fill(str(value))
        widget.thresholds = thresholds
        assert told(opened) == expected(widget) and picture(opened) != before
    assert slider(opened, "core").get_attribute("aria-valuetext") == f"0.17, Dice of core {widget.scores['dice']['core']:.3f}"
    opened.get_by_role("button", name="The paper's thresholds").click()
    widget.thresholds = SETTINGS[0]
    assert told(opened) == expected(widget)


def test_a_voxel_s_votes_fall_through_the_tree(opened, widget):
    d, h, w = widget.position
    for here in [(d, h), (d - 3, h + 2), (d + 6, h - 5), (5, 5)]:
        opened.mouse.click(*place(opened, widget, *here))
        widget.position = (*here, w)
        position, path = widget.position, widget.path
        text = verdict(opened)
        assert text.startswith(f"Voxel {', '.join(map(str, position))}: the tree says {CLASSES[widget.merged[position]]}; ")
        assert f"the truth is {CLASSES[widget._case.label[position]]}." in text
        assert all(f"{n} {name}: {said}" in text for n, (name, said) in enumerate(widget.votes.items(), 1))
        for row, (_, asked) in zip(opened.locator(".tree li").all(), path.iterrows()):
            number = row.locator(".ask .number").inner_text()
            if asked["asked"]:
                assert number.startswith(f"{asked['for']} of {asked['of']} = ") and ("≥" in number) == asked["answer"]
                assert row.locator(".yes .chip").count() == asked["for"]
                assert row.locator(".chip").count() == asked["of"]
            else:
                assert number == "not asked" and row.locator(".chip").count() == 0


def test_keys_and_slices(opened, widget):
    stage = opened.locator("[data-view=vote]")
    d, h, w = widget.position
    stage.focus()
    for key, position in {"ArrowLeft": (d + 1, h, w), "ArrowDown": (d + 1, h - 1, w), "PageUp": (d + 1, h - 1, w + 1)}.items():
        opened.keyboard.press(key)
        assert verdict(opened).startswith(f"Voxel {', '.join(map(str, position))}:")
    opened.get_by_role("slider", name="Slice").fill(str(w - 4))
    assert verdict(opened).startswith(f"Voxel {d + 1}, {h - 1}, {w - 4}:")
    slider(opened, "core").focus()
    opened.keyboard.press("ArrowRight")
    assert opened.locator(".tree label .number").nth(1).inner_text() == "0.31"


def test_chips_fall_unless_motion_is_reduced(opened, widget):
    d, h, _ = widget.position
    names = "all => all.map(e => getComputedStyle(e).animationName)"
    chips = opened.locator(".tree .chip")
    assert set(chips.evaluate_all(names)) == {"none"}  # nothing moves before a voxel is chosen
    opened.mouse.click(*place(opened, widget, d - 3, h + 2))
    assert set(chips.evaluate_all(names)) == {"medseg-votes-fall"}
    slider(opened, "core").fill("0.5")
    assert set(chips.evaluate_all(names)) == {"none"}  # the same votes, counted otherwise
    opened.emulate_media(reduced_motion="reduce")
    opened.mouse.click(*place(opened, widget, d, h))
    assert set(chips.evaluate_all(names)) == {"none"}


def test_a_tap_chooses_a_voxel(on_a_phone, widget, tmp_path):
    widget.to_html(tmp_path / "v.html")
    page = on_a_phone(tmp_path / "v.html")
    d, h, w = widget.position
    page.touchscreen.tap(*place(page, widget, d - 4, h + 3))
    assert verdict(page).startswith(f"Voxel {d - 4}, {h + 3}, {w}:")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
