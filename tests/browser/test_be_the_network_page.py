"""The game of two views in a page of its own: a whole round by mouse, by keys and by touch; both themes and narrow pages."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_lite.volume import Case
from medseg_lite.widgets import BeTheNetwork


@pytest.fixture(scope="module")
def widget() -> BeTheNetwork:
    """Two bright balls, of which one is the lesion."""
    d, h, w = np.indices((40, 36, 12))
    ball, other = ((d - a) ** 2 + (h - b) ** 2 + (2 * (w - 6)) ** 2 < 40 for a, b in ((10, 12), (28, 24)))
    image = np.stack([100 + 80 * (ball | other) + np.random.default_rng(0).normal(0, 3, ball.shape)]).astype(np.float32)
    return BeTheNetwork(Case(image=image, channels=("flair",), name="balls", label=ball.astype(np.uint8)))


@pytest.fixture
def opened(exported, widget):
    return exported(widget)


def step(page) -> str:
    return page.locator(".medseg-network").get_attribute("data-step")


def row(page, name: str) -> list[str]:
    return page.locator("tr", has=page.get_by_role("rowheader", name=name, exact=True)).locator("td").all_inner_texts()


def test_a_round_by_mouse(opened, widget):
    truth, wide = widget._scene["truth"], opened.locator("[data-view=wide]")
    for n, lesion in enumerate(truth):
        assert opened.locator(".question").inner_text() == f"Voxel {n + 1} of 10. Is the framed voxel lesion?"
        assert step(opened) == "near" and not wide.is_visible()
        opened.get_by_role("button", name="Lesion", exact=True).click()  # always "lesion" without the wide view
        assert step(opened) == "wide" and wide.is_visible()
        assert row(opened, "without")[n:] == ["·"] * (10 - n) + [f"{sum(truth[:n])} of {n}"], "no verdict before both answers"
        opened.get_by_role("button", name="Lesion" if lesion else "Not a lesion", exact=True).click()
        text = opened.locator(".question").inner_text()
        assert text.startswith(f"It is {'lesion' if lesion else 'not a lesion'} (balls, voxel ")
        assert text.endswith(f"you were {'right' if lesion else 'wrong'}, with it right.")
        opened.get_by_role("button", name="Start again" if n == 9 else "Next voxel").click()
        if n == 8:
            assert row(opened, "with") == ["✓"] * 9 + ["·", "9 of 9"]
            assert row(opened, "without")[-1] == f"{sum(truth[:9])} of 9"
    assert row(opened, "with") == ["·"] * 10 + ["0 of 0"] and step(opened) == "near"


def test_keys(opened):
    opened.get_by_role("button", name="Lesion", exact=True).focus()
    opened.keyboard.press("n")
    assert step(opened) == "wide"
    opened.keyboard.press("l")
    assert step(opened) == "shown"
    opened.keyboard.press("l")  # too late
    assert step(opened) == "shown"
    opened.keyboard.press("Enter")
    assert step(opened) == "near" and opened.locator(".question").inner_text().startswith("Voxel 2 of 10")
    opened.keyboard.press("Enter")  # the focus is on the first answer
    assert step(opened) == "wide"


def test_touch(on_a_phone, widget, tmp_path):
    widget.to_html(tmp_path / "n.html")
    page = on_a_phone(tmp_path / "n.html", width=390)
    for name in ("Lesion", "Not a lesion", "Next voxel"):
        button = page.get_by_role("button", name=name, exact=True)
        assert button.bounding_box()["height"] >= 40
        button.tap()
    assert page.locator(".question").inner_text().startswith("Voxel 2 of 10")


def test_the_truth_is_drawn_only_at_the_end(opened, widget):
    shots = []
    for name in ("Lesion", "Lesion", None):
        shots.append(opened.eval_on_selector("[data-view=near] canvas", "c => c.toDataURL()"))
        if name:
            opened.get_by_role("button", name=name, exact=True).click()
    assert shots[0] == shots[1]
    assert (shots[2] != shots[1]) == bool(widget._pictures[0][2].any()), "the outline, where a part of the lesion is in sight"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    opened.get_by_role("button", name="Lesion", exact=True).click()
    opened.get_by_role("button", name="Lesion", exact=True).click()
    check_layout(opened, scheme)
