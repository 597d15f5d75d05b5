"""Every example in a docstring of the benchmarks runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import benchmarks

NAMES = [
    info.name
    for info in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    if not info.name.endswith("__main__")
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
