"""The penalty of strategy ``sparse``: norms of units over all weights that they own, and the gradients it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from widthkit_plugins.searchers.importance import prune

from widthkit.budget import Budget
from widthkit.graph import FloatArray, IntArray
from widthkit.supernet import Supernet


@dataclass(frozen=True)
class _Place:
    """One dim of a parameter along which units lie."""

    parameter: str
    dim: int


class GroupPenalty(nn.Module):
    """Norms of the units of all groups, and a penalty on them.

    Units are numbered group after group, in the order of the supernet's graph. A unit owns all parameters that go with
    it: its row in the layers that write it, its column in the layers that read it, scale and bias of its norms.

    Args:
        net: The supernet.
        budget: What the network may cost after pruning, or ``None`` if no units are chosen to go.

    Attributes:
        ranges: Group name -> where its units are.
        going: ``[units]``: the units that are chosen to go.
        free: ``[units]``: 1 for the units of groups that can become narrower, else 0.
    """

    going: Tensor
    free: Tensor
    _group: Tensor
    _owner: Tensor

    def __init__(self, net: Supernet, budget: Budget | None) -> None:
        super().__init__()
        self.budget = budget
        widths = net.wide_graph.group_widths
        ends = np.cumsum(widths)
        names = net.wide_graph.group_names
        self.ranges = {n: slice(int(e - w), int(e)) for n, e, w in zip(names, ends, widths, strict=True)}
        self.total = int(widths.sum())
        narrowest = {g.name: g.narrowest for g in net.space.groups}
        can_shrink = np.array([narrowest[n] < w for n, w in zip(names, widths, strict=True)])
        self._places, owners = _places(net, ends - widths, self.total)
        self._sizes = [len(owner) for owner in owners]
        with torch.inference_mode(False):
            self.register_buffer("going", torch.zeros(self.total, dtype=torch.bool))
            # These follow from the graph, so checkpoints need not hold them.
            self.register_buffer("free", torch.from_numpy(np.repeat(can_shrink, widths)).double(), persistent=False)
            group = np.repeat(np.arange(len(widths)), widths)
            self.register_buffer("_group", torch.from_numpy(group), persistent=False)
            self.register_buffer("_owner", torch.from_numpy(np.concatenate(owners)), persistent=False)

    # --- norms --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def squared_norms(self, model: nn.Module) -> Tensor:
        """Return float64 ``[units]``: the sum of squares of all parameters that a unit owns (DepGraph, section 3.3)."""
        parameters = dict(model.named_parameters())
        squares: dict[str, Tensor] = {}
        sums = []
        for place in self._places:
            if place.parameter not in squares:
                # Kernels' own dims are summed once for both dims of a weight.
                square = parameters[place.parameter].detach().square()
                squares[place.parameter] = square.flatten(2).sum(2) if square.ndim > 2 else square
            square = squares[place.parameter]
            others = [d for d in range(square.ndim) if d != place.dim]
            sums.append(square.sum(others) if others else square)
        result = torch.zeros(self.total + 1, dtype=torch.float64, device=self._owner.device)
        return result.index_add(0, self._owner, torch.cat(sums).double())[: self.total]

    def ranked(self, model: nn.Module) -> dict[str, IntArray]:
        """Return the units of every group, those of the largest norm first; equal ones keep their order."""
        norms = self.squared_norms(model).cpu().numpy()
        return {name: np.argsort(-norms[where], kind="stable") for name, where in self.ranges.items()}

    # --- the penalty --------------------------------------------------------------------------------------------------

    def strengths(self, norms: Tensor, reg: float, alpha: float, growth: float) -> Tensor:
        """Return float64 ``[units]``: how strongly each unit is pulled to zero.

        That is ``reg * 2**(alpha * (max - I) / (max - min))`` (DepGraph, Eq. 4), where I is the unit's squared norm
        and max and min are those of its group, and ``growth`` more for the units that are chosen to go.
        """
        n_groups = len(self.ranges)
        largest = norms.new_zeros(n_groups).scatter_reduce(0, self._group, norms, "amax", include_self=False)
        least = norms.new_zeros(n_groups).scatter_reduce(0, self._group, norms, "amin", include_self=False)
        span = (largest - least)[self._group]
        place = torch.where(span > 0, (largest[self._group] - norms) / span, 0.0)
        return self.free * (reg * 2 ** (alpha * place) + growth * self.going.to(norms.dtype))

    def value(self, model: nn.Module, norms: Tensor, strengths: Tensor) -> Tensor:
        """Return the penalty, half the sum of strength times squared norm; strengths count as constants.

        Its gradient for a weight is the weight times the strengths of the units that own it.
        """
        parameters = dict(model.named_parameters())
        per_position = torch.cat([strengths, strengths.new_zeros(1)])[self._owner].split(self._sizes)
        factors: dict[str, Tensor] = {}
        for place, strength in zip(self._places, per_position, strict=True):
            parameter = parameters[place.parameter]
            shape = [1] * parameter.ndim
            shape[place.dim] = -1
            factor = strength.to(parameter.dtype).reshape(shape)
            factors[place.parameter] = factors[place.parameter] + factor if place.parameter in factors else factor
        total = 0.5 * (strengths * norms).sum()
        trained = {name: factor for name, factor in factors.items() if parameters[name].requires_grad}
        return _Penalty.apply(  # type: ignore[no-any-return, no-untyped-call]
            total.float(), list(trained.values()), *(parameters[name] for name in trained)
        )

    # --- which units go -----------------------------------------------------------------------------------------------

    def choose(self, net: Supernet) -> None:
        """Choose the units that go: those that one ranking of all units by their norms cuts at the budget."""
        if self.budget is None:
            return
        norms = self.squared_norms(net.model).cpu().numpy()
        scores = _even(norms, self.ranges)
        widths = prune(net.space, self.budget, scores)
        going = np.zeros(self.total, dtype=bool)
        for name, where in self.ranges.items():
            going[where.start + np.argsort(-norms[where], kind="stable")[widths[name] :]] = True
        self.going.copy_(torch.from_numpy(going))

    def going_norm(self, model: nn.Module) -> float:
        """Return the mean squared norm of the units that go, where the mean of every group is 1."""
        going = self.going.cpu().numpy()
        scores = np.concatenate(list(_even(self.squared_norms(model).cpu().numpy(), self.ranges).values()))
        return float(scores[going].mean()) if going.any() else 0.0


class _Penalty(torch.autograd.Function):
    """A value whose gradient for every parameter is the parameter times a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factors: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.factors = factors
        ctx.save_for_backward(*parameters)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        pairs = zip(ctx.saved_tensors, ctx.factors, strict=True)
        return None, None, *(parameter * (factor * grad.to(factor.dtype)) for parameter, factor in pairs)


def _places(net: Supernet, starts: IntArray, total: int) -> tuple[list[_Place], list[IntArray]]:
    """List where units lie in parameters, and for every position there its unit; ``total`` stands for none."""
    own = dict(net.model.named_parameters())
    places, owners = [], []
    for info in net.wide_graph.tensors.values():
        for dim, positions in enumerate(info.dims):
            if info.name in own and positions is not None and positions.searchable:
                places.append(_Place(info.name, dim))
                owners.append(np.where(positions.group < 0, total, starts[positions.group] + positions.rank))
    return places, owners


def _even(norms: FloatArray, ranges: Mapping[str, slice]) -> dict[str, FloatArray]:
    """Return norms with mean 1 in every group, as criteria are compared over groups."""
    return {name: norms[where] / max(float(norms[where].mean()), 1e-300) for name, where in ranges.items()}
