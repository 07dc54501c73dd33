"""Segmentations against the truth in a page of its own."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_lite.widgets import CompareSegmentations


@pytest.fixture
def compare(case):
    noisy = case.label.copy()
    noisy[5:9, 5:12, 20] = 1
    return CompareSegmentations(case, {"moved": np.roll(case.label, 4, axis=0), "noisy": noisy})


@pytest.fixture
def opened(exported, compare):
    return exported(compare)


def shots(page) -> list[str]:
    return page.eval_on_selector_all(".stage canvas", "all => all.map(c => c.toDataURL())")


def test_numbers_are_those_of_python(opened, compare):
    scores = compare.table.query("region == 'all labels'")["dice"].tolist()
    assert [t.split()[1] for t in opened.locator("figcaption .number").all_inner_texts()] == [f"{100 * s:.1f}" for s in scores]
    compare.region = "core"
    opened.get_by_label("Region").select_option("core")
    row = compare.table.query("region == 'core'")["dice"].tolist()
    assert opened.locator("figcaption .number").first.inner_text() == f"Dice {100 * row[0]:.1f} %"
    d, h, w = compare.position
    truth, moved = compare._case.label == 4, compare._predictions["moved"] == 4
    missed = int((truth & ~moved)[..., w].sum())
    assert f"{missed} missed" in opened.inner_text(".readout") and f"{d}, {h}, {w}" in opened.inner_text(".readout")


def test_every_interaction_changes_the_pictures(opened):
    for act in (
        lambda: opened.get_by_label("Region").select_option("core"),
        lambda: opened.get_by_label("Slice", exact=True).fill("14"),
        lambda: opened.get_by_label("Opacity of the colours").fill("0.2"),
        lambda: opened.get_by_label("Input").select_option("t1c"),
        lambda: opened.get_by_label("Plane").select_option("coronal"),
    ):
        before = shots(opened)
        act()
        assert all(a != b for a, b in zip(shots(opened), before))


def test_worst_slice_bars_and_keys(opened, compare):
    opened.get_by_role("button", name="worst slice").nth(1).click()
    assert ", 20" in opened.inner_text(".readout span:first-child")
    bars = opened.locator("[data-view=bars0]").bounding_box()
    start, depth = compare._scene["start"][2], compare._shape[2]
    opened.mouse.click(bars["x"] + (14 - start + 0.5) / depth * bars["width"], bars["y"] + 20)
    assert ", 14" in opened.inner_text(".readout span:first-child")
    opened.focus("[data-view=picture0]")
    opened.keyboard.press("PageUp")
    assert ", 15" in opened.inner_text(".readout span:first-child")


def test_bars_by_keyboard(opened):
    bars = opened.locator("[data-view=bars1]")
    bars.focus()
    first = int(bars.get_attribute("aria-valuenow"))
    opened.keyboard.press("ArrowRight")
    assert f", {first + 1}" in opened.inner_text(".readout span:first-child")
    assert bars.get_attribute("aria-valuetext").startswith(f"slice {first + 1}: ")
    opened.keyboard.press("End")
    assert bars.get_attribute("aria-valuenow") == bars.get_attribute("aria-valuemax")
    opened.get_by_role("button", name="worst slice of noisy").click()
    assert bars.get_attribute("aria-valuetext") == "slice 20: 0 missed, 28 made up"


def test_pictures_stand_at_one_height(page, compare, tmp_path):
    """At the width of JupyterLab, however long a name is."""
    case, long = compare._case, "DeepMedic with a conditional random field behind it"
    predictions = dict(zip(("a", long, "c"), [*compare._predictions.values(), case.label]))
    CompareSegmentations(case, predictions).to_html(tmp_path / "c.html")
    page.set_viewport_size({"width": 880, "height": 900})
    page.goto((tmp_path / "c.html").as_uri())
    page.wait_for_selector("[data-ready]")
    tops = [page.locator(f"[data-view={kind}{n}]").bounding_box()["y"] for kind in ("picture", "bars") for n in range(3)]
    assert len(set(tops[:3])) == len(set(tops[3:])) == 1


def test_controls_have_names_and_narrow_notebooks_do(opened):
    unnamed = opened.evaluate(
        """() => [...document.querySelectorAll('input, button, select, [tabindex]')]
            .filter(e => !(e.ariaLabel || e.innerText?.trim())).map(e => e.outerHTML)"""
    )
    assert not unnamed
    for width in (900, 380):
        opened.set_viewport_size({"width": width, "height": 900})
        assert opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
