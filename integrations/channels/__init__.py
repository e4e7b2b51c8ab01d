"""Channel removal with torch-pruning."""
