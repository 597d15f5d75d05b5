"""The command line: thin functions over the library."""

from widthkit.cli.main import main

__all__ = ["main"]
