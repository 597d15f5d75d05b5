"""Permute the units of all groups in a small copy with random weights: its outputs must not change.

The rules, the sizes and the shrunk copies say which channels can be exchanged for one another. This is the check of
that result by values, which trusts none of them. The copy keeps a few units of every group, so it costs about as much
as another run on the meta device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from widthkit.graph import ChannelGraph, IntArray, Positions
from widthkit.graph.plan import Plan, make_plan, set_attribute
from widthkit.modules.clone import clone_with, named_tensors
from widthkit.trace.candidate import Candidate
from widthkit.trace.context import bind, flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.outputs import Outputs
from widthkit.trace.recorder import call_model, same_operators
from widthkit.trace.recording import TracedCall

_CAPS = (16, 8, 4, 2)
"""How many units every group keeps at most; the first number that is cheap enough is taken."""
_CHEAP_MACS = 60e6
_MOST_MACS = 2e9
"""MACs of one run: of what is cheap, and of what is run at all."""
_SIDE = 64
"""Side length that larger images are cut to, where the model runs on such images."""
_TOLERANCE = 1e-6
"""Largest relative difference in float64. Sums in another order explain 1e-10; a wrong group changes far more."""
_CAST_TOLERANCE = 1e-3
"""The same for models that compute a part in a less precise type."""
_NUDGE = 1e-12
"""Relative change of the weights that shows how much a model amplifies rounding errors."""


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
    plan, n_macs = _small_plan(graph, candidate.batch, candidate.example)
    if n_macs > _MOST_MACS:
        return Verdict(unknown=f"a copy with {_CAPS[-1]} units a group has {n_macs / 1e9:.0f} billion MACs")
    if any(t.is_meta and not t.is_floating_point() for t in named_tensors(candidate.original).values()):
        return Verdict(unknown="integer buffers on the meta device have no values")
    copy = small_copy(candidate.original, plan)
    for inputs in _small_inputs(candidate.example):
        try:
            with _repeatable(candidate.recording.calls, inputs):
                check = _Check.of(candidate, graph, plan, copy, inputs)
                return check.verdict()
        except Exception as error:  # a model may raise anything on an image size or a type that it was not made for
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Verdict(unknown=f"a small copy in float64 does not run ({failure})")


def _small_plan(graph: ChannelGraph, batch: int, example: Inputs) -> tuple[Plan, float]:
    """Return the plan of the copy and the MACs of a run of it."""
    sizes = [t.shape[-2] * t.shape[-1] for t in flat_tensors(example) if _is_large_image(t)]
    share = min([_SIDE * _SIDE / size for size in sizes], default=1.0)
    rng = np.random.default_rng(0)
    for cap in _CAPS:
        widths = {name: min(width, cap) for name, width in graph.full.items()}
        n_macs = graph.macs(widths) * batch * share
        if n_macs <= _CHEAP_MACS:
            break
    kept = {n: np.sort(rng.choice(graph.full[n], size=w, replace=False)).astype(np.int64) for n, w in widths.items()}
    return make_plan(graph, kept), n_macs


def small_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """Copy a model in float64 in evaluation mode on the CPU, as small as a plan says, with random weights.

    Random values are larger than those of a new model, whose zeros and ones would hide what is exchanged. Integer
    buffers keep their values.
    """
    generator = torch.Generator().manual_seed(0)

    def make(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().cpu().clone()
        shape = list(tensor.shape)
        for dim, index in plan.tensors.get(name, {}).items():
            shape[dim] = len(index)
        if len(shape) < 2:
            return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        fan_in = math.prod(shape[1:])
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(max(fan_in, 1) ** -0.5)

    copy = clone_with(model, make).eval()
    for (path, name), values in plan.attributes.items():
        set_attribute(copy.get_submodule(path), name, values)
    for module in copy.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                vars(module)[key] = value.cpu().double() if value.is_floating_point() else value.cpu()
    return copy


def _is_large_image(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 2 and min(tensor.shape[-2:]) > _SIDE


def _small_inputs(example: Inputs) -> Iterator[Inputs]:
    """Yield the example inputs in float64 with large images cut, then whole; constant inputs become random."""
    generator = torch.Generator().manual_seed(1)

    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().cpu()
        if tensor.is_meta or not tensor.numel() or bool((tensor == tensor.flatten()[0]).all()):
            return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor.detach().cpu().double()

    whole: Inputs = tree_map_only(Tensor, real, example)
    if any(_is_large_image(t) for t in flat_tensors(whole)):
        yield tree_map_only(Tensor, lambda t: t[..., :_SIDE, :_SIDE] if _is_large_image(t) else t, whole)
    yield whole


@contextlib.contextmanager
def _repeatable(calls: Sequence[TracedCall], inputs: Inputs) -> Iterator[None]:
    """Compute in float64 without gradients, draw nothing at random, and leave the random state as it was."""
    before = torch.get_default_dtype()
    draws = any(torch.Tag.nondeterministic_seeded in call.func.tags for call in calls)
    try:
        torch.set_default_dtype(torch.float64)
        with same_operators(inputs), _NoNoise() if draws else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


class _NoNoise(TorchDispatchMode):
    """Replaces random values by one half: two channels that are exchanged would draw different ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, without noise."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if "dropout" in func.overloadpacket.__name__:
            return args[0] if bind(func, args, kwargs).get("train") else func(*args, **kwargs)
        out = func(*args, **kwargs)
        return out.fill_(0.5) if isinstance(out, Tensor) and out.is_floating_point() and _draws(func) else out


def _draws(func: Any) -> bool:
    """Whether an operator returns nothing but random numbers."""
    return func.overloadpacket.__name__.rstrip("_").removesuffix("_like") in ("rand", "randn", "uniform", "normal")


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
        tolerance = _CAST_TOLERANCE if names & {"to", "_to_copy", "float", "type_as", "half"} else _TOLERANCE
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
        """Whether nudging the weights changes the outputs far less than what the tolerance allows."""
        generator = torch.Generator().manual_seed(2)
        for tensor in self.copy.parameters():
            if tensor.is_floating_point():
                tensor.data.mul_(1 + _NUDGE * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
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
