"""Masks in modules: pruning methods, state dicts, files, N:M sparsity."""
