"""The valley in a page of its own: its paths are those of Python, and it runs, steps and resets without a kernel."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_lite.widgets import Valley
from medseg_lite.widgets._base import script


@pytest.fixture
def widget() -> Valley:
    return Valley(rate=0.5, factor=0.1)


@pytest.fixture
def opened(exported, widget):
    return exported(widget)


def told(page) -> list[float]:
    texts = page.locator(".balls .number").all_inner_texts()
    return [float(t.replace("−", "-")) for t in texts]


def expected(widget: Valley) -> list:
    return [
        pytest.approx(d[widget.updates], rel=0.06 if d[widget.updates] < 1e-3 else 0.006) for d in widget.distances.values()
    ]


def test_paths_are_those_of_python(page, widget):
    page.goto("about:blank")
    page.evaluate(script("valley.js").replace("export default { render };", "window.tools = [roll];"))
    rng, scene = np.random.default_rng(0), {key: widget._scene[key] for key in ("balls", "start", "most")}
    for n in range(12):
        rate, factor = np.exp(rng.uniform(np.log(0.01), np.log(3))), np.exp(rng.uniform(np.log(0.01), np.log(10)))
        state = {"rate": float(rate), "factor": float(factor), "stretch": float(rng.uniform(1, 8)), "falls": n % 2 == 1}
        found = np.array(page.evaluate("([scene, state]) => tools[0](scene, state)", [scene, state]), float)
        expected = np.array([*Valley(**state).paths.values()])
        np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-9)
        # Near the minimum a rounding error turns a step of fixed length a little, so it is compared update by update.
        gradient = found[2, :-1] * [1 / state["stretch"] ** 2, 1]
        rates = state["rate"] * (1 - np.arange(80)[:, None] / 80 * state["falls"])
        steps = -rates * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
        np.testing.assert_allclose(np.diff(found[2], axis=0), steps, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found[2, :15], expected[2, :15], rtol=1e-6)


def test_steps_sliders_and_the_falling_rate(opened, widget):
    for n in range(4):
        widget.updates = n
        assert told(opened) == expected(widget) and f"After {n} of 80 updates." in opened.inner_text(".verdict")
        opened.get_by_role("button", name="One update").click()
    widget.updates = 4
    opened.get_by_label("Rate falls to zero").check()
    widget.falls = True
    assert told(opened) == expected(widget)
    opened.get_by_role("slider", name="Valley").fill("8")
    widget.stretch = 8.0
    assert told(opened) == expected(widget)
    slider = opened.get_by_role("slider", name="Rate")
    slider.focus()
    opened.keyboard.press("End")
    widget.rate = 3.0
    assert told(opened) == expected(widget) and slider.get_attribute("aria-valuetext") == "3"
    assert "above 2 for plain descent:" in opened.inner_text(".verdict")
    opened.get_by_role("slider", name="Factor").press("End")
    widget.factor = 10.0
    assert told(opened) == expected(widget)
    assert "above 2 for plain descent and loss × factor:" in opened.inner_text(".verdict")
    opened.get_by_role("button", name="Reset").click()
    widget.updates = 0
    assert told(opened) == expected(widget)


def test_both_pictures_follow(opened):
    shots = [opened.eval_on_selector_all(".plot canvas", "all => all.map(c => c.toDataURL())")]
    for act in (lambda: opened.keyboard.press("s"), lambda: opened.get_by_role("slider", name="Rate").fill("40")):
        opened.get_by_role("button", name="One update").focus()
        act()
        shots.append(opened.eval_on_selector_all(".plot canvas", "all => all.map(c => c.toDataURL())"))
        assert all(a != b for a, b in zip(*shots[-2:]))


def test_a_run_pauses_and_ends(opened):
    opened.get_by_role("button", name="Run").click()
    opened.wait_for_timeout(500)
    opened.get_by_role("button", name="Pause").click()
    before = opened.inner_text(".verdict")
    assert "After 0 " not in before
    opened.wait_for_timeout(300)
    assert opened.inner_text(".verdict") == before


def test_reduced_motion_goes_ten_updates_on_a_tap(browser, widget, tmp_path):
    widget.to_html(tmp_path / "v.html")
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 380, "height": 900}, has_touch=True)
    page = context.new_page()
    page.goto((tmp_path / "v.html").as_uri())
    page.get_by_role("button", name="Ten updates").tap()
    widget.updates = 10
    assert told(page) == expected(widget)
    page.wait_for_timeout(200)
    assert told(page) == expected(widget)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
