"""The slice viewer in a page of its own: no kernel, no network."""

from __future__ import annotations

import re

import numpy as np
import pytest

from medseg_lite import plotting
from medseg_lite.widgets import SliceViewer


@pytest.fixture
def viewer(case):
    prediction = np.roll(case.label, 3, axis=0)
    return SliceViewer(case, {"prediction": prediction}, position=(15, 28, 15))


@pytest.fixture
def opened(exported, viewer):
    return exported(viewer)


def pixels(page, plane: str) -> np.ndarray:
    """RGB (rows, columns, 3) of one plane's canvas, one pixel per voxel."""
    width, height, values = page.eval_on_selector(
        f"[data-plane={plane}] canvas",
        "c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]",
    )
    return np.uint8(values).reshape(height, width, 4)[..., :3]


def expected(viewer, name: str) -> np.ndarray:
    """The same plane painted with numpy. Outlines lie on a canvas of their own."""
    plane = plotting.find_plane(name)
    index = viewer.position[plane.cut]
    case = viewer._case
    layers = [o._replace(array=plotting.cut(o.array, plane, index)) for o in viewer._overlays if o.name in viewer.visible]
    layers = [o for o in layers if o.style in ("area", "probability")]
    image = case.image[case.channels.index(viewer.channel)]
    return plotting.paint(plotting.cut(image, plane, index), viewer.window, layers, viewer.opacity, viewer._classes)


def assert_shows(page, viewer):
    """All planes agree with numpy within two grey levels: one of quantisation, one of blending."""
    for name in ("axial", "coronal", "sagittal"):
        found, wanted = pixels(page, name), expected(viewer, name)
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted).max() <= 2, name


def readout(page) -> str:
    return page.inner_text(".readout")


def test_opens_as_numpy_paints_it(opened, viewer):
    assert_shows(opened, viewer)
    assert re.search(r"voxel\s*15, 28, 15.*truth\s*4 core.*prediction\s*1 shell", readout(opened), re.S)
    assert [e.inner_text() for e in opened.query_selector_all("[data-plane=axial] b")] == list("RLAP")


def test_shape_on_screen_follows_the_spacing(opened):
    box = opened.locator("[data-plane=coronal]").bounding_box()
    assert box["height"] / box["width"] == pytest.approx(32 * 3 / 40, rel=0.02)


def test_keys(opened, viewer):
    opened.focus("[data-plane=axial]")
    for key, position in [
        ("PageUp", (15, 28, 16)),
        ("PageDown", (15, 28, 15)),
        ("Shift+PageUp", (15, 28, 25)),
        ("End", (15, 28, 31)),
        ("PageUp", (15, 28, 31)),  # there is no further slice
        ("Home", (15, 28, 0)),
        ("ArrowLeft", (16, 28, 0)),  # towards the patient's right
        ("ArrowRight", (15, 28, 0)),
        ("ArrowUp", (15, 29, 0)),
        ("Shift+ArrowDown", (15, 19, 0)),
    ]:
        opened.keyboard.press(key)
        viewer.position = position
        assert_shows(opened, viewer)
        assert "voxel" in readout(opened) and ", ".join(map(str, position)) in readout(opened)


def test_wheel_slider_click_and_drag(opened, viewer):
    opened.focus("[data-plane=sagittal]")
    opened.hover("[data-plane=sagittal]")
    opened.mouse.wheel(0, 120)
    viewer.position = (14, 28, 15)
    assert_shows(opened, viewer)

    opened.get_by_label("Coronal slice", exact=True).fill("40")
    viewer.position = (14, 40, 15)
    assert_shows(opened, viewer)

    box = opened.locator("[data-plane=axial]").bounding_box()

    def point(d, h):
        return box["x"] + (40 - d - 0.5) / 40 * box["width"], box["y"] + (48 - h - 0.5) / 48 * box["height"]

    opened.mouse.click(*point(30, 12))
    viewer.position = (30, 12, 15)
    assert_shows(opened, viewer)
    opened.mouse.down()
    opened.mouse.move(*point(22, 20))
    opened.mouse.move(box["x"] - 50, box["y"] - 50)  # beyond the edge it stays at the last voxel
    opened.mouse.up()
    viewer.position = (39, 47, 15)
    assert_shows(opened, viewer)


def test_overlays_opacity_sequence_and_window(opened, viewer):
    opened.get_by_label("prediction").uncheck()
    viewer.visible = ("truth",)
    assert_shows(opened, viewer)
    opened.get_by_label("Opacity of the overlays").fill("0.8")
    viewer.opacity = 0.8
    assert_shows(opened, viewer)
    opened.keyboard.press("o")
    viewer.visible = ()
    assert_shows(opened, viewer)
    opened.keyboard.press("o")
    viewer.visible = ("truth", "prediction")
    assert_shows(opened, viewer)

    opened.get_by_role("radio", name="t1c").check()
    opened.wait_for_function("() => document.querySelector('.readout').innerText.includes('t1c')")
    viewer.channel = "t1c"
    assert_shows(opened, viewer)
    opened.get_by_label("shown as white").fill("120")
    viewer.window = (viewer.window[0], 120)
    assert_shows(opened, viewer)
    opened.focus("[data-plane=axial]")
    opened.keyboard.press("1")
    opened.wait_for_function("() => document.querySelector('.readout').innerText.includes('flair')")
    viewer.channel = "flair"
    assert_shows(opened, viewer)


def test_right_drag_sets_the_window_and_reset_undoes_it(opened, viewer):
    before = pixels(opened, "axial")
    opened.evaluate("document.addEventListener('contextmenu', () => { window.menu = true; })")
    opened.hover("[data-plane=axial]")
    opened.mouse.down(button="right")
    opened.mouse.move(400, 400)
    opened.mouse.up(button="right")
    assert (pixels(opened, "axial") != before).any()
    assert not opened.evaluate("window.menu")  # JupyterLab's own menu opens from the document
    opened.get_by_role("button", name="Reset").click()
    assert_shows(opened, viewer)


def test_dashed_lines_and_probabilities(page, case, tmp_path):
    rng = np.random.default_rng(1)
    overlays = {name: np.roll(case.label, k, axis=1) for k, name in enumerate(("first", "second", "third"))}
    overlays["risk"] = rng.random(case.shape)
    viewer = SliceViewer(case.replace(label=None), overlays, opacity=0.3)
    viewer.to_html(tmp_path / "v.html")
    page.goto((tmp_path / "v.html").as_uri())
    page.wait_for_selector("[data-ready]")
    for shown in [("first",), ("second",), ("third",), ("risk",), ("first", "risk")]:
        for name in overlays:
            page.get_by_label(name).set_checked(name in shown)
        viewer.visible = shown
        assert_shows(page, viewer)


def outline(page) -> np.ndarray:
    """RGBA (rows, columns, 4) of the axial outlines, as sharp as the screen."""
    width, height, values = page.eval_on_selector(
        "[data-plane=axial] .lines",
        "c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]",
    )
    return np.uint8(values).reshape(height, width, 4)


def test_outlines_lie_on_the_edges_of_voxels(page, tmp_path):
    block = np.zeros((20, 24, 3), np.uint8)
    block[5:15, 4:12] = 1
    viewer = SliceViewer(np.zeros(block.shape), {"first": block, "second": block}, visible=["first"], opacity=1)
    viewer.to_html(tmp_path / "v.html")
    page.goto((tmp_path / "v.html").as_uri())
    page.wait_for_selector("[data-ready]")
    drawn = outline(page)
    scale = drawn.shape[1] / 20, drawn.shape[0] / 24
    wanted = plotting.rgb(viewer._overlays[0].colour)
    rows, columns = np.nonzero(np.abs(drawn[..., :3].astype(int) - wanted).max(axis=2) < 30)
    assert rows.min() == pytest.approx(12 * scale[1], abs=1.5) and rows.max() == pytest.approx(20 * scale[1], abs=1.5)
    assert columns.min() == pytest.approx(5 * scale[0], abs=1.5) and columns.max() == pytest.approx(15 * scale[0], abs=1.5)
    whole = len(rows)
    page.get_by_label("first").uncheck()
    assert not outline(page).any()
    page.get_by_label("second").check()  # dashed, in another colour
    wanted = plotting.rgb(viewer._overlays[1].colour)
    assert 0.4 * whole < (np.abs(outline(page)[..., :3].astype(int) - wanted).max(axis=2) < 30).sum() < 0.8 * whole


def test_the_key_lists_what_is_visible(opened):
    key = opened.locator(".key")
    assert key.inner_text().split() == ["shell", "core"]
    assert "linear-gradient" in opened.locator(".boxes .swatch").first.get_attribute("style")
    opened.get_by_label("truth").uncheck()
    assert not key.is_visible()


def test_a_single_picture_shows_one_plane(page, tmp_path):
    picture = np.arange(600, dtype=np.float32).reshape(20, 30, 1)
    SliceViewer(picture, letters=False).to_html(tmp_path / "v.html")
    page.goto((tmp_path / "v.html").as_uri())
    page.wait_for_selector("[data-ready]")
    assert page.locator(".stage").count() == 1
    assert page.locator("[data-plane=axial] b").count() == 0
    assert not page.get_by_text("Overlays", exact=True).is_visible()


def test_hostile_names_stay_text(page, case, tmp_path):
    nasty = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    hostile = case.replace(name=nasty, channels=(nasty, "t1c"), info={"classes": {1: nasty, 4: "{{core}} %s \u2028"}})
    SliceViewer(hostile, {nasty: case.label}).to_html(tmp_path / "v.html")
    page.goto((tmp_path / "v.html").as_uri())
    page.wait_for_selector("[data-ready]")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert nasty in page.inner_text("h1") and nasty in page.inner_text(".key") and nasty in page.inner_text(".toolbar")


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(opened):
    unnamed = opened.evaluate(
        """() => [...document.querySelectorAll('input, button, [tabindex]')]
            .filter(e => !(e.ariaLabel || e.labels?.[0]?.innerText.trim() || e.innerText?.trim())).map(e => e.outerHTML)"""
    )
    assert not unnamed
    reached = []
    for _ in range(30):
        opened.keyboard.press("Tab")
        reached.append(opened.evaluate("document.activeElement.ariaLabel ?? document.activeElement.type ?? ''"))
    for name in ("Axial slice", "Sagittal slice", "Opacity of the overlays", "checkbox", "radio"):
        assert any(r.startswith(name) for r in reached), (name, reached)
    assert any("Arrow keys" in r for r in reached)


def test_fits_narrow_notebooks(opened):
    for width in (900, 640, 380):
        opened.set_viewport_size({"width": width, "height": 900})
        overflow = opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, width
