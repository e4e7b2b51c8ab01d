"""Lightning, Transformers and loggers."""
