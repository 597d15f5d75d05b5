"""The weight-sharing net: strategies, slices, gates, ranking of units."""

from widthkit.supernet.supernet import Supernet, make_supernet

__all__ = ["Supernet", "make_supernet"]
