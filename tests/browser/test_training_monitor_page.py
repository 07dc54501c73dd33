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
    opened.get_by_label("Picture").fill("0")
    opened.wait_for_selector("[data-shown='1']")
    assert opened.inner_text(".caption").startswith("after 1 update:")
    assert all(shot(opened, view) != old for view, old in before.items())  # the curves mark the place
    opened.get_by_label("Picture").fill("3")
    opened.wait_for_selector("[data-shown='6']")
    assert shot(opened, "picture") == before["picture"]
    opened.get_by_label("Opacity of the colours").fill("0.1")
    assert shot(opened, "picture") != before["picture"]
    assert opened.locator(".plots .key li").all_inner_texts() == ["dice whole", "dice core"]


def test_controls_have_names_and_narrow_notebooks_do(opened):
    unnamed = opened.evaluate("() => [...document.querySelectorAll('input')].filter(e => !e.ariaLabel).length")
    assert unnamed == 0
    for width in (900, 380):
        opened.set_viewport_size({"width": width, "height": 900})
        opened.wait_for_timeout(50)
        assert opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
