"""Methods at thresholds in a page of its own."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_lite.widgets import OperatingPoint


@pytest.fixture
def widget(case) -> OperatingPoint:
    """Two cases; a method that is unsure and one that gives few large steps, which overlap the truth in part."""
    rng = np.random.default_rng(0)
    other = case.replace(name="other", label=np.roll(case.label, 3, axis=1))
    cases = [case, other]
    unsure = [np.clip((c.label > 0) * 0.4 + rng.normal(0.3, 0.15, c.shape), 0, 1).astype(np.float32) for c in cases]
    steps = [np.round(np.roll(p, 1, axis=0), 1) for p in unsure]
    return OperatingPoint(cases, {"unsure": unsure, "steps": steps}, label=[1, 4], chosen={"unsure": 0.4321})


@pytest.fixture
def opened(exported, widget):
    return exported(widget)


def shots(page, kind: str) -> list[str]:
    return page.eval_on_selector_all(f"[data-view^={kind}] canvas", "all => all.map(c => c.toDataURL())")


def slider(page, name: str):
    return page.get_by_role("slider", name=f"Threshold of {name}")


def numbers(page, panel: int) -> list[str]:
    """Return the texts of a panel: its caption, and its six numbers."""
    figure = page.locator("figure").nth(panel)
    return [figure.locator("figcaption .number").inner_text(), *figure.locator(".numbers span").all_inner_texts()]


def expected(widget: OperatingPoint, panel: int) -> list[str]:
    """Return the same texts, from the widget's table in Python."""
    row = widget.table.iloc[panel]
    shares = {
        name: f"{100 * row[name]:.{digits}f} %" for name, digits in (("sensitivity", 1), ("precision", 1), ("specificity", 2))
    }
    voxels = {name: f"{row[name.replace(' ', '_')]:,}".replace(",", "\u202f") for name in ("missed", "made up", "found")}
    pairs = zip(shares.items(), voxels.items())
    texts = [f"{name}\n{text}" for pair in pairs for name, text in pair]
    return [f"above {row.threshold:.4g}: Dice {100 * row.dice:.1f} %", *texts]


def test_numbers_are_those_of_python(opened, widget):
    for k in (0, 7, 40, 66, 90, 125):
        threshold = widget._scene["grid"][k]
        slider(opened, "unsure").fill(str(k))
        slider(opened, "steps").fill(str(125 - k))
        widget.thresholds = {"unsure": threshold, "steps": widget._scene["grid"][125 - k]}
        for panel in range(2):
            assert numbers(opened, panel) == expected(widget, panel)


def test_the_slider_moves_outline_and_curve_of_its_method(opened):
    before = {kind: shots(opened, kind) for kind in ("picture", "curve")}
    slider(opened, "unsure").fill("20")
    for kind, old in before.items():
        new = shots(opened, kind)
        assert new[0] != old[0] and new[1] == old[1]
    assert slider(opened, "unsure").get_attribute("aria-valuetext").startswith("0.08, Dice ")
    before = shots(opened, "curve")
    for name in ("precision by sensitivity", "ROC", "Dice by threshold"):
        opened.get_by_label("Curve").select_option(name)
        assert opened.locator("[data-view=curve0]").get_attribute("aria-label").startswith(f"{name} of unsure: ")
    assert shots(opened, "curve") == before


def test_the_outline_is_that_of_the_prediction(opened, widget):
    """Count the pixels in the colour of the prediction: none where nothing is predicted, and more round more specks."""
    count = """c => { const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data; let n = 0;
        for (let i = 0; i < d.length; i += 4) n += d[i] === 255 && d[i + 1] === 153 && d[i + 2] === 170; return n; }"""
    pink = {}
    for k in (20, 66, 125):
        slider(opened, "unsure").fill(str(k))
        pink[k] = opened.eval_on_selector("[data-view=picture0] canvas", count)
    assert pink[125] == 0 < pink[66] < pink[20]


def test_best_here_is_called_cheating_and_chosen_is_fair(opened, widget):
    verdicts = opened.locator(".verdict")
    assert verdicts.nth(0).inner_text() == "0.4321 was chosen on validation cases. That is fair."
    assert verdicts.nth(1).inner_text() == ""
    opened.get_by_role("button", name="best Dice here, unsure").click()
    widget.thresholds = {"unsure": widget.best["unsure"]}
    assert numbers(opened, 0) == expected(widget, 0)
    text = verdicts.nth(0).inner_text()
    assert text.startswith(f"{widget.best['unsure']:g} has the best Dice on these cases.") and "cheating" in text
    widget.thresholds = {"unsure": 0.4321}
    assert f"0.4321, has Dice {100 * widget.table.dice[0]:.1f} % here" in text
    opened.get_by_role("button", name="chosen on validation, unsure").click()
    assert "fair" in verdicts.nth(0).inner_text() and numbers(opened, 0) == expected(widget, 0)
    assert opened.get_by_role("button", name="chosen on validation, steps").count() == 0


def test_one_threshold_for_all(opened):
    together = opened.get_by_label("One threshold for all")
    assert not together.is_checked()
    together.check()
    assert {slider(opened, name).get_attribute("aria-valuetext").split(",")[0] for name in ("unsure", "steps")} == {"0.4321"}
    slider(opened, "steps").fill("30")
    assert slider(opened, "unsure").input_value() == "30"
    together.uncheck()
    slider(opened, "steps").fill("31")
    assert slider(opened, "unsure").input_value() == "30"


def test_keys_and_the_curve_move_the_threshold(opened, widget):
    slider(opened, "unsure").focus()
    first = int(slider(opened, "unsure").input_value())
    opened.keyboard.press("ArrowRight")
    assert slider(opened, "unsure").input_value() == str(first + 1)
    opened.focus("[data-view=picture1]")
    opened.keyboard.press("Shift+ArrowLeft")
    assert slider(opened, "steps").input_value() == str(widget._scene["grid"].index(0.5) - 10)
    place = opened.get_by_role("slider", name="Axial slice")
    assert place.input_value() == str(widget.index)
    before = shots(opened, "picture")
    opened.keyboard.press("PageUp")
    assert place.input_value() == str(widget.index + 1)
    assert all(a != b for a, b in zip(shots(opened, "picture"), before))
    box = opened.locator("[data-view=curve0]").bounding_box()
    for share, k in ((0.25, 31), (0.8, 100)):
        opened.mouse.click(box["x"] + 42 + share * (box["width"] - 52), box["y"] + 60)
        assert slider(opened, "unsure").input_value() == str(k)
    thumb = slider(opened, "unsure").bounding_box()  # its middle is that of the dot
    assert abs(thumb["x"] + 8 - box["x"] - 42) <= 1 and abs(thumb["x"] + thumb["width"] - 8 - box["x"] - box["width"] + 10) <= 1


def test_another_case(opened, widget):
    before, told = shots(opened, "picture"), numbers(opened, 0)
    opened.get_by_label("Case").select_option("other")
    opened.wait_for_function("old => document.querySelector('[data-view=picture0] canvas').toDataURL() !== old", arg=before[0])
    assert opened.get_by_role("slider", name="Axial slice").input_value() == str(widget._scene["cases"][1]["index"])
    assert numbers(opened, 0) == told  # of all cases


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    opened.get_by_role("button", name="best Dice here, steps").click()
    check_layout(opened, scheme)
