"""Rows and Gram matrices of Gauss-Newton and Fisher matrices, layer by layer."""
