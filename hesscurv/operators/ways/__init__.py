"""Ways of computing products with a batch's curvature."""
