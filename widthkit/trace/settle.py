"""What the claims of a run mean: which attributes follow which channels, and what Python's arithmetic ties."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from widthkit.trace.components import connect, solve
from widthkit.trace.context import AttributeRecord, RunState
from widthkit.trace.labels import Alternative, Labels
from widthkit.trace.size_uses import Claim
from widthkit.trace.sizes import Attribute, Result, Size, Source


def settle(run: RunState, claims: Sequence[Claim]) -> None:
    """Let attributes follow what they count, and tie dims whose sizes Python computes from one another.

    Claims that the labels foretell anyway (most of them: ``x.view(B, C, -1)``) tie nothing. Attributes that count
    several dims tie these; an attribute that is also a fixed size freezes what it counts. What one claim ties may
    change which alternatives are taken, so claims that tied nothing are weighed again until none does.
    """
    counted = _by_attribute(run, claims)
    _follow(run, counted)
    open_claims = [c for c in claims if not isinstance(c.source, Attribute)]
    n_before = -1
    while len(open_claims) != n_before:
        n_before = len(open_claims)
        known = _Known.of(run)
        open_claims = [c for c in open_claims if not _compute(run, c, counted, known)]


class _Known:
    """What is tied and frozen so far, brought up to date after every tie."""

    def __init__(self, run: RunState, unit: Labels, frozen: npt.NDArray[np.bool_]) -> None:
        self.run = run
        self.unit = unit
        self.frozen = frozen

    @classmethod
    def of(cls, run: RunState) -> _Known:
        solved = solve(run.store)
        return cls(run, solved.unit, solved.frozen)

    def same(self, a: Labels, b: Labels) -> bool:
        """Whether as many positions remain of both, whatever is dropped: the same free units, equally often."""
        if a is b:
            return True
        sides = []
        for labels in (a, b):
            units, counts = np.unique(self.unit[labels], return_counts=True)
            free = ~self.frozen[units]
            sides.append((len(labels), units[free].tobytes(), counts[free].tobytes()))
        return sides[0] == sides[1]

    def tie(self, a: Labels, b: Labels) -> None:
        """Tie, and remember that."""
        self.run.store.tie(a, b)
        self.assume(a, b)

    def assume(self, a: Labels, b: Labels) -> None:
        """Remember a tie that the solver is likely to make."""
        merged = connect(len(self.frozen), [(self.unit[a], self.unit[b])])
        frozen = np.zeros(int(merged.max()) + 1, dtype=bool)
        frozen[merged[self.frozen]] = True
        self.unit, self.frozen = merged[self.unit], frozen


def _by_attribute(run: RunState, claims: Sequence[Claim]) -> dict[Attribute, list[Claim]]:
    """Group claims by attribute; ``k * attribute`` and ``attribute // k`` claim for the attribute, too."""
    found: dict[Attribute, list[Claim]] = {}
    for record in run.attributes:
        key = Attribute(record.module, record.name, record.element)
        found.setdefault(key, []).append(Claim(key, len(record.labels), record.labels, record.module))
    for claim in claims:
        if isinstance(claim.source, Attribute):
            found.setdefault(claim.source, []).append(claim)
    for claim in claims:
        for key, labels in _implied(claim):
            if key not in found:
                found[key] = [Claim(key, len(labels), labels, claim.where)]
    return found


def _implied(claim: Claim) -> Iterator[tuple[Attribute, Labels]]:
    """``self.dim // 4`` positions remain: then ``self.dim`` counts four times these."""
    source = claim.source
    if claim.labels is None or not isinstance(source, Result):
        return
    if source.kind == "floordiv" and isinstance(source.left, Attribute) and isinstance(source.right, int):
        yield source.left, np.tile(claim.labels, source.right)


def _follow(run: RunState, counted: dict[Attribute, list[Claim]]) -> None:
    for key, own in counted.items():
        labelled = [c for c in own if c.labels is not None]
        if not labelled:
            continue
        first = labelled[0].labels
        assert first is not None
        known = {(r.module, r.name, r.element) for r in run.attributes}
        if (key.path, key.name, key.element) not in known:
            run.attributes.append(AttributeRecord(key.path, key.name, key.element, first))
        name = f"{key.path or 'model'}: {key.name}"
        if len(labelled) < len(own):
            run.store.freeze(first, f"{name} is a fixed size elsewhere")
        for claim in labelled[1:]:
            assert claim.labels is not None
            if len(claim.labels) == len(first):
                run.store.tie(first, claim.labels, f"{name} counts constant padding")


def _compute(run: RunState, claim: Claim, counted: dict[Attribute, list[Claim]], known: _Known) -> bool:
    """Tie a dim with those that its size is computed from, unless they agree anyway; return whether it was needed."""
    source, labels = claim.source, claim.labels
    if isinstance(source, Size):
        if labels is None:
            run.store.freeze(source.labels, f"{claim.where or 'model'}: its size is used for a dim of fixed size")
            return True
        if not known.same(source.labels, labels):
            known.tie(source.labels, labels)
            return True
    elif isinstance(source, Result) and source.kind == "floordiv" and labels is not None:
        return _divide(run, claim.where, source, labels, counted, known)
    return False


def _divide(
    run: RunState,
    where: str,
    source: Result,
    labels: Labels,
    counted: dict[Attribute, list[Claim]],
    known: _Known,
) -> bool:
    """``C // heads`` positions remain: equally many in every head, or whole heads go; whether that had to be said."""
    whole, count = _labels_of(source.left, counted), _value(source.right, counted)
    if whole is None or count is None or len(whole) != count * len(labels):
        return False
    heads = _labels_of(source.right, counted)
    inside = np.tile(labels, count)
    if known.same(whole, inside) or (heads is not None and known.same(whole, np.repeat(heads, len(labels)))):
        return False
    if heads is None or known.frozen[known.unit[heads]].all():
        known.tie(whole, inside)
        return True
    outside = Alternative(f"factor {count}", ((whole, np.repeat(heads, len(labels))),), (labels,))
    options = [Alternative(f"factor {len(labels)}", ((whole, inside),), (heads,)), outside]
    run.store.choose(where, f"{where or 'model'}: computes a size by division", options)
    known.assume(whole, inside)
    return True


def _labels_of(source: Source | int, counted: dict[Attribute, list[Claim]]) -> Labels | None:
    if isinstance(source, Size):
        return source.labels
    if isinstance(source, Attribute):
        return next((c.labels for c in counted.get(source, []) if c.labels is not None), None)
    return None


def _value(source: Source | int, counted: dict[Attribute, list[Claim]]) -> int | None:
    if isinstance(source, int):
        return source
    labels = _labels_of(source, counted)
    return None if labels is None else len(labels)
