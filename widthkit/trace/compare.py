"""What a run of the shrunk model says about the first run: which channels meet that must not, and where it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from widthkit.graph import ChannelGraph
from widthkit.graph.plan import Plan
from widthkit.trace.build import Seeds
from widthkit.trace.components import Components, connect
from widthkit.trace.context import Call, RunState
from widthkit.trace.labels import Choice, Labels

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Clash:
    """Components of the first run that the second run joins or freezes, and the module that did."""

    path: str
    why: str
    components: frozenset[int]


@dataclass(frozen=True)
class Expectation:
    """What shrinking should do to every component of the first run.

    Args:
        kept: ``[components]``; whether the component remains.
        owned: ``[components]``; whether it lives in a tensor of the model, so that ``kept`` means something.
        free: ``[components]``; whether it belongs to a channel group.
    """

    kept: Flags
    owned: Flags
    free: Flags

    @classmethod
    def of(cls, graph: ChannelGraph, solved: Components, seeds: Seeds, plan: Plan) -> Expectation:
        """Read off the tensors of the model which components remain."""
        n = int(solved.unit.max()) + 1
        kept, owned, free = np.ones(n, dtype=bool), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        owned[solved.unit[0]] = True
        for name, dims in seeds.labels.items():
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
        """Return how many positions should remain, ``None`` where the model's tensors do not say."""
        if isinstance(labels, int):
            return labels
        components = unit[labels]
        return int(self.kept[components].sum()) if self.owned[components].all() else None


def divergence(first: Sequence[Call], second: Sequence[Call], unit: Labels, expected: Expectation) -> int:
    """Return the number of the first call whose result does not have the size that the trace says.

    A call that raised is missing from the second run, so the answer is then the length of what there is of it.
    """
    for number, (a, b) in enumerate(zip(first, second, strict=False)):
        if (a.name, len(a.outputs)) != (b.name, len(b.outputs)):
            return number
        for before, after in zip(a.outputs, b.outputs, strict=True):
            sizes = [expected.size(labels, unit) for labels in before]
            found = [n if isinstance(n, int) else len(n) for n in after]
            if len(sizes) != len(found) or any(s not in (None, f) for s, f in zip(sizes, found, strict=True)):
                return number
    return len(second)


def disagreement(run: RunState, n: int, expected: Expectation) -> Clash | None:
    """Find a tie or freeze of the second run that the first run does not know.

    Args:
        run: The second run, whose label ``c + 1`` is component ``c`` of the first.
        n: How many labels came from the first run, the constant included.
        expected: Which components are free.
    """
    original = np.zeros(run.store.size, dtype=bool)
    original[1:n] = True
    is_free = np.zeros(run.store.size, dtype=bool)
    is_free[1:n] = expected.free
    unit = connect(run.store.size, run.store.ties)
    bad = _conflict(unit, original, is_free, [labels for labels, _ in run.store.freezes])
    if bad is not None:
        return Clash(_blame(run, bad), "two channels meet that the full model keeps apart", bad)
    for choice in run.store.choices:
        settled = _settle(choice, unit, original, is_free)
        if settled is None:
            return Clash(choice.path, f"{choice.where} does not divide after shrinking", _of_choice(choice, n))
        unit = settled
    return None


def _conflict(unit: Labels, original: Flags, is_free: Flags, freezes: Sequence[Labels]) -> frozenset[int] | None:
    """Return the first-run components that the second run joins or freezes, if any."""
    members = np.flatnonzero(original)
    merged = np.bincount(unit[members], minlength=int(unit.max()) + 1)
    clash = merged > 1
    for labels in freezes:
        clash[unit[labels[is_free[labels]]]] = True
    hit = members[clash[unit[members]] & is_free[members]]
    return frozenset((hit - 1).tolist()) if len(hit) else None


def _settle(choice: Choice, unit: Labels, original: Flags, is_free: Flags) -> Labels | None:
    """Take the first alternative under which nothing new is joined; ``None`` when there is none."""
    for alternative in choice.alternatives:
        joined = connect(int(unit.max()) + 1, [(unit[a], unit[b]) for a, b in alternative.ties])[unit]
        reached = [np.flatnonzero(np.isin(joined, joined[labels])) for labels in alternative.freezes]
        if _conflict(joined, original, is_free, reached) is None:
            return joined
    return None


def _of_choice(choice: Choice, n: int) -> frozenset[int]:
    labels = [side for alt in choice.alternatives for tie in alt.ties for side in tie]
    if not labels:
        return frozenset()
    known = np.unique(np.concatenate(labels))
    return frozenset((known[(known > 0) & (known < n)] - 1).tolist())


def _blame(run: RunState, components: frozenset[int]) -> str:
    """Name the module through which the first of these components passed last."""
    wanted = np.array(sorted(components)) + 1
    for path in reversed(list(run.seen)):
        if any(np.isin(labels, wanted).any() for labels in run.seen[path]):
            return path
    return ""
