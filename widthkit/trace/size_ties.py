"""Turn size uses into attributes that follow channels, and into ties between dims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from widthkit.trace.components import connect, solve
from widthkit.trace.labels import Alternative, Labels
from widthkit.trace.recording import AttributeRecord, Recording, SizeUse
from widthkit.trace.sizes import AttributeSource, ComputedSource, DimSource, Source

_UsesByAttribute = dict[AttributeSource, list[SizeUse]]


def freeze_fixed_sizes(recording: Recording) -> None:
    """Freeze what a plain integer cuts off a dim: the cut stays where it is at every width.

    The integer may also be computed from a size in ways that are not followed, such as ``int(c * 0.5)``. Where a module
    does such arithmetic and cuts at plain integers, that size is frozen as well.
    """
    places = set()
    for use in recording.size_uses:
        if isinstance(use.source, int) and use.labels is not None:
            where = use.where or "model"
            recording.store.freeze(use.labels, f"{where}: {use.source} positions are cut off, a number that stays")
            places.add(use.where)
    counted = {AttributeSource(*record.key): record.labels for record in recording.attributes}
    for untraced in recording.untraced:
        if untraced.path in places:
            for labels in _labels_within(untraced.source, counted):
                recording.store.freeze(labels, f"{untraced.path or 'model'}: cuts at numbers computed from this size")


def _labels_within(source: Source | int, counted: Mapping[AttributeSource, Labels]) -> Iterator[Labels]:
    """Yield all labels that a source depends on."""
    if isinstance(source, DimSource):
        yield source.labels
    elif isinstance(source, AttributeSource):
        if source in counted:
            yield counted[source]
    elif isinstance(source, ComputedSource):
        yield from _labels_within(source.left, counted)
        yield from _labels_within(source.right, counted)


def tie_sizes(recording: Recording) -> None:
    """Let attributes follow what they count, and tie dims whose sizes Python computes from one another.

    Skip sizes that already agree, which most do: ``x.view(B, C, -1)``. Dims counted by one attribute are tied; if it
    also sizes a fixed dim, they freeze. A new tie may change which alternatives the solver takes. So uses that tied
    nothing are looked at again, until a pass ties nothing.
    """
    uses = recording.size_uses
    by_attribute = _by_attribute(recording, uses)
    _follow(recording, by_attribute)
    untied = [use for use in uses if not isinstance(use.source, AttributeSource)]
    n_before = -1
    while len(untied) != n_before:
        n_before = len(untied)
        ties = _Ties.of(recording)
        untied = [use for use in untied if not _tie(use, by_attribute, ties)]


class _Ties:
    """What is tied and frozen so far; new ties are added at once, without solving again."""

    def __init__(self, recording: Recording, unit: Labels, frozen: npt.NDArray[np.bool_]) -> None:
        self.recording = recording
        self.unit = unit
        self.frozen = frozen

    @classmethod
    def of(cls, recording: Recording) -> _Ties:
        solved = solve(recording.store)
        return cls(recording, solved.unit, solved.frozen)

    def same_size(self, a: Labels, b: Labels) -> bool:
        """Whether both keep equally many positions at any widths: the same free units, equally often."""
        if a is b:
            return True
        sides = []
        for labels in (a, b):
            units, counts = np.unique(self.unit[labels], return_counts=True)
            free = ~self.frozen[units]
            sides.append((len(labels), units[free].tobytes(), counts[free].tobytes()))
        return sides[0] == sides[1]

    def tie(self, a: Labels, b: Labels) -> None:
        """Tie two label arrays."""
        self.recording.store.tie(a, b)
        self.assume(a, b)

    def assume(self, a: Labels, b: Labels) -> None:
        """Treat two label arrays as tied, because the solver is likely to tie them."""
        merged = connect(len(self.frozen), [(self.unit[a], self.unit[b])])
        frozen = np.zeros(int(merged.max()) + 1, dtype=bool)
        frozen[merged[self.frozen]] = True
        self.unit, self.frozen = merged[self.unit], frozen


def _by_attribute(recording: Recording, uses: Sequence[SizeUse]) -> _UsesByAttribute:
    """List the uses of every attribute: those that rules recorded first, those implied by a quotient last."""
    found: _UsesByAttribute = {}
    for record in recording.attributes:
        key = AttributeSource(*record.key)
        found.setdefault(key, []).append(SizeUse(key, record.labels, record.module))
    for use in uses:
        if isinstance(use.source, AttributeSource):
            found.setdefault(use.source, []).append(use)
    for use in uses:
        for key, labels in _implied(use):
            if key not in found:
                found[key] = [SizeUse(key, labels, use.where)]
    return found


def _implied(use: SizeUse) -> Iterator[tuple[AttributeSource, Labels]]:
    """Yield what a quotient says: where ``self.dim // 4`` counts some labels, ``self.dim`` counts them four times."""
    source = use.source
    if use.labels is None or not isinstance(source, ComputedSource):
        return
    if source.kind == "floordiv" and isinstance(source.left, AttributeSource) and isinstance(source.right, int):
        yield source.left, np.tile(use.labels, source.right)


def _follow(recording: Recording, by_attribute: _UsesByAttribute) -> None:
    """Record what every attribute counts, and tie or freeze all that it counts."""
    for key, own in by_attribute.items():
        counted = [use.labels for use in own if use.labels is not None]
        if not counted:
            continue
        first = counted[0]
        if (key.path, key.name, key.element) not in {record.key for record in recording.attributes}:
            recording.attributes.append(AttributeRecord(key.path, key.name, key.element, first))
        name = f"{key.path or 'model'}: {key.name}"
        if len(counted) < len(own):
            recording.store.freeze(first, f"{name} is a fixed size elsewhere")
        for labels in counted[1:]:
            if len(labels) == len(first):
                recording.store.tie(first, labels, f"{name} counts constant padding")


def _tie(use: SizeUse, by_attribute: _UsesByAttribute, ties: _Ties) -> bool:
    """Tie a dim with those that its size is computed from; return whether they did not agree already."""
    source, labels = use.source, use.labels
    if isinstance(source, DimSource):
        if labels is None:
            reason = f"{use.where or 'model'}: its size is used for a dim of fixed size"
            ties.recording.store.freeze(source.labels, reason)
            return True
        if not ties.same_size(source.labels, labels):
            ties.tie(source.labels, labels)
            return True
    elif isinstance(source, ComputedSource) and source.kind == "floordiv" and labels is not None:
        return _tie_quotient(use.where, source, labels, by_attribute, ties)
    return False


def _tie_quotient(
    where: str, source: ComputedSource, labels: Labels, by_attribute: _UsesByAttribute, ties: _Ties
) -> bool:
    """Tie a dim of size ``C // heads``: every head keeps equally many positions, or whole heads are dropped.

    Args:
        where: Path of the module that divided.
        source: The quotient.
        labels: The dim that has its size.
        by_attribute: What attributes count.
        ties: What is tied and frozen so far.

    Returns:
        Whether the sizes did not agree already.
    """
    whole, count = _labels_of(source.left, by_attribute), _value_of(source.right, by_attribute)
    if whole is None or count is None or len(whole) != count * len(labels):
        return False
    heads = _labels_of(source.right, by_attribute)
    inside = np.tile(labels, count)
    if ties.same_size(whole, inside) or (heads is not None and ties.same_size(whole, np.repeat(heads, len(labels)))):
        return False
    if heads is None or ties.frozen[ties.unit[heads]].all():
        ties.tie(whole, inside)
        return True
    outside = Alternative(f"factor {count}", ((whole, np.repeat(heads, len(labels))),), (labels,))
    options = [Alternative(f"factor {len(labels)}", ((whole, inside),), (heads,)), outside]
    ties.recording.store.choose(where, f"{where or 'model'}: computes a size by division", options)
    ties.assume(whole, inside)
    return True


def _labels_of(source: Source | int, by_attribute: _UsesByAttribute) -> Labels | None:
    if isinstance(source, DimSource):
        return source.labels
    if isinstance(source, AttributeSource):
        return next((use.labels for use in by_attribute.get(source, []) if use.labels is not None), None)
    return None


def _value_of(source: Source | int, by_attribute: _UsesByAttribute) -> int | None:
    if isinstance(source, int):
        return source
    labels = _labels_of(source, by_attribute)
    if labels is None:
        return source.value if isinstance(source, AttributeSource) else None
    return len(labels)
