"""Closed units keep their weights: what momentum and weight decay do to them is taken back after every update."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from widthkit.graph import IntArray
from widthkit.supernet import Supernet


class ClosedUnits(nn.Module):
    """The weights of closed units, from a training step to the update that follows it.

    No gradient reaches a closed unit's weights, but the optimiser would still move them: momentum runs on after a unit
    was closed, and weight decay shrinks it. Nothing here is part of the state of a network.

    Args:
        net: The supernet. Of one whose blocks merge nothing is kept, because its units are not those of its branches.
        ranges: Group name -> where its units are among the bits.
    """

    def __init__(self, net: Supernet, ranges: Mapping[str, slice]) -> None:
        super().__init__()
        self._places: dict[str, dict[int, str]] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        parameters = {} if net.merges else dict(net.model.named_parameters(remove_duplicate=False))
        always = max((where.stop for where in ranges.values()), default=0)
        # Several groups may have a part of one dim each, as where layers are concatenated.
        bit_of: dict[tuple[str, int], IntArray] = {}
        for name, where in ranges.items():
            for site in net.wide_graph.groups[name].sites:
                if site.tensor in parameters:
                    none = np.full(parameters[site.tensor].shape[site.dim], always)
                    found = bit_of.setdefault((site.tensor, site.dim), none)
                    found[site.index] = np.arange(where.start, where.stop)[:, None]
        for number, ((tensor, dim), index) in enumerate(bit_of.items()):
            self._places.setdefault(tensor, {})[dim] = f"index{number}"
            self.register_buffer(f"index{number}", torch.from_numpy(index), persistent=False)

    @torch.no_grad()
    def note(self, net: Supernet, bits: Tensor) -> None:
        """Note the weights before an update.

        Args:
            net: The supernet.
            bits: ``[units]``: 1 for open units.
        """
        is_open = torch.cat([bits.detach() > 0, bits.new_ones(1, dtype=torch.bool)])
        parameters = dict(net.model.named_parameters(remove_duplicate=False))
        for name, places in self._places.items():
            weight = parameters[name]
            free = torch.ones([1] * weight.ndim, dtype=torch.bool, device=weight.device)
            for dim, buffer in places.items():
                along = [-1 if d == dim else 1 for d in range(weight.ndim)]
                free = free & is_open[self.get_buffer(buffer)].view(along)
            self._before[name] = weight.clone(), free

    @torch.no_grad()
    def put_back(self, net: Supernet) -> None:
        """Give the weights of closed units their values from before the update; once per note."""
        parameters = dict(net.model.named_parameters(remove_duplicate=False))
        for name, (before, free) in self._before.items():
            weight = parameters[name]
            weight.copy_(torch.where(free, weight, before))
        self._before = {}
