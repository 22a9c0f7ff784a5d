"""A private copy of a model under edit, and the driver of passes."""
