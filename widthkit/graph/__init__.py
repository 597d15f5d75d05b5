"""Pure data: channel graph, cost polynomials, the traced run, search space, plan."""

from widthkit.graph.channel_graph import (
    AttributeInfo,
    ChannelGraph,
    ChannelGroup,
    FloatArray,
    IntArray,
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
