"""Latency of any widths on a named device: operators are timed once; whole networks correct their sum."""

from widthkit.latency.conditions import Conditions, read_conditions
from widthkit.latency.model import LatencyModel

__all__ = ["Conditions", "LatencyModel", "read_conditions"]
