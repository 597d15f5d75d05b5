"""Permute the units of all groups in a small copy with random weights: its outputs must not change.

The rules, the sizes and the shrunk copies say which channels can be exchanged for one another. This is the check of
that result by values, which trusts none of them. The copy keeps a few units of every group, so it costs about as much
as another run on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from widthkit.graph import ChannelGraph, IntArray, Positions
from widthkit.graph.plan import Plan
from widthkit.modules.clone import named_tensors
from widthkit.trace.candidate import Candidate
from widthkit.trace.inputs import Inputs, float_dtype
from widthkit.trace.outputs import Outputs
from widthkit.trace.recorder import call_model
from widthkit.trace.small_copy import CAPS, MOST_MACS, repeatable, small_copy, small_inputs, small_plan

_TOLERANCE = 1e-6
"""Largest relative difference in float64. Sums in another order explain 1e-10; a wrong group changes far more."""
_CAST_TOLERANCE = 1e-3
"""The same for models that compute a part in a less precise type."""
_CASTS = {"to", "_to_copy", "float", "type_as", "half"}
"""Operators that may change to a less precise type."""
_NUDGE = 1e-6
"""Change of the weights, as a share of the tolerance, that shows how much a model amplifies rounding errors."""


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Args:
        wrong: Groups whose permutation changes the outputs.
        unknown: Why nothing can be said; empty where the check ran.
    """

    wrong: tuple[str, ...] = ()
    unknown: str = ""


def check_permutation(candidate: Candidate, graph: ChannelGraph) -> Verdict:
    """Permute all groups at once, and look for the wrong ones only where that changes an output.

    Args:
        candidate: The first run, with the user's model, which is copied and not changed.
        graph: A graph that all shrunk copies agree with.
    """
    if not graph.group_names:
        return Verdict()
    plan, n_macs = small_plan(graph, candidate.batch, candidate.example)
    if n_macs > MOST_MACS:
        return Verdict(unknown=f"a copy with {CAPS[-1]} units a group has {n_macs / 1e9:.0f} billion MACs")
    if any(t.is_meta and not t.is_floating_point() for t in named_tensors(candidate.original).values()):
        return Verdict(unknown="integer buffers on the meta device have no values")
    failure = ""
    for dtype in (torch.float64, torch.float32):
        copy = small_copy(candidate.original, plan, dtype)
        for inputs in small_inputs(candidate.example, dtype):
            try:
                with repeatable(candidate.recording.calls, inputs, dtype):
                    check = _Check.of(candidate, graph, plan, copy, inputs)
                    return check.verdict()
            except Exception as error:  # a model may raise anything on a size or a type that it was not made for
                failure = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Verdict(unknown=f"a small copy does not run ({failure})")


@dataclass
class _Check:
    """A small copy, its outputs, and how its groups are permuted.

    Args:
        graph: The groups.
        places: Which units the copy has.
        copy: The copy.
        inputs: What it is run on.
        expected: Its outputs.
        order: ``[units of the copy]``; the unit that takes the place of each, of the same group.
        out_dims: For every output, per dim the positions of the first run, ``None`` where nothing varies.
        tolerance: Largest relative difference.
    """

    graph: ChannelGraph
    places: _Places
    copy: nn.Module
    inputs: Inputs
    expected: list[Tensor]
    order: IntArray
    out_dims: list[list[Positions | None]]
    tolerance: float

    @classmethod
    def of(cls, candidate: Candidate, graph: ChannelGraph, plan: Plan, copy: nn.Module, inputs: Inputs) -> _Check:
        places = _Places.of(graph, plan)
        names = {call.func.overloadpacket.__name__ for call in candidate.recording.calls}
        is_coarse = float_dtype(copy) != torch.float64 or bool(names & _CASTS)
        tolerance = _CAST_TOLERANCE if is_coarse else _TOLERANCE
        expected = [t.clone() for t in Outputs.of(call_model(copy, inputs)).tensors]
        return cls(graph, places, copy, inputs, expected, _order(places), _output_positions(candidate), tolerance)

    def verdict(self) -> Verdict:
        """Return the groups whose permutation changes an output."""
        if not all(bool(t.isfinite().all()) for t in self.expected):
            return Verdict(unknown="a small copy with random weights returns numbers that are not finite")
        names = list(self.graph.group_names)
        if self._holds(names):
            return Verdict()
        if not self._is_precise():
            return Verdict(unknown="rounding errors grow in the model as fast as real differences")
        return Verdict(tuple(self._search(names)))

    def _search(self, names: list[str]) -> list[str]:
        """Return the wrong groups among some that are wrong together, by halves."""
        if len(names) == 1:
            return names
        half = len(names) // 2
        found = [n for part in (names[:half], names[half:]) if not self._holds(part) for n in self._search(part)]
        return found or names

    def _holds(self, names: list[str]) -> bool:
        """Whether the outputs stay if some groups are permuted; where they change the weights are put back."""
        chosen = np.isin(self.places.group, [self.graph.group_names.index(name) for name in names])
        order = np.where(chosen, self.order, np.arange(len(self.order)))
        self._permute(order)
        found = Outputs.of(call_model(self.copy, self.inputs)).tensors
        moved = [self._moved_output(t, dims, order) for t, dims in zip(self.expected, self.out_dims, strict=True)]
        self._permute(np.argsort(order))
        return self._difference(found, moved) <= self.tolerance

    def _difference(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Return the largest difference, relative to the largest value of the same output."""
        if [t.shape for t in found] != [t.shape for t in expected]:
            return math.inf
        largest = 0.0
        for a, b in zip(found, expected, strict=True):
            if not b.is_floating_point():
                largest = max(largest, 0.0 if torch.equal(a, b) else math.inf)
            elif b.numel():
                change = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
                largest = max(largest, change if change == change else math.inf)
        return largest

    def _is_precise(self) -> bool:
        """Whether nudging the weights changes the outputs by less than what the tolerance allows."""
        generator = torch.Generator().manual_seed(2)
        for tensor in self.copy.parameters():
            if tensor.is_floating_point():
                # Of float32 no change below its own rounding is left.
                nudge = max(_NUDGE * self.tolerance, torch.finfo(tensor.dtype).eps)
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.data.mul_(1 + nudge * noise)
        nudged = [t.clone() for t in Outputs.of(call_model(self.copy, self.inputs)).tensors]
        change = self._difference(nudged, self.expected)
        self.expected = nudged
        return change <= self.tolerance

    def _permute(self, order: IntArray) -> None:
        """Move the units of the copy: unit ``order[i]`` comes to the place of unit ``i``, wherever it occurs."""
        tensors = named_tensors(self.copy)
        for info in self.graph.tensors.values():
            for dim, positions in enumerate(info.dims):
                if positions is not None:
                    tensor = tensors[info.name].data
                    source = torch.from_numpy(self.places.source(positions, order))
                    tensor.copy_(tensor.index_select(dim, source))

    def _moved_output(self, tensor: Tensor, dims: list[Positions | None], order: IntArray) -> Tensor:
        for dim, positions in enumerate(dims):
            if positions is not None and positions.searchable:
                tensor = tensor.index_select(dim, torch.from_numpy(self.places.source(positions, order)))
        return tensor


@dataclass(frozen=True)
class _Places:
    """The units that the copy has, numbered over all groups.

    Args:
        start: ``[groups]``; the number of the first unit of every group of the model.
        number: ``[units of the model]``; the number of the unit in the copy, -1 where the copy does not have it.
        group: ``[units of the copy]``; the group of every unit.
    """

    start: IntArray
    number: IntArray
    group: IntArray

    @classmethod
    def of(cls, graph: ChannelGraph, plan: Plan) -> _Places:
        start = np.concatenate([[0], np.cumsum(graph.group_widths)]).astype(np.int64)
        number = np.full(int(start[-1]), -1, dtype=np.int64)
        kept = np.concatenate([start[g] + plan.kept[name] for g, name in enumerate(graph.group_names)])
        number[kept] = np.arange(len(kept))
        return cls(start, number, np.searchsorted(start, kept, side="right") - 1)

    def source(self, positions: Positions, order: IntArray) -> IntArray:
        """Return, for every position of a dim of the copy, the position that it takes its values from."""
        fixed = positions.group < 0
        unit = np.where(fixed, 0, self.number[np.where(fixed, 0, self.start[positions.group] + positions.rank)])
        key = np.where(fixed, len(order) + np.arange(len(positions)), unit)[fixed | (unit >= 0)]
        target = np.where(key < len(order), order[np.minimum(key, len(order) - 1)], key)
        source = np.empty(len(key), dtype=np.int64)
        source[np.argsort(target, kind="stable")] = np.argsort(key, kind="stable")
        return source


def _order(places: _Places) -> IntArray:
    """Return ``[units of the copy]``: a permutation inside every group that moves something in each of them."""
    rng = np.random.default_rng(1)
    order = np.lexsort((rng.random(len(places.group)), places.group))
    for g in np.unique(places.group):
        own = np.flatnonzero(places.group == g)
        if (order[own] == own).all():
            order[own] = np.roll(own, 1)
    return order


def _output_positions(candidate: Candidate) -> list[list[Positions | None]]:
    """Return the positions along every dim of every output, ``None`` where nothing varies."""
    solved, units = candidate.solve(), candidate.units()
    return [
        [None if labels is None else units.positions(solved.unit[labels]) for labels in dims]
        for dims in candidate.output_dims
    ]
