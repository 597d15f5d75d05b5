"""From a model or a supernet to an ordinary dense network of the same class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from widthkit.graph import ChannelGraph, IntArray, Kept
from widthkit.plan import Plan, apply_plan, make_plan
from widthkit.structure import Structure, architecture, structure
from widthkit.supernet import Supernet
from widthkit.trace import trace

_RECORD = "_widthkit_origin"


@dataclass(frozen=True)
class Origin:
    """How a slim network came about, so that it can be rebuilt: the dense model's description and a plan.

    Args:
        graph: The channel graph of the dense model.
        plan: The plan that made the slim network from it.
        structure: Module tree of the dense model as text, to recognise it by.
        architecture: The name that timm built the dense model under, if timm did.
        path: Which of the supernet's paths the weights came from; 0 without a supernet.
        notes: Anything the exporter wants kept, as JSON values.
    """

    graph: ChannelGraph
    plan: Plan
    structure: Structure
    architecture: str | None = None
    path: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


def export(
    net: nn.Module,
    widths: Kept | None = None,
    *,
    path: int = 0,
    example_inputs: Any = None,
    graph: ChannelGraph | None = None,
    freeze: tuple[str, ...] = (),
    free_outputs: bool = False,
) -> nn.Module:
    """Return a dense network of the given widths: same class, plain layers, no trace of widthkit in its forward.

    Args:
        net: A model or a supernet; it stays as it is.
        widths: Group name -> width, or the kept units themselves; groups that are not named stay whole. ``None``
            takes a supernet's active widths.
        path: Which of the strategy's paths to copy from a supernet.
        example_inputs: For a model: as in :func:`widthkit.trace`.
        graph: For a model: its channel graph, if it has been traced already.
        freeze: For a model: as in :func:`widthkit.trace`.
        free_outputs: For a model: as in :func:`widthkit.trace`.

    Raises:
        WidthsError: If the widths do not fit; nothing has been made by then.

    Batch-norm running statistics are those of the full network: recalibrate or train before running in eval mode.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> export(model, {"0": 2}, example_inputs=(1, 3, 8, 8))[0]
    Conv2d(3, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    if isinstance(net, Supernet):
        units = net.units(widths, path) if widths is not None else dict(net._active)
        slim = apply_plan(net.model, net.plan(units))
        origin_plan = _plan_from_dense(net, units)
        origin = Origin(net.graph, origin_plan, net.dense_structure, net.dense_architecture, path)
    else:
        graph = graph or trace(net, example_inputs, freeze=freeze, free_outputs=free_outputs)
        plan = make_plan(graph, widths)
        slim = apply_plan(net, plan)
        origin = Origin(graph, plan, structure(net), architecture(net))
    slim.__dict__[_RECORD] = origin
    return slim


def origin_of(slim: nn.Module) -> Origin | None:
    """Return how a network was exported, or ``None`` if widthkit did not make it."""
    return slim.__dict__.get(_RECORD)


def _plan_from_dense(net: Supernet, units: dict[str, IntArray]) -> Plan:
    """Plan the same shapes from the dense model: units that it does not have count as grown."""
    own = net.graph.full
    kept: dict[str, IntArray] = {}
    for name, indices in units.items():
        inside = indices[indices < own[name]]
        missing = len(indices) - len(inside)
        free = np.setdiff1d(np.arange(own[name]), inside)[:missing]
        inside = np.sort(np.concatenate([inside, free]))
        extra = len(indices) - len(inside)
        kept[name] = np.concatenate([inside, own[name] + np.arange(extra)])
    return make_plan(net.graph, kept)
