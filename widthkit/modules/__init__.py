"""Modules as such: copies, structure, branches that merge, models by name."""
