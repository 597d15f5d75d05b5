"""Benchmarks that verify widthkit itself; results lie beside the code."""
