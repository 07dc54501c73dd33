"""A course in medical image segmentation, and the models, losses, data and widgets of the five papers it follows."""

__version__ = "0.2.0"
