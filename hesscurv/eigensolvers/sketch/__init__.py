"""Eigenpairs from random sketches, in one or two passes."""
