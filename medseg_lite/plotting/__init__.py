"""Static figures (`figures`), and how a slice is turned, coloured and painted (`painting`), for figures and widgets alike.

plotting.show(plotting.slices(case), alt="Four sequences of one phantom; the tumour lies in the left parietal lobe")
"""

from ..volume import BRATS_CLASSES
from .figures import STYLE, SideBySide, history, intensities, paper_table, show, slices, style
from .painting import (
    CLASS_COLOURS,
    PLANES,
    PROBABILITY_COLOUR,
    SIGNED_COLOURS,
    Overlay,
    Plane,
    as_overlays,
    blend,
    busiest_position,
    check_position,
    class_colour,
    class_name,
    cut,
    default_window,
    find_plane,
    outline,
    paint,
    rgb,
)

__all__ = [
    "BRATS_CLASSES",
    "CLASS_COLOURS",
    "PLANES",
    "PROBABILITY_COLOUR",
    "SIGNED_COLOURS",
    "STYLE",
    "Overlay",
    "Plane",
    "SideBySide",
    "as_overlays",
    "blend",
    "busiest_position",
    "check_position",
    "class_colour",
    "class_name",
    "cut",
    "default_window",
    "find_plane",
    "history",
    "intensities",
    "outline",
    "paint",
    "paper_table",
    "rgb",
    "show",
    "slices",
    "style",
]
