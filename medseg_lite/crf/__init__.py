"""The 3D fully connected CRF of Kamnitsas et al. 2017 (section 2.5), its use for tumours, and the search for its parameters."""

from .dense import DenseCRF, Prepared, whole_tumour
from .permutohedral import Permutohedral
from .search import SPACE, Search, search

__all__ = ["SPACE", "DenseCRF", "Permutohedral", "Prepared", "Search", "search", "whole_tumour"]
