"""Modules as such: copies, names, merging blocks."""
