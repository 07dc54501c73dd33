"""The CRF explorer in a page of its own: the browser runs the CRF itself, and gets what Python gets."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_lite import metrics
from medseg_lite.widgets import CRFExplorer


@pytest.fixture
def explorer(case) -> CRFExplorer:
    """Probabilities of the ball with specks and holes, and a mask that leaves out two corners."""
    rng = np.random.default_rng(1)
    p = np.clip(np.where(case.label > 0, 0.7, 0.2) + 0.25 * rng.normal(size=case.shape), 0, 1).astype(np.float32)
    mask = np.ones(case.shape, bool)
    mask[:6, :7] = mask[-4:, -9:] = False
    image = (case.image - case.image.mean((1, 2, 3), keepdims=True)) / case.image.std((1, 2, 3), keepdims=True)
    return CRFExplorer(case.replace(image=image, mask=mask), np.stack([1 - p, p]), smoothness_weight=0.5, smoothness_sigma=1)


@pytest.fixture
def opened(exported, explorer):
    return exported(explorer)


def foreground(page, shape) -> np.ndarray:
    """Voxels that the last picture shows as kept (violet) or added (light blue), not as removed (purple), read at the middle of each voxel."""
    rows, columns = shape
    width, height, values = page.eval_on_selector(
        "[data-view='3'] canvas", "c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
    )
    pixels = np.uint8(values).reshape(height, width, 4).astype(int)
    v = ((np.arange(rows) + 0.5) * height / rows).astype(int)
    u = ((np.arange(columns) + 0.5) * width / columns).astype(int)
    red, _, blue, _ = np.moveaxis(pixels[np.ix_(v, u)], 2, 0)
    return blue > red + 20


def slider(page, name: str):
    return page.get_by_label(name)


def test_labels_are_those_of_python(opened, explorer):
    settings = {
        "w1, how strong": ("smoothness_weight", 2.0),
        "σα, how far": ("smoothness_sigma", 2.5),
        "w2, how strong": ("appearance_weight", 0.7),
        "σβ, how far": ("appearance_sigma", 3.0),
        "σγ, how different in intensity": ("intensity_sigma", 0.25),
    }
    seen = []
    for label, (name, value) in [(None, (None, None)), *settings.items()]:
        if label:
            slider(opened, label).fill(f"{np.log10(value):.2f}")
            setattr(explorer, name, 10 ** round(np.log10(value), 2))
        wanted = explorer.result
        different = (foreground(opened, wanted.shape) != wanted).sum()
        assert different <= 1, (label, different)  # float32 there may turn a tie
        truth = explorer._cut(explorer._case.label) > 0
        said = opened.inner_text("figure:nth-of-type(4) small")
        assert said.endswith(f"Dice {100 * metrics.dice(wanted, truth):.0f} %"), (label, said)
        seen.append(wanted.sum())
    assert len(set(seen)) > 3  # the parameters do matter here


def test_updates_switches_and_energies_are_those_of_python(opened, explorer):
    def check():
        wanted = explorer.result
        assert (foreground(opened, wanted.shape) != wanted).sum() <= 1
        said = opened.inner_text(".readout").split("network ")[-1]
        for number, energy in zip(said.split(", after the CRF "), explorer.energy.values()):
            assert float(number) == pytest.approx(energy, rel=2e-3, abs=0.6)

    check()
    lines = opened.eval_on_selector("[data-view='2'] canvas", "c => c.toDataURL()")
    for kernel in ("appearance", "smoothness"):
        opened.get_by_label(f"use the {kernel} kernel").uncheck()
        setattr(explorer, kernel, False)
        check()
    assert opened.inner_text("figure:nth-of-type(2) small") == "switched off"
    assert opened.eval_on_selector("[data-view='2'] canvas", "c => c.toDataURL()") != lines  # without lines
    opened.get_by_role("button", name="Reset").click()
    explorer.appearance = explorer.smoothness = True
    updates = opened.get_by_label("mean-field updates")
    updates.fill("0")
    explorer.iterations = 0
    check()
    opened.get_by_role("button", name="One update more").click()
    assert updates.input_value() == "1"
    explorer.iterations = 1
    check()


def test_mark_a_voxel_by_pointer_and_keys(opened, explorer):
    rows, columns = explorer.result.shape
    before = opened.eval_on_selector("[data-view='2'] canvas", "c => c.toDataURL()")
    box = opened.locator("[data-view='0']").bounding_box()
    opened.mouse.click(box["x"] + 5.5 / columns * box["width"], box["y"] + 20.5 / rows * box["height"])
    assert "row 20, column 5" in opened.inner_text(".readout")
    assert opened.eval_on_selector("[data-view='2'] canvas", "c => c.toDataURL()") != before
    for key, place in [
        ("ArrowUp", (19, 5)),
        ("ArrowRight", (19, 6)),
        ("Shift+ArrowDown", (29, 6)),
        ("Shift+ArrowLeft", (29, 0)),
    ]:
        opened.keyboard.press(key)
        assert "row {}, column {}".format(*place) in opened.inner_text(".readout")
    explorer.row, explorer.column = 29, 0
    for number, kernel in zip((2, 3), explorer._kernels()):
        assert opened.inner_text(f"figure:nth-of-type({number}) small") == f"the sum of the weights is {kernel.sum():.0f}"
    # The kernels' pictures show the neighbourhood of the mark; a click in them marks what is seen there.
    stage = opened.locator("[data-view='1']")
    near = stage.bounding_box()
    stage.click(position={"x": 0.5 * near["width"], "y": near["height"] - 1})
    shown = rows / min(min(rows, columns) / 7, 6)  # of the rows, with a standard deviation of one voxel
    assert f"row {int(29.5 + shown / 2 - 0.1)}, column" in opened.inner_text(".readout")
    opened.get_by_label("kernels: near the mark").uncheck()
    stage.click(position={"x": 0.5 / columns * near["width"], "y": 29.5 / rows * near["height"]})
    assert "row 29, column 0" in opened.inner_text(".readout")
    opened.mouse.click(box["x"] + 50, box["y"] + 50, button="right")  # opens a menu, and marks nothing
    assert "row 29, column 0" in opened.inner_text(".readout")


def test_reset_names_and_narrow_notebooks(opened, explorer):
    far = slider(opened, "σα, how far")
    assert far.get_attribute("aria-valuetext") == "1.0 mm, 1.00 voxels"  # the value, not its logarithm
    far.fill("0.5")
    opened.keyboard.press("Tab")
    assert far.get_attribute("aria-valuetext") == "3.2 mm, 3.16 voxels"
    opened.get_by_role("button", name="Reset").click()
    assert far.get_attribute("aria-valuetext") == "1.0 mm, 1.00 voxels"
    assert f"row {explorer.row}, column {explorer.column}" in opened.inner_text(".readout")
    names = opened.eval_on_selector_all("input, .stage", "all => all.map((e) => e.ariaLabel ?? e.labels[0].innerText)")
    assert len(names) == len(set(names)) == 13 and all(names)
    assert "Dice" in names[-1] and "Arrow keys" in names[-1]
    for width, across in ((900, 4), (390, 2)):
        opened.set_viewport_size({"width": width, "height": 900})
        opened.wait_for_timeout(50)
        assert opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert len({round(b["y"]) for b in (opened.locator(f"[data-view='{n}']").bounding_box() for n in range(across))}) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
