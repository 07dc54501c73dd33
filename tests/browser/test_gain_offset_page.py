"""Gain and offset in a page of its own: sliders, maps and keys set both, and the numbers are those of Python."""

from __future__ import annotations

import pytest

from medseg_lite import models, paths, phantoms, transforms
from medseg_lite.widgets import GainOffset


@pytest.fixture(scope="module")
def widget() -> GainOffset:
    raw, other = (models.load(paths.shipped("checkpoints", f"em_inputs_{n}.safetensors")) for n in ("learned", "standardised"))
    case = phantoms.em(3, slices=1, size=64, counts=True)
    networks = {"raw": raw, "standardised": (other, transforms.standardise)}
    return GainOffset(networks, case, gains=(0.5, 1, 3), offsets=(-400, 0, 900))


@pytest.fixture(autouse=True)
def as_it_came(widget):
    widget.gain, widget.offset = 1, 0


@pytest.fixture
def opened(exported, widget):
    return exported(widget)


def shots(page) -> list[str]:
    page.wait_for_timeout(60)
    return page.eval_on_selector_all(".stage canvas", "all => all.map(c => c.toDataURL())")


def slider(page, name: str):
    return page.get_by_role("slider", name=name)


def told(page) -> list[str]:
    return page.locator("figure .number").all_inner_texts()


def write(number: float) -> str:
    """Return a number with three digits at most, as the scripts write it."""
    return f"{float(f'{number:.3g}'):g}".replace("-", "−")


def expected(widget: GainOffset) -> list[str]:
    sign = "−" if widget.offset < 0 else "+"
    return [f"× {widget.gain:g} {sign} {abs(widget.offset):g}", *(f"Dice {d:.3f}" for d in widget.table["dice"])]


def test_numbers_are_those_of_python(opened, widget):
    for g, o in ((1, 1), (0, 1), (0, 2), (2, 0)):
        slider(opened, "Gain").fill(str(g))
        slider(opened, "Offset").fill(str(o))
        widget.gain, widget.offset = widget.gains[g], widget.offsets[o]
        assert told(opened) == expected(widget)
        given = opened.locator(".given").all_inner_texts()[1]
        row = widget.table.loc["raw"]
        assert given == f"is given {write(row['mean'])} ± {write(row['deviation'])}"
    assert slider(opened, "Gain").get_attribute("aria-valuetext") == "× 3"
    assert slider(opened, "Offset").get_attribute("aria-valuetext") == "− 400"
    opened.get_by_role("button", name="As it came").click()
    widget.gain, widget.offset = 1, 0
    assert told(opened) == expected(widget)


def test_input_and_predictions_follow(opened, widget):
    before = shots(opened)
    slider(opened, "Offset").fill("2")
    after = shots(opened)
    assert len(after) == 3 and after[0] != before[0] and after[1] != before[1]
    assert after[2] == before[2], "standardised input is the same"


def test_maps_and_keys_set_both(opened, widget):
    box = opened.locator(".plot.map").first.bounding_box()
    opened.mouse.click(box["x"] + box["width"] - 10, box["y"] + 10)
    widget.gain, widget.offset = 3, 900
    assert told(opened) == expected(widget)
    slider(opened, "Gain").focus()
    opened.keyboard.press("ArrowLeft")
    widget.gain = 1
    assert told(opened) == expected(widget)
    opened.mouse.move(box["x"] + 10, box["y"] + 10)
    opened.mouse.down()
    opened.mouse.move(box["x"] + 10, box["y"] + 80)
    opened.mouse.up()
    widget.gain, widget.offset = 0.5, -400
    assert told(opened) == expected(widget)


def test_a_tap_in_a_map(on_a_phone, widget, tmp_path):
    widget.to_html(tmp_path / "g.html")
    page = on_a_phone(tmp_path / "g.html")
    box = page.locator(".plot.map").first.bounding_box()
    page.touchscreen.tap(box["x"] + 8, box["y"] + 8)
    assert told(page)[0] == "× 0.5 + 900"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
