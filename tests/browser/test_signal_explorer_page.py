"""Signal, gradient and first update in a page of its own."""

from __future__ import annotations

import pytest
import torch

from medseg_lite.widgets import SignalExplorer


@pytest.fixture(scope="module")
def widget() -> SignalExplorer:
    generator = torch.Generator().manual_seed(0)
    segments = torch.randn(1, 2, 26, 26, 26, generator=generator)
    return SignalExplorer(segments, torch.randint(0, 2, (1, 2, 2, 2), generator=generator))


@pytest.fixture
def opened(exported, widget):
    return exported(widget)


def shots(page) -> list[str]:
    return page.eval_on_selector_all("[data-view] canvas", "all => all.map(c => c.toDataURL())")


def told(page) -> list[float]:
    """Return the four numbers of the layer."""
    texts = page.eval_on_selector_all(".readout span", "all => all.map(s => s.lastChild.textContent)")[:4]
    return [float(t.replace("−", "-")) for t in texts]


def test_numbers_are_those_of_python(opened, widget):
    settings = [{}, {"start": "He"}, {"depth": 12, "layer": 12}, {"normalise": True, "slope": 1.0}, {"epsilon": 1e-16}]
    for change in settings:
        for name, value in change.items():
            setattr(widget, name, value)
        opened.get_by_label("Start").select_option(widget.start)
        opened.get_by_label("Slope").select_option(f"{widget.slope:g}")
        opened.get_by_label("Layers").select_option(str(widget.depth))
        opened.get_by_label("Normalisation").select_option("batch normalisation" if widget.normalise else "none")
        opened.get_by_role("slider", name="Epsilon").fill("1" if widget.epsilon == 1e-16 else "5")
        opened.get_by_role("slider", name="Layer").fill(str(widget.layer))
        assert told(opened) == pytest.approx(widget.table.loc[widget.layer].tolist(), rel=0.06)
    widget.start, widget.depth, widget.normalise, widget.slope, widget.epsilon = "N(0, 0.01)", 8, False, 0.01, 1e-4
    widget.layer = 1


def test_each_control_moves_its_curves(opened):
    before = shots(opened)
    opened.get_by_role("slider", name="Epsilon").fill("1")
    after = shots(opened)
    assert [a == b for a, b in zip(after, before)] == [True, True, False]
    opened.get_by_label("Normalisation").select_option("batch normalisation")
    assert all(a != b for a, b in zip(shots(opened), after))
    text = opened.locator("[data-view=update]").get_attribute("aria-label")
    assert text.startswith("first update: update ") and text.endswith("in layer 8")


def test_keys_and_the_curves_choose_the_layer(opened):
    layer = opened.get_by_role("slider", name="Layer")
    layer.focus()
    opened.keyboard.press("ArrowRight")
    assert layer.input_value() == "2"
    box = opened.locator("[data-view=gradient]").bounding_box()
    opened.mouse.click(box["x"] + box["width"] - 12, box["y"] + 60)
    assert layer.input_value() == "8"
    opened.get_by_label("Layers").select_option("4")
    assert layer.input_value() == layer.get_attribute("max") == "4"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    check_layout(opened, scheme)
