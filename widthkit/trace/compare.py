"""Compare the run of a shrunk model with the first run: which channels remain where, and what is wrongly tied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from widthkit.graph import ChannelGraph
from widthkit.graph.plan import Plan
from widthkit.trace.components import Components, connect
from widthkit.trace.labels import CONSTANT, Choice, Labels
from widthkit.trace.recording import Recording, TracedCall
from widthkit.trace.tensor_labels import TensorLabels

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Conflict:
    """Components of the first run that the second run ties or freezes, and the module where it does."""

    path: str
    why: str
    components: frozenset[int]


@dataclass(frozen=True)
class ExpectedSizes:
    """What shrinking should do to every component of the first run.

    Args:
        kept: ``[components]``; whether the component remains.
        owned: ``[components]``; whether it occurs in a tensor of the model; ``kept`` says nothing about others.
        free: ``[components]``; whether it belongs to a channel group.
    """

    kept: Flags
    owned: Flags
    free: Flags

    @classmethod
    def of(cls, graph: ChannelGraph, solved: Components, tensor_labels: TensorLabels, plan: Plan) -> ExpectedSizes:
        """Read off the plan which components remain."""
        n = int(solved.unit.max()) + 1
        kept, owned, free = np.ones(n, dtype=bool), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        owned[solved.unit[0]] = True
        for name, dims in tensor_labels.items():
            for dim, labels in enumerate(dims):
                if labels is None:
                    continue
                owned[solved.unit[labels]] = True
                positions = graph.tensors[name].dims[dim]
                if positions is not None:
                    free[solved.unit[labels[positions.group >= 0]]] = True
                index = plan.tensors.get(name, {}).get(dim)
                if index is not None:
                    kept[solved.unit[np.delete(labels, index)]] = False
        return cls(kept, owned, free)

    def agrees(self, before: Labels | int, after: Labels | int, reference: Reference) -> bool:
        """Whether a dim of the shrunk model holds the components that should remain of it; order does not matter here.

        Args:
            before: The labels or size of the dim in the reference.
            after: Those in the second run, where label ``c + 1`` is component ``c`` of the first.
            reference: What the second run is compared with.
        """
        if isinstance(before, int):
            return before == (after if isinstance(after, int) else len(after))
        components = reference.component[before]
        if (components < 0).any() or not self.owned[components].all():
            return True  # the model's tensors do not say what should remain
        remaining = components[self.kept[components]]
        if isinstance(after, int) or len(after) != len(remaining):
            return len(remaining) == (after if isinstance(after, int) else len(after))
        found = np.where(after == CONSTANT, reference.component[CONSTANT], after - 1)
        if (found >= len(self.kept)).any() or np.array_equal(found, remaining):
            return True
        # Frozen positions may be labelled in several ways; nothing is dropped among them.
        found, remaining = found[self.free[found]], remaining[self.free[remaining]]
        return np.array_equal(np.sort(found), np.sort(remaining))


@dataclass(frozen=True)
class Reference:
    """A run of the model at full width that shrunk copies are compared with.

    Args:
        calls: Its calls.
        component: ``[labels]``; the component of the first run that every label of this run stands for, or -1.
    """

    calls: Sequence[TracedCall]
    component: Labels

    @classmethod
    def repeated(cls, recording: Recording, n: int, constant: int) -> Reference:
        """Take a repeated run, in which label ``c + 1`` is component ``c`` of the first.

        Args:
            recording: That run.
            n: How many labels came from the first run, the constant included.
            constant: The component of the constant.
        """
        component = np.full(recording.store.size, -1, dtype=np.int64)
        component[1:n] = np.arange(n - 1)
        component[CONSTANT] = constant
        return cls(recording.calls, component)


@dataclass(frozen=True)
class Divergence:
    """The first call of the shrunk model that does something else than that of the first run.

    Args:
        call: Its number.
        why: In words; empty where the second run only ended early.
        components: The components of the first run that are wrongly kept or dropped there.
    """

    call: int
    why: str = ""
    components: frozenset[int] = frozenset()


def first_divergence(reference: Reference, second: Sequence[TracedCall], expected: ExpectedSizes) -> Divergence:
    """Return the first call that differs: another operator, or a result of other channels than those that remain.

    A call that raised is not recorded. So where all recorded calls are right, the answer is the number of calls of the
    second run.

    Args:
        reference: A run at full width.
        second: Calls of the shrunk model's run.
        expected: What should remain.
    """
    right: set[tuple[int, int]] = set()
    for number, (a, b) in enumerate(zip(reference.calls, second, strict=False)):
        name = a.func.overloadpacket.__name__
        if a.func.overloadpacket is not b.func.overloadpacket or len(a.sizes) != len(b.sizes):
            other = b.func.overloadpacket.__name__
            return Divergence(number, f"which operators run depends on widths: '{other}' instead of '{name}'")
        for before, after in zip(a.sizes, b.sizes, strict=True):
            if len(before) != len(after):
                return Divergence(number, f"the number of dims of '{name}' depends on widths")
            for old, new in zip(before, after, strict=True):
                key = id(old), id(new)
                if isinstance(old, int) or key not in right:
                    if not expected.agrees(old, new, reference):
                        what = f"'{name}' does not pick the channels that remain when others are dropped"
                        return Divergence(number, what, _free(old, reference, expected))
                    right.add(key)
    if len(second) > len(reference.calls):
        return Divergence(len(reference.calls), "more operators run at smaller widths")
    return Divergence(len(second))


def _free(labels: Labels | int, reference: Reference, expected: ExpectedSizes) -> frozenset[int]:
    """Return the free components among some labels."""
    if isinstance(labels, int):
        return frozenset()
    components = reference.component[labels]
    return frozenset(components[expected.free[components]].tolist())


def first_conflict(recording: Recording, n: int, expected: ExpectedSizes) -> Conflict | None:
    """Find a tie or freeze of the second run that the first run does not have.

    Args:
        recording: The second run, whose label ``c + 1`` is component ``c`` of the first.
        n: How many labels came from the first run, the constant included.
        expected: Which components are free.
    """
    original = np.zeros(recording.store.size, dtype=bool)
    original[1:n] = True
    is_free = np.zeros(recording.store.size, dtype=bool)
    is_free[1:n] = expected.free
    unit = connect(recording.store.size, recording.store.ties)
    wrong = _wrongly_tied(unit, original, is_free, [labels for labels, _ in recording.store.freezes])
    if wrong is not None:
        path = _last_module_with(recording, wrong)
        return Conflict(path, "the shrunk model ties two channels that the full model keeps apart", wrong)
    for choice in recording.store.choices:
        chosen = _choose(choice, unit, original, is_free)
        if chosen is None:
            return Conflict(choice.path, f"{choice.where} does not divide after shrinking", _components(choice, n))
        unit = chosen
    return None


def _wrongly_tied(unit: Labels, original: Flags, is_free: Flags, freezes: Sequence[Labels]) -> frozenset[int] | None:
    """Return the free components of the first run that the second run ties or freezes, ``None`` without any."""
    members = np.flatnonzero(original)
    wrong = np.bincount(unit[members], minlength=int(unit.max()) + 1) > 1
    for labels in freezes:
        wrong[unit[labels[is_free[labels]]]] = True
    hit = members[wrong[unit[members]] & is_free[members]]
    return frozenset((hit - 1).tolist()) if len(hit) else None


def _choose(choice: Choice, unit: Labels, original: Flags, is_free: Flags) -> Labels | None:
    """Take the first alternative that ties nothing new; ``None`` when there is none."""
    for alternative in choice.alternatives:
        joined = connect(int(unit.max()) + 1, [(unit[a], unit[b]) for a, b in alternative.ties])[unit]
        frozen = [np.flatnonzero(np.isin(joined, joined[labels])) for labels in alternative.freezes]
        if _wrongly_tied(joined, original, is_free, frozen) is None:
            return joined
    return None


def _components(choice: Choice, n: int) -> frozenset[int]:
    """Return the components of the first run that a choice touches."""
    labels = [side for alternative in choice.alternatives for tie in alternative.ties for side in tie]
    if not labels:
        return frozenset()
    touched = np.unique(np.concatenate(labels))
    return frozenset((touched[(touched > 0) & (touched < n)] - 1).tolist())


def _last_module_with(recording: Recording, components: frozenset[int]) -> str:
    """Return the path of the last module that saw any of these components."""
    labels_of = np.array(sorted(components)) + 1
    for path in reversed(list(recording.seen)):
        if any(np.isin(labels, labels_of).any() for labels in recording.seen[path]):
            return path
    return ""
