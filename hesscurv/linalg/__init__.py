"""Dense and block linear algebra on tensors; knows nothing of models."""
