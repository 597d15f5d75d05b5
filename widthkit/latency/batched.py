"""Evaluate the curves of all operators at once: a search asks for the latency of thousands of width vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from widthkit.graph import FloatArray, IntArray
from widthkit.latency.curves import Curve, evaluate_curves
from widthkit.latency.kernels import KernelUse

_CHUNK = 1 << 21
"""Numbers in memory at once."""


@dataclass(frozen=True)
class _FittedKernels:
    """Kernels with equally many open sizes, whose curves are evaluated.

    Args:
        contracts: Whether they are contractions.
        counts: ``[uses]``: number of calls.
        forms: ``[uses, sizes, 1 + groups]``: open sizes as affine functions of the widths.
        weights: ``[uses, features]``: coefficients of the curves.
        points: ``[uses, points, sizes]``: measured sizes; NaN if a kernel has fewer points than another.
        residuals: ``[uses, points]``: residuals of the curves; 0 there.
    """

    contracts: bool
    counts: FloatArray
    forms: FloatArray
    weights: FloatArray
    points: FloatArray
    residuals: FloatArray

    @classmethod
    def of(cls, uses: Sequence[KernelUse], curves: Mapping[str, Curve]) -> _FittedKernels:
        own = [curves[use.kernel.key] for use in uses]
        most = max(len(curve.residuals) for curve in own)
        n = uses[0].kernel.n_sizes
        points, residuals = np.full((len(uses), most, n), np.nan), np.zeros((len(uses), most))
        for i, curve in enumerate(own):
            points[i, : len(curve.residuals)] = curve.points
            residuals[i, : len(curve.residuals)] = curve.residuals
        counts = np.array([use.count for use in uses], dtype=np.float64)
        forms = np.stack([use.forms for use in uses])
        return cls(own[0].contracts, counts, forms, np.stack([c.weights for c in own]), points, residuals)

    @property
    def n_numbers(self) -> int:
        """Numbers in memory per width vector."""
        return self.points.size

    def seconds(self, widths: FloatArray) -> FloatArray:
        """Return ``[n]``: seconds of all uses together at widths ``[n, groups]``."""
        sizes = np.rint(np.einsum("ng,usg->nus", widths, self.forms[..., 1:]) + self.forms[..., 0])
        seconds = evaluate_curves(sizes, self.contracts, self.weights, self.points, self.residuals)
        return np.asarray(seconds @ self.counts)


@dataclass(frozen=True)
class _TabulatedKernels:
    """Kernels with one open size, whose times are looked up in a table over all sizes.

    Args:
        contracts: Whether they are contractions.
        counts: ``[uses]``: number of calls.
        forms: ``[uses, 1 + groups]``: the open size as an affine function of the widths.
        row: ``[uses]``: row of each use in the table.
        table: ``[kernels, sizes]``: seconds of every kernel at sizes 0, 1, 2...
    """

    contracts: bool
    counts: FloatArray
    forms: FloatArray
    row: IntArray
    table: FloatArray

    @classmethod
    def of(cls, uses: Sequence[KernelUse], curves: Mapping[str, Curve], widest: IntArray) -> _TabulatedKernels:
        keys = list(dict.fromkeys(use.kernel.key for use in uses))
        most = max(int(use.sizes(widest)[0]) for use in uses)
        table = np.stack([curves[key].at(np.arange(most + 1)[:, None]) for key in keys])
        row = np.array([keys.index(use.kernel.key) for use in uses], dtype=np.int64)
        counts = np.array([use.count for use in uses], dtype=np.float64)
        return cls(uses[0].kernel.contracts, counts, np.stack([use.forms[0] for use in uses]), row, table)

    @property
    def n_numbers(self) -> int:
        """Numbers in memory per width vector."""
        return len(self.row)

    def seconds(self, widths: FloatArray) -> FloatArray:
        """Return ``[n]``: seconds of all uses together at widths ``[n, groups]``."""
        sizes = np.rint(widths @ self.forms[:, 1:].T + self.forms[:, 0]).astype(np.int64)
        return np.asarray(self.table[self.row, sizes] @ self.counts)


@dataclass(frozen=True)
class BatchedCurves:
    """The kernels of a network, stacked by kind.

    Args:
        stacks: Kernels with equally many open sizes, contractions apart from others.
    """

    stacks: tuple[_FittedKernels | _TabulatedKernels, ...]

    @classmethod
    def of(cls, uses: Sequence[KernelUse], curves: Mapping[str, Curve], widest: IntArray) -> BatchedCurves:
        """Stack the kernels of a network with their curves (by kernel key), up to the widest widths ``[groups]``."""
        by_kind: dict[tuple[int, bool], list[KernelUse]] = {}
        for use in uses:
            by_kind.setdefault((use.kernel.n_sizes, use.kernel.contracts), []).append(use)
        stacks = [
            _TabulatedKernels.of(same, curves, widest) if n == 1 else _FittedKernels.of(same, curves)
            for (n, _), same in by_kind.items()
        ]
        return cls(tuple(stacks))

    def seconds(self, widths: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return seconds ``[...]`` of contractions and of other operators at widths ``[..., groups]``."""
        rows = widths.reshape(math.prod(widths.shape[:-1]), widths.shape[-1]).astype(np.float64)
        total = {True: np.zeros(len(rows)), False: np.zeros(len(rows))}
        for stack in self.stacks:
            step = max(1, _CHUNK // max(stack.n_numbers, 1))
            chunks = [stack.seconds(rows[i : i + step]) for i in range(0, len(rows), step)]
            total[stack.contracts] += np.concatenate(chunks) if chunks else 0.0
        shape = widths.shape[:-1]
        return total[True].reshape(shape), total[False].reshape(shape)
