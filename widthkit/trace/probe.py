"""Shrink and run again: does what the trace says hold for the smaller model?

The first run cannot see sizes that live in Python (``self.num_heads``, split sizes). So a shrunk copy is run, with
the labels of the first run on its tensors. Every tie of the second run must join labels that the first run had joined
already; an error or a new tie is a misfit. For a misfit the probe tries integer attributes of the module that failed
(they may count kept channels), then the other alternatives of its shape demands, and freezes what nothing mends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from widthkit.clone import named_tensors
from widthkit.errors import TraceError
from widthkit.graph import ChannelGraph, IntArray
from widthkit.plan import apply_plan, make_plan
from widthkit.trace.build import Seeds, build_graph
from widthkit.trace.components import Components, connect, solve
from widthkit.trace.context import AttributeRecord, RunState, flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.labels import Choice, Labels, LabelStore
from widthkit.trace.recorder import record


@dataclass(frozen=True)
class Misfit:
    """Where and how the shrunk model disagrees with the trace."""

    path: str
    why: str
    components: frozenset[int] = frozenset()


@dataclass
class Draft:
    """A graph under probation: the record of the first run and what the probe decided so far."""

    model: nn.Module
    inputs: Inputs
    batch: int
    run: RunState
    seeds: Seeds
    output_shapes: list[tuple[int, ...]]
    forced: dict[int, int] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    free_outputs: bool = False

    def build(self) -> tuple[ChannelGraph, Components]:
        """Solve and assemble with the decisions so far."""
        solved = solve(self.run.store, self.forced)
        graph = build_graph(
            self.model,
            self.run,
            self.seeds,
            solved,
            batch=self.batch,
            extra_frozen=self.frozen,
            notes=self.notes,
        )
        return graph, solved


def probe(draft: Draft, *, seed: int = 0, limit: int = 400) -> ChannelGraph:
    """Return a graph whose shrunk model runs and agrees with the trace.

    Args:
        draft: The traced run.
        seed: Chooses which units the shrunk copy keeps.
        limit: How many shrunk runs to spend before giving up.

    Raises:
        TraceError: If no set of frozen groups makes the shrunk model run.
    """
    for _ in range(limit):
        graph, solved = draft.build()
        misfit = check(draft, graph, solved, set(graph.group_names), seed)
        if misfit is None:
            return graph
        if not (_mend_attributes(draft, misfit, seed) or _mend_choices(draft, misfit, seed)):
            _freeze(draft, graph, solved, misfit, seed)
    raise TraceError(f"{misfit.path or 'model'}: the shrunk model never ran ({misfit.why}); pass freeze= for this part")


def check(draft: Draft, graph: ChannelGraph, solved: Components, shrink: set[str], seed: int) -> Misfit | None:
    """Run a copy with the named groups shrunk and compare its ties with the first run's."""
    rng = np.random.default_rng(seed)
    kept = {n: _subset(int(w), rng) for n, w in zip(graph.group_names, graph.group_widths, strict=True) if n in shrink}
    plan = make_plan(graph, kept)
    run = RunState(store=LabelStore(size=int(solved.unit.max()) + 2))
    stack: list[tuple[str, nn.Module]] = []
    try:
        slim = apply_plan(draft.model, plan)
        for name, tensor in named_tensors(slim).items():
            if name in draft.seeds.labels:
                dims = [None if labels is None else solved.unit[labels] + 1 for labels in draft.seeds.labels[name]]
                for dim, index in plan.tensors.get(name, {}).items():
                    dims[dim] = dims[dim][index]  # type: ignore[index]
                run.set_dims(tensor, tuple(dims))
        outputs = record(slim, draft.inputs, run, stack)
    except Exception as error:
        return Misfit(stack[-1][0] if stack else "", f"{type(error).__name__}: {_first_line(error)}")
    shapes = [tuple(t.shape) for t in flat_tensors((outputs,))]
    if shapes != draft.output_shapes and not draft.free_outputs:
        return Misfit("", f"the output has shape {shapes} instead of {draft.output_shapes}")
    return _disagreement(draft, graph, solved, run)


def _subset(width: int, rng: np.random.Generator) -> IntArray:
    """Keep about 60% of the units, at random, at least one and never all."""
    n = min(max(2 if width > 2 else 1, round(width * 0.6)), width - 1)
    return np.sort(rng.choice(width, size=n, replace=False)).astype(np.int64)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return " ".join(text.split())[:200] if text else "no message"


def _disagreement(draft: Draft, graph: ChannelGraph, solved: Components, run: RunState) -> Misfit | None:
    """Find a tie or freeze of the second run that the first run does not know."""
    n = int(solved.unit.max()) + 2
    free = np.zeros(n, dtype=bool)
    for name, dims in draft.seeds.labels.items():
        for dim, labels in enumerate(dims):
            positions = graph.tensors[name].dims[dim]
            if labels is not None and positions is not None:
                free[solved.unit[labels[positions.group >= 0]] + 1] = True
    original = np.zeros(run.store.size, dtype=bool)
    original[1:n] = True
    is_free = np.zeros(run.store.size, dtype=bool)
    is_free[:n] = free
    unit = connect(run.store.size, run.store.ties)
    bad = _conflict(unit, original, is_free, [labels for labels, _ in run.store.freezes])
    if bad is not None:
        return Misfit(_blame(run, bad), "two channels meet that the full model keeps apart", bad)
    for choice in run.store.choices:
        settled = _settle(choice, unit, original, is_free)
        if settled is None:
            return Misfit(choice.path, f"{choice.where} does not divide after shrinking", _of_choice(choice))
        unit = settled
    return None


def _conflict(unit: Labels, original: Labels, is_free: Labels, freezes: list[Labels]) -> frozenset[int] | None:
    """Return the first-run components that the second run joins or freezes, if any."""
    members = np.flatnonzero(original)
    merged = np.bincount(unit[members], minlength=int(unit.max()) + 1)
    clash = merged > 1
    for labels in freezes:
        clash[np.unique(unit[labels[is_free[labels]]])] = True
    hit = members[clash[unit[members]] & is_free[members]]
    return frozenset((hit - 1).tolist()) if len(hit) else None


def _settle(choice: Choice, unit: Labels, original: Labels, is_free: Labels) -> Labels | None:
    """Take the first alternative under which nothing new is joined; ``None`` when there is none."""
    for alternative in choice.alternatives:
        joined = connect(int(unit.max()) + 1, [(unit[a], unit[b]) for a, b in alternative.ties])[unit]
        touched = [labels for labels in alternative.freezes]
        reached = [np.flatnonzero(np.isin(joined, joined[labels])) for labels in touched]
        if _conflict(joined, original, is_free, reached) is None:
            return joined
    return None


def _of_choice(choice: Choice) -> frozenset[int]:
    labels = [side for alt in choice.alternatives for tie in alt.ties for side in tie]
    return frozenset((np.unique(np.concatenate(labels)) - 1).tolist()) if labels else frozenset()


def _blame(run: RunState, components: frozenset[int]) -> str:
    """Name the module through which the first of these components passed last."""
    wanted = np.array(sorted(components)) + 1
    for path in reversed(list(run.seen)):
        if any(np.isin(labels, wanted).any() for labels in run.seen[path]):
            return path
    return ""


def _still(draft: Draft, misfit: Misfit, seed: int) -> bool:
    """Whether the same place still fails in the same way."""
    graph, solved = draft.build()
    now = check(draft, graph, solved, set(graph.group_names), seed)
    return now is not None and now.path == misfit.path


def _mend_attributes(draft: Draft, misfit: Misfit, seed: int) -> bool:
    """Let an integer attribute follow the channels it counts; twins of the module get the same treatment."""
    module = draft.model.get_submodule(misfit.path)
    for name, element, size in integer_attributes(module):
        for labels in _distinct(draft.run.seen.get(misfit.path, []), size):
            added = [AttributeRecord(misfit.path, name, element, labels)]
            added += _twins(draft, module, misfit.path, name, element)
            before = len(draft.run.attributes)
            draft.run.attributes.extend(added)
            if not _still(draft, misfit, seed):
                return True
            del draft.run.attributes[before:]
    return False


def integer_attributes(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Yield ``(name, element, value)`` of every integer attribute above 1, and of integers in tuples and lists."""
    for name, value in sorted(vars(module).items()):
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield name, None, value
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                if isinstance(item, int) and not isinstance(item, bool) and item > 1:
                    yield name, i, item


def _distinct(arrays: list[Labels], size: int) -> list[Labels]:
    found: dict[bytes, Labels] = {}
    for labels in arrays:
        if len(labels) == size:
            found.setdefault(labels.tobytes(), labels)
    return list(found.values())[:4]


def _twins(draft: Draft, module: nn.Module, path: str, name: str, element: int | None) -> list[AttributeRecord]:
    records = []
    for other_path, other in draft.model.named_modules():
        if other_path == path or type(other) is not type(module):
            continue
        for own, own_element, size in integer_attributes(other):
            arrays = _distinct(draft.run.seen.get(other_path, []), size)
            if (own, own_element) == (name, element) and arrays:
                records.append(AttributeRecord(other_path, name, element, arrays[0]))
    return records


def _mend_choices(draft: Draft, misfit: Misfit, seed: int) -> bool:
    """Take another alternative at a shape demand of the module that failed."""
    _, solved = draft.build()
    for number, choice in enumerate(draft.run.store.choices):
        if choice.path != misfit.path or number in draft.forced:
            continue
        for pick in range(len(choice.alternatives)):
            if pick != solved.taken[number]:
                draft.forced[number] = pick
                if not _still(draft, misfit, seed):
                    return True
                del draft.forced[number]
    return False


def _freeze(draft: Draft, graph: ChannelGraph, solved: Components, misfit: Misfit, seed: int) -> None:
    """Freeze the fewest groups that take the misfit away, the suspects of the failing module first."""
    reason = f"{misfit.path or 'model'}: the shrunk model does not run ({misfit.why})"
    if misfit.components:
        reason = f"{misfit.path or 'model'}: {misfit.why}"
    everything = list(graph.group_names)

    def gone(names: set[str]) -> bool:
        now = check(draft, graph, solved, set(everything) - names, seed)
        return now is None or now.path != misfit.path

    suspects = _suspects(draft, graph, solved, misfit) or everything
    if not gone(set(suspects)):
        suspects = everything
    for name in _minimal(suspects, gone):
        draft.frozen[name] = reason


def _minimal(suspects: list[str], gone: Callable[[set[str]], bool]) -> list[str]:
    """Drop suspects, in halves first and then one by one, as long as the misfit stays away."""
    needed = list(suspects)
    step = len(needed) // 2
    while step >= 1:
        start = 0
        while start < len(needed) and len(needed) > 1:
            rest = needed[:start] + needed[start + step :]
            if rest and gone(set(rest)):
                needed = rest
            else:
                start += step
        step //= 2
    return needed


def _suspects(draft: Draft, graph: ChannelGraph, solved: Components, misfit: Misfit) -> list[str]:
    """List the groups whose units pass through the module that failed, or that met wrongly."""
    components = set(misfit.components)
    if not components:
        for labels in draft.run.seen.get(misfit.path, []):
            components.update(solved.unit[labels].tolist())
    names = []
    for name, group in graph.groups.items():
        site = group.sites[0]
        labels = draft.seeds.labels[site.tensor][site.dim]
        assert labels is not None
        if components.intersection(solved.unit[labels[site.index[:, 0]]].tolist()):
            names.append(name)
    return names
