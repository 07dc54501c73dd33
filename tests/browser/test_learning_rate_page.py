"""The learning-rate widget in a page of its own: no kernel, no network."""

from __future__ import annotations

import pytest

from medseg_lite.widgets import LearningRate


@pytest.fixture
def widget() -> LearningRate:
    return LearningRate([0, 0, 1, 3, 3, 2, 0, 0, 2, 1], [-1, 0, 1], rate=0.1)


@pytest.fixture
def opened(exported, widget):
    return exported(widget)


def learned(page) -> list[float]:
    return [float(t.replace("−", "-")) for t in page.locator("table tr").first.locator("td").all_inner_texts()]


def test_steps_are_those_of_python(opened, widget):
    for n in range(4):
        assert learned(opened) == pytest.approx(widget.weights[n], rel=0.006, abs=1e-3)
        assert f"After {n} updates" in opened.inner_text(".verdict")
        opened.get_by_role("button", name="One update").click()
    opened.get_by_role("button", name="Back to the start").click()
    assert learned(opened) == [0, 0, 0]


def test_the_slider_tells_small_good_and_large(opened):
    slider = opened.get_by_label("Learning rate", exact=True).last
    slider.focus()
    for key, verdict in (("Home", "too small"), ("End", "too large")):
        opened.keyboard.press(key)
        assert verdict in opened.inner_text(".verdict")
        assert verdict in slider.get_attribute("aria-valuetext")


def test_play_runs_to_a_pause_and_needs_no_motion(browser, opened):
    opened.get_by_role("button", name="Play").click()
    opened.wait_for_timeout(500)
    opened.get_by_role("button", name="Pause").click()
    before = opened.inner_text(".verdict")
    assert "After 0 " not in before
    opened.wait_for_timeout(300)
    assert opened.inner_text(".verdict") == before
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 380, "height": 900})
    quiet = context.new_page()
    quiet.goto(opened.url)
    quiet.get_by_role("button", name="Ten updates").click()
    assert "After 10 updates" in quiet.inner_text(".verdict")
    overflow = quiet.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
