"""The gates of strategy ``dbc``: how they become bits, and which units are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from widthkit_plugins.strategies.dbc.closed import ClosedUnits
from widthkit_plugins.strategies.dbc.cost import Bound, bounds_of

from widthkit.budget import Budget
from widthkit.errors import BudgetError, Option
from widthkit.graph import ChannelGraph, IntArray
from widthkit.supernet import Supernet

BoolArray = npt.NDArray[np.bool_]
THRESHOLD = 0.5
_CLOSE = 0.999
"""No more units are opened once the cost reaches this share of the target."""


class Policy(nn.Module):
    """The gates of all groups, and the units that they keep.

    The search space limits them. In a group of one choice the units of that choice are open, whatever their gates are.
    Units past a group's widest choice are closed. A group never has fewer open units than its narrowest choice.

    Args:
        net: The supernet.
        target: What the open units may cost in the end.
        start: Initial value of every gate.

    Attributes:
        gates: ``[units of all groups]``.
        ranges: Group name -> where its units are in the gates.
        settled: Whether the policy is fixed.
        kept: The units of the fixed policy.
        closed: Keeps the weights of closed units while the policy is not fixed.
        before: Which units were open at the end of the last epoch.

    Raises:
        BudgetError: If the narrowest choices cost more than the target, and there is anything to choose.
        OptionError: If gates cannot be trained for any of its bounds.
    """

    gates: nn.Parameter
    settled: Tensor
    kept: Tensor
    before: Tensor

    def __init__(self, net: Supernet, target: Budget, start: float) -> None:
        super().__init__()
        widths = net.wide_graph.group_widths
        self.names, self.target = net.wide_graph.group_names, target
        self._graph: ChannelGraph = net.graph
        self._bounds: tuple[Bound, ...] = bounds_of(target, net.graph)
        ends = np.cumsum(widths)
        self.ranges = {n: slice(int(e - w), int(e)) for n, e, w in zip(self.names, ends, widths, strict=True)}
        self._group = np.repeat(np.arange(len(widths)), widths)
        total = int(widths.sum())
        self._free, self._fixed = np.zeros(total, dtype=bool), np.zeros(total, dtype=bool)
        # How many units every group keeps at least, of those that it may choose.
        self._floor = np.array([g.narrowest if len(g.options) > 1 else 0 for g in net.space.groups])
        for g in net.space.groups:
            first = self.ranges[g.name].start
            (self._free if len(g.options) > 1 else self._fixed)[first : first + g.widest] = True
        self._padded = _padded(self._free, self._group, len(widths))
        self.closed = ClosedUnits(net, self.ranges)
        self.gates = nn.Parameter(torch.full((total,), float(start)))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))
        self.register_buffer("kept", torch.zeros(total, dtype=torch.bool))
        self.register_buffer("before", torch.from_numpy(self._free | self._fixed))
        if self._free.any() and self._usage(self._least()) > 1:
            costs = [limit.show(limit.cost(self._graph, self._least())) for limit in target.limits]
            raise BudgetError(
                f"target {target} is below the narrowest network of this space ({', '.join(costs)}); "
                "raise it or lower ",
                Option("min_width"),
            )

    # --- training -----------------------------------------------------------------------------------------------------

    def bits(self) -> Tensor:
        """Return ``[units]``: 1 for open units, 0 for closed ones; gradients pass to the gates unchanged.

        A unit is open if its gate is above the threshold, or among the largest ones of its group, as many as its
        narrowest choice. This is the straight-through estimator of PaS, Eq. 2.
        """
        device = self.gates.device
        hard = (self._open() | torch.from_numpy(self._fixed).to(device)).to(self.gates.dtype)
        free = torch.from_numpy(self._free).to(device, self.gates.dtype)
        return hard + free * (self.gates - self.gates.detach())

    def excess(self, bits: Tensor) -> Tensor:
        """Return what the open units cost beyond the target, as a share of the model's cost; below it is negative.

        Of several bounds the strictest one counts, at every step anew.
        """
        widths = torch.zeros(len(self.names), dtype=torch.float64, device=bits.device)
        widths = widths.index_add(0, torch.from_numpy(self._group).to(bits.device), bits.double())
        strictest: Bound = self._bounds[0]
        if len(self._bounds) > 1:
            counts = np.rint(widths.detach().cpu().numpy()).astype(np.int64)
            strictest = max(self._bounds, key=lambda b: b.limit.cost(self._graph, counts) / b.limit.value)
        excess: Tensor = strictest.excess(widths)
        return excess

    def settle(self) -> None:
        """Fix the policy; :meth:`units` does not change any more."""
        self.kept.copy_(torch.from_numpy(self._project()))
        self.settled.fill_(True)

    def end_epoch(self) -> dict[str, float]:
        """Return figures of convergence.

        These are the MACs as a share of the model's, the strictest bound's cost as a share of it, the share of open
        units, how many units flipped since the last epoch ended, and how many groups are at their narrowest choice.
        """
        now = self._bits_now()
        counts = self._counts(now)
        flipped = int((now != self.before.cpu().numpy()).sum())
        self.before.copy_(torch.from_numpy(now))
        return {
            "policy_macs": float(self._graph.macs(counts) / self._graph.macs()),
            "policy_usage": self._usage(counts),
            "policy_open": float(now.sum() / (self._free | self._fixed).sum()),
            "policy_flipped": float(flipped),
            "policy_narrowest": float((counts <= self._floor).sum()),
        }

    # --- the kept units -----------------------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether the policy is fixed."""
        return bool(self.settled)

    def units(self) -> dict[str, IntArray]:
        """Return the kept units; they hold the target, as close to it as whole units allow."""
        kept = self.kept.cpu().numpy() if self.is_settled else self._project()
        return {name: np.flatnonzero(kept[where]).astype(np.int64) for name, where in self.ranges.items()}

    def ranked(self, name: str) -> IntArray:
        """Return a group's units in the order in which they are kept; :meth:`units` has the first ones."""
        where = self.ranges[name]
        return np.lexsort((np.arange(where.stop - where.start), *self._keys(where)))

    def _keys(self, where: slice) -> tuple[npt.NDArray[Any], ...]:
        values = self.gates.detach().double().cpu().numpy()[where]
        unusable = ~(self._free | self._fixed)[where]
        kept = self.kept.cpu().numpy()[where]
        return -values * self._free[where], ~kept, unusable

    def _open(self) -> Tensor:
        gates = self.gates.detach()
        padded = torch.from_numpy(self._padded).to(gates.device)
        table = torch.where(padded < 0, -torch.inf, gates[padded.clamp_min(0)])
        hard = (gates > THRESHOLD) & torch.from_numpy(self._free).to(gates.device)
        ranked = padded.gather(1, table.argsort(dim=1, descending=True, stable=True))
        floor = torch.from_numpy(self._floor).to(gates.device)
        hard[ranked[torch.arange(ranked.shape[1], device=gates.device) < floor[:, None]]] = True
        return hard

    def _bits_now(self) -> BoolArray:
        if self.is_settled:
            return np.asarray(self.kept.cpu().numpy())
        return np.asarray(self._open().cpu().numpy() | self._fixed)

    def _least(self) -> IntArray:
        """Return ``[groups]``: the narrowest choices."""
        return np.asarray(np.maximum(self._floor, self._counts(self._fixed)))

    def _usage(self, counts: IntArray) -> float:
        """Return the largest share of all bounds, those included that gates are not trained for."""
        return float(self.target.usage(self._graph, counts))

    def _counts(self, bits: BoolArray) -> IntArray:
        return np.bincount(self._group[bits], minlength=len(self.names)).astype(np.int64)

    def _project(self) -> BoolArray:
        """Move the open units to the target: close the lowest gates, or open the highest closed ones.

        Every group keeps its largest gates, as many as its narrowest choice. Equal gates go in turns, the last units of
        every group first.
        """
        values = self.gates.detach().double().cpu().numpy()
        place, stays = np.zeros(len(values)), np.zeros(len(values), dtype=bool)
        for (name, where), floor in zip(self.ranges.items(), self._floor.tolist(), strict=True):
            ranked = where.start + self.ranked(name)
            place[ranked] = np.arange(len(ranked)) / len(ranked)
            stays[ranked[:floor]] = True
        bits: BoolArray = self._bits_now().copy()
        order = np.lexsort((-place, values))
        counts = self._close(bits, order[(bits & self._free & ~stays)[order]])
        self._reopen(bits, counts, order[::-1][(~bits & self._free)[order[::-1]]])
        return bits

    def _close(self, bits: BoolArray, order: IntArray) -> IntArray:
        """Close as few units as the target needs, in order; costs fall with every unit, so bisection finds how many."""
        low, high, counts = 0, len(order), self._counts(bits)
        while low < high:
            middle = (low + high) // 2
            gone = np.bincount(self._group[order[:middle]], minlength=len(counts))
            low, high = (low, middle) if self._usage(counts - gone) <= 1 else (middle + 1, high)
        bits[order[:low]] = False
        return self._counts(bits)

    def _reopen(self, bits: BoolArray, counts: IntArray, order: IntArray) -> None:
        """Open units in order while they fit; a group whose unit did not fit is left out from then on."""
        full: set[int] = set()
        for unit in order.tolist():
            if self._usage(counts) >= _CLOSE:
                return
            group = int(self._group[unit])
            if group in full:
                continue
            counts[group] += 1
            if self._usage(counts) <= 1:
                bits[unit] = True
            else:
                counts[group] -= 1
                full.add(group)


def _padded(free: BoolArray, group: IntArray, n_groups: int) -> IntArray:
    """Return ``[groups, widest]``: the free units of every group, -1 where there is none."""
    rows = [np.flatnonzero(free & (group == g)) for g in range(n_groups)]
    table = np.full((n_groups, max([1, *map(len, rows)])), -1, dtype=np.int64)
    for row, units in zip(table, rows, strict=True):
        row[: len(units)] = units
    return table
