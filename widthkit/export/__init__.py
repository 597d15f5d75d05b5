"""Export: dense networks, and files to keep them in."""

from widthkit.export.dense import export
from widthkit.export.origin import Origin, origin_of
from widthkit.export.save import load, save

__all__ = ["Origin", "export", "load", "origin_of", "save"]
