"""Atomic files with checksums, and out-of-core storage of vectors."""
