"""Generated cases with known truth: deterministic by seed, so nothing has to be downloaded to teach or test."""

from .brain import brain, brain_cohort
from .hand import hand, hand_cohort
from .mri import SITES

__all__ = ["SITES", "brain", "brain_cohort", "hand", "hand_cohort"]
