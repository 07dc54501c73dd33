"""Interactive views for notebooks, drawn in the browser; each shows a static picture where no kernel or browser is at hand."""

from .compare_segmentations import CompareSegmentations
from .crf_explorer import CRFExplorer
from .feature_explorer import FeatureExplorer
from .kernel_editor import KernelEditor
from .slice_viewer import SliceViewer
from .training_monitor import TrainingMonitor

__all__ = ["CRFExplorer", "CompareSegmentations", "FeatureExplorer", "KernelEditor", "SliceViewer", "TrainingMonitor"]
