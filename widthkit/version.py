"""The version of widthkit, and the versions of the libraries that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("widthkit")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def versions() -> dict[str, str]:
    """Return the versions of Python, widthkit and its libraries, for result files."""
    found = {"python": platform.python_version(), "widthkit": __version__}
    for name in ("torch", "torchvision", "timm", "fvcore", "torch-pruning", "numpy", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
