"""Timing of the ways and the choice among them."""
