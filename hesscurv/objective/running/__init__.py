"""Execution of a model's code without side effects."""
