"""Compare the run of a shrunk model with the first run: where sizes differ, and what is tied that must not be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from widthkit.graph import ChannelGraph
from widthkit.graph.plan import Plan
from widthkit.trace.components import Components, connect
from widthkit.trace.labels import Choice, Labels
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

    def size(self, labels: Labels | int, unit: Labels) -> int | None:
        """Return how many positions should remain; ``None`` where the model's tensors do not say."""
        if isinstance(labels, int):
            return labels
        components = unit[labels]
        return int(self.kept[components].sum()) if self.owned[components].all() else None


def first_divergence(
    first: Sequence[TracedCall], second: Sequence[TracedCall], unit: Labels, expected: ExpectedSizes
) -> int:
    """Return the number of the first call whose result does not have the expected size.

    A call that raised is not recorded. So where all recorded sizes are right, the answer is the number of calls of the
    second run.

    Args:
        first: Calls of the first run.
        second: Calls of the shrunk model's run.
        unit: ``[labels]``; the component of every label of the first run.
        expected: The sizes to find.
    """
    for number, (a, b) in enumerate(zip(first, second, strict=False)):
        if a.func.overloadpacket is not b.func.overloadpacket or len(a.sizes) != len(b.sizes):
            return number
        for before, after in zip(a.sizes, b.sizes, strict=True):
            sizes = [expected.size(labels, unit) for labels in before]
            found = [n if isinstance(n, int) else len(n) for n in after]
            if len(sizes) != len(found) or any(s not in (None, f) for s, f in zip(sizes, found, strict=True)):
                return number
    return len(second)


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
