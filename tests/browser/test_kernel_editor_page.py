"""The kernel editor in a page of its own: no kernel, no network."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_lite import metrics
from medseg_lite.widgets import KernelEditor
from medseg_lite.widgets import kernel_editor as module

ROWS, COLUMNS = 40, 34


@pytest.fixture
def editor() -> KernelEditor:
    r, c = np.indices((ROWS, COLUMNS))
    far = (r - 18) ** 2 + (c - 15) ** 2
    image = np.exp(-far / 60) + 0.05 * np.random.default_rng(0).normal(size=(ROWS, COLUMNS))
    return KernelEditor(image, preset="Sobel x", position=(12, 20), truth=far < 42)


@pytest.fixture
def opened(exported, editor):
    return exported(editor)


def pixels(page, view: str) -> np.ndarray:
    """RGBA (rows, columns, 4) of one canvas."""
    width, height, values = page.eval_on_selector(
        f"[data-view={view}] canvas",
        "c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]",
    )
    return np.uint8(values).reshape(height, width, 4)


def assert_shows(page, editor):
    """The map on screen agrees with numpy to one level of colour, and its rim is left open."""
    values, half = editor.feature_map, len(editor.kernel) // 2
    limit = editor.limit if editor.locked else module._limit(values)
    t = np.clip(values / limit, -1, 1)[..., None]
    ends = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in module.SIGNED_COLOURS]
    negative, zero, positive = np.array(ends)
    wanted = zero + np.abs(t) * (np.where(t < 0, negative, positive) - zero)
    found = pixels(page, "map")
    inside = found[half : ROWS - half, half : COLUMNS - half]
    assert np.abs(inside[..., :3] - wanted).max() <= 1 and (inside[..., 3] == 255).all()
    assert (found[..., 3] == 0).sum() == ROWS * COLUMNS - values.size
    row, column = editor.position
    said = page.inner_text(".result b").replace("−", "-")
    assert float(said) == pytest.approx(values[row - half, column - half], rel=0.006, abs=1e-9)
    assert float(page.inner_text(".score b")) == pytest.approx(editor.dice, abs=0.0006)


def weight(page, row: int, column: int):
    return page.get_by_label(f"Weight in row {row}, column {column}")


def test_edit_a_kernel_and_see_the_map_change(opened, editor):
    assert_shows(opened, editor)
    before = pixels(opened, "map")
    weight(opened, 2, 2).focus()
    opened.keyboard.type("3")  # one key: no Enter, no leaving the field
    editor.kernel = [[-1, 0, 1], [-2, 3, 2], [-1, 0, 1]]
    assert (pixels(opened, "map") != before).any()
    assert_shows(opened, editor)
    assert "your own; its weights add up to 3" in opened.inner_text(".total")

    opened.keyboard.press("ArrowDown")  # a step of 0.25
    editor.kernel = [[-1, 0, 1], [-2, 2.75, 2], [-1, 0, 1]]
    assert_shows(opened, editor)
    opened.keyboard.press("Tab")  # on to row 2, column 3, whose number is selected
    opened.keyboard.type("-")  # half a number
    assert "Row 2, column 3 is not a number yet; the map still uses 2" in opened.inner_text(".complaint")
    assert weight(opened, 2, 3).get_attribute("aria-invalid") == "true"
    assert_shows(opened, editor)
    opened.keyboard.type("1.5")
    editor.kernel = [[-1, 0, 1], [-2, 2.75, -1.5], [-1, 0, 1]]
    assert_shows(opened, editor)
    assert opened.inner_text(".complaint") == ""


def test_presets_and_sizes(opened, editor):
    for name in module.PRESETS[3]:
        opened.get_by_role("button", name=name, exact=True).click()
        editor.preset = name
        assert_shows(opened, editor)
        pressed = opened.locator("button[aria-pressed=true]").all_inner_texts()
        assert pressed == [name, "3×3"]
    opened.get_by_role("button", name="5×5").click()  # the preset in its other size
    editor.kernel = module.PRESETS[5]["sharpen"]
    assert_shows(opened, editor)
    opened.get_by_role("button", name="3×3").click()
    weight(opened, 1, 1).fill("4")
    opened.get_by_role("button", name="5×5").click()  # a kernel of one's own is framed with zeros
    own = np.array(module.PRESETS[3]["sharpen"])
    own[0, 0] = 4
    editor.kernel = np.pad(own, 1)
    assert_shows(opened, editor)
    opened.get_by_role("button", name="3×3").click()
    editor.kernel = own
    assert_shows(opened, editor)


def test_the_marked_pixel_by_keys_and_pointer(opened, editor):
    opened.focus("[data-view=image]")
    for key, position in [
        ("ArrowUp", (11, 20)),
        ("Shift+ArrowRight", (11, 30)),
        ("Shift+ArrowRight", (11, 32)),
        ("Shift+ArrowUp", (1, 32)),
    ]:
        opened.keyboard.press(key)
        editor.position = position
        assert_shows(opened, editor)
        assert f"row {position[0]}, column {position[1]}" in opened.inner_text(".result")
    box = opened.locator("[data-view=map]").bounding_box()
    opened.mouse.click(box["x"] + 5.5 / COLUMNS * box["width"], box["y"] + 30.5 / ROWS * box["height"])
    editor.position = (30, 5)
    assert_shows(opened, editor)
    patch = [float(t.replace("−", "-")) for t in opened.locator(".under span").all_inner_texts()]
    np.testing.assert_allclose(patch, editor.image[29:32, 4:7].ravel(), atol=0.0051)


def test_products_and_their_sum(opened, editor):
    shown = [float(t.replace("−", "-")) for t in opened.locator(".products span").all_inner_texts()]
    wanted = np.array(editor.kernel) * editor.image[11:14, 19:22]
    np.testing.assert_allclose(shown, wanted.ravel(), atol=0.0051)
    assert f"add up to {wanted.sum():.4g}".replace("-", "−") in opened.inner_text(".result")


def test_bias_relu_and_the_colours(opened, editor):
    opened.get_by_label("Bias").fill("-0.5")
    editor.bias = -0.5
    assert_shows(opened, editor)
    opened.get_by_label("ReLU").check()
    editor.relu = True
    assert_shows(opened, editor)
    opened.get_by_label("Lock the colours").uncheck()
    editor.locked = False
    assert_shows(opened, editor)
    opened.get_by_role("button", name="blur").click()
    editor.preset = "blur"
    assert_shows(opened, editor)
    opened.get_by_label("Lock the colours").check()  # at what they are now
    editor.limit, editor.locked = module._limit(editor.feature_map), True
    opened.get_by_role("button", name="sharpen").click()
    editor.preset = "sharpen"
    assert_shows(opened, editor)


def test_threshold_and_dice(opened, editor):
    opened.get_by_role("button", name="blur").click()
    editor.preset = "blur"
    slider = opened.get_by_label("Threshold")
    slider.focus()
    opened.keyboard.press("ArrowRight")
    editor.threshold = float(slider.input_value())
    assert_shows(opened, editor)
    opened.get_by_role("button", name="best for this map").click()
    values, truth = editor.feature_map, editor._truth > 0
    dices = [metrics.dice(np.pad(values > t, 1), truth) for t in np.unique(values)]
    assert float(opened.inner_text(".score b")) == pytest.approx(max(dices), abs=0.0006)
    lines = "[data-view=image] canvas.lines"
    drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)"
    assert opened.eval_on_selector(lines, drawn)


def test_step_and_play_fill_the_map(opened, editor):
    def shown():
        return int((pixels(opened, "map")[..., 3] > 0).sum())

    whole = (ROWS - 2) * (COLUMNS - 2)
    assert shown() == whole
    opened.get_by_role("button", name="One pixel on").click()
    assert "row 12, column 21" in opened.inner_text(".result")
    assert shown() == 11 * (COLUMNS - 2) + 21
    assert "so far" in opened.inner_text(".score")
    opened.focus("[data-view=map]")
    opened.keyboard.press("s")
    assert shown() == 11 * (COLUMNS - 2) + 22
    opened.get_by_role("button", name="Whole map").click()
    assert shown() == whole
    opened.get_by_role("button", name="Let the kernel slide").click()
    opened.wait_for_timeout(150)
    assert 0 < shown() < whole
    opened.get_by_role("button", name="Stop the kernel").click()
    opened.focus("[data-view=map]")
    before = shown()
    opened.wait_for_timeout(150)
    assert shown() == before
    opened.keyboard.press("p")
    opened.get_by_role("button", name="Let the kernel slide").wait_for(timeout=20_000)
    assert shown() == whole
    editor.position = (ROWS - 2, COLUMNS - 2)
    assert_shows(opened, editor)


def test_reduced_motion_moves_on_request_only(browser, opened):
    context = browser.new_context(reduced_motion="reduce")
    quiet = context.new_page()
    quiet.goto(opened.url)
    quiet.wait_for_selector("[data-ready]")
    button = quiet.get_by_role("button", name="Fill the next row of the map")
    for rows in (1, 2):
        button.click()
        quiet.wait_for_timeout(120)
        assert (pixels(quiet, "map")[..., 3] > 0).sum() == rows * (COLUMNS - 2)
    context.close()


def test_large_weights_keep_their_digits(opened):
    for button in ("identity", "3×3"):
        opened.get_by_role("button", name=button).click()
    weight(opened, 2, 2).fill("9999")
    assert "its weights add up to 9999" in opened.inner_text(".total")
    opened.keyboard.press("Tab")
    assert weight(opened, 2, 2).input_value() == "9999"


def test_a_right_click_and_a_swipe_leave_the_mark(browser, opened):
    before, box = opened.inner_text(".result"), opened.locator("[data-view=image]").bounding_box()
    opened.mouse.click(box["x"] + 20, box["y"] + 20, button="right")
    assert opened.inner_text(".result") == before
    context = browser.new_context(viewport={"width": 390, "height": 500}, has_touch=True)
    phone = context.new_page()
    phone.goto(opened.url)
    phone.wait_for_selector("[data-ready]")
    box = phone.locator("[data-view=image]").bounding_box()
    place = {"x": box["x"] + 100, "y": box["y"] + 100}
    phone.touchscreen.tap(**place)
    assert phone.inner_text(".result") != before  # a tap moves it
    before, device = phone.inner_text(".result"), context.new_cdp_session(phone)
    for kind, up in [("Start", 0), *(("Move", up) for up in range(10, 100, 10))]:
        finger = {"x": place["x"], "y": place["y"] - up}
        device.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": [finger]})
    device.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    phone.wait_for_timeout(100)
    assert phone.evaluate("scrollY") > 50 and phone.inner_text(".result") == before
    context.close()


def test_every_control_has_a_name_and_fits_narrow_notebooks(opened):
    unnamed = opened.evaluate(
        """() => [...document.querySelectorAll('input, button, [tabindex]')]
            .filter(e => !(e.ariaLabel || e.labels?.[0]?.innerText.trim() || e.innerText?.trim())).map(e => e.outerHTML)"""
    )
    assert not unnamed
    reached = set()
    for _ in range(34):
        opened.keyboard.press("Tab")
        reached.add(opened.evaluate("document.activeElement.ariaLabel ?? document.activeElement.innerText"))
    for name in (
        "Sobel y",
        "5×5",
        "One pixel on",
        "Bias",
        "Threshold",
        "Weight in row 1, column 1",
        "Weight in row 3, column 3",
    ):
        assert name in reached, (name, reached)
    assert sum("Arrow keys" in name for name in reached) == 2
    for width in (900, 640, 380):
        opened.set_viewport_size({"width": width, "height": 900})
        overflow = opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
