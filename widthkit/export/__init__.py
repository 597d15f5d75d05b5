"""Export: dense networks, and files to keep them in."""

from widthkit.export.backbone import Backbone, backbone
from widthkit.export.check import check_same
from widthkit.export.dense import export
from widthkit.export.fold import fold_batchnorm
from widthkit.export.origin import Origin, origin_of
from widthkit.export.save import check_formats, save
from widthkit.export.slim_file import load

__all__ = [
    "Backbone",
    "Origin",
    "backbone",
    "check_formats",
    "check_same",
    "export",
    "fold_batchnorm",
    "load",
    "origin_of",
    "save",
]
