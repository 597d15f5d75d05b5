"""The graph of a narrower (or wider) copy of a model, without tracing it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from widthkit.graph.channel_graph import ChannelGraph
from widthkit.graph.plan import Plan, kept_units, make_plan, resized


def narrow(graph: ChannelGraph, widths: Mapping[str, int]) -> tuple[Plan, ChannelGraph]:
    """Plan a model of these widths and return its graph; groups keep their names, units their numbers.

    Args:
        graph: The channel graph of the model.
        widths: Group name -> width; the first units stay. Groups that are not named stay whole.

    Returns:
        The plan for :func:`widthkit.graph.plan.apply_plan`, and the graph of the model that it makes.

    Raises:
        WidthsError: If the widths do not fit the graph.

    >>> from torch import nn
    >>> from widthkit.trace import trace
    >>> graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (1, 3, 8, 8))
    >>> plan, small = narrow(graph, {"0": 2})
    >>> small.full, small.macs() == graph.macs({"0": 2})
    ({'0': 2}, True)
    """
    plan = make_plan(graph, dict(widths))
    return plan, replace(graph, **resized(graph, kept_units(graph, dict(widths))))
