"""Importances of channels for torch-pruning."""
