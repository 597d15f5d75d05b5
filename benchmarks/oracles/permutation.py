"""The permutation oracle: permute the units of a group at all its sites, and the outputs do not change.

The truth is the symmetry of the network itself. A site that is missing, or that belongs to another group, breaks it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.oracles.outputs import TOLERANCE, OracleError, check_equal, outputs
from widthkit.graph import ChannelGraph
from widthkit.modules.clone import named_tensors


def permuted(
    model: nn.Module, graph: ChannelGraph, rng: np.random.Generator, names: Iterable[str] | None = None
) -> nn.Module:
    """Return a copy in which the units of the named groups (of all groups) have changed places, at all their sites."""
    model = copy.deepcopy(model)
    tensors = named_tensors(model)
    for name in graph.groups if names is None else names:
        group = graph.groups[name]
        order = rng.permutation(group.width)
        if (order == np.arange(group.width)).all():
            order = np.roll(order, 1)
        for site in group.sites:
            tensor = tensors[site.tensor].data
            index = np.arange(tensor.shape[site.dim])
            index[site.index.reshape(-1)] = site.index[order].reshape(-1)
            tensor.copy_(tensor.index_select(site.dim, torch.from_numpy(index)))
    return model


def check_permutation(
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Any,
    rng: np.random.Generator,
    *,
    each: bool = False,
    tolerance: float = TOLERANCE,
) -> None:
    """Permute all groups at once, or one group after the other.

    Raises:
        OracleError: Naming the groups whose permutation changes an output.
    """
    expected = outputs(model, inputs)
    names = list(graph.groups)
    for chosen in [[n] for n in names] if each else [names]:
        try:
            check_equal(outputs(permuted(model, graph, rng, chosen), inputs), expected, tolerance)
        except OracleError as error:
            raise OracleError(f"{error}, with {chosen if each else 'all groups'} permuted") from error
