"""Batches in any container, their samples, and lists of samples."""
