"""The command line inside this process, which saves the seconds of importing torch."""

import sys
from typing import NamedTuple

import pytest

from widthkit.cli import main


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def here(capfd, monkeypatch, *args):
    """Run one command; it always ends by ``SystemExit``."""
    monkeypatch.setattr(sys, "argv", ["widthkit", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as left:
        main()
    return Done(left.value.code, *capfd.readouterr())
