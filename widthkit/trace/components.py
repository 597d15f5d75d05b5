"""From ties to units: connected components, and the alternatives that leave the most units free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from widthkit.trace.labels import Alternative, Labels, LabelStore, unique

_FEW = 4096
"""Up to so many nodes and ties are joined without a sparse matrix."""


@dataclass
class Components:
    """Which unit every label belongs to, and why some units are frozen.

    Args:
        unit: ``[labels]``; the component of every label.
        why: ``[components]``; the index of the reason why a component is frozen, -1 for the free.
        reasons: In words.
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
        """Say why a component is frozen; ``None`` for a free one."""
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
    if len(rows) + n < _FEW:
        return _connect_few(n, rows, cols)
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _connect_few(n: int, rows: Labels, cols: Labels) -> Labels:
    """Hand the least number on along ties, by leaps; a fraction of what a sparse matrix costs to set up."""
    root = np.arange(n, dtype=np.int64)
    while True:
        left, right = root[rows], root[cols]
        if np.array_equal(left, right):
            return np.unique(root, return_inverse=True)[1].astype(np.int64)
        least = np.minimum(left, right)
        np.minimum.at(root, left, least)
        np.minimum.at(root, right, least)
        leap = root[root]
        while not np.array_equal(leap, root):
            root, leap = leap, leap[leap]


def solve(store: LabelStore, forced: Mapping[int, int] | None = None) -> Components:
    """Settle all choices in the order of the run and return the units; nothing is solved twice in a row.

    Args:
        store: What the run recorded.
        forced: Index of a choice -> index of the alternative to take there, whatever it leaves free.
    """
    state = store.state, tuple(sorted((forced or {}).items()))
    if store.solved is None or store.solved[0] != state:
        store.solved = state, _solve(store, forced or {})
    solved: Components = store.solved[1]
    return solved


def _solve(store: LabelStore, forced: Mapping[int, int]) -> Components:
    unit = connect(store.size, store.ties)
    reasons = [reason for _, reason in store.freezes]
    forest = _Forest(unit, np.full(int(unit.max()) + 1, -1, dtype=np.int64))
    for number in reversed(range(len(reasons))):
        forest.why[unit[store.freezes[number][0]]] = number
    taken = []
    for number, choice in enumerate(store.choices):
        options = [_Option.of(alternative, forest) for alternative in choice.alternatives]
        pick = forced.get(number)
        if pick is None:
            pick = _best(options, forest)
        taken.append(pick)
        _take(options[pick], forest, len(reasons))
        reason = f"{choice.where}: kept whole so that '{choice.alternatives[pick].name}' can vary"
        reasons += [reason] * len(options[pick].freezes)
    unit = forest.roots(np.arange(len(forest.why)))[unit]
    present = np.zeros(len(forest.why), dtype=bool)
    present[unit] = True
    return Components((np.cumsum(present) - 1)[unit], forest.why[present], reasons, taken)


class _Forest:
    """Components that are joined one choice after another, without looking at those that a choice does not touch.

    Args:
        unit: ``[labels]``; the component of every label at the start.
        why: ``[components]``; the index of the reason why a component is frozen, -1 for the free. That of the
            component whose number a joined one bears counts.
    """

    def __init__(self, unit: Labels, why: Labels) -> None:
        self.unit = unit
        self.why = why
        self._parent = np.arange(len(why), dtype=np.int64)

    def of(self, labels: Labels) -> Labels:
        """Return the component of every label now."""
        return self.roots(self.unit[labels])

    def roots(self, components: Labels) -> Labels:
        """Return what components have been joined into."""
        found = self._parent[components]
        further = self._parent[found]
        if not np.array_equal(found, further):
            while not np.array_equal(found, further):
                found, further = further, self._parent[further]
            self._parent[components] = found
        return found

    def join(self, components: Labels, into: Labels) -> None:
        """Let each of the components bear another one's number."""
        self._parent[components] = into


@dataclass(frozen=True)
class _Option:
    """An alternative in terms of components: pairs to join, and components to freeze."""

    ties: list[tuple[Labels, Labels]]
    freezes: list[Labels]

    @classmethod
    def of(cls, alternative: Alternative, forest: _Forest) -> _Option:
        ties = [(forest.of(a), forest.of(b)) for a, b in alternative.ties if a.size]
        return cls(ties, [forest.of(labels) for labels in alternative.freezes])


def _best(options: Sequence[_Option], forest: _Forest) -> int:
    """Count the units that every alternative leaves free among all labels that the choice touches.

    Only free units are joined: what meets a frozen one is stuck, and there may be millions of these.
    """
    why = forest.why
    touched = [side for option in options for tie in option.ties for side in tie]
    touched += [units for option in options for units in option.freezes]
    involved, place = _numbered([units[why[units] < 0] for units in touched], len(why))
    free = []
    for option in options:
        joined, stuck = [], list(option.freezes)
        for a, b in option.ties:
            both = (why[a] < 0) & (why[b] < 0)
            joined.append((place(a[both]), place(b[both])))
            stuck += [a[~both], b[~both]]
        merged = connect(len(involved), joined)
        is_stuck = np.zeros(merged.max(initial=-1) + 1, dtype=bool)
        for units in stuck:
            is_stuck[merged[place(units[why[units] < 0])]] = True
        free.append(int((~is_stuck).sum()))
    return int(np.argmax(free))


def _numbered(parts: Sequence[Labels], n: int) -> tuple[Labels, Callable[[Labels], Labels]]:
    """Return the distinct components among some of ``n``, in order, and a function that gives their places."""
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    involved = unique(values, n)
    if 8 * len(values) < n:
        return involved, lambda components: np.searchsorted(involved, components)
    local = np.zeros(n, dtype=np.int64)
    local[involved] = np.arange(len(involved))
    return involved, lambda components: local[components]


def _take(option: _Option, forest: _Forest, reason: int) -> None:
    """Join what an alternative ties, under the number of one of them, and freeze what it freezes.

    Args:
        option: The alternative.
        forest: Changed in place.
        reason: Number of the reason of the first freeze; the others follow.
    """
    why = forest.why
    if option.ties:
        involved, place = _numbered([side for tie in option.ties for side in tie], len(why))
        merged = connect(len(involved), [(place(a), place(b)) for a, b in option.ties])
        # Where an index repeats, the last value holds; backwards that is the first.
        first = np.zeros(int(merged.max()) + 1, dtype=np.int64)
        first[merged[::-1]] = involved[::-1]
        target = first[merged]
        stuck = np.flatnonzero(why[involved] >= 0)[::-1]
        why[target[stuck]] = why[involved[stuck]]
        forest.join(involved, target)
    for number, units in enumerate(option.freezes, start=reason):
        components = forest.roots(units)
        why[components[why[components] < 0]] = number
