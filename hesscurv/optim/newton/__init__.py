"""Newton steps by preconditioned conjugate gradients."""
