"""Eigenpairs of Gauss-Newton and Fisher matrices from the Gram matrix of their rows."""
