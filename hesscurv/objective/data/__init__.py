"""Batches of any container, their samples, and lists of samples."""
