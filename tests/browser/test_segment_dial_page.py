"""The segment dial in a page of its own: its numbers are Python's, and segment, sliders and keys move together."""

from __future__ import annotations

import pytest

from medseg_lite.widgets import SegmentDial


@pytest.fixture
def dial(case) -> SegmentDial:
    return SegmentDial(case, centre=(18, 24, 16))


@pytest.fixture
def opened(exported, dial):
    return exported(dial)


def picture(page) -> str:
    return page.eval_on_selector("[data-view=segment] canvas", "c => c.toDataURL()")


def slider(page, name: str):
    return page.get_by_role("slider", name=name)


def short(number: float) -> str:
    """Return a number with three digits at most, as the scripts write it."""
    return f"{float(f'{number:.3g}'):g}"


def expected(dial: SegmentDial) -> list[str]:
    """Return the texts beside the slice, from the numbers in Python."""
    n = dial.numbers
    count = round(n["share"] * n["predicted"])
    return [
        f"sees\n{n['seen']}³ voxels, {n['seen']} mm a side",
        f"predicts, V\n{n['predicted']} voxels",
        f"a voxel costs\n{short(n['multiplications'] / 1e6)} million multiplications, {short(n['cheaper'])} times less than a patch",
        f"lesion here\n{count} of {n['predicted']}, {100 * n['share']:.1f} %",
        f"lesion, mean over all segments centred on it\n{100 * n['mean share']:.1f} %",
    ]


def told(page) -> list[str]:
    return page.locator(".readout span").all_inner_texts()


def test_numbers_are_those_of_python(opened, dial):
    assert told(opened) == expected(dial)
    for output, radius in ((1, 12), (3, 2), (13, 5), (29, 1)):
        slider(opened, "side of the output").fill(str(output))
        slider(opened, "radius of the lesion").fill(str(radius))
        dial.output, dial.radius = output, radius
        assert told(opened) == expected(dial)
    assert slider(opened, "side of the output").get_attribute("aria-valuetext") == "29³ predicted, segment 45³"


def test_keys_move_the_segment_and_the_button_brings_it_back(opened, dial):
    opened.focus("[data-view=segment]")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "PageUp"):
        before = picture(opened)
        opened.keyboard.press(key)
        assert picture(opened) != before
    dial.position = (16, 25, 17)  # right in the picture is left in the array
    assert told(opened) == expected(dial)
    opened.get_by_role("button", name="Centre on the lesion").click()
    dial.position = (18, 24, 16)
    assert told(opened) == expected(dial)


def test_the_segment_is_dragged(opened, dial):
    box = opened.locator("[data-view=segment]").bounding_box()
    start, shape = dial._scene["start"], dial._scene["shape"]

    def middle(x, y):  # of a voxel, in the page
        u, v = (shape[0] - (x - start[0]) - 0.5) / shape[0], (shape[1] - (y - start[1]) - 0.5) / shape[1]
        return box["x"] + u * box["width"], box["y"] + v * box["height"]

    opened.mouse.move(*middle(18, 24))
    opened.mouse.down()
    opened.mouse.move(*middle(21, 22), steps=3)
    opened.mouse.up()
    dial.position = (21, 22, 16)
    assert told(opened) == expected(dial)


def test_what_is_predicted_is_coloured(opened, dial):
    """Count pixels in the colours of the predicted voxels: no lesion far from the ball, and no background in a patch on it."""
    count = """c => { const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data; let violet = 0, pink = 0;
        for (let i = 0; i < d.length; i += 4) { violet += d[i + 2] > d[i] + 25 && d[i + 2] > d[i + 1] + 25; pink += d[i] > d[i + 2] + 25; }
        return [violet > 20, pink > 20]; }"""
    kinds = []
    for output, moves in ((1, 0), (13, 0), (3, 1)):
        slider(opened, "side of the output").fill(str(output))
        opened.focus("[data-view=segment]")
        for _ in range(moves):
            opened.keyboard.press("Shift+ArrowLeft")
        kinds.append(opened.eval_on_selector("[data-view=segment] canvas", count))
    assert kinds == [[True, False], [True, True], [False, True]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
