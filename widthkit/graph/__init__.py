"""Pure data: channel graph, cost polynomials, the traced run as a program, search space, plan."""

from widthkit.graph.arrays import FloatArray, IntArray
from widthkit.graph.channel_graph import (
    AttributeInfo,
    ChannelGraph,
    ChannelGroup,
    Kept,
    Positions,
    Site,
    TensorInfo,
    Widths,
    site_indices,
)

__all__ = [
    "AttributeInfo",
    "ChannelGraph",
    "ChannelGroup",
    "FloatArray",
    "IntArray",
    "Kept",
    "Positions",
    "Site",
    "TensorInfo",
    "Widths",
    "site_indices",
]
