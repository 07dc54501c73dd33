"""The training monitor in a page of its own."""

from __future__ import annotations

import pytest
import torch

from medseg_lite import models
from medseg_lite.widgets import TrainingMonitor


@pytest.fixture
def opened(page, case, tmp_path):
    torch.manual_seed(0)
    model = models.dm2d_seg(in_channels=2, classes=5, width=0.1)
    monitor = TrainingMonitor(model, case.replace(image=case.image / 40), every=2)
    for step in range(1, 7):
        with torch.no_grad():
            model.classifier.bias.normal_()
        row = {"step": step, "loss": 1 / step}
        monitor(row | ({"dice_whole": step / 10, "dice_core": 0.1} if step % 3 == 0 else {}))
    monitor.to_html(tmp_path / "t.html")
    page.goto((tmp_path / "t.html").as_uri())
    page.wait_for_selector("[data-ready]")
    return page


def shot(page, view: str) -> str:
    return page.eval_on_selector(f"[data-view={view}] canvas", "c => c.toDataURL()")


def test_pictures_follow_the_slider(opened):
    assert opened.inner_text(".caption").startswith("after 6 updates: Dice of this slice")
    before = {view: shot(opened, view) for view in ("picture", "loss", "scores")}
    opened.get_by_label("Picture", exact=True).fill("0")
    opened.wait_for_selector("[data-shown='1']")
    assert opened.inner_text(".caption").startswith("after 1 update:")
    assert all(shot(opened, view) != old for view, old in before.items())  # the curves mark the place
    opened.get_by_label("Picture", exact=True).fill("3")
    opened.wait_for_selector("[data-shown='6']")
    assert shot(opened, "picture") == before["picture"]
    opened.get_by_label("Opacity of the colours").fill("0.1")
    assert shot(opened, "picture") != before["picture"]
    assert opened.locator(".plots .key li").all_inner_texts() == ["dice whole", "dice core"]


def test_play_and_choose_in_the_curve(browser, opened):
    opened.get_by_role("button", name="Play").click()  # from the last picture on to the first
    assert opened.inner_text("button") == "Pause"
    opened.wait_for_selector("[data-shown='1']")
    opened.wait_for_selector("[data-shown='6']")
    assert opened.inner_text("button") == "Play"
    box = opened.locator("[data-view=loss]").bounding_box()
    opened.mouse.click(box["x"] + box["width"] * 0.65, box["y"] + 50)  # update 4.0
    opened.wait_for_selector("[data-shown='4']")
    context = browser.new_context(reduced_motion="reduce")
    still = context.new_page()
    still.goto(opened.url)
    still.wait_for_selector("[data-ready]")
    for step in (1, 2, 4):
        still.get_by_role("button", name="Next picture").click()
        still.wait_for_timeout(500)
        assert still.get_attribute("[data-shown]", "data-shown") == str(step)
    still.get_by_label("Picture", exact=True).focus()
    still.keyboard.press("p")
    still.wait_for_selector("[data-shown='6']")
    context.close()


def test_both_curves_have_one_axis_and_fill_the_height(opened):
    boxes = {view: opened.locator(f"[data-view={view}]").bounding_box() for view in ("loss", "scores")}
    assert boxes["loss"]["x"] == boxes["scores"]["x"] and boxes["loss"]["width"] == boxes["scores"]["width"]
    plots, view = (opened.locator(name).bounding_box() for name in (".plots", ".view"))
    legend = opened.locator(".plots .key").bounding_box()
    assert abs(plots["height"] - view["height"]) < 10 and plots["y"] + plots["height"] - legend["y"] < 60
    assert opened.locator(".plots .key canvas").count() == 2  # lines with their dashes


def test_controls_have_names_and_narrow_notebooks_do(opened):
    unnamed = opened.evaluate("() => [...document.querySelectorAll('input')].filter(e => !e.ariaLabel).length")
    assert unnamed == 0
    for width in (900, 380):
        opened.set_viewport_size({"width": width, "height": 900})
        opened.wait_for_timeout(50)
        assert opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
