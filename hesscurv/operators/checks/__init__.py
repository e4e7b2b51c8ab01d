"""Checks of derivatives, ways and products against independent references."""
