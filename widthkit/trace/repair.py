"""Repair a mismatch: let integer attributes count channels, or meet a shape demand in another way."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from widthkit.trace.candidate import AttributeKey, Candidate, Mismatch, check
from widthkit.trace.labels import Labels
from widthkit.trace.sizes import integer_attributes

_Attribute = tuple[str, "int | None"]
"""Name of an attribute, and element where it is a tuple or list."""
_MAX_ASSIGNMENTS = 40
"""How many assignments of integer attributes are tried per mismatch."""
_MAX_RUNS = 600
"""After so many runs of shrunk copies mismatches are frozen without a try at repair, so that a trace ends."""


def repair(candidate: Candidate, mismatch: Mismatch, copy_index: int) -> bool:
    """Change the candidate so that the shrunk model gets further; return whether that was possible.

    Where no repair helped, the same call is not tried again in other modules of the class. A model with a hundred equal
    blocks would take a hundred times as long.
    """
    place = _place(candidate, mismatch)
    if place in candidate.unrepairable or candidate.n_runs > _MAX_RUNS:
        return False
    if _repair_attributes(candidate, mismatch, copy_index) or _repair_choices(candidate, mismatch, copy_index):
        return True
    if place is not None:
        candidate.unrepairable.add(place)
    return False


def _place(candidate: Candidate, mismatch: Mismatch) -> tuple[type, int] | None:
    """Return the class of the failing module and the number of the call in it; ``None`` where no call failed."""
    if not mismatch.path or mismatch.call >= len(candidate.recording.calls):
        return None
    earlier = sum(call.path == mismatch.path for call in candidate.recording.calls[: mismatch.call])
    return type(candidate.model.get_submodule(mismatch.path)), earlier


def _advances(candidate: Candidate, mismatch: Mismatch, copy_index: int) -> bool:
    """Whether the shrunk model now gets past the mismatch, and the copies before it still agree."""
    graph, solved = candidate.build()
    now = check(candidate, graph, solved, graph.group_names, copy_index)
    if now is not None and now.progress <= mismatch.progress:
        return False
    return all(check(candidate, graph, solved, graph.group_names, earlier) is None for earlier in range(copy_index))


def _repair_attributes(candidate: Candidate, mismatch: Mismatch, copy_index: int) -> bool:
    """Let integer attributes follow the channels they count, also in other modules of the same class."""
    before = dict(candidate.attributes)
    for added in itertools.islice(_assignments(candidate, mismatch), _MAX_ASSIGNMENTS):
        others = _same_in_other_modules(candidate, added)
        for more in [others, {}] if others else [{}]:
            candidate.attributes = {**before, **more, **added}
            if _advances(candidate, mismatch, copy_index):
                return True
    candidate.attributes = before
    return False


def _assignments(candidate: Candidate, mismatch: Mismatch) -> Iterator[dict[AttributeKey, Labels]]:
    """Yield guesses of which attributes count which channels, the likeliest first.

    The attribute belongs to the module that ran the call or to one around it. It counts channels of that call's
    result, or channels seen elsewhere in that module. A call with several results, such as a split, may need several.
    """
    unit = candidate.solve().unit
    seen = candidate.recording.seen
    here = _results(candidate, mismatch.call)
    for path in _outwards(mismatch.path):
        attributes = list(integer_attributes(candidate.model.get_submodule(path)))
        yield from _joint(path, attributes, _distinct(here, unit))
        near = _distinct([*here, *seen.get(mismatch.path, []), *seen.get(path, [])], unit)
        for name, element, size in attributes:
            for labels in [a for a in near if len(a) == size][:4]:
                yield {(path, name, element): labels}
        yield from _joint(path, attributes, near[:8])


def _joint(
    path: str, attributes: list[tuple[str, int | None, int]], arrays: list[Labels]
) -> Iterator[dict[AttributeKey, Labels]]:
    """Yield assignments of a different attribute to every label array, in order where sizes repeat."""
    options = [[(name, element) for name, element, size in attributes if size == len(a)] for a in arrays]
    counted = [(a, o) for a, o in zip(arrays, options, strict=True) if o]
    if len(counted) > 1:
        for picks in itertools.islice(_distinct_picks([o for _, o in counted]), 4):
            yield {(path, *pick): a for pick, (a, _) in zip(picks, counted, strict=True)}


def _distinct_picks(options: list[list[_Attribute]]) -> Iterator[tuple[_Attribute, ...]]:
    """Yield picks of one option each, no option twice, in lexicographic order.

    >>> list(_distinct_picks([[("a", 0), ("a", 1)], [("a", 0), ("a", 1)]]))
    [(('a', 0), ('a', 1)), (('a', 1), ('a', 0))]
    """
    if not options:
        yield ()
        return
    for pick in options[0]:
        for rest in _distinct_picks([[o for o in more if o != pick] for more in options[1:]]):
            yield (pick, *rest)


def _results(candidate: Candidate, call: int) -> list[Labels]:
    if call >= len(candidate.recording.calls):
        return []
    sizes = candidate.recording.calls[call].sizes
    return [labels for dims in sizes for labels in dims if not isinstance(labels, int)]


def _outwards(path: str) -> Iterator[str]:
    """Yield a module path and the paths of the modules around it.

    >>> list(_outwards("a.b"))
    ['a.b', 'a', '']
    """
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _distinct(arrays: Iterable[Labels], unit: Labels) -> list[Labels]:
    """Leave out arrays of the same units as an earlier one, such as the channels of k after those of q."""
    found: dict[bytes, Labels] = {}
    ids: set[int] = set()
    for labels in arrays:
        if id(labels) not in ids:
            ids.add(id(labels))
            found.setdefault(unit[labels].tobytes(), labels)
    return list(found.values())


def _same_in_other_modules(candidate: Candidate, added: dict[AttributeKey, Labels]) -> dict[AttributeKey, Labels]:
    """Assign the same attributes in other modules of the same class, to the labels they saw at the same moment."""
    found: dict[AttributeKey, Labels] = {}
    seen = candidate.recording.seen
    for (path, name, element), labels in added.items():
        module = candidate.model.get_submodule(path)
        moments = [i for i, a in enumerate(seen.get(path, [])) if np.array_equal(a, labels)]
        for other_path, other in candidate.model.named_modules():
            if other_path == path or type(other) is not type(module) or not moments:
                continue
            sizes = {(n, e): size for n, e, size in integer_attributes(other)}
            arrays = seen.get(other_path, [])
            fits = [arrays[i] for i in moments if i < len(arrays) and len(arrays[i]) == sizes.get((name, element))]
            if fits:
                found[other_path, name, element] = fits[0]
    return found


def _repair_choices(candidate: Candidate, mismatch: Mismatch, copy_index: int) -> bool:
    """Take another alternative at a shape demand of the module that failed."""
    solved = candidate.solve()
    for number, choice in enumerate(candidate.recording.store.choices):
        if choice.path != mismatch.path or number in candidate.forced:
            continue
        for pick in range(len(choice.alternatives)):
            if pick != solved.taken[number]:
                candidate.forced[number] = pick
                if _advances(candidate, mismatch, copy_index):
                    return True
                del candidate.forced[number]
    return False
