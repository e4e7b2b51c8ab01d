"""Measurement of curvature during training."""
