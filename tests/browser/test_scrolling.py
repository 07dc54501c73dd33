"""No widget traps its reader: wheel, zoom and touch belong to the page until a picture has the focus."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg_lite import models
from medseg_lite.widgets import (
    BlockSwitchboard,
    CompareSegmentations,
    CRFExplorer,
    FeatureExplorer,
    GainOffset,
    KernelEditor,
    LossBench,
    OperatingPoint,
    SegmentDial,
    SegmentYourself,
    SignalExplorer,
    SliceViewer,
    TrainingMonitor,
    TrainingScrubber,
    Valley,
    VoteTree,
    VRandExplorer,
)


def make_slices(case):
    return SliceViewer(case, position=(15, 28, 15)), "[data-plane=axial]"


def make_compare(case):
    return CompareSegmentations(case, {"moved": np.roll(case.label, 4, axis=0)}, position=(15, 28, 15)), "[data-view=picture0]"


def make_features(case):
    torch.manual_seed(0)
    model = models.deepmedic(in_channels=2, classes=3, width=0.2)
    return FeatureExplorer(model, case, position=(15, 28, 15)), "[data-view=picture0]"


def make_kernel(case):
    return KernelEditor(case.image[0, :, :, 15], position=(12, 20)), "[data-view=image]"


def make_crf(case):
    p = np.where(case.label > 0, 0.7, 0.2).astype(np.float32)
    return CRFExplorer(case, np.stack([1 - p, p])), "[data-view='3']"


def make_operating(case):
    p = np.where(case.label > 0, 0.7, 0.2)
    return OperatingPoint(case, {"a": p, "b": p}, label=[1, 4], chosen={"a": 0.5}), "[data-view=picture1]"


def make_segment(case):
    return SegmentDial(case), "[data-view=segment]"


def make_monitor(case):
    monitor = TrainingMonitor(models.dm2d_seg(in_channels=2, classes=5, width=0.1), case, every=1)
    monitor({"step": 1, "loss": 1.0})
    return monitor, "[data-view=picture]"


def make_signals(case):
    generator = torch.Generator().manual_seed(0)
    segments = torch.randn(1, 1, 26, 26, 26, generator=generator)
    return SignalExplorer(segments, torch.zeros(1, 2, 2, 2, dtype=torch.long)), "[data-view=update]"


def make_bench(case):
    return LossBench(), "[data-view=image0]"


def make_scrubber(case):
    image, truth = case.image[0, :, :, 15], case.label[:, :, 15]
    labels = np.stack([np.roll(truth, n, axis=0) for n in (3, 2, 1)])[None]
    return TrainingScrubber(image, truth, labels, [1, 2, 3], ["moved"], case.info["classes"]), "[data-view=picture1]"


def make_cells(case):
    truth = case.label[:, :, 15] == 0
    return VRandExplorer(case.image[0, :, :, 15], np.where(truth, 0.8, 0.3), truth), "[data-view=segments]"


def make_blocks(case):
    torch.manual_seed(0)
    model = models.fc_resnet(in_channels=2, width=0.05)
    return BlockSwitchboard(model, case), "[data-view=probability]"


def make_paint(case):
    return SegmentYourself(case, np.roll(case.label, 4, axis=0), {"moved": np.roll(case.label, 2, axis=1)}), "[data-view=slice]"


def make_gains(case):
    torch.manual_seed(0)
    return GainOffset({"one": models.unet2d(in_channels=2, width=0.05)}, case), "[data-view='network 0']"


def make_votes(case):
    maps = {name: np.roll(case.label, n, axis=0) for n, name in enumerate("abc")}
    return VoteTree(case, maps, labels=(1, 2, 4)), "[data-view=vote]"


def make_valley(case):
    return Valley(updates=20), "[data-view=valley]"


def write_page(make, case, folder):
    """Write a page that is longer than the window. Return its path and the selector of one of its pictures."""
    widget, stage = make(case)
    path = folder / "widget.html"
    text = widget.to_html().replace("</body>", '<div style="height: 3000px"></div></body>')
    path.write_text(text, encoding="utf-8")
    return path, stage


@pytest.fixture(scope="module", params=[make_slices, make_compare, make_features])
def widget(request, case, tmp_path_factory):
    """A widget with slice pictures."""
    return write_page(request.param, case, tmp_path_factory.mktemp("page"))


ALL = [
    make_slices,
    make_compare,
    make_features,
    make_kernel,
    make_crf,
    make_operating,
    make_segment,
    make_signals,
    make_monitor,
    make_bench,
    make_scrubber,
    make_cells,
    make_blocks,
    make_gains,
    make_votes,
    make_valley,
    make_paint,
]


@pytest.fixture(scope="module", params=ALL)
def any_widget(request, case, tmp_path_factory):
    return write_page(request.param, case, tmp_path_factory.mktemp("page"))


def open_page(page, widget):
    page.goto(widget[0].as_uri())
    page.wait_for_selector("[data-ready]")
    return page.locator(widget[1])


def position(page) -> list[int]:
    page.mouse.move(1, 1)  # the feature explorer tells what is under the pointer
    return [int(n) for n in page.locator(".readout span").first.inner_text().removeprefix("voxel").split(",")]


def scrolled(page) -> float:
    page.wait_for_timeout(200)
    return page.evaluate("window.scrollY")


def test_the_wheel_scrolls_the_page_until_the_picture_has_the_focus(page, widget):
    stage = open_page(page, widget)
    before = position(page)
    stage.hover()
    page.mouse.wheel(0, 120)
    assert scrolled(page) > 50 and position(page) == before

    page.evaluate("window.scrollTo(0, 0)")
    stage.click(position={"x": 20, "y": 20})
    d, h, w = position(page)
    stage.hover()
    page.mouse.wheel(0, 120)
    assert scrolled(page) == 0 and position(page) == [d, h, w - 1]


def test_the_wheel_scrolls_the_page_past_the_last_slice(page, widget):
    stage = open_page(page, widget)
    stage.focus()
    page.keyboard.press("Home")
    first = position(page)
    page.evaluate("window.scrollTo(0, 0)")
    stage.hover()
    page.mouse.wheel(0, 120)
    assert scrolled(page) > 50 and position(page) == first


def test_ctrl_and_wheel_zoom_the_page(page, widget):
    stage = open_page(page, widget)
    stage.focus()
    before = position(page)
    event = "new WheelEvent('wheel', { deltaY: 100, ctrlKey: true, bubbles: true, cancelable: true })"
    assert stage.evaluate(f"stage => stage.dispatchEvent({event})")  # nobody prevented it
    assert position(page) == before


@pytest.fixture
def phone(browser):
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    yield context.new_page()
    context.close()


def swipe(phone, stage) -> float:
    """Draw a finger up a picture, and return by how many pixels the page scrolled."""
    stage.scroll_into_view_if_needed()
    phone.wait_for_timeout(100)
    place, top = stage.bounding_box(), phone.evaluate("window.scrollY")
    x, y = place["x"] + 60, place["y"] + min(place["height"], 800 - place["y"]) - 40
    touch = phone.context.new_cdp_session(phone)
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for step in range(1, 11):
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [{"x": x, "y": y - 20 * step}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    return scrolled(phone) - top


def test_a_swipe_scrolls_and_a_tap_moves_the_crosshair(phone, widget):
    stage = open_page(phone, widget)
    before = position(phone)
    assert swipe(phone, stage) > 100 and position(phone) == before

    stage.scroll_into_view_if_needed()
    place = stage.bounding_box()
    phone.touchscreen.tap(place["x"] + 0.25 * place["width"], place["y"] + 0.75 * place["height"])
    assert position(phone)[:2] != before[:2] and position(phone)[2] == before[2]


def test_every_picture_lets_the_page_scroll(phone, any_widget):
    assert swipe(phone, open_page(phone, any_widget)) > 100


def test_nothing_is_wider_than_a_phone(phone, any_widget):
    open_page(phone, any_widget)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390


def test_forced_colours_leave_swatches_and_choices_their_colours(browser, any_widget):
    context = browser.new_context(forced_colors="active")
    page = context.new_page()
    open_page(page, any_widget)
    told = page.locator(".swatch, .key i, [aria-pressed=true], input:checked + span")
    assert told.count() > 0
    assert set(told.evaluate_all("all => all.map(e => getComputedStyle(e).forcedColorAdjust)")) == {"none"}
    context.close()


def test_controls_are_large_enough(page, any_widget):
    """WCAG 2.2 asks for 24 pixels. A box with a label may be smaller: its label is pressed too."""
    open_page(page, any_widget)
    heights = page.locator("select, button, summary, label, input[type=range]").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().height).filter(h => h > 0)"
    )
    assert min(heights) >= 24
