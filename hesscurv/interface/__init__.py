"""Conventions shared by public objects: printing, warnings, integers, torch.compile."""
