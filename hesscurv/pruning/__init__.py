"""Prune with curvature: weights, scores, masks, and what is left on disk."""
