"""Merged and split cells in a page of its own: growth and scores are those of Python, brush, keys and slider work."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import ndimage
from skimage.segmentation import watershed

from medseg_lite import phantoms
from medseg_lite.widgets import VRandExplorer
from medseg_lite.widgets._base import script


@pytest.fixture
def widget() -> VRandExplorer:
    case = phantoms.em(1, slices=1, size=96)
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 1.2, case.shape), (2, 2, 0))
    return VRandExplorer(case, np.clip(0.5 * (case.label == 0) + 0.25 + smooth, 0, 1), side=64)


@pytest.fixture
def opened(exported, widget):
    return exported(widget)


def told(page) -> list[str]:
    return page.eval_on_selector_all(".readout span", "all => all.map(s => s.lastChild.textContent)")


def expected(widget: VRandExplorer) -> list[str]:
    s = widget.scores()
    segments, cells = (ndimage.label(mask)[1] for mask in (widget.inside(), widget._truth))
    scores = [f"{s[name]:.3f}" for name in ("v_rand", "v_info", "dice")]
    return [*scores, *(str(n) for n in (s["merged"], s["split"], segments, cells, len(widget.edits)))]


def picture(page) -> str:
    return page.eval_on_selector("[data-view=segments] canvas", "c => c.toDataURL()")


def slider(page, name: str):
    return page.get_by_role("slider", name=name)


def place(page, widget, d: int, h: int) -> tuple[float, float]:
    """Return where the middle of a pixel of the square lies in the page."""
    box, (rows, columns, _) = page.locator("[data-view=segments]").bounding_box(), widget._scene["shape"]
    return box["x"] + (rows - d - 0.5) / rows * box["width"], box["y"] + (columns - h - 0.5) / columns * box["height"]


def test_segments_grow_as_in_scikit_image(page):
    """Masks of all kinds, pixel by pixel: the lines depend on the order in which equal pixels are reached."""
    rng, masks = np.random.default_rng(3), []
    for _ in range(40):
        noise = ndimage.gaussian_filter(rng.normal(size=rng.integers(4, 50, 2)), rng.uniform(0, 3))
        masks.append(noise > np.quantile(noise, rng.uniform(0, 1)))
    page.goto("about:blank")
    page.evaluate(
        script("vrand_explorer.js").replace("export default { render };", "window.grow = [numberSegments, growSegments];")
    )
    for mask in masks:
        code = "([mask, wide]) => { const { numbers, count } = grow[0](mask, wide); return [[...numbers], count, [...grow[1](numbers, wide)]]; }"
        numbers, count, grown = page.evaluate(code, [mask.ravel().astype(int).tolist(), mask.shape[1]])
        labelled, found = ndimage.label(mask)
        assert count == found and numbers == labelled.ravel().tolist()
        lines = watershed(~mask, labelled, connectivity=1, watershed_line=True)
        assert grown == lines.ravel().tolist(), json.dumps(mask.astype(int).tolist())


def test_numbers_are_those_of_python(opened, widget):
    faults = set()
    for k in (0, 10, 20, 25, 30, 35, 45, 50):
        slider(opened, "Threshold").fill(str(k))
        widget.threshold = k / 50
        assert told(opened) == expected(widget)
        faults |= {name for name in ("merged", "split") if widget.scores()[name]}
    assert faults == {"merged", "split"}
    assert slider(opened, "Threshold").get_attribute("aria-valuetext") == "1"


def painted(widget, value: int, places) -> list[list[int]]:
    """Return the edits of a brush of five pixels in these places."""
    return [[d + i, h + j, value] for d, h in places for i in range(-2, 3) for j in range(-2, 3)]


def test_the_brush_closes_and_opens(opened, widget):
    before = picture(opened)
    opened.mouse.move(*place(opened, widget, 20, 30))
    opened.mouse.down()
    opened.mouse.move(*place(opened, widget, 40, 30))
    opened.mouse.up()
    widget.edits = painted(widget, 0, [(d, 30) for d in range(20, 41)])
    expect = expected(widget)
    assert told(opened)[:7] == expect[:7] and told(opened)[7] == str(25 * 5) and picture(opened) != before
    opened.get_by_label("Brush", exact=True).select_option("open a gap")
    opened.mouse.click(*place(opened, widget, 30, 30))
    widget.edits = [*widget.edits, *painted(widget, 1, [(30, 30)])]
    assert told(opened)[:7] == expected(widget)[:7] and told(opened)[7] == str(25 * 5)
    opened.get_by_role("button", name="Undo the brush").click()
    widget.edits = []
    assert told(opened) == expected(widget)
    assert opened.get_by_role("button", name="Undo the brush").is_disabled()


def test_keys_move_the_brush_and_paint(opened, widget):
    opened.focus("[data-view=segments]")
    for key in ("ArrowRight", "Shift+ArrowUp", "Space"):
        before = picture(opened)
        opened.keyboard.press(key)
        assert picture(opened) != before
    widget.edits = painted(widget, 0, [(31, 42)])  # right in the picture is left in the array
    assert told(opened)[7] == "25" and told(opened)[:7] == expected(widget)[:7]
    slider(opened, "Width of the brush").fill("1")
    opened.focus("[data-view=segments]")
    for _ in range(2):
        opened.keyboard.press("Shift+ArrowUp")
    opened.keyboard.press("Space")
    assert told(opened)[7] == "26"


def test_segments_that_merge_flash_a_few_times(opened, widget):
    slider(opened, "Threshold").fill("5")
    red = """c => { const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data; let n = 0;
        for (let i = 0; i < d.length; i += 4) n += d[i] > 150 && d[i + 2] < 90 && d[i + 3] > 0; return n; }"""
    flash, style = (
        "[data-view=segments] .flash",
        "c => [getComputedStyle(c).animationName, +getComputedStyle(c).animationIterationCount]",
    )
    assert opened.eval_on_selector(flash, red) > 1000
    assert opened.eval_on_selector(flash, style) == ["medseg-flash", 4]
    opened.emulate_media(reduced_motion="reduce")
    assert opened.eval_on_selector(flash, style)[0] == "none"
    slider(opened, "Threshold").fill("50")  # nothing is inside, so nothing is merged
    assert opened.eval_on_selector(flash, red) == 0 and opened.eval_on_selector(flash, style)[0] == "none"


def test_a_tap_paints(on_a_phone, widget, tmp_path):
    widget.to_html(tmp_path / "v.html")
    page = on_a_phone(tmp_path / "v.html", width=390)
    page.touchscreen.tap(*place(page, widget, 32, 32))
    assert told(page)[7] == "25"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
