"""Measurement of curvature in training."""
