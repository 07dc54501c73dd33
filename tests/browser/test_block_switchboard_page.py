"""Switches of residual blocks in a page of its own: single blocks and the slider work without a kernel, combinations say what they need."""

from __future__ import annotations

import pytest

from medseg_lite import models, paths, phantoms, transforms
from medseg_lite.widgets import BlockSwitchboard


@pytest.fixture(scope="module")
def board() -> BlockSwitchboard:
    model = models.load(paths.shipped("checkpoints", "em_inputs_standardised.safetensors"))
    return BlockSwitchboard(model, transforms.standardise(phantoms.em(3, slices=1, size=64, counts=True)))


@pytest.fixture(autouse=True)
def all_on(board):
    board.off = []


@pytest.fixture
def opened(exported, board):
    return exported(board)


def shots(page) -> list[str]:
    page.wait_for_timeout(60)
    return page.eval_on_selector_all("[data-view] canvas", "all => all.map(c => c.toDataURL())")


def told(page) -> list[str]:
    return page.eval_on_selector_all(".readout span", "all => all.map(s => s.lastChild.textContent)")


def note(page) -> str:
    return page.locator(".note").inner_text()


def block(page, number: int):
    return page.get_by_role("button", name=f"Block {number},")


def slider(page):
    return page.get_by_role("slider", name="Read the head after block")


def expected(board: BlockSwitchboard) -> list[str]:
    return [f"{board.dice:.3f}", f"{board.table['after'][47]:.3f}", f"{47 - len(board.off)} of 47"]


def off(page) -> list[int]:
    states = page.locator(".block").evaluate_all("all => all.map(b => [+b.textContent, b.getAttribute('aria-pressed')])")
    assert {state for _, state in states} <= {"true", "false"} and len(states) == 47
    return sorted(n for n, state in states if state == "false")


def test_one_block_at_a_time(opened, board):
    assert told(opened) == expected(board) and note(opened) == "All blocks are on."
    before = shots(opened)
    for number in (1, 4, 20):
        block(opened, number).click()
        board.off = [board.blocks[number - 1]]
        assert told(opened) == expected(board) and off(opened) == [number]
        assert note(opened).startswith(f"Block {number} is off, {board.blocks[number - 1]}; its shortcut ")
    block(opened, 1).click()
    after = shots(opened)
    assert after[0] != before[0] and after[1] != before[1]
    block(opened, 1).click()
    assert off(opened) == [] and shots(opened) == before


def test_the_head_is_read_after_each_block(opened, board):
    pictures = [shots(opened)]
    for count in (30, 2, 0):
        slider(opened).fill(str(count))
        board.read_after(count)
        assert told(opened) == expected(board) and off(opened) == list(range(count + 1, 48))
        assert slider(opened).get_attribute("aria-valuetext") == f"{count} of 47, Dice {board.dice:.3f}"
        pictures.append(shots(opened))
        assert all(a != b for a, b in zip(pictures[-1], pictures[-2])), "both pictures, and the dot of the curve"
    assert note(opened) == "Read after block 0: the 47 later ones are off."
    opened.get_by_role("button", name="All on").click()
    assert off(opened) == [] and slider(opened).input_value() == "47" and shots(opened) == pictures[0]


def test_a_combination_needs_python_and_says_so(opened):
    before = shots(opened)
    opened.get_by_label("One block at a time").uncheck()
    block(opened, 3).click()
    block(opened, 30).click()
    assert off(opened) == [3, 30] and told(opened)[0] == "–"
    assert note(opened).startswith("Blocks 3, 30 are off. This combination needs Python: open the notebook.")
    assert shots(opened)[0] != before[0]
    block(opened, 3).click()
    assert off(opened) == [30] and told(opened)[0] != "–"


def test_with_a_kernel_a_combination_is_computed(page, board, tmp_path):
    """A page that thinks it has a kernel waits for the answer, and shows it when it comes."""
    board.off = ["down.1.1", "up.0.3"]
    board._write_page(tmp_path / "b.html", None, _kernel=True, off=[], answers=None)
    page.goto((tmp_path / "b.html").as_uri())
    page.wait_for_selector("[data-ready]")
    assert not page.get_by_label("One block at a time").is_checked()
    block(page, 3).click()
    block(page, 28).click()
    assert note(page) == "Blocks 3, 28 are off. Python computes …"
    block(page, 28).click()
    block(page, 29).click()  # the answer to these two is there
    assert note(page) == "Blocks 3, 29 are off." and told(page) == expected(board)


def test_keys(opened):
    block(opened, 1).focus()
    for key in ("ArrowRight", "ArrowRight", "Space"):
        opened.keyboard.press(key)
    assert off(opened) == [3]
    opened.keyboard.press("End")
    opened.keyboard.press("Enter")
    assert off(opened) == [47]
    assert opened.locator(".block[tabindex='0']").count() == 1, "one stop for the Tab key"
    slider(opened).focus()
    opened.keyboard.press("ArrowLeft")  # the slider stood one place before the end, for the last block is off
    assert off(opened) == [46, 47]


def test_a_tap_switches(on_a_phone, board, tmp_path):
    board.to_html(tmp_path / "b.html")
    page = on_a_phone(tmp_path / "b.html")
    sizes = page.locator(".block").evaluate_all(
        "all => all.map(b => b.getBoundingClientRect()).flatMap(r => [r.width, r.height])"
    )
    assert min(sizes) >= 24
    block(page, 26).tap()
    assert off(page) == [26]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_notebooks(opened, check_layout, scheme):
    block(opened, 3).click()
    check_layout(opened, scheme)
