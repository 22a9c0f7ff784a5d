"""What this machine has and can run."""
