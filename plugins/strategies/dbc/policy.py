"""The gates of strategy ``dbc``: how they become bits, what the open units cost, and which units are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from widthkit.budget import parse_budget, show_count
from widthkit.errors import BudgetError, OptionError
from widthkit.graph import ChannelGraph, IntArray
from widthkit.graph.cost import Polynomial
from widthkit.supernet import Supernet

BoolArray = npt.NDArray[np.bool_]
THRESHOLD = 0.5
_CLOSE = 0.999
"""No more units are opened once the MACs reach this share of the target."""


class Policy(nn.Module):
    """The gates of all groups, and the units that they keep.

    The search space limits them. In a group of one choice the units of that choice are open, whatever their gates are.
    Units past a group's widest choice are closed.

    Args:
        net: The supernet.
        target: MACs to end with.
        start: Initial value of every gate.

    Attributes:
        gates: ``[units of all groups]``.
        ranges: Group name -> where its units are in the gates.
        settled: Whether the policy is fixed.
        kept: The units of the fixed policy.
        before: Which units were open at the end of the last epoch.

    Raises:
        BudgetError: If one unit per group costs more than the target, and there is anything to choose.
    """

    gates: nn.Parameter
    settled: Tensor
    kept: Tensor
    before: Tensor

    def __init__(self, net: Supernet, target: int, start: float) -> None:
        super().__init__()
        widths = net.wide_graph.group_widths
        self.names, self.target, self.dense = net.wide_graph.group_names, target, int(net.graph.macs())
        self._graph: ChannelGraph = net.graph
        ends = np.cumsum(widths)
        self.ranges = {n: slice(int(e - w), int(e)) for n, e, w in zip(self.names, ends, widths, strict=True)}
        self._group = np.repeat(np.arange(len(widths)), widths)
        total = int(widths.sum())
        self._free, self._fixed = np.zeros(total, dtype=bool), np.zeros(total, dtype=bool)
        for g in net.space.groups:
            first = self.ranges[g.name].start
            (self._free if len(g.options) > 1 else self._fixed)[first : first + g.widest] = True
        self._padded = _padded(self._free, self._group, len(widths))
        self.gates = nn.Parameter(torch.full((total,), float(start)))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))
        self.register_buffer("kept", torch.zeros(total, dtype=torch.bool))
        self.register_buffer("before", torch.from_numpy(self._free | self._fixed))
        least = int(self._graph.macs(self._counts(self._fixed | self._first())))
        if self._free.any() and least > target:
            raise BudgetError(
                f"target {show_count(target)} MACs is below one unit per group ({show_count(least)} MACs); raise it"
            )

    # --- training -----------------------------------------------------------------------------------------------------

    def bits(self) -> Tensor:
        """Return ``[units]``: 1 for open units, 0 for closed ones; gradients pass to the gates unchanged.

        A unit is open if its gate is above the threshold or the largest of its group. This is the straight-through
        estimator of PaS, Eq. 2.
        """
        device = self.gates.device
        hard = (self._open() | torch.from_numpy(self._fixed).to(device)).to(self.gates.dtype)
        free = torch.from_numpy(self._free).to(device, self.gates.dtype)
        return hard + free * (self.gates - self.gates.detach())

    def macs(self, bits: Tensor) -> Tensor:
        """Return the MACs of the open units: the exact polynomial, with its exact gradient for every bit."""
        widths = torch.zeros(len(self.names), dtype=torch.float64, device=bits.device)
        widths = widths.index_add(0, torch.from_numpy(self._group).to(bits.device), bits.double())
        value: Tensor = ExactMacs.apply(widths, self._graph.cost.macs_polynomial)  # type: ignore[no-untyped-call]
        return value

    def settle(self) -> None:
        """Fix the policy; :meth:`units` does not change any more."""
        self.kept.copy_(torch.from_numpy(self._project()))
        self.settled.fill_(True)

    def end_epoch(self) -> dict[str, float]:
        """Return figures of convergence: MACs, open units, and units that flipped since the last epoch ended."""
        now = self._bits_now()
        flipped = int((now != self.before.cpu().numpy()).sum())
        self.before.copy_(torch.from_numpy(now))
        return {
            "policy_macs": float(self._graph.macs(self._counts(now))) / self.dense,
            "policy_open": float(now.sum() / (self._free | self._fixed).sum()),
            "policy_flipped": float(flipped),
        }

    # --- the kept units -----------------------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether the policy is fixed."""
        return bool(self.settled)

    def units(self) -> dict[str, IntArray]:
        """Return the kept units; they have at most the target's MACs, as close to it as whole units allow."""
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
        rows = torch.arange(len(padded), device=gates.device)
        largest = padded[rows, table.argmax(1)]
        hard = (gates > THRESHOLD) & torch.from_numpy(self._free).to(gates.device)
        hard[largest[largest >= 0]] = True
        return hard

    def _bits_now(self) -> BoolArray:
        if self.is_settled:
            return np.asarray(self.kept.cpu().numpy())
        return np.asarray(self._open().cpu().numpy() | self._fixed)

    def _first(self) -> BoolArray:
        """Return one unit of every group that has a choice."""
        first = np.zeros_like(self._free)
        first[self._padded[:, 0][self._padded[:, 0] >= 0]] = True
        return first

    def _counts(self, bits: BoolArray) -> IntArray:
        return np.bincount(self._group[bits], minlength=len(self.names)).astype(np.int64)

    def _project(self) -> BoolArray:
        """Move the open units to the target: close the lowest gates, or open the highest closed ones.

        Every group keeps its largest gate. Equal gates go in turns, the last units of every group first.
        """
        values = self.gates.detach().double().cpu().numpy()
        place = np.zeros(len(values))
        for name, where in self.ranges.items():
            place[where.start + self.ranked(name)] = np.arange(where.stop - where.start) / (where.stop - where.start)
        bits: BoolArray = self._bits_now().copy()
        order = np.lexsort((-place, values))
        counts = self._close(bits, order[bits[order] & self._free[order] & (place[order] > 0)])
        self._reopen(bits, counts, order[::-1][(~bits & self._free)[order[::-1]]])
        return bits

    def _close(self, bits: BoolArray, order: IntArray) -> IntArray:
        """Close as few units as the target needs, in order; costs fall with every unit, so bisection finds how many."""
        low, high, counts = 0, len(order), self._counts(bits)
        while low < high:
            middle = (low + high) // 2
            gone = np.bincount(self._group[order[:middle]], minlength=len(counts))
            low, high = (low, middle) if self._graph.macs(counts - gone) <= self.target else (middle + 1, high)
        bits[order[:low]] = False
        return self._counts(bits)

    def _reopen(self, bits: BoolArray, counts: IntArray, order: IntArray) -> None:
        """Open units in order while they fit; a group whose unit did not fit is left out from then on."""
        full: set[int] = set()
        for unit in order.tolist():
            if self._graph.macs(counts) >= _CLOSE * self.target:
                return
            group = int(self._group[unit])
            if group in full:
                continue
            counts[group] += 1
            if self._graph.macs(counts) <= self.target:
                bits[unit] = True
            else:
                counts[group] -= 1
                full.add(group)


class ExactMacs(torch.autograd.Function):
    """The cost polynomial ``[groups] -> scalar`` in float64, with its exact gradient."""

    @staticmethod
    def forward(ctx: Any, widths: Tensor, polynomial: Polynomial) -> Tensor:
        """Evaluate the polynomial; widths need not be whole numbers."""
        vector = widths.detach().cpu().numpy()
        ctx.slope = widths.new_tensor(polynomial.gradient(vector))
        return widths.new_tensor(polynomial.per_term(vector).sum() / polynomial.divisor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Multiply the incoming gradient by the slope."""
        return grads[0] * ctx.slope, None


def target_macs(text: str, graph: ChannelGraph) -> int:
    """Read a target such as ``"0.5x"``.

    Raises:
        BudgetError: If it cannot be read.
        OptionError: If it says nothing about MACs.
    """
    bounds = [limit.value for limit in parse_budget(text, graph).limits if limit.kind == "macs"]
    if not bounds:
        raise OptionError(f"target '{text}' says nothing about MACs, which is what gates are trained for; add a bound")
    return int(min(bounds))


def _padded(free: BoolArray, group: IntArray, n_groups: int) -> IntArray:
    """Return ``[groups, widest]``: the free units of every group, -1 where there is none."""
    rows = [np.flatnonzero(free & (group == g)) for g in range(n_groups)]
    table = np.full((n_groups, max([1, *map(len, rows)])), -1, dtype=np.int64)
    for row, units in zip(table, rows, strict=True):
        row[: len(units)] = units
    return table
