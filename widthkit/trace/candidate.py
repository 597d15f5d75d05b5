"""A candidate graph with the decisions behind it, and the check that runs a shrunk copy against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from widthkit.graph import ChannelGraph, IntArray
from widthkit.graph.plan import Plan, apply_plan, make_plan
from widthkit.modules.clone import named_tensors
from widthkit.trace.build import build_graph
from widthkit.trace.compare import ExpectedSizes, Reference, first_conflict, first_divergence
from widthkit.trace.components import Components, solve
from widthkit.trace.inputs import Inputs
from widthkit.trace.labels import CONSTANT, Dims, Labels, LabelStore
from widthkit.trace.outputs import Outputs
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
        raised: Whether the shrunk model raised an exception.
    """

    path: str
    why: str
    components: frozenset[int] = frozenset()
    call: int = _AFTER_ALL_CALLS
    raised: bool = False

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
        original: The user's model, which is copied and never run.
        example: The example inputs with their values.
        output_dims: The labels of the outputs' dims.
        notes: Remarks for the user.
        free_outputs: Whether the outputs may shrink.
        fake_values: Whether expensive operators return made-up values.
        forced: Number of a choice -> number of the alternative that the probe took.
        attributes: Integer attributes that the probe found -> the labels they count.
        unrepairable: Class of a module and number of a call in it where no repair helped.
        n_runs: How often a shrunk copy was run.
        repeats_differ: Whether a second run of the model runs other operators than the first.
        repeated: That second run, and the components it was labelled with.
        witness: Widths at which a claim of the first run does not hold (:mod:`widthkit.trace.claims`).
    """

    model: nn.Module
    inputs: Inputs
    batch: int
    recording: Recording
    tensor_labels: TensorLabels
    output_shapes: list[tuple[int, ...]]
    original: nn.Module
    example: Inputs
    output_dims: list[Dims]
    notes: list[str] = field(default_factory=list)
    free_outputs: bool = False
    fake_values: bool = False
    forced: dict[int, int] = field(default_factory=dict)
    attributes: dict[AttributeKey, Labels] = field(default_factory=dict)
    unrepairable: set[tuple[type, int]] = field(default_factory=set)
    n_runs: int = 0
    repeats_differ: bool = False
    repeated: tuple[Components, Reference] | None = None
    witness: dict[str, int] = field(default_factory=dict)
    _units: tuple[Components, Units] | None = None

    def build(self) -> tuple[ChannelGraph, Components]:
        """Solve and assemble the graph under the decisions so far."""
        solved, units = self.solve(), self.units()
        graph = build_graph(
            self.model,
            self.recording,
            self.tensor_labels,
            solved,
            units,
            batch=self.batch,
            attributes=self.attribute_records(),
            notes=self.notes,
        )
        return graph, solved

    def attribute_records(self) -> list[AttributeRecord]:
        """Return what integer attributes count; those that the probe found come first."""
        found = [AttributeRecord(*key, labels) for key, labels in self.attributes.items()]
        return [*found, *self.recording.attributes]

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
        copy_index: Which of the :data:`N_SHRUNK_COPIES` width vectors to take; the next number is for
            ``candidate.witness``.
    """
    names = set(shrink)
    chosen = _kept_units(graph, copy_index) if copy_index < N_SHRUNK_COPIES else _units_of(graph, candidate.witness)
    plan = make_plan(graph, {n: units for n, units in chosen.items() if n in names})
    expected = ExpectedSizes.of(graph, solved, candidate.tensor_labels, plan)
    run = _Run.of(candidate, solved, plan)
    reference = _reference(candidate, solved)
    found = first_divergence(reference, run.recording.calls, expected)
    if found.why and not candidate.repeats_differ and not found.components and _repeats_differ(candidate, solved):
        candidate.repeats_differ = True
        reference = _reference(candidate, solved)
        found = first_divergence(reference, run.recording.calls, expected)
    n_calls = len(reference.calls)
    wrong = _what_is_wrong(candidate, run, expected) or (found.why and ("", found.why, frozenset())) or None
    if wrong is None:
        return None if found.call >= n_calls else Mismatch("", "fewer operators run at smaller widths", call=found.call)
    path, why, components = wrong
    if not found.why:
        return Mismatch(
            path, why, components, found.call if found.call < n_calls else _AFTER_ALL_CALLS, bool(run.error)
        )
    path = reference.calls[min(found.call, n_calls - 1)].path
    return Mismatch(path, why if run.error else found.why, components or found.components, found.call, bool(run.error))


_Wrong = tuple[str, str, "frozenset[int]"]
"""Module, what is wrong in words, and the components that are tied but should not be."""


def _what_is_wrong(candidate: Candidate, run: _Run, expected: ExpectedSizes) -> _Wrong | None:
    """Say whether a copy raised, returned other shapes, or tied other channels than the first run."""
    if run.error:
        return run.stack[-1][0] if run.stack else "", run.error, frozenset()
    shapes = [tuple(t.shape) for t in run.outputs.tensors]
    if shapes != candidate.output_shapes and not candidate.free_outputs:
        return "", f"the output has shape {shapes} instead of {candidate.output_shapes}", frozenset()
    conflict = first_conflict(run.recording, run.n, expected)
    return None if conflict is None else (conflict.path, conflict.why, conflict.components)


@dataclass
class _Run:
    """One run of a copy whose labels are the components of the first run, plus one.

    Args:
        n: How many labels came from the first run, the constant included.
        recording: What the run recorded.
        stack: The running modules, where it raised.
        error: What it raised, in words.
        outputs: What it returned.
    """

    n: int
    recording: Recording
    stack: Stack = field(default_factory=list)
    error: str = ""
    outputs: Outputs = field(default_factory=Outputs)

    @classmethod
    def of(cls, candidate: Candidate, solved: Components, plan: Plan) -> _Run:
        candidate.n_runs += 1
        n = int(solved.unit.max()) + 2
        run = cls(n, Recording(store=LabelStore(size=n)))
        try:
            slim = apply_plan(candidate.model, plan)
            _label_shrunk(slim, candidate, solved, plan, run.recording)
            run.outputs = record(slim, candidate.inputs, run.recording, run.stack, fake_values=candidate.fake_values)
        except Exception as error:
            run.error = f"{type(error).__name__}: {_first_line(error)}"
        return run


def _reference(candidate: Candidate, solved: Components) -> Reference:
    """Return the first run, or a repeated one where a model that keeps something between calls runs other operators."""
    if not candidate.repeats_differ:
        return Reference(candidate.recording.calls, solved.unit)
    if candidate.repeated is None or candidate.repeated[0] is not solved:
        plan = make_plan(candidate.build()[0], {})
        run = _Run.of(candidate, solved, plan)
        constant = int(solved.unit[CONSTANT])
        candidate.repeated = solved, Reference.repeated(run.recording, run.n, constant)
    return candidate.repeated[1]


def _repeats_differ(candidate: Candidate, solved: Components) -> bool:
    """Whether a copy of full width runs other operators than the first run."""
    run = _Run.of(candidate, solved, make_plan(candidate.build()[0], {}))
    names = [[call.func for call in calls] for calls in (candidate.recording.calls, run.recording.calls)]
    return not run.error and names[0] != names[1]


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


def _units_of(graph: ChannelGraph, widths: Mapping[str, int]) -> dict[str, IntArray]:
    """Choose units at random for given widths."""
    rng = np.random.default_rng(0)
    return {
        name: np.sort(rng.choice(width, size=min(widths.get(name, width), width), replace=False)).astype(np.int64)
        for name, width in graph.full.items()
    }


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return " ".join(text.split())[:200] if text else "no message"
