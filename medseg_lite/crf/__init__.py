"""The 3D fully connected CRF of Kamnitsas et al. 2017 (section 2.5), its use for tumours, and the search for its parameters."""

from .dense import DenseCRF, whole_tumour
from .kernels import Prepared
from .permutohedral import Permutohedral
from .search import SPACE, Search, search

__all__ = ["SPACE", "DenseCRF", "Permutohedral", "Prepared", "Search", "search", "whole_tumour"]
