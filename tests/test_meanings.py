"""The table of colours: one colour for one meaning, told apart by every reader."""

from __future__ import annotations

from importlib import import_module
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from medseg_lite import plotting
from medseg_lite.plotting.meanings import CLASS_COLOURS, COLOURS, NAMED_CLASSES, OUTCOMES, OVERLAY_COLOURS
from medseg_lite.volume import BRATS_CLASSES

FOUR_CLASSES = ("background", "necrosis and non-enhancing", "oedema", "enhancing")
ORGANS = [f"phantoms.{name}" for name in ("em", "hand", "liver", "prostate")] + ["datasets.lits", "datasets.promise12"]
ORGANS = {name.split(".")[1]: import_module(f"medseg_lite.{name}").CLASSES for name in ORGANS}
BRAINS = import_module("medseg_lite.phantoms.brain").CLASSES
DATA = [BRATS_CLASSES, FOUR_CLASSES, *ORGANS.values(), *BRAINS.values()]
# Linear sRGB seen without green and without red cones: Machado et al. 2009, severity 1.
EYES = {
    "normal": np.eye(3),
    "deuteranope": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanope": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}


def linear(colour: str) -> np.ndarray:
    c = np.array(plotting.rgb(colour)) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(matrix @ light, 0.009, None) / (0.9505, 1, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one: str, other: str) -> float:
    """Return the least CIE 1976 distance that the three kinds of eyes see."""
    pairs = ([lab(np.clip(np.array(m) @ linear(c), 0, 1)) for c in (one, other)] for m in EYES.values())
    return min(float(np.linalg.norm(a - b)) for a, b in pairs)


def contrast(colour: str, background: str) -> float:
    light, dark = sorted((linear(c) @ (0.2126, 0.7152, 0.0722) + 0.05 for c in (colour, background)), reverse=True)
    return light / dark


def test_the_simulation_knows_red_from_green():
    assert distance("#FFFFFF", "#000000") > 90
    red, green = "#B05050", "#507A3A"
    assert distance(red, green) < 0.6 * np.linalg.norm(lab(linear(red)) - lab(linear(green)))


def test_a_colour_follows_the_name_of_its_class():
    colours = [plotting.class_colours(names) for names in DATA]
    by_name = {}
    for names, found in zip(DATA, colours):
        for k, name in enumerate(names):
            if k and name in BRATS_CLASSES + FOUR_CLASSES + ("lesion",):
                assert by_name.setdefault(name, found[k]) == found[k] == plotting.class_colour(k, names)
    assert plotting.class_colour("enhancing") == plotting.class_colour("enhancing tumour") == by_name["enhancing"]
    assert plotting.class_colour("Non-enhancing core") == plotting.class_colour("core") == by_name[FOUR_CLASSES[1]]
    assert plotting.class_colour("edema") == plotting.class_colour("oedema")
    assert plotting.class_colour(4, BRATS_CLASSES) == plotting.class_colour(3, FOUR_CLASSES)  # other numbers, one class
    assert plotting.class_colours({0: "background", 7: "oedema"}) == {0: "#00000000", 7: plotting.class_colour("oedema")}


@pytest.mark.parametrize("names", DATA, ids=lambda names: names[1])
def test_classes_of_one_data_set_have_colours_of_their_own(names):
    colours = [c for k, c in plotting.class_colours(names).items() if k]
    assert len(set(colours)) == len(names) - 1
    assert all(distance(a, b) >= 20 for a, b in combinations(colours, 2))


def test_a_class_of_an_unknown_name_needs_its_neighbours():
    assert plotting.class_colour("liver", ORGANS["liver"]) == plotting.class_colour(1)
    with pytest.raises(ValueError, match="no colour for the class 'liver'; known are necrosis"):
        plotting.class_colour("liver")


def test_no_class_has_the_colour_of_another_thing():
    for thing, colour in COLOURS.items():
        for name, of_class in NAMED_CLASSES.items():
            assert distance(colour, of_class) >= 14, f"{thing} and {name}"
    assert len(set(CLASS_COLOURS)) == len(CLASS_COLOURS)


def test_found_missed_and_made_up_are_told_apart():
    colours = [plotting.class_colour(name) for name in OUTCOMES[1:]]
    assert colours == [COLOURS[name] for name in ("found", "missed", "made up")]
    assert all(distance(a, b) >= 25 for a, b in combinations(colours, 2))
    assert all(distance(a, b) >= 20 for a in colours for b in NAMED_CLASSES.values())
    truth, prediction = np.array([0, 1, 2, 0]), np.array([0, 1, 0, 3])
    assert plotting.outcomes(truth, prediction).tolist() == [0, 1, 2, 3]


def test_what_a_correction_keeps_removes_and_adds_is_told_apart():
    colours = plotting.class_colour("lesion"), COLOURS["removed"], COLOURS["added"]
    assert all(distance(a, b) >= 25 for a, b in combinations(colours, 2))


def test_colours_stand_out_on_black():
    for name, colour in {**COLOURS, **NAMED_CLASSES}.items():
        assert contrast(colour, "#000000") >= 3, name  # WCAG 2.2, 1.4.11
    # Outlines are light, because their casing is dark.
    assert all(contrast(c, plotting.meanings.CASING) >= 7 for c in (*OVERLAY_COLOURS, COLOURS["truth"]))


def test_colours_of_areas_stand_out_on_white():
    # Yellow is pale on white; it is drawn with others and named in a legend.
    areas = {name: COLOURS[name] for name in ("found", "missed", "made up", "probability", "field", "neutral")} | NAMED_CLASSES
    low = {name for name, colour in areas.items() if contrast(colour, "#FFFFFF") < 1.9}
    assert low == {"non-enhancing tumour"}


def test_colour_maps():
    assert plotting.SIGNED(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.01)
    for one_way in (plotting.PROBABILITY, plotting.UNSIGNED):
        steps = [lab(np.clip(linear(to_hex(one_way(v))), 0, 1))[0] for v in np.linspace(0, 1, 9)]
        assert (np.diff(steps) >= 0).all() and steps[-1] - steps[0] > 55  # lighter is more, in grey print too
    assert plotting.PROBABILITY(1.0, bytes=True)[:3] == plotting.rgb(COLOURS["probability"])
    assert distance(to_hex(plotting.SIGNED(0.0)), to_hex(plotting.SIGNED(1.0))) > 60
