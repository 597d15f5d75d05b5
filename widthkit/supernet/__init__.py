"""The weight-sharing net: strategies, slices, gates, ranking of units."""

from widthkit.supernet.make import make_supernet
from widthkit.supernet.supernet import Supernet

__all__ = ["Supernet", "make_supernet"]
