"""Loss over data: tasks, batches, weights, parameters and the environment of the model."""
