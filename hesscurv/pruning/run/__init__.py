"""Staged pruning of a model."""
