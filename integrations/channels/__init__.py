"""Removal of channels with torch-pruning."""
