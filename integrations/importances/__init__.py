"""Channel importances for torch-pruning."""
