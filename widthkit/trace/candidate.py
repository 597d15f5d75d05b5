"""A graph under probation, and the run of a shrunk copy that judges it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from widthkit.graph import ChannelGraph, IntArray
from widthkit.graph.plan import Plan, apply_plan, make_plan
from widthkit.modules.clone import named_tensors
from widthkit.trace.build import Seeds, Units, build_graph, group_units
from widthkit.trace.compare import Expectation, disagreement, divergence
from widthkit.trace.components import Components, solve
from widthkit.trace.context import AttributeRecord, RunState, flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.labels import Labels, LabelStore
from widthkit.trace.recorder import record

AttributeKey = tuple[str, str, "int | None"]
_END = 1 << 60
TURNS = 3
"""How many shrunk copies have to agree with the first run."""


@dataclass(frozen=True)
class Misfit:
    """Where and how the shrunk model disagrees with the trace.

    Args:
        path: The module to blame.
        why: In words.
        components: The components that met wrongly, if that was it.
        call: Number of the operator call where sizes began to differ; past the end where they never did.
    """

    path: str
    why: str
    components: frozenset[int] = frozenset()
    call: int = _END

    @property
    def progress(self) -> tuple[int, int]:
        """Later is better; then fewer wrong meetings."""
        return self.call, -len(self.components)


@dataclass
class Draft:
    """The record of the first run and what the probe decided so far."""

    model: nn.Module
    inputs: Inputs
    batch: int
    run: RunState
    seeds: Seeds
    output_shapes: list[tuple[int, ...]]
    forced: dict[int, int] = field(default_factory=dict)
    attributes: dict[AttributeKey, Labels] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    free_outputs: bool = False
    hollow: bool = False
    hopeless: set[tuple[type, int]] = field(default_factory=set)
    n_checks: int = 0
    _units: tuple[Components, Units] | None = None

    def build(self) -> tuple[ChannelGraph, Components]:
        """Solve and assemble with the decisions so far."""
        solved, units = self.solve(), self.units()
        chosen = [AttributeRecord(*key, labels) for key, labels in self.attributes.items()]
        graph = build_graph(
            self.model,
            self.run,
            self.seeds,
            solved,
            units,
            batch=self.batch,
            attributes=[*chosen, *self.run.attributes],
            notes=self.notes,
        )
        return graph, solved

    def solve(self) -> Components:
        """Return the components under the decisions so far; attributes tie nothing."""
        return solve(self.run.store, self.forced)

    def units(self) -> Units:
        """Group the components of :meth:`solve`."""
        solved = self.solve()
        if self._units is None or self._units[0] is not solved:
            self._units = solved, group_units(self.model, self.seeds, solved)
        return self._units[1]


def check(draft: Draft, graph: ChannelGraph, solved: Components, shrink: Iterable[str], turn: int) -> Misfit | None:
    """Run a copy with the named groups shrunk and compare it with the first run.

    Args:
        draft: The first run.
        graph: The graph that it led to.
        solved: Its components.
        shrink: Names of the groups that lose units.
        turn: Which of the :data:`TURNS` width vectors to take.
    """
    draft.n_checks += 1
    chosen = set(shrink)
    plan = make_plan(graph, {n: units for n, units in _subsets(graph, turn).items() if n in chosen})
    expected = Expectation.of(graph, solved, draft.seeds, plan)
    n = int(solved.unit.max()) + 2
    run = RunState(store=LabelStore(size=n))
    stack: list[tuple[str, nn.Module]] = []

    def misfit(path: str, why: str, components: frozenset[int] = frozenset()) -> Misfit:
        call = divergence(draft.run.trail, run.trail, solved.unit, expected)
        if call < len(run.trail):
            return Misfit(draft.run.trail[call].path, why, components, call)
        return Misfit(path, why, components, call if call < len(draft.run.trail) else _END)

    try:
        slim = apply_plan(draft.model, plan)
        _label(slim, draft, solved, plan, run)
        outputs = record(slim, draft.inputs, run, stack, hollow=draft.hollow)
    except Exception as error:
        return misfit(stack[-1][0] if stack else "", f"{type(error).__name__}: {_first_line(error)}")
    shapes = [tuple(t.shape) for t in flat_tensors((outputs,))]
    if shapes != draft.output_shapes and not draft.free_outputs:
        return misfit("", f"the output has shape {shapes} instead of {draft.output_shapes}")
    clash = disagreement(run, n, expected)
    return None if clash is None else misfit(clash.path, clash.why, clash.components)


def _label(slim: nn.Module, draft: Draft, solved: Components, plan: Plan, run: RunState) -> None:
    """Give the tensors of a shrunk copy the first run's components as labels; 0 stays the constant."""
    for name, tensor in named_tensors(slim).items():
        if name in draft.seeds.labels:
            dims = [None if labels is None else solved.unit[labels] + 1 for labels in draft.seeds.labels[name]]
            for dim, index in plan.tensors.get(name, {}).items():
                labels = dims[dim]
                assert labels is not None
                dims[dim] = labels[index]
            run.set_dims(tensor, tuple(dims))


def _subsets(graph: ChannelGraph, turn: int) -> dict[str, IntArray]:
    """Choose units at random, in such numbers that over the turns no two groups of a width always keep as many.

    Otherwise an integer that counts one group could be taken for the count of another. All groups shrink in the
    first turn; one unit alone is avoided, since dims of size 1 broadcast.
    """
    rng = np.random.default_rng(turn)
    kept = {}
    for number, (name, width) in enumerate(graph.full.items()):
        least = 2 if width > 2 else 1
        most = width - 1 if turn == 0 else width
        span = most - least + 1
        digit = number // span ** max(turn - 1, 0)
        kept[name] = np.sort(rng.choice(width, size=most - digit % span, replace=False)).astype(np.int64)
    return kept


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return " ".join(text.split())[:200] if text else "no message"
