"""The feature explorer in a page of its own: every interaction changes what it should; nothing piles up."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from medseg_lite import models
from medseg_lite.volume import Case
from medseg_lite.widgets import FeatureExplorer


@pytest.fixture(scope="module")
def explored():
    """An explorer of a small DeepMedic over a small brain."""
    torch.manual_seed(0)
    model = models.deepmedic(in_channels=2, classes=3, width=0.3).eval()
    shape = (36, 42, 30)
    d, h, w = np.indices(shape)
    ball = ((d - 12) ** 2 + (h - 25) ** 2 + (w - 14) ** 2 < 40).astype(np.uint8) * 4
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32) + ball
    case = Case(
        image=image, channels=("flair", "t1c"), name="ball", label=ball, extra={"wm": h / 42.0}, info={"classes": {4: "core"}}
    )
    return FeatureExplorer(model, case, layer="normal.2", compare_layer="")


@pytest.fixture(scope="module")
def file(explored, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    explored.to_html(path, layers=["low.7", "classifier"])
    return path


@pytest.fixture
def opened(page, file):
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("[data-ready]")
    yield page
    assert [r for r in requests if not r.startswith("blob:")] == [file.as_uri()]


def shot(page, view: str) -> str:
    return page.eval_on_selector(f"[data-view={view}] canvas", "c => c.toDataURL()")


def colour(page, view: str, x: float, y: float) -> np.ndarray:
    """RGB of one pixel of a canvas, x and y as shares of its width and height."""
    return np.array(
        page.eval_on_selector(
            f"[data-view={view}] canvas",
            "(c, [x, y]) => [...c.getContext('2d').getImageData(x * c.width, y * c.height, 1, 1).data].slice(0, 3)",
            [x, y],
        )
    )


def readout(page) -> str:
    return page.inner_text(".readout")


def test_opens_with_the_numbers_of_python(opened, explored):
    assert "normal.2 ConvBlock: 12 maps of 36×42×30 voxels" in opened.inner_text(".facts")
    assert "receptive field 7×7×7" in opened.inner_text(".facts")
    maps = explored.maps("normal.2")
    value = float(maps.data[(0, *maps.index(explored.position))])
    said = readout(opened).replace("−", "-").split("channel 0")[1].split()[0]
    assert float(said) == pytest.approx(value, abs=0.02)
    assert "truth\ncore" in readout(opened) or "truthcore" in readout(opened).replace("\n", "")
    assert "0 of 12 channels dead" in opened.inner_text(".counts")
    buttons = opened.locator(".strip button")
    assert buttons.count() == 19 and buttons.nth(10).inner_text().split("\n") == ["2", "12 maps ÷3", "sees 19"]


def test_the_picture_is_the_map_over_the_input(opened, explored):
    """With the map at full opacity, the pixels in the middle of each voxel have the colours of its values."""
    opened.get_by_label("Opacity of the map").fill("1")
    opened.get_by_label("outlines", exact=True).uncheck()
    plane = explored.maps("normal.2").data[0, :, :, explored.position[2]].astype(float)
    values = opened.inner_text(".legend").replace("−", "-").split()
    low, high = float(values[0]), float(values[-1])
    signed = low == -high
    palette = np.array(
        [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in explored._scene["palettes"]["signed" if signed else "sequential"]]
    )
    wanted = palette[np.clip(np.rint((plane - low) / (high - low) * 255), 0, 255).astype(int)]
    for i, j in [(3, 5), (20, 30), (30, 9), (8, 38)]:
        found = colour(opened, "picture0", (36 - i - 0.5) / 36, (42 - j - 0.5) / 42)
        assert np.abs(found - wanted[i, j]).max() <= 12, (i, j)


def test_layer_and_channel(opened):
    before = shot(opened, "grid0"), shot(opened, "picture0")
    opened.locator(".pathway", has_text="low").locator("button").nth(7).click()
    opened.wait_for_selector("[data-layer='low.7']")
    assert "low.7 ConvBlock: 15 maps of 12×14×10 voxels" in opened.inner_text(".facts")
    assert shot(opened, "grid0") != before[0] and shot(opened, "picture0") != before[1]
    opened.locator(".pathway", has_text="low").locator("button").nth(1).click()
    opened.wait_for_function("() => document.querySelector('.facts').innerText.includes('not part of this page')")
    opened.locator("button", has_text="classifier").click()
    opened.wait_for_selector("[data-layer='classifier']")
    before = shot(opened, "picture0")
    opened.locator("[data-view=grid0]").click(position={"x": 230, "y": 60})
    assert "classifier, channel 1" in readout(opened) and shot(opened, "picture0") != before
    opened.focus("[data-view=grid0]")
    for key, channel in [("ArrowRight", 2), ("ArrowRight", 2), ("Home", 0), ("End", 2), ("ArrowLeft", 1)]:
        opened.keyboard.press(key)
        assert f"classifier, channel {channel}" in readout(opened)
    opened.keyboard.press("[")
    opened.wait_for_function("() => document.querySelector('[aria-pressed=true]').innerText.startsWith('1')")


def test_a_layer_with_fewer_channels_than_the_chosen_one(opened):
    """Python corrects the channel in a message of its own, which comes after the layer."""
    opened.locator(".pathway", has_text="low").locator("button").nth(7).click()
    opened.wait_for_selector("[data-layer='low.7']")
    opened.focus("[data-view=grid0]")
    opened.keyboard.press("End")
    opened.wait_for_function("() => document.querySelector('.readout').innerText.includes('channel 14')")
    opened.locator(".strip button", has_text="classifier").click()
    opened.wait_for_selector("[data-layer='classifier']")
    opened.wait_for_function("() => document.querySelector('.readout').innerText.includes('classifier, channel 2')")
    assert "Channel 2: mean" in opened.inner_text(".counts")


def test_sorting_is_that_of_python(opened, explored):
    index = shot(opened, "grid0")
    for sort in ("activity", "selectivity", "correlation"):
        opened.get_by_label("Sort by").select_option(sort)
        explored.sort = sort
        assert shot(opened, "grid0") != index
        opened.focus("[data-view=grid0]")
        opened.keyboard.press("Home")
        for channel in explored.order[:4]:
            assert f"normal.2, channel {channel}" in readout(opened), sort
            opened.keyboard.press("ArrowRight")
    before = shot(opened, "grid0")
    opened.get_by_label("Map of the correlation").select_option("t1c")
    assert shot(opened, "grid0") != before
    explored.sort = "index"


@pytest.mark.parametrize(
    ["label", "value"],
    [("Scale", "layer"), ("Scale", "p1-p99"), ("Colours", "signed"), ("Plane", "coronal"), ("Plane", "sagittal")],
)
def test_scale_colours_and_plane(opened, label, value):
    if value == "signed":
        opened.get_by_label("Colours").select_option("sequential")
    before = shot(opened, "grid0"), shot(opened, "picture0")
    opened.get_by_label(label).select_option(value)
    assert shot(opened, "grid0") != before[0] and shot(opened, "picture0") != before[1]


def test_slice_opacity_outlines_and_sequence(opened):
    opened.get_by_label("Slice", exact=True).fill("20")
    assert readout(opened).replace("\n", "").startswith("voxel") and ", 20" in readout(opened)
    opened.get_by_label("Slice", exact=True).fill("14")
    for act in (
        lambda: opened.get_by_label("Opacity of the map").fill("0.1"),
        lambda: opened.get_by_label("outlines", exact=True).uncheck(),
        lambda: opened.get_by_label("Input", exact=True).select_option("t1c"),
    ):
        before, grid = shot(opened, "picture0"), shot(opened, "grid0")
        act()
        assert shot(opened, "picture0") != before and shot(opened, "grid0") == grid
    opened.focus("[data-view=picture0]")
    before = shot(opened, "picture0")
    opened.keyboard.press("t")
    assert shot(opened, "picture0") != before
    opened.keyboard.press("1")
    assert "flair" in readout(opened)
    opened.keyboard.press("c")
    assert opened.get_by_label("Scale").input_value() == "layer"
    opened.keyboard.press("s")
    assert opened.get_by_label("Sort by").input_value() == "activity"


def test_crosshair_by_keys_and_pointer_and_the_receptive_field(opened, explored):
    opened.focus("[data-view=picture0]")
    d, h, w = explored.position
    for key, place in [
        ("ArrowLeft", (d + 1, h, w)),
        ("Shift+ArrowDown", (d + 1, h - 10, w)),
        ("PageUp", (d + 1, h - 10, w + 1)),
        ("Home", (d + 1, h - 10, 0)),
    ]:
        opened.keyboard.press(key)
        assert ", ".join(map(str, place)) in readout(opened)
    box = opened.locator("[data-view=picture0]").bounding_box()
    opened.mouse.click(box["x"] + (36 - 20 - 0.5) / 36 * box["width"], box["y"] + (42 - 30 - 0.5) / 42 * box["height"])
    assert "20, 30, 0" in readout(opened)
    field = [float(v) for v in opened.get_attribute("[data-view=picture0]", "data-field").split()]
    np.testing.assert_allclose(field, np.array([36 - 24, 42 - 34, 7, 7]) * box["width"] / 36, atol=0.6)
    opened.locator("button", has_text="classifier").click()
    opened.wait_for_selector("[data-layer='classifier']")
    wider = [float(v) for v in opened.get_attribute("[data-view=picture0]", "data-field").split()]
    assert wider[2] == pytest.approx(51 * box["width"] / 36, rel=0.01)


def test_hover_tells_the_value(opened, explored):
    maps, (d, h, w) = explored.maps("normal.2"), explored.position
    box = opened.locator("[data-view=picture0]").bounding_box()
    opened.mouse.move(box["x"] + (36 - 9 - 0.5) / 36 * box["width"], box["y"] + (42 - 12 - 0.5) / 42 * box["height"])
    assert f"9, 12, {w}" in readout(opened)
    said = float(readout(opened).replace("−", "-").split("channel 0")[1].split()[0])
    assert said == pytest.approx(float(maps.data[0, 9, 12, w]), abs=0.02)
    opened.hover("[data-view=grid0]", position={"x": 150, "y": 50})
    assert "normal.2, channel 1" in readout(opened)
    opened.mouse.move(2, 2)
    assert f"{d}, {h}, {w}" in readout(opened) and "channel 0" in readout(opened)


def test_the_chosen_channel_stays_in_sight(opened, explored):
    """Sorting and keys scroll the channels to the one that is chosen."""
    opened.locator(".tiles").evaluate("box => { box.style.maxHeight = '130px'; }")
    top = "box => box.scrollTop"
    opened.focus("[data-view=grid0]")
    opened.keyboard.press("End")
    assert opened.locator(".tiles").evaluate(top) > 0
    opened.keyboard.press("Home")
    assert opened.locator(".tiles").evaluate(top) == 0
    explored.sort = "activity"
    last = explored.order[-1]
    explored.sort = "index"
    for _ in range(last):
        opened.keyboard.press("ArrowRight")
    opened.get_by_label("Sort by").select_option("activity")
    assert opened.locator(".tiles").evaluate(top) > 0


def test_pages_say_that_voxels_are_left_out(page, explored, tmp_path):
    explored.to_html(tmp_path / "f.html", megabytes=0.3)
    page.goto((tmp_path / "f.html").as_uri())
    page.wait_for_selector("[data-ready]")
    assert re.search(r"voxels, one voxel of \d+ kept", page.inner_text(".facts"))


def test_brain_only(page, explored, tmp_path):
    """Without the rest, tiles are transparent outside the mask."""
    case = explored._case
    mask = np.zeros(case.shape, bool)
    mask[4:30, 6:36] = True
    FeatureExplorer(explored._models[0], case.replace(mask=mask), region=tuple(slice(0, n) for n in case.shape)).to_html(
        tmp_path / "f.html", megabytes=20
    )
    page.goto((tmp_path / "f.html").as_uri())
    page.wait_for_selector("[data-ready]")
    corner = "c => c.getContext('2d').getImageData(1, 15, 1, 1).data[3]"
    tiles = page.locator("[data-view=grid0] canvas")
    page.focus("[data-view=grid0]")
    page.keyboard.press("End")  # the frame of the chosen channel is elsewhere
    assert page.get_by_label("brain only").is_checked() and tiles.evaluate(corner) == 0
    page.get_by_label("brain only").uncheck()
    assert tiles.evaluate(corner) == 255
    page.keyboard.press("b")
    assert tiles.evaluate(corner) == 0


def test_export(opened):
    with opened.expect_download() as download:
        opened.get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename == "normal.2-0.png"
    assert download.value.path().read_bytes()[:4] == b"\x89PNG"


def test_nothing_piles_up_over_500_steps(opened):
    """Memory and elements after 500 slices, against those after 50."""
    session = opened.context.new_cdp_session(opened)
    session.send("HeapProfiler.enable")

    def steps(count):
        opened.evaluate(
            """async count => { const s = document.querySelector('[aria-label=Slice]');
                for (let i = 0; i < count; i++) { s.value = i % 30; s.dispatchEvent(new Event('input'));
                    if (i % 10 === 0) await new Promise(requestAnimationFrame); } }""",
            count,
        )
        session.send("HeapProfiler.collectGarbage")
        heap = session.send("Runtime.getHeapUsage")
        return heap["usedSize"] + heap.get("backingStorageSize", 0), opened.locator("*").count()

    before, elements = steps(50)
    after, more = steps(500)
    assert more == elements and after - before < 4e6, (before, after)


def test_two_layers_side_by_side(page, explored, tmp_path):
    model, case = explored._models[0], explored._case
    FeatureExplorer(model, case, layer="normal.7", compare="low.7").to_html(tmp_path / "pair.html")
    page.goto((tmp_path / "pair.html").as_uri())
    page.wait_for_selector("[data-ready]")
    assert page.locator(".panel").count() == 2
    assert "normal.7, channel 0" in readout(page) and "low.7, channel 0" in readout(page)
    before = shot(page, "picture0"), shot(page, "picture1")
    page.focus("[data-view=grid1]")
    page.keyboard.press("ArrowRight")
    assert "low.7, channel 1" in readout(page)
    assert shot(page, "picture0") == before[0] and shot(page, "picture1") != before[1]
    page.focus("[data-view=picture1]")
    page.keyboard.press("PageUp")
    assert shot(page, "picture0") != before[0]


def test_hostile_names_stay_text(page, explored, tmp_path):
    nasty = "</script><img src=x onerror='window.hacked = 1'>"
    case = explored._case.replace(name=nasty, channels=(nasty, "t1c"), info={"classes": {4: nasty}})
    FeatureExplorer(explored._models[0], case, maps={nasty: case.image[0]}).to_html(tmp_path / "n.html")
    page.goto((tmp_path / "n.html").as_uri())
    page.wait_for_selector("[data-ready]")
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0


def test_every_control_has_a_name_and_fits_narrow_notebooks(opened):
    unnamed = opened.evaluate(
        """() => [...document.querySelectorAll('input, button, select, [tabindex]')]
            .filter(e => !(e.ariaLabel || e.labels?.[0]?.innerText.trim() || e.innerText?.trim())).map(e => e.outerHTML)"""
    )
    assert not unnamed
    for width in (900, 640, 380):
        opened.set_viewport_size({"width": width, "height": 900})
        opened.wait_for_timeout(50)
        overflow = opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, width
