"""Heatmaps: which pixels spoke for a class."""
