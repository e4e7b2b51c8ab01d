"""Dense and block linear algebra on tensors, independent of models."""
