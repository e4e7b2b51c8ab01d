"""A loss over data: tasks, batches, weights of the mean, parameters and the model's environment."""
