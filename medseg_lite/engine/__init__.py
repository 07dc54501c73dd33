"""Machines that the lessons do not open: what training, inference and the data need to be fast, exact and safe."""
