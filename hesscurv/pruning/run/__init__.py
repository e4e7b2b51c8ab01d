"""Pruning a model in stages."""
