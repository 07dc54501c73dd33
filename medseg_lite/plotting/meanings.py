"""The colours of the course: one colour for one meaning, in figures and widgets.

Grey images leave the hues free for what is drawn on them. The colours are told apart by readers who see no red or no green too:
tests/test_meanings.py measures the distances for them, and the contrast with black and with white. Blue, sky blue, yellow and
vermilion are of Okabe and Ito's set (https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.colors import Colormap, LinearSegmentedColormap

# Colours of what is drawn. No class has one of them.
COLOURS = {
    "found": "#55CC66",
    "missed": "#CC1133",
    "made up": "#7733DD",
    "truth": "#FFFFFF",
    "prediction": "#FF99AA",
    "second prediction": "#99DD55",
    "third prediction": "#00DDAA",
    "probability": "#E69F00",
    "field": "#009E73",
    "neutral": "#777777",
}
# Colours of overlays that are outlines, in their order. The truth has one of its own.
OVERLAY_COLOURS = tuple(COLOURS[name] for name in ("prediction", "second prediction", "third prediction"))

# Outcomes as classes: `paint` and `class_legend` take them for class names, `outcomes` gives the numbers.
OUTCOMES = ("", "found", "missed", "made up")
# Dark border of lines over pictures.
CASING = "#111111"

# Colours of the classes that occur in several data sets, by name. "core" is necrosis and non-enhancing tumour in one class.
NAMED_CLASSES = {
    "necrosis": "#0072B2",
    "oedema": "#56B4E9",
    "non-enhancing tumour": "#F0E442",
    "enhancing tumour": "#D55E00",
    "core": "#CC79A7",
    "lesion": "#9988FF",
}
_ALIASES = {
    "edema": "oedema",
    "non-enhancing": "non-enhancing tumour",
    "non-enh.": "non-enhancing tumour",
    "nonenhancing": "non-enhancing tumour",
    "enhancing": "enhancing tumour",
    "enhancing core": "enhancing tumour",
    "necrosis and non-enhancing tumour": "core",
    "necrosis and non-enhancing": "core",
    "necrosis + non-enhancing": "core",
    "non-enhancing core": "core",
    "tumour core": "core",
    "contusion": "lesion",
    "stroke": "lesion",
}
# Colours by number, for classes with other names. The background is transparent.
CLASS_COLOURS = ("#00000000", *NAMED_CLASSES.values(), "#CCCCBB")
PROBABILITY_COLOUR = COLOURS["probability"]
# Negative, zero and positive numbers.
SIGNED_COLOURS = ("#0072B2", "#FFFFFF", "#D55E00")

# Colour maps: probabilities from 0 (black) to 1 (the colour of the overlay), numbers of both signs, and numbers from 0 up.
PROBABILITY: Colormap = LinearSegmentedColormap.from_list("probability", ("#000000", PROBABILITY_COLOUR))
SIGNED: Colormap = LinearSegmentedColormap.from_list("signed", SIGNED_COLOURS)
UNSIGNED: Colormap = mpl.colormaps["viridis"]


def class_colours(classes: Sequence[str] | Mapping[int, str]) -> dict[int, str]:
    """Return the colours of classes by number, as "#rrggbb". The background, class 0, is transparent.

    A class whose name is known has the same colour in every data set. The others have the colour of their number, or the next
    one that is still free.

    Args:
        classes: class names, a sequence by number or a mapping.
    """
    named = dict(classes) if isinstance(classes, Mapping) else dict(enumerate(classes))
    colours = {k: _named_colour(name) for k, name in named.items() if k}
    for k, colour in colours.items():
        if colour is None:
            order = [CLASS_COLOURS[(k - 1 + i) % 7 + 1] for i in range(7)]
            colours[k] = next((c for c in order if c not in colours.values()), order[0])
    return {k: colours[k] if k else CLASS_COLOURS[0] for k in named}


def class_colour(which: int | str, classes: Sequence[str] | Mapping[int, str] | None = None) -> str:
    """Return the colour of a class as "#rrggbb". The background is transparent.

    Args:
        which: name of the class, or its number.
        classes: class names of the data, a sequence by number or a mapping. Without them a number has the colour of its place in
            `CLASS_COLOURS`, and class 8 has the colour of class 1 again.

    Raises:
        ValueError: for a name that is not known.
    """
    if isinstance(which, str):
        by_name = {name: k for k, name in (classes.items() if isinstance(classes, Mapping) else enumerate(classes or ()))}
        colour = _named_colour(which)
        if which not in by_name and colour is None:
            known = ", ".join(NAMED_CLASSES)
            raise ValueError(f"there is no colour for the class {which!r}; known are {known}; for others pass classes=")
        return class_colour(by_name[which], classes) if which in by_name else colour
    if classes is not None and which in (colours := class_colours(classes)):
        return colours[which]
    return CLASS_COLOURS[which] if which < len(CLASS_COLOURS) else CLASS_COLOURS[(which - 1) % 7 + 1]


def class_name(value: int, classes: Sequence[str] | Mapping[int, str] | None) -> str:
    """Return the name of a class in `classes` (a sequence by class number, or a mapping), or "class 5" if it has none there."""
    named = classes if isinstance(classes, Mapping) else dict(enumerate(classes or ()))
    return str(named.get(value, f"class {value}" if value else "background"))


def rgb(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue (0 to 255) of "#rrggbb"."""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _named_colour(name: str) -> str | None:
    name = str(name).lower()
    return NAMED_CLASSES.get(_ALIASES.get(name, name)) or (COLOURS[name] if name in OUTCOMES[1:] else None)
