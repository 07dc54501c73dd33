"""Interactive views for notebooks, drawn in the browser; each shows a static picture where no kernel or browser is at hand."""

from .kernel_editor import KernelEditor
from .slice_viewer import SliceViewer

__all__ = ["KernelEditor", "SliceViewer"]
