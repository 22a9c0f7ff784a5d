"""Population statistics from batches."""
