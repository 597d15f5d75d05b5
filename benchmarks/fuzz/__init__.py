"""Random networks, checked by the oracles."""
