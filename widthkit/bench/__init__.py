"""Benchmarks of widthkit itself: results are JSON with versions, device and date."""
