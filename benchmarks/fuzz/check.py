"""One random network against all oracles."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.fuzz.nets import RandomNet, Recipe
from benchmarks.fuzz.tokens import Named
from benchmarks.oracles import (
    check_cut,
    check_macs,
    check_params,
    check_permutation,
    check_same_net,
    counted_macs,
    random_units,
    supernet_of,
    why_not,
    widths_of,
)
from widthkit.export.dense import export
from widthkit.graph import ChannelGraph
from widthkit.trace import trace


def check(recipe: list[Recipe], flat: bool = False, seed: int = 0) -> None:
    """Build a network, trace it, and check it in float64.

    Args:
        recipe: The blocks between stem and head.
        flat: Whether the head reads the flattened map.
        seed: Of the weights, units and widths.

    Raises:
        OracleError: If an oracle does not hold.

    >>> check([("residual", (("se", (2,)), ("conv", (3,))))])
    """
    model, x = random_model(recipe, flat, seed)
    graph = trace(model, x)
    if graph.group_names:
        check_network(model, graph, x, np.random.default_rng(seed))


def random_model(recipe: list[Recipe], flat: bool, seed: int) -> tuple[nn.Module, Tensor]:
    """Build a network in float64 with random weights, norms included; return it with an image ``[1, 3, 6, 6]``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RandomNet(recipe, flat).double().eval()
        for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim <= 1 and tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        return model, torch.randn(1, 3, 6, 6, dtype=torch.float64)


def check_network(model: nn.Module, graph: ChannelGraph, x: Tensor, rng: np.random.Generator) -> None:
    """Hold a network and its graph against all oracles that apply, at random units and widths.

    Raises:
        OracleError: If an oracle does not hold.
    """
    check_permutation(model, graph, x, rng)
    units = random_units(graph, rng)
    slim, widths = export(model, units, graph=graph), widths_of(units)
    check_params(graph, widths, slim)
    if not _multiplies_by_element(slim):
        check_macs(graph, widths, counted_macs(slim, x))
    if not why_not(model, x):
        check_cut(model, graph, x, units)
    net = supernet_of(model, graph, "ua")
    check_same_net(net, x, net.space.sample(rng))


def _multiplies_by_element(model: nn.Module) -> bool:
    """Whether ``torch.einsum`` multiplies element by element, over a dim of size 1; no counter counts that."""
    return any(1 in m.matrix.shape for m in model.modules() if isinstance(m, Named))
