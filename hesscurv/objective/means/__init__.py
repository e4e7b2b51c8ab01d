"""Whether a loss is the mean over samples that it claims to be."""
