"""The training scrubber in a page of its own: slider, keys, play and a drag move all pictures and their scores."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_lite.widgets import TrainingScrubber

STEPS = (25, 50, 75, 100, 200, 500)


@pytest.fixture
def scrubber() -> TrainingScrubber:
    """Five networks that find more and more of a disc and a small square, each a little faster than the one before."""
    rows, columns = np.indices((40, 40))
    truth = ((rows - 18) ** 2 + (columns - 16) ** 2 < 120).astype(np.uint8)
    truth[30:33, 30:34] = 2
    reach = np.arange(len(STEPS)) / 5 * np.linspace(0.4, 1, 5)[:, None]
    labels = truth * (rows + columns < 80 * reach[..., None, None]).astype(np.uint8)
    names = ["Jaccard", "cross-entropy", "weighted", "no skips", "one map"]
    return TrainingScrubber(
        truth * 2.0 + rows / 40, truth, labels, STEPS, names, ("background", "metacarpal", "distal"), frame=2
    )


@pytest.fixture
def opened(exported, scrubber):
    return exported(scrubber)


def pictures(page) -> list[str]:
    return page.eval_on_selector_all(".stage canvas", "all => all.map(c => c.toDataURL())")


def check(page, scrubber: TrainingScrubber, frame: int) -> None:
    """Compare the number of updates and the scores of every picture with those of Python."""
    page.wait_for_selector(f"[data-shown='{STEPS[frame]}']")
    scrubber.frame = frame
    assert page.inner_text(".number") == f"after {STEPS[frame]} updates"
    told = page.eval_on_selector_all(
        ".scores", "all => all.map(s => [...s.querySelectorAll('span:nth-child(2)')].map(t => t.textContent))"
    )
    expected = [[f"{100 * d:.0f} %" for d in row] for row in scrubber.dice.to_numpy()]
    assert told == expected


def test_colours_are_those_of_the_labels(opened, scrubber):
    """Read the colour of one voxel of each class in the truth, and of the same voxels where nothing is found yet."""
    read = """(canvas, [row, column]) => { const s = canvas.width / 40, d = canvas.getContext("2d");
        return [...d.getImageData((column + 0.5) * s, (row + 0.5) * s, 1, 1).data].slice(0, 3); }"""
    opened.get_by_label("Opacity of the colours").fill("1")
    for place, (_, _, colour) in zip(([18, 16], [31, 32]), scrubber._scene["classes"]):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert opened.eval_on_selector("[data-view=picture0] canvas", read, place) == rgb
        opened.get_by_role("slider", name="Updates").fill("0")
        red, green, blue = opened.eval_on_selector("[data-view=picture1] canvas", read, place)
        assert red == green == blue  # grey


def test_slider_and_keys_move_all_pictures(opened, scrubber):
    check(opened, scrubber, 2)
    slider = opened.get_by_role("slider", name="Updates")
    for key, frame in (("ArrowRight", 3), ("End", 5), ("ArrowLeft", 4), ("Home", 0)):
        before = pictures(opened)
        slider.press(key)
        check(opened, scrubber, frame)
        after = pictures(opened)
        assert before[0] == after[0] and before[-1] != after[-1]
    assert slider.get_attribute("aria-valuetext") == "after 25 updates"
    assert opened.get_attribute("[data-view=picture2]", "aria-label").startswith(
        "cross-entropy after 25 updates: Dice metacarpal"
    )


def test_a_drag_across_a_picture_is_a_slider(opened, scrubber):
    box = opened.locator("[data-view=picture3]").bounding_box()
    opened.mouse.move(box["x"] + 2, box["y"] + 20)
    opened.mouse.down()
    check(opened, scrubber, 0)
    opened.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 40, steps=3)
    check(opened, scrubber, 3)
    opened.mouse.move(box["x"] + box["width"] + 50, box["y"] + 40, steps=3)
    check(opened, scrubber, 5)
    opened.mouse.up()


def test_play_goes_to_the_end_pauses_and_needs_no_motion(browser, opened, scrubber):
    opened.get_by_role("slider", name="Updates").press("End")
    opened.get_by_role("button", name="Play").click()  # from the last to the first
    opened.wait_for_selector("[data-shown='50']")
    opened.get_by_role("button", name="Pause").click()
    stopped = opened.get_attribute("[data-shown]", "data-shown")
    opened.wait_for_timeout(700)
    assert opened.get_attribute("[data-shown]", "data-shown") == stopped
    opened.keyboard.press("p")
    opened.wait_for_selector("[data-shown='500']")
    assert opened.inner_text("button") == "Play"
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 380, "height": 900}, has_touch=True)
    still = context.new_page()
    still.goto(opened.url)
    still.wait_for_selector("[data-shown='75']")
    still.get_by_role("button", name="Next").tap()
    still.wait_for_selector("[data-shown='100']")
    still.wait_for_timeout(700)
    check(still, scrubber, 3)
    still.locator("[data-view=picture1]").tap(position={"x": 3, "y": 30})
    check(still, scrubber, 0)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
