"""Mend a misfit: integers kept in Python that count channels, and other ways to meet a shape demand."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from widthkit.trace.candidate import AttributeKey, Draft, Misfit, check
from widthkit.trace.labels import Labels
from widthkit.trace.sizes import integer_attributes

_Pick = tuple[str, "int | None"]
_TRIES = 40
"""How many assignments of integer attributes are tried per misfit."""
_PATIENCE = 600
"""After so many runs of shrunk copies nothing more is mended, only frozen: a trace ends."""


def mend(draft: Draft, misfit: Misfit, turn: int) -> bool:
    """Change the draft so that the shrunk model gets further; return whether that was possible.

    What could not be mended in one module is not tried again at the same place of its twins: a model with a hundred
    equal blocks would take a hundred times as long.
    """
    place = _place(draft, misfit)
    if place in draft.hopeless or draft.n_checks > _PATIENCE:
        return False
    if _mend_attributes(draft, misfit, turn) or _mend_choices(draft, misfit, turn):
        return True
    if place is not None:
        draft.hopeless.add(place)
    return False


def _place(draft: Draft, misfit: Misfit) -> tuple[type, int] | None:
    """Return the class of the module and the number of the call within it, ``None`` where no call is known."""
    if not misfit.path or misfit.call >= len(draft.run.trail):
        return None
    earlier = sum(call.path == misfit.path for call in draft.run.trail[: misfit.call])
    return type(draft.model.get_submodule(misfit.path)), earlier


def advances(draft: Draft, misfit: Misfit, turn: int) -> bool:
    """Whether the shrunk model now gets further than the misfit, and earlier turns still agree."""
    graph, solved = draft.build()
    now = check(draft, graph, solved, graph.group_names, turn)
    if now is not None and now.progress <= misfit.progress:
        return False
    return all(check(draft, graph, solved, graph.group_names, earlier) is None for earlier in range(turn))


def _mend_attributes(draft: Draft, misfit: Misfit, turn: int) -> bool:
    """Let integer attributes follow the channels they count; twins of the module get the same treatment."""
    before = dict(draft.attributes)
    for added in itertools.islice(_assignments(draft, misfit), _TRIES):
        twins = _twins(draft, added)
        for more in [twins, {}] if twins else [{}]:
            draft.attributes = {**before, **more, **added}
            if advances(draft, misfit, turn):
                return True
    draft.attributes = before
    return False


def _assignments(draft: Draft, misfit: Misfit) -> Iterator[dict[AttributeKey, Labels]]:
    """Yield guesses which attributes count which channels, the likeliest first.

    The attribute belongs to the module that ran the call or to one around it. It counts channels of that call's
    result, or channels seen elsewhere in that module. A call with several results, such as a split, may need several.
    """
    unit = draft.solve().unit
    here = _results(draft, misfit.call)
    for path in _outwards(misfit.path):
        attributes = list(integer_attributes(draft.model.get_submodule(path)))
        yield from _joint(path, attributes, distinct(here, unit))
        near = distinct([*here, *draft.run.seen.get(misfit.path, []), *draft.run.seen.get(path, [])], unit)
        for name, element, size in attributes:
            for labels in [a for a in near if len(a) == size][:4]:
                yield {(path, name, element): labels}
        yield from _joint(path, attributes, near[:8])


def _joint(
    path: str, attributes: list[tuple[str, int | None, int]], arrays: list[Labels]
) -> Iterator[dict[AttributeKey, Labels]]:
    """Yield assignments of an attribute of its own to every array of labels, in order where sizes repeat."""
    options = [[(name, element) for name, element, size in attributes if size == len(a)] for a in arrays]
    chosen = [(a, o) for a, o in zip(arrays, options, strict=True) if o]
    if len(chosen) > 1:
        for picks in itertools.islice(_distinct_picks([o for _, o in chosen]), 4):
            yield {(path, *pick): a for pick, (a, _) in zip(picks, chosen, strict=True)}


def _distinct_picks(options: list[list[_Pick]]) -> Iterator[tuple[_Pick, ...]]:
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


def _results(draft: Draft, call: int) -> list[Labels]:
    if call >= len(draft.run.trail):
        return []
    return [labels for out in draft.run.trail[call].outputs for labels in out if not isinstance(labels, int)]


def _outwards(path: str) -> Iterator[str]:
    """Yield a module path and the paths of the modules around it.

    >>> list(_outwards("a.b"))
    ['a.b', 'a', '']
    """
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def distinct(arrays: Iterable[Labels], unit: Labels) -> list[Labels]:
    """Leave out arrays that name the same units as one before, such as the channels of q and of k."""
    found: dict[bytes, Labels] = {}
    known: set[int] = set()
    for labels in arrays:
        if id(labels) not in known:
            known.add(id(labels))
            found.setdefault(unit[labels].tobytes(), labels)
    return list(found.values())


def _twins(draft: Draft, added: dict[AttributeKey, Labels]) -> dict[AttributeKey, Labels]:
    """Give every other module of the same class the same treatment: the array that it saw at the same moment."""
    found: dict[AttributeKey, Labels] = {}
    for (path, name, element), labels in added.items():
        module = draft.model.get_submodule(path)
        moments = [i for i, a in enumerate(draft.run.seen.get(path, [])) if np.array_equal(a, labels)]
        for other_path, other in draft.model.named_modules():
            if other_path == path or type(other) is not type(module) or not moments:
                continue
            sizes = {(n, e): size for n, e, size in integer_attributes(other)}
            arrays = draft.run.seen.get(other_path, [])
            fits = [arrays[i] for i in moments if i < len(arrays) and len(arrays[i]) == sizes.get((name, element))]
            if fits:
                found[other_path, name, element] = fits[0]
    return found


def _mend_choices(draft: Draft, misfit: Misfit, turn: int) -> bool:
    """Take another alternative at a shape demand of the module that failed."""
    solved = draft.solve()
    for number, choice in enumerate(draft.run.store.choices):
        if choice.path != misfit.path or number in draft.forced:
            continue
        for pick in range(len(choice.alternatives)):
            if pick != solved.taken[number]:
                draft.forced[number] = pick
                if advances(draft, misfit, turn):
                    return True
                del draft.forced[number]
    return False
