"""Latency of any widths on a named device: tables per operator, measured once, corrected on a few whole networks."""

from widthkit.latency.conditions import Conditions, read_conditions
from widthkit.latency.model import LatencyModel

__all__ = ["Conditions", "LatencyModel", "read_conditions"]
