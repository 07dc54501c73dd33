"""The loss bench in a page of its own: its script computes what the package's losses say, and the page shows these numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg_lite.widgets import LossBench
from medseg_lite.widgets._base import script
from medseg_lite.widgets.loss_bench import BATCHES, LOSSES


@pytest.fixture
def bench() -> LossBench:
    return LossBench()


@pytest.fixture
def opened(exported, bench):
    return exported(bench)


def slider(page, name: str):
    return page.get_by_role("slider", name=name)


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def cells(page) -> list[list[str]]:
    rows = page.locator("tbody tr")
    return [rows.nth(k).locator("td").all_inner_texts() for k in range(3)]


def check(page, bench: LossBench) -> None:
    """Compare loss, parts, pushes and shares on the page with those of Python."""
    n = bench.numbers
    assert number(page.inner_text(".value").split(": ")[1].split(". ")[0].rstrip(".")) == pytest.approx(n["loss"], abs=6e-4)
    for k, (part, one, total) in enumerate(cells(page)):
        if n["voxels"][k] == 0:
            assert one.strip() == total.strip() == "–"
            continue
        if not (bench.loss == "Dice loss" and k == 0):
            assert number(part) == pytest.approx(n["parts"][k], abs=6e-4)
        assert number(one) == pytest.approx(1000 * n["push"][k], rel=0.006)
        all_, share = total.split(", ")
        assert number(all_) == pytest.approx(1000 * n["total"][k], rel=0.006)
        assert number(share.split()[0]) == pytest.approx(100 * n["total"][k] / sum(n["total"]), abs=0.6)


def test_the_script_computes_what_the_losses_say(page):
    """Compare without rounding: the script's function alone, for settings at random and at the ends."""
    page.goto("about:blank")
    source = script("loss_bench.js").replace("export default { render };", "")
    bench, rng = LossBench(), np.random.default_rng(0)
    for n, (loss, batch) in enumerate(itertools.product(LOSSES, BATCHES)):
        bench.loss, bench.batch = loss, batch
        bench.large, bench.tiny, bench.alarm = (0.01, 0.99, 0.01) if n % 4 == 0 else rng.uniform(0.01, 0.99, 3)
        scene = {"classes": bench._scene["classes"], "weights": bench._scene["weights"]}
        asked = [scene, bench._scene["counts"][batch], bench.probabilities.tolist(), loss]
        found, expected = page.evaluate(f"(asked) => {{ {source}; return assess(...asked); }}", asked), bench.numbers
        for name, values in found.items():
            assert values == pytest.approx(expected[name], abs=1e-6), (name, loss, batch)


def test_the_page_shows_these_numbers(opened, bench):
    check(opened, bench)
    for loss, batch in itertools.product(LOSSES, BATCHES):
        opened.get_by_role("combobox", name="Loss").select_option(loss)
        opened.get_by_role("combobox", name="Batch").select_option(batch)
        slider(opened, "false alarm outside").fill("0.3")
        bench.loss, bench.batch, bench.alarm = loss, batch, 0.3
        check(opened, bench)


def test_an_absent_class_costs_one(opened):
    opened.get_by_role("combobox", name="Batch").select_option("an empty image")
    for alarm in ("0.01", "0.6"):
        slider(opened, "false alarm outside").fill(alarm)
        assert [row[0] for row in cells(opened)[1:]] == ["1.000", "1.000"]
        assert opened.inner_text(".value").endswith("The two absent classes cost 1 each, whatever is predicted.")
    assert not opened.locator("[data-view=image0]").is_visible() and opened.locator("[data-view=image1]").is_visible()
    opened.get_by_role("combobox", name="Batch").select_option("both images")
    assert "1.000" not in [row[0] for row in cells(opened)] and opened.locator("[data-view=image0]").is_visible()


def test_mouse_keys_and_buttons_move_the_sliders_and_the_picture(opened, bench):
    def picture():
        return opened.eval_on_selector("[data-view=image0] canvas", "c => c.toDataURL()")

    before, box = picture(), slider(opened, "sure of the tiny one").bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2, steps=4)
    opened.mouse.up()
    bench.tiny = float(slider(opened, "sure of the tiny one").input_value())
    assert 0.7 < bench.tiny < 0.9 and picture() != before
    check(opened, bench)
    slider(opened, "sure of the large one").focus()
    for _ in range(3):
        opened.keyboard.press("ArrowRight")
    bench.large = 0.53
    check(opened, bench)
    assert slider(opened, "sure of the large one").get_attribute("aria-valuetext") == "53 %"
    for name, values in {"All background": (0.01,) * 3, "Unsure": (0.5,) * 3, "All found": (0.99, 0.99, 0.01)}.items():
        opened.get_by_role("button", name=name).click()
        bench.large, bench.tiny, bench.alarm = values
        check(opened, bench)


def test_arrows_are_as_long_as_the_pushes(opened, bench):
    n = bench.numbers
    for column, name in ((2, "push"), (3, "total")):
        arrows = opened.locator(f"tbody td:nth-child({column + 1}) .arrow")
        widths = [arrows.nth(k).bounding_box()["width"] for k in range(3)]
        assert [w / max(widths) for w in widths] == pytest.approx([v / max(n[name]) for v in n[name]], abs=0.02)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    opened.get_by_role("combobox", name="Batch").select_option("both images")
    check_layout(opened, scheme)
