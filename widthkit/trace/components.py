"""From ties to units: connected components, and the alternatives that leave the most units free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from widthkit.trace.labels import Alternative, Choice, Labels, LabelStore, unique


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
    """Return ``[n]``: the connected component of every node.

    >>> import numpy as np
    >>> connect(4, [(np.array([0, 2]), np.array([1, 2]))]).tolist()
    [0, 0, 1, 2]
    """
    if not ties:
        return np.arange(n, dtype=np.int64)
    rows = np.concatenate([a for a, _ in ties])
    cols = np.concatenate([b for _, b in ties])
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


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
    why = np.full(int(unit.max()) + 1, -1, dtype=np.int64)
    for number in reversed(range(len(reasons))):
        why[unit[store.freezes[number][0]]] = number
    taken = []
    for number, choice in enumerate(store.choices):
        pick = forced.get(number)
        if pick is None:
            pick = _best(choice, unit, why)
        taken.append(pick)
        unit = _take(choice, choice.alternatives[pick], unit, why, reasons)
    present = np.zeros(len(why), dtype=bool)
    present[unit] = True
    return Components((np.cumsum(present) - 1)[unit], why[present], reasons, taken)


def _labels_of(alternatives: Sequence[Alternative]) -> Labels:
    parts = [side for alt in alternatives for tie in alt.ties for side in tie]
    parts += [labels for alt in alternatives for labels in alt.freezes]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _best(choice: Choice, unit: Labels, why: Labels) -> int:
    """Count the units that every alternative leaves free among all labels that the choice touches.

    Only free units are joined: what meets a frozen one is stuck, and there may be millions of these.
    """
    is_free = why < 0
    involved = unit[_labels_of(choice.alternatives)]
    involved = unique(involved[is_free[involved]], len(why))
    local = _numbered(involved, len(why))
    free = []
    for alternative in choice.alternatives:
        joined, stuck = [], [unit[labels] for labels in alternative.freezes]
        for a, b in ((unit[a], unit[b]) for a, b in alternative.ties):
            both = is_free[a] & is_free[b]
            joined.append((local[a[both]], local[b[both]]))
            stuck += [a[~both], b[~both]]
        merged = connect(len(involved), joined)
        is_stuck = np.zeros(merged.max(initial=-1) + 1, dtype=bool)
        for units in stuck:
            is_stuck[merged[local[units[is_free[units]]]]] = True
        free.append(int((~is_stuck).sum()))
    return int(np.argmax(free))


def _numbered(involved: Labels, n: int) -> Labels:
    """Return ``[n]``: the place of every involved component among them."""
    local = np.zeros(n, dtype=np.int64)
    local[involved] = np.arange(len(involved))
    return local


def _take(choice: Choice, alternative: Alternative, unit: Labels, why: Labels, reasons: list[str]) -> Labels:
    """Join what an alternative ties, under the number of one of them, and freeze what it freezes (in ``why``)."""
    ties = [(unit[a], unit[b]) for a, b in alternative.ties if a.size]
    if ties:
        involved = unique(np.concatenate([side for tie in ties for side in tie]), len(why))
        local = _numbered(involved, len(why))
        merged = connect(len(involved), [(local[a], local[b]) for a, b in ties])
        # Where an index repeats, the last value holds; backwards that is the first.
        first = np.zeros(int(merged.max()) + 1, dtype=np.int64)
        first[merged[::-1]] = involved[::-1]
        target = np.arange(len(why))
        target[involved] = first[merged]
        stuck = involved[why[involved] >= 0][::-1]
        why[target[stuck]] = why[stuck]
        unit = target[unit]
    for labels in alternative.freezes:
        components = unit[labels]
        why[components[why[components] < 0]] = len(reasons)
        reasons.append(f"{choice.where}: kept whole so that '{alternative.name}' can vary")
    return unit
