"""The conventions that public objects share: printing, warnings, plain integers, torch.compile."""
