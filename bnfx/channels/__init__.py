"""Which channels nothing needs: those that are constant, and those that nobody reads."""
