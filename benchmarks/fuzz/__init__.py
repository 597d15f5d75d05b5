"""Random networks against the oracles."""
