"""Curvature of weights: per-sample gradients, input covariances, quadratic models, saliencies."""
