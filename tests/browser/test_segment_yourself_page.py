"""Segment it yourself in a page of its own: painting by mouse, keys and touch, undo, the answer, and numbers that are those of Python."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from medseg_lite import metrics, phantoms
from medseg_lite.widgets import SegmentYourself


@pytest.fixture(scope="module")
def widget(case) -> SegmentYourself:
    reader = phantoms.draw_as_reader(case.label, "generous", strength=3, spacing=case.spacing)
    return SegmentYourself(case, np.roll(case.label, 3, axis=0), {"generous": reader})


@pytest.fixture
def opened(exported, widget):
    return exported(widget)


def place(page, d: float, h: float, shape=(40, 48)) -> tuple[float, float]:
    """Return where on the page the middle of a pixel lies."""
    box = page.locator("[data-view=slice]").bounding_box()
    across, down = (shape[0] - d - 0.5) / shape[0], (shape[1] - h - 0.5) / shape[1]
    return box["x"] + across * box["width"], box["y"] + down * box["height"]


def stroke(page, *points, button: str = "left"):
    page.mouse.move(*place(page, *points[0]))
    page.mouse.down(button=button)
    for point in points[1:]:
        page.mouse.move(*place(page, *point))
    page.mouse.up(button=button)


def painted_pixels(page) -> int:
    return int(re.search(r"(\d+) pixels", page.locator(".readout").inner_text())[1])


def press(page, name: str):
    page.get_by_role("button", name=name, exact=True).click()


def rows(page) -> dict[str, list[float]]:
    found = page.locator("tbody tr").all()
    return {row.get_by_role("button").inner_text(): [float(t) for t in row.locator("td").all_inner_texts()] for row in found}


def brush(shape, points, radius: float) -> np.ndarray:
    """Return the pixels within a radius of a line through points."""
    drawn, grid = np.zeros(shape, bool), np.indices(shape)
    for a, b in itertools.pairwise(points):
        for t in np.linspace(0, 1, 400):
            d, h = (1 - t) * np.array(a) + t * np.array(b)
            drawn |= (grid[0] - d) ** 2 + (grid[1] - h) ** 2 <= radius**2
    return drawn


def expected(widget, painted) -> list[str]:
    return [f"{f(painted, widget.truth):.3f}" for f in (metrics.dice, metrics.precision, metrics.sensitivity)]


def test_numbers_are_those_of_python(opened, widget):
    opened.get_by_role("slider", name="Radius").fill("5")  # 2.5 mm, and pixels of 1 mm
    line = [(10, 24), (10, 36), (24, 36)]
    stroke(opened, *line)
    assert not opened.get_by_role("table").is_visible()
    press(opened, "Reveal")
    table, painted = rows(opened), brush((40, 48), line, 2.5)
    assert abs(painted_pixels(opened) - painted.sum()) <= 4, "pixels at the very edge of the brush may differ"
    np.testing.assert_allclose(table["you"], [float(t) for t in expected(widget, painted)], atol=0.02)
    for name in ("network", "generous"):
        np.testing.assert_allclose(table[name], widget.scores.loc[name], atol=5e-4)
    assert table["network"][0] < 1 and table["generous"][2] == 1

    stroke(opened, (12, 28), (24, 28))  # painting goes on, and the numbers follow
    assert rows(opened)["you"] != table["you"] and rows(opened)["network"] == table["network"]
    press(opened, "Undo")
    assert rows(opened) == table


def test_single_pixels_give_exact_numbers(opened, widget):
    """With the smallest brush a click is one pixel, so every number is known."""
    opened.get_by_role("slider", name="Radius").fill("1")
    pixels = [(18, 30), (18, 31), (19, 30), (2, 2)]
    for pixel in pixels:
        opened.mouse.click(*place(opened, *pixel))
    painted = np.zeros((40, 48), bool)
    painted[tuple(zip(*pixels))] = True
    press(opened, "Reveal")
    assert painted_pixels(opened) == 4
    assert opened.locator("tbody tr").first.locator("td").all_inner_texts() == expected(widget, painted)
    assert expected(widget, painted)[1] == "0.750"
    text = opened.locator(".readout").inner_text()
    assert all(f"{name}{count}" in text.replace(" ", "").replace("\n", "") for name, count in (("found", 3), ("madeup", 1)))


def test_undo_clear_and_the_eraser(opened):
    stroke(opened, (10, 10), (20, 10))
    first = painted_pixels(opened)
    stroke(opened, (10, 20), (20, 20))
    both = painted_pixels(opened)
    press(opened, "Erase")
    stroke(opened, (10, 20), (20, 20))
    assert painted_pixels(opened) == first > 0
    press(opened, "Undo")
    assert painted_pixels(opened) == both > first
    press(opened, "Paint")
    stroke(opened, (10, 20), (20, 20), button="right")
    assert painted_pixels(opened) == first
    press(opened, "Clear")
    assert painted_pixels(opened) == 0
    for count in (first, both, first, 0):
        press(opened, "Undo")
        assert painted_pixels(opened) == count
    assert opened.get_by_role("button", name="Undo").is_disabled()


def test_keys(opened):
    stage = opened.locator("[data-view=slice]")
    stage.focus()
    for _ in range(10):
        opened.keyboard.press("[")
    assert opened.get_by_role("slider", name="Radius").input_value() == "1"
    for key in ("Space", "ArrowLeft", "Space", "Shift+ArrowUp", "Space"):
        opened.keyboard.press(key)
    assert painted_pixels(opened) == 3
    opened.keyboard.press("e")
    opened.keyboard.press("Space")
    assert painted_pixels(opened) == 2
    opened.keyboard.press("z")
    assert painted_pixels(opened) == 3
    for key in ("e", "]", "]", "]", "Space"):  # radius 2 mm: 13 pixels within it, one of them painted already
        opened.keyboard.press(key)
    assert painted_pixels(opened) == 15
    opened.keyboard.press("2")
    assert opened.get_by_role("button", name="t1c").get_attribute("aria-pressed") == "true"
    opened.keyboard.press("r")
    assert opened.get_by_role("table").is_visible()
    assert "found, missed and made up" in stage.get_attribute("aria-label")
    opened.keyboard.press("r")
    assert not opened.get_by_role("table").is_visible()


def test_pictures_of_others_and_the_answer(opened):
    def shot():
        return opened.eval_on_selector(".stage canvas", "c => c.toDataURL()")

    stroke(opened, (14, 28), (22, 28))
    shots = [shot()]
    press(opened, "Reveal")
    shots.append(shot())
    for name in ("network", "generous"):
        press(opened, f"Show {name}")
        shots.append(shot())
    assert len(set(shots)) == 4
    count = painted_pixels(opened)
    stroke(opened, (14, 34), (22, 34))  # painting shows your own again
    assert painted_pixels(opened) > count
    assert opened.get_by_role("button", name="Show you").get_attribute("aria-pressed") == "true"
    press(opened, "Hide the answer")
    assert not opened.get_by_role("table").is_visible()


def test_a_finger_paints_sideways_or_in_all_directions(on_a_phone, widget, tmp_path):
    widget.to_html(tmp_path / "s.html")
    page = on_a_phone(tmp_path / "s.html", width=390, is_mobile=True)
    touch, stage = page.context.new_cdp_session(page), page.locator("[data-view=slice]")
    stage.scroll_into_view_if_needed()

    def swipe(*points):
        for kind, at in zip(["touchStart", *["touchMove"] * 9], points):
            x, y = place(page, *at)
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    swipe(*[(10 + 2 * k, 24) for k in range(10)])
    sideways = painted_pixels(page)
    assert sideways > 30
    page.get_by_label("Hold the page still").check()
    swipe(*[(30, 10 + 2 * k) for k in range(10)])
    assert painted_pixels(page) > sideways + 30


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    stroke(opened, (14, 28), (22, 28))
    press(opened, "Reveal")
    check_layout(opened, scheme)
