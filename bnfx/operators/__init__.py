"""What an operator is: one table, and how to read one call."""
