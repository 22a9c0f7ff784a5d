"""Whether a file computes what the model did."""
