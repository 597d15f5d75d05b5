"""From a model or a supernet to an ordinary dense network of the same class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from widthkit.errors import OptionError
from widthkit.export.info import refresh_feature_info
from widthkit.export.origin import Origin, after, origin_of, set_origin
from widthkit.graph import ChannelGraph, IntArray, Kept
from widthkit.graph.plan import Plan, apply_plan, make_plan
from widthkit.modules.structure import Dense
from widthkit.supernet import Supernet
from widthkit.trace import trace


def export(
    net: nn.Module,
    widths: Kept | None = None,
    *,
    path: int = 0,
    example_inputs: Any = None,
    graph: ChannelGraph | None = None,
    freeze: Sequence[str] = (),
    free_outputs: bool = False,
) -> nn.Module:
    """Return a dense network of the given widths: same class, plain layers, nothing of widthkit in its forward.

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
        return _from_supernet(net, widths, path)
    if callable(getattr(net, "networks", None)):
        raise OptionError(f"{type(net).__name__} has networks of its own; call networks(), which returns them dense")
    graph = graph or trace(net, example_inputs, freeze=freeze, free_outputs=free_outputs)
    plan = make_plan(graph, widths)
    slim = apply_plan(net, plan)
    refresh_feature_info(slim)
    origin = _origin(graph, plan, Dense.of(net))
    earlier = origin_of(net)
    set_origin(slim, origin if earlier is None else after(earlier, origin))
    return slim


def _from_supernet(net: Supernet, widths: Kept | None, path: int) -> nn.Module:
    units = net.active if widths is None else net.units(widths, path)
    slim = apply_plan(net.whole(), net.plan(units))
    refresh_feature_info(slim)
    origin = _origin(net.graph, _dense_plan(net, units), net.dense)
    earlier = origin_of(net.model)
    set_origin(slim, origin if earlier is None else after(earlier, origin))
    return slim


def _origin(graph: ChannelGraph, plan: Plan, dense: Dense) -> Origin:
    costs = graph.macs(plan.widths), graph.params(plan.widths), graph.macs(), graph.params()
    return Origin(plan, dense, *costs)


def _dense_plan(net: Supernet, units: dict[str, IntArray]) -> Plan:
    """Plan the same shapes from the dense model, which lacks the units that a strategy added.

    Only shapes matter here (the weights come from the supernet): a unit past the dense model's end is replaced by
    one that it has, and counts as new when there is none left.
    """
    own = net.graph.full
    kept: dict[str, IntArray] = {}
    for name, indices in units.items():
        inside = indices[indices < own[name]]
        spare = np.setdiff1d(np.arange(own[name]), inside)[: len(indices) - len(inside)]
        inside = np.sort(np.concatenate([inside, spare]))
        kept[name] = np.concatenate([inside, own[name] + np.arange(len(indices) - len(inside))])
    return make_plan(net.graph, kept)
