"""Static figures, their colours (`meanings`), and how a slice is turned and painted (`painting`), for figures and widgets alike.

plotting.show(plotting.slices(case), alt="Four sequences of one phantom; the tumour lies in the left parietal lobe")
"""

from ..volume import BRATS_CLASSES
from .anatomy import outline, slices
from .figures import STYLE, SideBySide, history, intensities, paper_table, picture, set_style, show, style
from .meanings import (
    CLASS_COLOURS,
    COLOURS,
    OVERLAY_COLOURS,
    PROBABILITY,
    PROBABILITY_COLOUR,
    SIGNED,
    SIGNED_COLOURS,
    UNSIGNED,
    class_colour,
    class_colours,
    class_name,
    rgb,
)
from .painting import (
    PLANES,
    Overlay,
    Plane,
    as_overlays,
    blend,
    borders,
    busiest_position,
    check_position,
    cut,
    default_window,
    draw_sample,
    find_plane,
    outline_pixels,
    paint,
)

__all__ = [
    "BRATS_CLASSES",
    "CLASS_COLOURS",
    "COLOURS",
    "OVERLAY_COLOURS",
    "PLANES",
    "PROBABILITY",
    "PROBABILITY_COLOUR",
    "SIGNED",
    "SIGNED_COLOURS",
    "STYLE",
    "UNSIGNED",
    "Overlay",
    "Plane",
    "SideBySide",
    "as_overlays",
    "blend",
    "borders",
    "busiest_position",
    "check_position",
    "class_colour",
    "class_colours",
    "class_name",
    "cut",
    "default_window",
    "draw_sample",
    "find_plane",
    "history",
    "intensities",
    "outline",
    "outline_pixels",
    "paint",
    "paper_table",
    "picture",
    "rgb",
    "set_style",
    "show",
    "slices",
    "style",
]
