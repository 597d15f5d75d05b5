"""Checks that do not trust the tracer, for tests and benchmarks alike."""
