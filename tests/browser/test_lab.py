"""The slice viewer in a real JupyterLab: what is done in the browser arrives in Python, and the other way round."""

from __future__ import annotations

import time

import nbformat
import pytest

SETUP = """
import numpy as np
from medseg_lite.volume import Case
from medseg_lite.widgets import SliceViewer
d, h, w = np.indices((32, 36, 28))
ball = ((d - 12) ** 2 + (h - 20) ** 2 + (w - 14) ** 2 < 64).astype(np.uint8)
case = Case(image=np.stack([d + 2 * h + 3 * w + 40 * ball, 5 * h - w]).astype(np.float32),
            channels=("flair", "t1c"), name="ball", label=ball)
"""


@pytest.fixture
def open_notebook(lab, page):
    """Write a notebook of these cells, open it and run all of them."""

    def run(*cells: str, wait: bool = True):
        address, token, folder = lab
        name = f"n{time.time_ns()}"
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c) for c in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
        nbformat.write(notebook, folder / f"{name}.ipynb")
        page.goto(f"{address}/lab/workspaces/{name}/tree/{name}.ipynb?reset&token={token}")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        # "Run All" is dropped without a word until the kernel has connected.
        page.wait_for_function(
            "() => document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')", timeout=60_000
        )
        page.click(".jp-Notebook .jp-CodeCell .jp-InputArea-editor")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        if not wait:
            return page
        page.wait_for_function(
            """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(e => /\\[\\d+\\]/.test(e.innerText))""",
            timeout=60_000,
        )
        return page

    return run


def run_cell(page, number: int) -> str:
    """Run a cell again and return what it prints."""
    cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
    before = cell.locator(".jp-InputPrompt").inner_text()
    cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    page.wait_for_function(
        """([number, before]) => {
            const text = document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')[number].innerText;
            return /\\[\\d+\\]/.test(text) && text !== before; }""",
        arg=[number, before],
    )
    outputs = cell.locator(".jp-OutputArea-output")
    return outputs.last.inner_text().strip() if outputs.count() else ""


def run_until(page, number: int, expected: str) -> str:
    """Run a cell again and again until it prints `expected` at its start.

    While the kernel works on one message of a widget, ipywidgets holds back the next ones. A cell that is run meanwhile overtakes
    them, so what was done in the browser arrives in Python soon, but not always before the next cell.
    """
    end = time.monotonic() + 30
    while not (printed := run_cell(page, number)).startswith(expected):
        assert time.monotonic() < end, f"Python says {printed!r}; expected {expected!r}"
    return printed


def picture(page) -> str:
    return page.eval_on_selector("[data-plane=axial] canvas", "c => c.toDataURL()")


def test_canvas_viewer(open_notebook):
    page = open_notebook(
        SETUP + "viewer = SliceViewer(case)\nviewer",
        "viewer.position = (3, 4, 5)",
        "print(viewer.position, viewer.visible, viewer.channel)",
    )
    page.wait_for_selector("[data-ready]")
    page.wait_for_function("() => document.querySelector('.medseg-slices .readout').innerText.includes('3, 4, 5')")

    first = picture(page)
    page.get_by_label("Axial slice", exact=True).fill("14")
    second = picture(page)
    assert second != first
    page.locator("[data-plane=axial]").focus()
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("1")  # in command mode the notebook would make the cell a heading
    page.get_by_label("truth").uncheck()
    assert picture(page) != second
    page.get_by_role("radio", name="t1c").check()
    page.wait_for_function("() => document.querySelector('.readout').innerText.includes('t1c')")
    assert run_until(page, 2, "(3, 14, 14) () t1c") == "(3, 14, 14) () t1c"
    run_cell(page, 1)
    page.wait_for_function("() => document.querySelector('.readout').innerText.includes('3, 4, 5')")
    assert page.locator(".jp-Notebook .jp-CodeCell").count() == 3


FEATURES = """
import torch
from medseg_lite import models
from medseg_lite.widgets import FeatureExplorer
torch.manual_seed(0)
explorer = FeatureExplorer(models.deepmedic(in_channels=2, classes=3, width=0.2), case)
explorer
"""


def test_feature_explorer(open_notebook):
    """Layers come from the kernel when they are first looked at, once; what is chosen in the browser arrives in Python."""
    page = open_notebook(
        SETUP + FEATURES,
        "explorer.layer = 'normal.0'\nexplorer.position = (3, 4, 5)",
        "print(explorer.layer, explorer.channel, explorer.sort, explorer.bytes_sent)",
    )

    def choose_low7():
        page.locator(".pathway", has_text="low").locator("button").nth(7).click()
        page.wait_for_selector("[data-layer='low.7']")

    page.wait_for_selector(".medseg-features[data-ready] [data-layer='normal.0']")
    page.wait_for_function("() => document.querySelector('.medseg-features .readout').innerText.includes('3, 4, 5')")
    choose_low7()
    page.focus("[data-view=grid0]")
    page.keyboard.press("End")
    page.get_by_label("Sort by").select_option("activity")
    first = run_until(page, 2, "low.7 9 activity ").split()[-1]
    assert int(first) > 0
    run_cell(page, 1)
    page.wait_for_selector("[data-layer='normal.0']")
    choose_low7()
    assert run_until(page, 2, "low.7 ").split()[-1] == first  # the layer was there already


def test_first_layer_while_the_kernel_is_busy(open_notebook):
    """The first layer is there although the kernel, busy with the next cell, answers no message."""
    page = open_notebook(SETUP + FEATURES, "import time\ntime.sleep(20)", wait=False)
    page.wait_for_selector(".medseg-features[data-ready] [data-layer='normal.0']", timeout=50_000)
    assert page.locator(".jp-CodeCell .jp-InputPrompt").nth(1).inner_text().strip() == "[*]:"


def test_reading_past_a_viewer(open_notebook):
    """The wheel scrolls the notebook until the picture is clicked; a right-drag opens no menu."""
    page = open_notebook(
        SETUP + "viewer = SliceViewer(case, position=(3, 4, 5))\nviewer",
        "from IPython.display import HTML\nHTML('<div style=\"height: 3000px\"></div>')",
    )
    page.wait_for_selector("[data-ready]")
    stage = page.locator("[data-plane=axial]")
    scroller = "() => document.querySelector('.jp-WindowedPanel-outer').scrollTop"
    readout = page.locator(".medseg-slices .readout")
    stage.scroll_into_view_if_needed()
    stage.hover()
    top = page.evaluate(scroller)
    page.mouse.wheel(0, 60)
    page.wait_for_function(f"top => ({scroller})() > top", arg=top)
    assert "3, 4, 5" in readout.inner_text()

    place = stage.bounding_box()
    page.mouse.click(place["x"] + 60, place["y"] + 60)
    page.mouse.wheel(0, 120)
    page.wait_for_function("() => document.querySelector('.medseg-slices .readout').innerText.includes(', 4\\n')")
    before = page.locator(".medseg-slices .number").first.inner_text()
    page.mouse.down(button="right")
    page.mouse.move(place["x"] + 90, place["y"] + 90)
    page.mouse.up(button="right")
    page.wait_for_timeout(300)
    assert page.locator(".medseg-slices .number").first.inner_text() != before
    assert page.locator(".lm-Menu").count() == 0


MONITOR = """
import time, torch
from IPython.display import display
from medseg_lite import models
from medseg_lite.widgets import TrainingMonitor
monitor = TrainingMonitor(models.dm2d_seg(in_channels=2, classes=2, width=0.1), case, every=1)
display(monitor)
for step in range(1, 9):
    monitor({"step": step, "loss": 1 / step})
    time.sleep(0.05)  # the view is still being made when the first pictures come
"""


def test_training_monitor(open_notebook):
    """Every picture arrives, also in a view that was not there yet when it was made."""
    page = open_notebook(SETUP + MONITOR, "monitor", "print(monitor.frame, len(monitor._frames))")
    for number in (0, 1):  # displayed before the training, and after it
        view = page.locator(".medseg-monitor").nth(number)
        page.locator(".medseg-monitor[data-shown='8']").nth(number).wait_for()
        slider = view.get_by_label("Picture", exact=True)
        assert slider.get_attribute("max") == "7"
        for frame in (0, 3):
            slider.fill(str(frame))
            page.locator(f".medseg-monitor[data-shown='{frame + 1}']").nth(number).wait_for()
        slider.fill("7")
        page.locator(".medseg-monitor[data-shown='8']").nth(number).wait_for()
    page.locator(".medseg-monitor").first.get_by_label("Picture", exact=True).fill("2")
    assert run_until(page, 2, "2 8") == "2 8"


CRF = """
from medseg_lite.widgets import CRFExplorer
p = np.clip(0.2 + 0.5 * ball + 0.2 * np.random.default_rng(0).normal(size=ball.shape), 0, 1).astype(np.float32)
explorer = CRFExplorer(case, np.stack([1 - p, p]))
explorer
"""


def test_crf_explorer(open_notebook):
    """A slice comes from the kernel when it is chosen; what is done in the browser arrives in Python."""
    page = open_notebook(SETUP + CRF, "explorer.index = 14", "print(explorer.index, explorer.row)")
    page.wait_for_selector(".medseg-crf[data-ready]")
    slider, said = page.get_by_label("Axial slice"), page.locator(".medseg-crf figure:nth-of-type(4) small")
    page.wait_for_function("() => document.querySelector('.medseg-crf [aria-label=\"Axial slice\"]').value === '14'")
    before = said.inner_text()
    slider.fill("8")
    page.wait_for_function("old => document.querySelectorAll('.medseg-crf small')[3].innerText !== old", arg=before)
    page.locator("[data-view='0']").focus()
    for _ in range(40):
        page.keyboard.press("ArrowUp")
    run_until(page, 2, "8 0")
    run_cell(page, 1)
    page.wait_for_function("old => document.querySelectorAll('.medseg-crf small')[3].innerText === old", arg=before)


OPERATING = """
from medseg_lite.widgets import OperatingPoint
p = np.clip(0.2 + 0.5 * ball + 0.2 * np.random.default_rng(0).normal(size=ball.shape), 0, 1).astype(np.float32)
points = OperatingPoint([case, case], {"a": [p, p], "b": [p**2, p**2]}, chosen={"a": 0.31})
points
"""


def test_operating_point(open_notebook):
    """A slider in the browser sets the threshold in Python, and Python moves the slider."""
    page = open_notebook(
        SETUP + OPERATING, "points.thresholds = {'b': 0.75}", "print(points.thresholds, points.case, points.index)"
    )
    page.wait_for_selector(".medseg-operating[data-ready]")
    page.wait_for_function(
        "() => document.querySelectorAll('.medseg-operating figcaption')[1].innerText.includes('above 0.75: ')"
    )
    page.get_by_role("slider", name="Threshold of a").fill("30")
    page.get_by_role("slider", name="Axial slice").fill("9")
    run_until(page, 2, "{'a': 0.18, 'b': 0.75} ball 9")
    page.get_by_label("Case").select_option("ball 2")
    run_until(page, 2, "{'a': 0.18, 'b': 0.75} ball 2 13")
    page.get_by_label("One threshold for all").check()
    run_until(page, 2, "{'a': 0.18, 'b': 0.18} ball 2 13")


BLOCKS = """
import torch
from medseg_lite import models
from medseg_lite.widgets import BlockSwitchboard
torch.manual_seed(0)
board = BlockSwitchboard(models.fc_resnet(in_channels=2, width=0.05), case)
board
"""


def test_a_combination_of_blocks_is_computed_by_the_kernel(open_notebook):
    page = open_notebook(SETUP + BLOCKS, "print(board.off, f'{board.dice:.3f}')")
    page.wait_for_selector("[data-ready]")
    for number in (2, 20, 40):
        page.get_by_role("button", name=f"Block {number},").click()
    page.wait_for_function("() => document.querySelector('.medseg-blocks .note').innerText === 'Blocks 2, 20, 40 are off.'")
    shown = page.locator(".medseg-blocks .readout span").first.inner_text().removeprefix("Dice").strip()
    assert run_until(page, 1, "['down.1.0', 'down.3.7', 'up.1.4']").endswith(shown)
