"""A candidate graph with the decisions behind it, and the check that runs a shrunk copy against it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from widthkit.graph import ChannelGraph, IntArray
from widthkit.graph.plan import Plan, apply_plan, make_plan
from widthkit.modules.clone import named_tensors
from widthkit.trace.build import build_graph
from widthkit.trace.compare import ExpectedSizes, first_conflict, first_divergence
from widthkit.trace.components import Components, solve
from widthkit.trace.context import flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.labels import Labels, LabelStore
from widthkit.trace.recorder import Stack, record
from widthkit.trace.recording import AttributeRecord, Recording
from widthkit.trace.tensor_labels import TensorLabels
from widthkit.trace.units import Units, group_units

AttributeKey = tuple[str, str, "int | None"]
_AFTER_ALL_CALLS = 1 << 60
N_SHRUNK_COPIES = 3
"""How many shrunk copies have to agree with the first run."""


@dataclass(frozen=True)
class Mismatch:
    """Where and how the shrunk model disagrees with the trace.

    Args:
        path: The module where it shows.
        why: In words.
        components: The components that are tied but should not be, if that is what is wrong.
        call: Number of the first operator call with wrong sizes; past the last call where all sizes are right.
    """

    path: str
    why: str
    components: frozenset[int] = frozenset()
    call: int = _AFTER_ALL_CALLS

    @property
    def progress(self) -> tuple[int, int]:
        """How far the shrunk model got: a later call is better, then fewer wrongly tied components."""
        return self.call, -len(self.components)


@dataclass
class Candidate:
    """The recording of the first run and the decisions of the probe so far.

    Args:
        model: The copy that was run.
        inputs: The example inputs, on its device.
        batch: Their batch size.
        recording: What the first run recorded.
        tensor_labels: The labels of the copy's tensors.
        output_shapes: Shapes of the model's outputs.
        notes: Remarks for the user.
        free_outputs: Whether the outputs may shrink.
        fake_values: Whether expensive operators return made-up values.
        forced: Number of a choice -> number of the alternative that the probe took.
        attributes: Integer attributes that the probe found -> the labels they count.
        unrepairable: Class of a module and number of a call in it where no repair helped.
        n_runs: How often a shrunk copy was run.
    """

    model: nn.Module
    inputs: Inputs
    batch: int
    recording: Recording
    tensor_labels: TensorLabels
    output_shapes: list[tuple[int, ...]]
    notes: list[str] = field(default_factory=list)
    free_outputs: bool = False
    fake_values: bool = False
    forced: dict[int, int] = field(default_factory=dict)
    attributes: dict[AttributeKey, Labels] = field(default_factory=dict)
    unrepairable: set[tuple[type, int]] = field(default_factory=set)
    n_runs: int = 0
    _units: tuple[Components, Units] | None = None

    def build(self) -> tuple[ChannelGraph, Components]:
        """Solve and assemble the graph under the decisions so far."""
        solved, units = self.solve(), self.units()
        found = [AttributeRecord(*key, labels) for key, labels in self.attributes.items()]
        graph = build_graph(
            self.model,
            self.recording,
            self.tensor_labels,
            solved,
            units,
            batch=self.batch,
            attributes=[*found, *self.recording.attributes],
            notes=self.notes,
        )
        return graph, solved

    def solve(self) -> Components:
        """Return the components under the decisions so far; attributes tie nothing."""
        return solve(self.recording.store, self.forced)

    def units(self) -> Units:
        """Group the components of :meth:`solve`."""
        solved = self.solve()
        if self._units is None or self._units[0] is not solved:
            self._units = solved, group_units(self.model, self.tensor_labels, solved, self.recording.cuts)
        return self._units[1]


def check(
    candidate: Candidate, graph: ChannelGraph, solved: Components, shrink: Iterable[str], copy_index: int
) -> Mismatch | None:
    """Run a copy with the named groups shrunk and compare it with the first run.

    Args:
        candidate: The first run.
        graph: The graph that it led to.
        solved: Its components.
        shrink: Names of the groups that lose units.
        copy_index: Which of the :data:`N_SHRUNK_COPIES` width vectors to take.
    """
    candidate.n_runs += 1
    names = set(shrink)
    plan = make_plan(graph, {n: units for n, units in _kept_units(graph, copy_index).items() if n in names})
    expected = ExpectedSizes.of(graph, solved, candidate.tensor_labels, plan)
    n = int(solved.unit.max()) + 2
    recording = Recording(store=LabelStore(size=n))
    stack: Stack = []
    first_calls = candidate.recording.calls

    def mismatch(path: str, why: str, components: frozenset[int] = frozenset()) -> Mismatch:
        found = first_divergence(first_calls, recording.calls, solved.unit, expected)
        if found.why:
            at = first_calls[min(found.call, len(first_calls) - 1)].path
            return Mismatch(at, why if raised else found.why, components or found.components, found.call)
        return Mismatch(path, why, components, found.call if found.call < len(first_calls) else _AFTER_ALL_CALLS)

    raised = True
    try:
        slim = apply_plan(candidate.model, plan)
        _label_shrunk(slim, candidate, solved, plan, recording)
        outputs = record(slim, candidate.inputs, recording, stack, fake_values=candidate.fake_values)
    except Exception as error:
        return mismatch(stack[-1][0] if stack else "", f"{type(error).__name__}: {_first_line(error)}")
    raised = False
    shapes = [tuple(t.shape) for t in flat_tensors((outputs,))]
    if shapes != candidate.output_shapes and not candidate.free_outputs:
        return mismatch("", f"the output has shape {shapes} instead of {candidate.output_shapes}")
    conflict = first_conflict(recording, n, expected)
    if conflict is not None:
        return mismatch(conflict.path, conflict.why, conflict.components)
    differs = first_divergence(first_calls, recording.calls, solved.unit, expected).why
    if not differs and len(recording.calls) < len(first_calls):
        differs = "fewer operators run at smaller widths"
    return mismatch("", differs) if differs else None


def _label_shrunk(slim: nn.Module, candidate: Candidate, solved: Components, plan: Plan, recording: Recording) -> None:
    """Label the tensors of a shrunk copy: component ``c`` of the first run becomes label ``c + 1``."""
    for name, tensor in named_tensors(slim).items():
        if name in candidate.tensor_labels:
            dims = [None if labels is None else solved.unit[labels] + 1 for labels in candidate.tensor_labels[name]]
            for dim, index in plan.tensors.get(name, {}).items():
                labels = dims[dim]
                assert labels is not None
                dims[dim] = labels[index]
            recording.set_dims(tensor, tuple(dims))


def _kept_units(graph: ChannelGraph, copy_index: int) -> dict[str, IntArray]:
    """Choose the units that each group keeps, at random. Equal-width groups keep different counts in at least one run.

    Otherwise an integer that counts one group could pass for the count of another. All groups shrink in the first
    copy. At least two units remain where possible, since dims of size 1 broadcast.
    """
    rng = np.random.default_rng(copy_index)
    kept = {}
    for number, (name, width) in enumerate(graph.full.items()):
        least = 2 if width > 2 else 1
        most = width - 1 if copy_index == 0 else width
        span = most - least + 1
        digit = number // span ** max(copy_index - 1, 0)
        kept[name] = np.sort(rng.choice(width, size=most - digit % span, replace=False)).astype(np.int64)
    return kept


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return " ".join(text.split())[:200] if text else "no message"
