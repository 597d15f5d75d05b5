"""Export a model or a supernet as an ordinary dense network of the same class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from widthkit.errors import OptionError
from widthkit.export.feature_info import refresh_feature_info
from widthkit.export.origin import Origin, compose_origins, origin_of, set_origin
from widthkit.export.runs import check_runs
from widthkit.graph import ChannelGraph, IntArray, Kept
from widthkit.graph.plan import Plan, apply_plan, make_plan
from widthkit.modules.structure import Dense
from widthkit.search import SearchResult, Trial
from widthkit.supernet import Supernet
from widthkit.trace import trace


class SeveralNetworks(nn.Module, ABC):
    """A module that holds several dense networks; :func:`export` refuses it and names :meth:`networks`."""

    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """Return every network as an ordinary dense one."""


def export(
    net: nn.Module,
    widths: Kept | SearchResult | Trial | None = None,
    *,
    path: int = 0,
    example_inputs: Any = None,
    graph: ChannelGraph | None = None,
    freeze: Sequence[str] = (),
    free_outputs: bool = False,
) -> nn.Module:
    """Return a dense network of the given widths: the model's own class, plain layers, no widthkit code in its forward.

    Args:
        net: A model or a supernet; it is not changed.
        widths: Group name -> width, or -> indices of the kept units. Groups that are not named keep all units.
            ``None`` takes a supernet's active widths. The result of a search, or one of its trials, takes the units
            that were judged best in the supernet; of any other model it takes the leading units of these widths.
        path: For a supernet and widths: which of the strategy's paths to copy, by default the first one. Nothing says
            that it is the best: only a search has judged the paths.
        example_inputs: For a model: as in :func:`widthkit.trace`.
        graph: For a model: its channel graph, if it is already traced.
        freeze: For a model: as in :func:`widthkit.trace`.
        free_outputs: For a model: as in :func:`widthkit.trace`.

    Raises:
        WidthsError: If the widths do not fit; nothing is built then.
        OptionError: If ``net`` holds several networks.
        ExportError: If the new network raises on the example input of the trace.

    The batch norms have the running statistics of the full network: recalibrate or train before you use eval mode.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> export(model, {"0": 2}, example_inputs=(1, 3, 8, 8))[0]
    Conv2d(3, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    if isinstance(net, Supernet):
        return _from_supernet(net, *judged_best(widths, path))
    if isinstance(net, SeveralNetworks):
        raise OptionError(
            f"{type(net).__name__} has networks of its own; call its networks(), which returns them dense"
        )
    graph = graph or trace(net, example_inputs, freeze=freeze, free_outputs=free_outputs)
    plan = make_plan(graph, widths.widths if isinstance(widths, (SearchResult, Trial)) else widths)
    slim = apply_plan(net, plan)
    check_runs(slim, net, graph.program)
    return _with_origin(slim, _origin(graph, plan, Dense.of(net)), origin_of(net))


def judged_best(widths: Kept | SearchResult | Trial | None, path: int = 0) -> tuple[Kept | None, int]:
    """Return widths or units, and the path to take: of a search's result or trial those that were judged best.

    Args:
        widths: As in :func:`export`.
        path: Taken where nothing was judged.
    """
    if isinstance(widths, SearchResult):
        return (widths.units or widths.widths), 0
    return (widths.widths, widths.path) if isinstance(widths, Trial) else (widths, path)


def _from_supernet(net: Supernet, widths: Kept | None, path: int) -> nn.Module:
    units = net.active if widths is None else net.units(widths, path)
    whole = net.whole()
    slim = apply_plan(whole, net.plan(units))
    check_runs(slim, whole, net.graph.program)
    return _with_origin(slim, _origin(net.graph, _dense_plan(net, units), net.dense), origin_of(net.model))


def _with_origin(slim: nn.Module, origin: Origin, earlier: Origin | None) -> nn.Module:
    """Update timm's channel counts and store the origin, composed with the one that the network already had."""
    refresh_feature_info(slim)
    set_origin(slim, origin if earlier is None else compose_origins(earlier, origin))
    return slim


def _origin(graph: ChannelGraph, plan: Plan, dense: Dense) -> Origin:
    costs = graph.macs(plan.widths), graph.params(plan.widths), graph.macs(), graph.params()
    return Origin(plan, dense, *costs)


def _dense_plan(net: Supernet, units: dict[str, IntArray]) -> Plan:
    """Plan the same shapes from the dense model, which lacks the units that a strategy has added.

    Only the shapes of this plan matter, because the weights come from the supernet. So a unit past the dense model's
    end is replaced by an unused unit of the dense model; if none is left, it counts as a new unit.
    """
    own = net.graph.full
    kept: dict[str, IntArray] = {}
    for name, indices in units.items():
        inside = indices[indices < own[name]]
        spare = np.setdiff1d(np.arange(own[name]), inside)[: len(indices) - len(inside)]
        inside = np.sort(np.concatenate([inside, spare]))
        kept[name] = np.concatenate([inside, own[name] + np.arange(len(indices) - len(inside))])
    return make_plan(net.graph, kept)
