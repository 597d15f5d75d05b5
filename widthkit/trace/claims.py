"""Check at many widths what the first run took for granted about sizes in Python.

An integer that became the size of a dim must count the positions that remain of it, and a comparison of sizes must
answer the same, at all widths. Both are evaluated here without running the model. Widths where a claim fails are a
*witness*: a shrunk copy of these widths shows whether the model does something else there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from widthkit.graph import ChannelGraph
from widthkit.trace.components import Components
from widthkit.trace.labels import Labels
from widthkit.trace.recording import AttributeRecord, Recording, SizeUse
from widthkit.trace.sizes import ARITHMETIC, COMPARISONS, AttributeSource, Comparison, ComputedSource, DimSource, Source
from widthkit.trace.units import Units

_N_RANDOM = 12
_N_EQUAL = 10
"""How many width vectors are random, and how many give all groups the same width, as far as they have it."""
_Values = npt.NDArray[np.int64]


class Claims:
    """The claims of a first run, evaluated at some widths.

    Args:
        recording: The first run.
        attributes: What the integer attributes of modules count.
        graph: The groups.
        solved: The components of the first run.
        units: Which group every component belongs to.
    """

    def __init__(
        self,
        recording: Recording,
        attributes: list[AttributeRecord],
        graph: ChannelGraph,
        solved: Components,
        units: Units,
    ) -> None:
        self.recording = recording
        self._counted: dict[AttributeSource, Labels] = {}
        for record in attributes:
            self._counted.setdefault(AttributeSource(*record.key), record.labels)
        self._names = graph.group_names
        self._unit = solved.unit
        self._group = units.group
        self.widths = _width_vectors(units.widths, _literals(recording))
        self._kept = _kept(self.widths, units)
        self._counts: dict[int, _Values] = {}

    def witness(self, tried: set[int]) -> tuple[dict[str, int], int] | None:
        """Return widths at which a claim fails, and the number of the claim; ``None`` where all hold.

        Args:
            tried: Numbers of the claims to leave out.
        """
        claims: list[SizeUse | Comparison] = [*self.recording.size_uses, *self.recording.comparisons]
        for number, claim in enumerate(claims):
            if number in tried:
                continue
            fails = self._use_fails(claim) if isinstance(claim, SizeUse) else self._comparison_fails(claim)
            rows = np.flatnonzero(fails)
            if len(rows):
                widths = self.widths[rows[0]]
                return {name: int(w) for name, w in zip(self._names, widths, strict=True)}, number
        return None

    def _use_fails(self, use: SizeUse) -> npt.NDArray[np.bool_]:
        if use.labels is None or not self._varies(use.source, use.labels):
            return np.zeros(len(self.widths), dtype=bool)
        return np.asarray(self._value(use.source) != self._count(use.labels))

    def _comparison_fails(self, claim: Comparison) -> npt.NDArray[np.bool_]:
        with np.errstate(divide="ignore"):
            answers = COMPARISONS[claim.kind](self._value(claim.left), self._value(claim.right))
        return np.broadcast_to(np.asarray(answers) != claim.answer, (len(self.widths),))

    def _varies(self, source: Source | int, labels: Labels) -> bool:
        """Whether a claim depends on widths at all, and on nothing that cannot be evaluated."""
        return bool((self._group[self._unit[labels]] >= 0).any()) or any(
            (self._group[self._unit[own]] >= 0).any() for own in self._within(source)
        )

    def _within(self, source: Source | int) -> Iterator[Labels]:
        if isinstance(source, DimSource):
            yield source.labels
        elif isinstance(source, AttributeSource) and source in self._counted:
            yield self._counted[source]
        elif isinstance(source, ComputedSource):
            yield from self._within(source.left)
            yield from self._within(source.right)

    def _value(self, source: Source | int) -> _Values:
        """Return ``[width vectors]``: the value of a source."""
        if isinstance(source, int):
            return np.full(len(self.widths), source)
        if isinstance(source, DimSource):
            return self._count(source.labels)
        if isinstance(source, AttributeSource):
            labels = self._counted.get(source)
            return np.full(len(self.widths), source.value) if labels is None else self._count(labels)
        left, right = self._value(source.left), self._value(source.right)
        with np.errstate(divide="ignore"):
            return np.asarray(ARITHMETIC[source.kind](left, right))

    def _count(self, labels: Labels) -> _Values:
        """Return ``[width vectors]``: how many of some labels remain."""
        if id(labels) not in self._counts:
            self._counts[id(labels)] = self._kept[:, self._unit[labels]].sum(axis=1, dtype=np.int64)
        return self._counts[id(labels)]


def _literals(recording: Recording) -> list[int]:
    """Return the plain integers that sizes are compared with; just there the answers change."""
    sides = [side for c in recording.comparisons for side in (c.left, c.right) if isinstance(side, int)]
    return sorted({n for side in sides for n in (side - 1, side, side + 1) if n > 0})[:30]


def _width_vectors(full: _Values, literals: list[int]) -> _Values:
    """Return ``[width vectors, groups]``: equal widths for all groups, then random ones."""
    rng = np.random.default_rng(0)
    most = int(full.max(initial=1))
    equal = np.unique(np.concatenate([np.geomspace(1, most, _N_EQUAL).astype(np.int64), np.array(literals, dtype=int)]))
    rows = [np.minimum(full, width) for width in equal] + [rng.integers(1, full + 1) for _ in range(_N_RANDOM)]
    return np.stack(rows).astype(np.int64)


def _kept(widths: _Values, units: Units) -> npt.NDArray[np.bool_]:
    """Return ``[width vectors, components]``: whether a component remains where every group keeps its first units."""
    kept = np.ones((len(widths), len(units.group)), dtype=bool)
    own = units.group >= 0
    kept[:, own] = units.rank[own] < widths[:, units.group[own]]
    return kept
