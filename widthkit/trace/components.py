"""From ties to units: connected components, and the alternatives that leave the most units free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from widthkit.trace.labels import Alternative, Choice, Labels, LabelStore


@dataclass
class Components:
    """Which unit every label belongs to, and why some units are frozen.

    Args:
        unit: ``[labels]``; the component of every label.
        frozen: component -> reason.
        taken: For every choice of the store, the index of the alternative that was taken.
    """

    unit: Labels
    frozen: dict[int, str]
    taken: list[int]


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
    """Settle all choices in the order of the run and return the units.

    Args:
        store: What the run recorded.
        forced: Index of a choice -> index of the alternative to take there, whatever it leaves free.
    """
    unit = connect(store.size, store.ties)
    frozen = _frozen(store, unit)
    taken = []
    for number, choice in enumerate(store.choices):
        pick = (forced or {}).get(number)
        if pick is None:
            pick = _best(choice, unit, frozen)
        taken.append(pick)
        unit = _take(choice, choice.alternatives[pick], unit, frozen)
    present, dense = np.unique(unit, return_inverse=True)
    ids = {component: number for number, component in enumerate(present.tolist())}
    return Components(dense, {ids[component]: reason for component, reason in frozen.items()}, taken)


def _frozen(store: LabelStore, unit: Labels) -> dict[int, str]:
    """Return component -> the reason of the first freeze that names one of its labels."""
    if not store.freezes:
        return {}
    components = np.concatenate([unit[labels] for labels, _ in store.freezes])
    number = np.repeat(np.arange(len(store.freezes)), [len(labels) for labels, _ in store.freezes])
    found, first = np.unique(components, return_index=True)
    return {c: store.freezes[n][1] for c, n in zip(found.tolist(), number[first].tolist(), strict=True)}


def _labels_of(alternatives: Sequence[Alternative]) -> Labels:
    parts = [side for alt in alternatives for tie in alt.ties for side in tie]
    parts += [labels for alt in alternatives for labels in alt.freezes]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _best(choice: Choice, unit: Labels, frozen: Mapping[int, str]) -> int:
    """Count the units that every alternative leaves free among all labels that the choice touches."""
    involved = np.unique(unit[_labels_of(choice.alternatives)])
    is_frozen = np.array([int(c) in frozen for c in involved], dtype=bool)
    free = []
    for alternative in choice.alternatives:
        local = [(_local(involved, unit[a]), _local(involved, unit[b])) for a, b in alternative.ties]
        merged = connect(len(involved), local)
        stuck = np.zeros(merged.max(initial=-1) + 1, dtype=bool)
        stuck[merged[is_frozen]] = True
        for labels in alternative.freezes:
            stuck[merged[_local(involved, unit[labels])]] = True
        free.append(int((~stuck).sum()))
    return int(np.argmax(free))


def _local(involved: Labels, components: Labels) -> Labels:
    return np.searchsorted(involved, components).astype(np.int64)


def _take(choice: Choice, alternative: Alternative, unit: Labels, frozen: dict[int, str]) -> Labels:
    """Join what an alternative ties, under the number of one of them, and freeze what it freezes (in ``frozen``)."""
    ties = [(unit[a], unit[b]) for a, b in alternative.ties if a.size]
    if ties:
        involved = np.unique(np.concatenate([side for tie in ties for side in tie]))
        merged = connect(len(involved), [(_local(involved, a), _local(involved, b)) for a, b in ties])
        _, first = np.unique(merged, return_index=True)
        target = np.arange(int(unit.max()) + 1)
        target[involved] = involved[first[merged]]
        for component in involved[target[involved] != involved].tolist():
            if component in frozen:
                frozen.setdefault(int(target[component]), frozen.pop(component))
        unit = target[unit]
    for labels in alternative.freezes:
        for component in np.unique(unit[labels]).tolist():
            frozen.setdefault(component, f"{choice.where}: kept whole so that '{alternative.name}' can vary")
    return unit
