"""Measure models on your own devices; results are JSON with versions, device and date."""
