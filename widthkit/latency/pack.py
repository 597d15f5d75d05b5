"""All operators of a network evaluated at once: searches ask for the latency of thousands of width vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from widthkit.latency.fit import Curve, evaluate
from widthkit.latency.kernels import IntArray, Use

FloatArray = npt.NDArray[np.float64]
_CHUNK = 1 << 21
"""Numbers in flight at once."""


@dataclass(frozen=True)
class _Part:
    """Uses of kernels with equally many open sizes.

    Args:
        contracts: Whether they are contractions.
        counts: ``[uses]``.
        forms: ``[uses, sizes, 1 + groups]``.
        weights: ``[uses, features]``.
        points: ``[uses, points, sizes]``; NaN where a kernel has fewer points than another.
        rest: ``[uses, points]``.
    """

    contracts: bool
    counts: FloatArray
    forms: FloatArray
    weights: FloatArray
    points: FloatArray
    rest: FloatArray

    @classmethod
    def of(cls, uses: Sequence[Use], known: Mapping[str, Curve]) -> _Part:
        curves = [known[use.kernel.key] for use in uses]
        most = max(len(curve.rest) for curve in curves)
        n = uses[0].kernel.n_sizes
        points, rest = np.full((len(uses), most, n), np.nan), np.zeros((len(uses), most))
        for i, curve in enumerate(curves):
            points[i, : len(curve.rest)] = curve.points
            rest[i, : len(curve.rest)] = curve.rest
        counts = np.array([use.count for use in uses], dtype=np.float64)
        forms = np.stack([use.forms for use in uses])
        return cls(curves[0].contracts, counts, forms, np.stack([c.weights for c in curves]), points, rest)

    @property
    def cells(self) -> int:
        """Numbers in flight per width vector."""
        return self.points.size

    def seconds(self, widths: FloatArray) -> FloatArray:
        """Return ``[n]`` seconds of all uses together at widths ``[n, groups]``."""
        sizes = np.rint(np.einsum("ng,usg->nus", widths, self.forms[..., 1:]) + self.forms[..., 0])
        return np.asarray(evaluate(sizes, self.contracts, self.weights, self.points, self.rest) @ self.counts)


@dataclass(frozen=True)
class _Looked:
    """Uses of kernels with one open size, whose times are a row of numbers.

    Args:
        contracts: Whether they are contractions.
        counts: ``[uses]``.
        forms: ``[uses, 1 + groups]``.
        row: ``[uses]``: the kernel of each use.
        table: ``[kernels, sizes]``: seconds of every kernel at sizes 0, 1, 2...
    """

    contracts: bool
    counts: FloatArray
    forms: FloatArray
    row: IntArray
    table: FloatArray

    @classmethod
    def of(cls, uses: Sequence[Use], known: Mapping[str, Curve], widest: IntArray) -> _Looked:
        keys = list(dict.fromkeys(use.kernel.key for use in uses))
        most = max(int(use.sizes(widest)[0]) for use in uses)
        table = np.stack([known[key].at(np.arange(most + 1)[:, None]) for key in keys])
        row = np.array([keys.index(use.kernel.key) for use in uses], dtype=np.int64)
        counts = np.array([use.count for use in uses], dtype=np.float64)
        return cls(uses[0].kernel.contracts, counts, np.stack([use.forms[0] for use in uses]), row, table)

    @property
    def cells(self) -> int:
        """Numbers in flight per width vector."""
        return len(self.row)

    def seconds(self, widths: FloatArray) -> FloatArray:
        """Return ``[n]`` seconds of all uses together at widths ``[n, groups]``."""
        sizes = np.rint(widths @ self.forms[:, 1:].T + self.forms[:, 0]).astype(np.int64)
        return np.asarray(self.table[self.row, sizes] @ self.counts)


@dataclass(frozen=True)
class Packed:
    """The kernels of a network.

    Args:
        parts: Those with equally many sizes together.
    """

    parts: tuple[_Part | _Looked, ...]

    @classmethod
    def of(cls, uses: Sequence[Use], known: Mapping[str, Curve], widest: IntArray) -> Packed:
        """Pack the kernels of a network with their curves, up to the widest widths ``[groups]``."""
        by_kind: dict[tuple[int, bool], list[Use]] = {}
        for use in uses:
            by_kind.setdefault((use.kernel.n_sizes, use.kernel.contracts), []).append(use)
        parts = [
            _Looked.of(some, known, widest) if n == 1 else _Part.of(some, known) for (n, _), some in by_kind.items()
        ]
        return cls(tuple(parts))

    def seconds(self, widths: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return seconds ``[...]`` of contractions and of other operators at widths ``[..., groups]``."""
        rows = widths.reshape(math.prod(widths.shape[:-1]), widths.shape[-1]).astype(np.float64)
        total = {True: np.zeros(len(rows)), False: np.zeros(len(rows))}
        for part in self.parts:
            step = max(1, _CHUNK // max(part.cells, 1))
            parts = [part.seconds(rows[i : i + step]) for i in range(0, len(rows), step)]
            total[part.contracts] += np.concatenate(parts) if parts else 0.0
        shape = widths.shape[:-1]
        return total[True].reshape(shape), total[False].reshape(shape)
