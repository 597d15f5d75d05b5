"""Solve for units: connected components of the ties, and for every choice the alternative that leaves most free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from widthkit.trace.labels import Alternative, Labels, LabelStore, unique

_SMALL = 4096
"""Below so many nodes and ties no sparse matrix is built."""


@dataclass
class Components:
    """Which unit every label belongs to, and why some units are frozen.

    Args:
        unit: ``[labels]``; the component of every label.
        why: ``[components]``; the index in ``reasons`` of why a component is frozen, -1 where it is free.
        reasons: Reasons in words.
        taken: For every choice of the store, the index of the alternative that was taken.
    """

    unit: Labels
    why: Labels
    reasons: Sequence[str]
    taken: list[int]

    @property
    def frozen(self) -> npt.NDArray[np.bool_]:
        """``[components]``; whether a component is frozen."""
        return self.why >= 0

    def reason(self, component: int) -> str | None:
        """Return why a component is frozen; ``None`` for a free one."""
        number = int(self.why[component])
        return self.reasons[number] if number >= 0 else None


def connect(n: int, ties: Sequence[tuple[Labels, Labels]]) -> Labels:
    """Return ``[n]``: the connected component of every node, numbered by their first nodes.

    >>> import numpy as np
    >>> connect(4, [(np.array([0, 2]), np.array([1, 2]))]).tolist()
    [0, 0, 1, 2]
    """
    if not ties:
        return np.arange(n, dtype=np.int64)
    rows = np.concatenate([a for a, _ in ties])
    cols = np.concatenate([b for _, b in ties])
    if len(rows) + n < _SMALL:
        return _connect_small(n, rows, cols)
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _connect_small(n: int, rows: Labels, cols: Labels) -> Labels:
    """Propagate the least number along ties, with pointer jumping; far cheaper than building a sparse matrix."""
    root = np.arange(n, dtype=np.int64)
    while True:
        left, right = root[rows], root[cols]
        if np.array_equal(left, right):
            return np.unique(root, return_inverse=True)[1].astype(np.int64)
        least = np.minimum(left, right)
        np.minimum.at(root, left, least)
        np.minimum.at(root, right, least)
        jumped = root[root]
        while not np.array_equal(jumped, root):
            root, jumped = jumped, jumped[jumped]


def solve(store: LabelStore, forced: Mapping[int, int] | None = None) -> Components:
    """Decide all choices in the order of the run and return the units; the last result is reused if nothing changed.

    Args:
        store: What the run recorded.
        forced: Index of a choice -> index of the alternative to take there.
    """
    state = store.state, tuple(sorted((forced or {}).items()))
    if store.solved is None or store.solved[0] != state:
        store.solved = state, _solve(store, forced or {})
    solved: Components = store.solved[1]
    return solved


def _solve(store: LabelStore, forced: Mapping[int, int]) -> Components:
    unit = connect(store.size, store.ties)
    reasons = [reason for _, reason in store.freezes]
    sets = _UnionFind(unit, np.full(int(unit.max()) + 1, -1, dtype=np.int64))
    for number in reversed(range(len(reasons))):
        sets.why[unit[store.freezes[number][0]]] = number
    taken = []
    for number, choice in enumerate(store.choices):
        options = [_Option.of(alternative, sets) for alternative in choice.alternatives]
        pick = forced.get(number)
        if pick is None:
            pick = _best(options, sets)
        taken.append(pick)
        _take(options[pick], sets, len(reasons))
        reason = f"{choice.where}: kept whole so that '{choice.alternatives[pick].name}' can vary"
        reasons += [reason] * len(options[pick].freezes)
    unit = sets.roots(np.arange(len(sets.why)))[unit]
    present = np.zeros(len(sets.why), dtype=bool)
    present[unit] = True
    return Components((np.cumsum(present) - 1)[unit], sets.why[present], reasons, taken)


class _UnionFind:
    """Components that are joined choice by choice, at a cost that depends on the joined ones only.

    Args:
        unit: ``[labels]``; the component of every label at the start.
        why: ``[components]``; the index of the reason why a component is frozen, -1 where it is free. After a join
            only the root's entry is valid.
    """

    def __init__(self, unit: Labels, why: Labels) -> None:
        self.unit = unit
        self.why = why
        self._parent = np.arange(len(why), dtype=np.int64)

    def of(self, labels: Labels) -> Labels:
        """Return the root of every label's component."""
        return self.roots(self.unit[labels])

    def roots(self, components: Labels) -> Labels:
        """Return the root of every component; paths are compressed."""
        found = self._parent[components]
        further = self._parent[found]
        if not np.array_equal(found, further):
            while not np.array_equal(found, further):
                found, further = further, self._parent[further]
            self._parent[components] = found
        return found

    def join(self, components: Labels, into: Labels) -> None:
        """Make ``into[i]`` the root of ``components[i]``."""
        self._parent[components] = into


@dataclass(frozen=True)
class _Option:
    """An alternative in terms of components: pairs to join, and components to freeze."""

    ties: list[tuple[Labels, Labels]]
    freezes: list[Labels]

    @classmethod
    def of(cls, alternative: Alternative, sets: _UnionFind) -> _Option:
        ties = [(sets.of(a), sets.of(b)) for a, b in alternative.ties if a.size]
        return cls(ties, [sets.of(labels) for labels in alternative.freezes])


def _best(options: Sequence[_Option], sets: _UnionFind) -> int:
    """Return the option that leaves the most units free among all that the choice touches; the first of equals.

    Only free units are joined. What is tied to a frozen unit is frozen as well, and there may be millions of these.
    """
    why = sets.why
    touched = [side for option in options for tie in option.ties for side in tie]
    touched += [units for option in options for units in option.freezes]
    involved, place = _numbered([units[why[units] < 0] for units in touched], len(why))
    n_free = []
    for option in options:
        joined, frozen = [], list(option.freezes)
        for a, b in option.ties:
            both = (why[a] < 0) & (why[b] < 0)
            joined.append((place(a[both]), place(b[both])))
            frozen += [a[~both], b[~both]]
        merged = connect(len(involved), joined)
        is_frozen = np.zeros(merged.max(initial=-1) + 1, dtype=bool)
        for units in frozen:
            is_frozen[merged[place(units[why[units] < 0])]] = True
        n_free.append(int((~is_frozen).sum()))
    return int(np.argmax(n_free))


def _numbered(parts: Sequence[Labels], n: int) -> tuple[Labels, Callable[[Labels], Labels]]:
    """Return the distinct components among some of ``n``, in order, and a function that maps each to its place."""
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    involved = unique(values, n)
    if 8 * len(values) < n:
        return involved, lambda components: np.searchsorted(involved, components)
    local = np.zeros(n, dtype=np.int64)
    local[involved] = np.arange(len(involved))
    return involved, lambda components: local[components]


def _take(option: _Option, sets: _UnionFind, reason: int) -> None:
    """Join what an option ties, and freeze what it freezes.

    Args:
        option: The option.
        sets: Changed in place.
        reason: Index of the reason of the first freeze; the others follow.
    """
    why = sets.why
    if option.ties:
        involved, place = _numbered([side for tie in option.ties for side in tie], len(why))
        merged = connect(len(involved), [(place(a), place(b)) for a, b in option.ties])
        # Of repeated indices NumPy keeps the last value. In reverse order that is the first occurrence.
        first = np.zeros(int(merged.max()) + 1, dtype=np.int64)
        first[merged[::-1]] = involved[::-1]
        target = first[merged]
        frozen = np.flatnonzero(why[involved] >= 0)[::-1]
        why[target[frozen]] = why[involved[frozen]]
        sets.join(involved, target)
    for number, units in enumerate(option.freezes, start=reason):
        roots = sets.roots(units)
        why[roots[why[roots] < 0]] = number
