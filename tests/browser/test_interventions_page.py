"""Interventions of the feature explorer in Chromium: with a kernel that answers, and in a page of its own."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from medseg_lite import models
from medseg_lite.volume import Case
from medseg_lite.widgets import FeatureExplorer

STATE = ("layer", "channel", "position", "plane", "changes", "untrained", "path")
ASK = """send(content) {
    window.kernel(content, Object.fromEntries(%r.map((key) => [key, state[key]]))).then(([about, buffers]) => {
      for (const listener of listeners["msg:custom"]) listener(about, buffers.map((b) => Uint8Array.from(atob(b), (c) => c.charCodeAt(0))));
    });
  },"""


@pytest.fixture(scope="module")
def explored() -> FeatureExplorer:
    torch.manual_seed(0)
    model = models.deepmedic(in_channels=2, classes=5, width=0.3).eval()
    shape = (36, 42, 30)
    d, h, w = np.indices(shape)
    distance = (d - 12) ** 2 + (h - 25) ** 2 + (w - 14) ** 2
    label = (distance < 80).astype(np.uint8) + 3 * (distance < 30).astype(np.uint8)
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32) + label
    mask = ((d - 18) / 17) ** 2 + ((h - 21) / 20) ** 2 + ((w - 15) / 15) ** 2 < 1
    names = {1: "shell <b>", 2: "two", 3: "three", 4: "core"}
    case = Case(image=image, channels=("flair", "t1c"), name="ball", label=label, mask=mask, info={"classes": names})
    return FeatureExplorer(model, case, layer="normal.2")


@pytest.fixture(autouse=True)
def fresh(explored):
    explored.layer, explored.channel, explored.untrained, explored.path = "normal.2", 0, False, False
    explored.restore()


@pytest.fixture
def opened(exported, explored):
    return exported(explored)


@pytest.fixture
def live(page, explored, tmp_path):
    """The widget with a kernel: what it asks for, Python answers, with the state of the page."""

    def kernel(content, state):
        found = []
        for name, value in state.items():
            setattr(explored, name, value)
        explored.send = lambda about, buffers: found.append((about, [base64.b64encode(b).decode() for b in buffers]))
        explored._on_message(explored, content, [])
        return found[0]

    page.expose_function("kernel", kernel)
    text = explored._write_page(None, None, _maps={"0/normal.2": explored._pack_layer("0/normal.2")})
    (tmp_path / "live.html").write_text(text.replace("send() {},", ASK % list(STATE)), encoding="utf-8")
    page.goto((tmp_path / "live.html").as_uri())
    page.wait_for_selector("[data-ready]")
    return page


def shots(page) -> list[str]:
    page.wait_for_timeout(80)
    return page.eval_on_selector_all(".results canvas", "all => all.map(c => c.toDataURL())")


def settled(page) -> None:
    page.wait_for_selector(".results[data-waiting=false]")


def note(page) -> str:
    return page.locator(".results .note").inner_text()


def dice(page) -> list[list[str]]:
    return page.eval_on_selector_all(".results tbody tr", "all => all.map(r => [...r.children].map(c => c.textContent))")


def expected(explored) -> list[list[str]]:
    return [
        [name, *("–" if np.isnan(v) else f"{v:.2f}".replace("-", "−") for v in row)]
        for name, row in zip(explored.effect.index, explored.effect.to_numpy())
    ]


def silence(page):
    return page.locator(".intervene button").first


def test_silence_scale_and_reset(live, explored):
    assert live.locator(".results").is_hidden() and silence(live).inner_text() == "Silence channel 0"
    assert live.get_by_role("button", name="Reset").is_disabled()
    silence(live).click()
    settled(live)
    assert explored.changes == [["normal.2", 0, 0.0]] and note(live) == "normal.2, channel 0 × 0."
    assert dice(live) == expected(explored) and dice(live)[0][0] == "shell <b>"
    first = shots(live)
    assert first[0] != first[1] and silence(live).get_attribute("aria-pressed") == "true"
    live.get_by_label("Factor of the channel").fill("1.5")
    settled(live)
    assert (
        explored.changes == [["normal.2", 0, 1.5]]
        and note(live) == "normal.2, channel 0 × 1.5."
        and dice(live) == expected(explored)
    )
    assert shots(live)[0] == first[0] and shots(live)[1] != first[1]
    live.focus("[data-view=grid0]")
    live.keyboard.press("ArrowRight")
    live.keyboard.press("x")
    settled(live)
    assert explored.changes == [["normal.2", 0, 1.5], ["normal.2", 1, 0.0]] and dice(live) == expected(explored)
    assert note(live) == "normal.2, channel 0 × 1.5; normal.2, channel 1 × 0."
    live.get_by_role("button", name="Reset").click()
    assert live.locator(".results").is_hidden() and silence(live).get_attribute("aria-pressed") == "false"


def test_the_prediction_follows_slice_and_plane(live, explored):
    silence(live).click()
    settled(live)
    before, rows = shots(live), dice(live)
    live.focus("[data-view=picture0]")
    live.keyboard.press("Shift+PageUp")
    settled(live)
    assert shots(live)[0] != before[0] and dice(live) == expected(explored) != rows
    live.get_by_label("Plane").select_option("sagittal")
    settled(live)
    assert explored.plane == "sagittal" and dice(live) == expected(explored)
    explored.plane = "axial"


def test_the_outlines_are_those_of_the_prediction(live, explored):
    """A click into a voxel that is predicted otherwise finds pink there, and elsewhere not."""
    silence(live).click()
    settled(live)
    live.get_by_label("outlines", exact=True).uncheck()
    shots(live)
    before, after = explored._predict([])[0][:, :, 0], explored.prediction[:, :, 0]
    differs = before != after
    inner = [np.roll(differs, by, axis) for axis in (0, 1) for by in (-1, 1)]
    colours = {}
    for name, where in (("yes", differs), ("no", ~differs & np.logical_and.reduce([~i for i in inner]))):
        i, j = np.argwhere(where)[len(np.argwhere(where)) // 2]
        u, v = 1 - (i + 0.5) / differs.shape[0], 1 - (j + 0.5) / differs.shape[1]
        colours[name] = [
            live.eval_on_selector(
                f"[data-view={view}] canvas",
                "(c, [u, v]) => [...c.getContext('2d').getImageData(u * c.width, v * c.height, 1, 1).data]",
                [u, v],
            )
            for view in ("before", "after")
        ]
    r, g, b, _ = colours["yes"][1]
    assert colours["yes"][0] != colours["yes"][1] and g < min(r, b) - 30
    assert colours["no"][0] == colours["no"][1]


def test_path(live, explored):
    path = live.get_by_role("button", name="Fed by")
    live.locator("[data-view=grid0]").click(position={"x": 150, "y": 50})
    live.keyboard.press("p")
    links = live.locator(".links button")
    links.first.wait_for()
    found = explored.fed_by(1)
    assert path.get_attribute("aria-pressed") == "true"
    assert links.all_inner_texts() == [f"{layer}, channel {c}" for layer, c, _ in found]
    links.first.click()
    live.wait_for_selector("[data-layer='normal.1']")
    live.get_by_role("button", name=f"Silence channel {found[0][1]}").wait_for()
    live.wait_for_function("() => document.querySelector('.links').innerText.includes('normal.0')")
    links.first.click()
    live.wait_for_selector("[data-layer='normal.0']")
    live.wait_for_function("() => document.querySelector('.links').innerText.includes('input')")
    links.filter(has_text="t1c").click()
    assert live.get_by_label("Input", exact=True).input_value() == "t1c"


def test_untrained_twin(live, explored):
    twin, grid = live.get_by_role("button", name="Untrained twin"), "[data-view=grid0] canvas"
    before = live.eval_on_selector(grid, "c => c.toDataURL()")
    twin.click()
    live.wait_for_function("() => document.querySelector('.facts').innerText.includes('of the untrained twin')")
    assert twin.get_attribute("aria-pressed") == "true" and explored.untrained
    live.keyboard.press("u")
    live.wait_for_function("() => !document.querySelector('.facts').innerText.includes('untrained')")
    assert live.eval_on_selector(grid, "c => c.toDataURL()") == before


def test_a_page_without_a_kernel_has_single_maps_of_its_layer(opened, explored):
    assert opened.get_by_role("button", name="Untrained twin").is_hidden()
    silence(opened).click()
    settled(opened)
    explored.silence(0)
    assert dice(opened) == expected(explored) and note(opened) == "normal.2, channel 0 × 0."
    opened.focus("[data-view=grid0]")
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("x")
    assert "This needs a running kernel: open the notebook." in note(opened)
    assert [row[2:] for row in dice(opened)] == [["–", "–"]] * 2
    opened.keyboard.press("r")
    opened.keyboard.press("x")
    settled(opened)
    explored.changes = [["normal.2", 1, 0]]
    assert dice(opened) == expected(explored)
    opened.keyboard.press("p")
    assert opened.locator(".links button").all_inner_texts() == [f"{layer}, channel {c}" for layer, c, _ in explored.fed_by(1)]


def test_a_page_without_room_says_that_it_needs_a_kernel(page, explored, tmp_path):
    explored.to_html(tmp_path / "f.html", megabytes=0.02)
    page.goto((tmp_path / "f.html").as_uri())
    page.wait_for_selector("[data-ready]")
    silence(page).click()
    assert note(page) == "normal.2, channel 0 × 0. Silencing needs a running kernel: open the notebook."


def test_a_tap_silences(on_a_phone, explored, tmp_path):
    explored.to_html(tmp_path / "f.html")
    page = on_a_phone(tmp_path / "f.html")
    sizes = page.locator(".intervene button:visible, .intervene input").evaluate_all(
        "all => all.map(b => b.getBoundingClientRect()).flatMap(r => [r.width, r.height])"
    )
    assert min(sizes) >= 24
    silence(page).tap()
    settled(page)
    assert dice(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    opened.keyboard.press("Tab")
    silence(opened).click()
    opened.get_by_role("button", name="Fed by").click()
    settled(opened)
    check_layout(opened, scheme)
