"""Benchmarks that verify widthkit itself; results lie beside the code. ``python -m benchmarks --help`` lists them."""
