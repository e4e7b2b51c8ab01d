"""Adapters for Lightning, Transformers and loggers."""
