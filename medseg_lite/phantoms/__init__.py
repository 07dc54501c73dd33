"""Generated cases with a known label. The seed determines each case, so teaching and testing need no download."""

from .brain import brain, brain_cohort
from .em import em, em_cohort
from .hand import hand, hand_cohort
from .liver import liver, liver_cohort
from .mri import SITES, Site, random_site
from .prostate import PROSTATE_SITES, prostate, prostate_cohort
from .puzzles import PUZZLES, puzzle_cohort
from .readers import HABITS, draw_as_reader, mean_pairwise_dice

__all__ = [
    "HABITS",
    "PROSTATE_SITES",
    "PUZZLES",
    "SITES",
    "Site",
    "brain",
    "brain_cohort",
    "draw_as_reader",
    "em",
    "em_cohort",
    "hand",
    "hand_cohort",
    "liver",
    "liver_cohort",
    "mean_pairwise_dice",
    "prostate",
    "prostate_cohort",
    "puzzle_cohort",
    "random_site",
]
