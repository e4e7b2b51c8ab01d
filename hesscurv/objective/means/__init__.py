"""Tests whether a loss is a mean over samples."""
