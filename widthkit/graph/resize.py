"""The graph of a narrower or wider copy of a model, without tracing it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from widthkit.errors import WidthsError
from widthkit.graph.channel_graph import ChannelGraph
from widthkit.graph.plan import KeptTable, KeptUnits, Plan, kept_units, make_plan


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
    return plan, replace(graph, **_resized(graph, kept_units(graph, dict(widths))))


def grow(graph: ChannelGraph, widths: Mapping[str, int]) -> tuple[Plan, ChannelGraph]:
    """Plan a wider model and return its graph, in which the old units keep their numbers.

    Args:
        graph: The channel graph of the model.
        widths: Group name -> width, at least the group's own.

    Returns:
        The plan for :func:`widthkit.graph.plan.apply_plan`, and the graph of the model that it makes.

    Raises:
        WidthsError: If a width is below the group's own.
    """
    for name, width in widths.items():
        if name in graph.full and width < graph.full[name]:
            raise WidthsError(f"group '{name}': cannot grow from {graph.full[name]} to {width} units")
    plan = make_plan(graph, widths)
    if not plan.grows:
        return plan, graph
    return plan, replace(graph, **_resized(graph, kept_units(graph, widths)))


def _resized(graph: ChannelGraph, kept: KeptUnits) -> dict[str, Any]:
    """Return the parts of a graph that change when every group keeps its first units, or gains some."""
    table = KeptTable.of(graph, kept)
    tensors = {}
    for info in graph.tensors.values():
        dims = tuple(None if p is None else table.grown(p) for p in info.dims)
        shape = tuple(s if p is None else len(p) for s, p in zip(info.shape, dims, strict=True))
        tensors[info.name] = replace(info, shape=shape, dims=dims)
    attributes = tuple(replace(a, positions=table.grown(a.positions)) for a in graph.attributes)
    vector = np.array([len(kept[name]) for name in graph.group_names], dtype=np.int64)
    return {"group_widths": vector, "tensors": tensors, "attributes": attributes}
