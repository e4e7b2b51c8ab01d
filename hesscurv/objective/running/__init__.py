"""The surroundings in which a model's code runs, and leaves no trace."""
