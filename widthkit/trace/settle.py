"""What the claims of a run mean: which attributes follow which channels, and what Python's arithmetic ties."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from widthkit.trace.components import Components, solve
from widthkit.trace.context import AttributeRecord, RunState
from widthkit.trace.labels import Alternative, Labels
from widthkit.trace.numbers import Attribute, Result, Size, Source
from widthkit.trace.watch import Claim


def settle(run: RunState, claims: Sequence[Claim]) -> None:
    """Let attributes follow what they count, and tie dims whose sizes Python computes from one another.

    Claims that the labels foretell anyway (most of them: ``x.view(B, C, -1)``) tie nothing. Attributes that count
    several dims tie these; an attribute that is also a fixed size freezes what it counts.
    """
    counted = _by_attribute(run, claims)
    _follow(run, counted)
    solved = solve(run.store)
    for claim in claims:
        if not isinstance(claim.source, Attribute):
            _compute(run, claim, counted, solved)


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


def _compute(run: RunState, claim: Claim, counted: dict[Attribute, list[Claim]], solved: Components) -> None:
    """Tie a dim with those that its size is computed from, unless they agree anyway."""
    source, labels = claim.source, claim.labels
    if isinstance(source, Size):
        if labels is None:
            run.store.freeze(source.labels, f"{claim.where or 'model'}: its size is used for a dim of fixed size")
        elif not _same_units(source.labels, labels, solved):
            run.store.tie(source.labels, labels)
    elif isinstance(source, Result) and source.kind == "floordiv" and labels is not None:
        whole, divisor = _labels_of(source.left, counted), source.right
        count = _value(divisor, counted)
        if whole is None or count is None or len(whole) != count * len(labels):
            return
        if _same_units(whole, np.tile(labels, count), solved):
            return
        heads = _labels_of(divisor, counted)
        rows = Alternative(
            f"factor {len(labels)}", ((whole, np.tile(labels, count)),), () if heads is None else (heads,)
        )
        options = [rows]
        if heads is not None:
            if _same_units(whole, np.repeat(heads, len(labels)), solved):
                return
            options.append(Alternative(f"factor {count}", ((whole, np.repeat(heads, len(labels))),), (labels,)))
        run.store.choose(claim.where, f"{claim.where or 'model'}: computes a size by division", options)


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


def _same_units(a: Labels, b: Labels, solved: Components) -> bool:
    """Whether as many positions remain of both, whatever is dropped: the same units, as often; fixed ones count."""
    if len(a) != len(b):
        return False
    sides = []
    for labels in (a, b):
        units, counts = np.unique(solved.unit[labels], return_counts=True)
        free = np.array([int(u) not in solved.frozen for u in units], dtype=bool)
        sides.append((units[free].tobytes(), counts[free].tobytes()))
    return sides[0] == sides[1]
