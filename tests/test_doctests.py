"""Every example in a docstring runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest
import widthkit_plugins

import widthkit

NAMES = [
    info.name
    for package in (widthkit, widthkit_plugins)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not info.name.endswith("__main__")
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [t for name in NAMES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(found) > 40
