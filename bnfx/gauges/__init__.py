"""Folding as algebra: which gauge every element may carry, the choice, the new weights."""
