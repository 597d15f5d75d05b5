"""Fit curves that give the time of a kernel at any sizes from its time at a few measured ones.

Time grows with products of sizes, but in steps: kernels work on blocks of 16 channels, and channel counts that are not
multiples of 16 may take a slower path. So the time is modelled as a non-negative combination of the sizes, of the sizes
rounded up to blocks, of the sizes that are no multiples of 16, and of their products. The residuals at the measured
points are interpolated smoothly between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from widthkit.graph import FloatArray, IntArray

BLOCK = 16
"""Channels that vectorised kernels handle at once."""
_SUM_FROM = 3
"""With this many open sizes or more, only the sum of the sizes counts."""
_BANDWIDTH = 0.35
"""Standard deviation of the Gaussian weights of measured points, in log size."""
_ZERO_WEIGHT = 0.3
"""Weight of a residual of zero in the interpolation; a measured point at distance 0 has weight 1."""
_UNALIGNED_DISTANCE = 0.7
"""Distance, in log size, that is added between a multiple of 16 and a size that is none."""


def sizes_to_measure(largest: Sequence[int]) -> list[tuple[int, ...]]:
    """Choose the sizes at which a kernel is measured: small and large ones, multiples of 16 and others.

    Args:
        largest: ``[n]``: the largest value of every open size.

    >>> sizes_to_measure([64])
    [(3,), (16,), (29,), (32,), (45,), (48,), (58,), (64,)]
    >>> len(sizes_to_measure([64, 128])), sizes_to_measure([])
    (18, [()])
    """
    n = len(largest)
    if n == 0:
        return [()]
    aligned: list[tuple[float, ...]]
    unaligned: list[tuple[float, ...]]
    if n == 1:
        aligned, unaligned = [(1.0,), (0.7,), (0.45,), (0.25,)], [(0.9,), (0.7,), (0.45,), (0.05,)]
    elif n == 2:
        aligned = list(itertools.product((1.0, 0.5, 0.25), repeat=2))
        unaligned = [
            (0.9, 0.9),
            (0.6, 0.3),
            (0.3, 0.6),
            (0.15, 0.5),
            (0.5, 0.15),
            (0.08, 0.08),
            (0.9, 0.45),
            (0.45, 0.9),
        ]
        unaligned.append((0.25, 0.8))
    else:
        rng = np.random.default_rng(0)
        aligned = [tuple([share] * n) for share in (1.0, 0.5, 0.2)]
        unaligned = [tuple(rng.uniform(0.1, 1.0, n).tolist()) for _ in range(5)]
    found = {tuple(_aligned(s, m) for s, m in zip(point, largest, strict=True)) for point in aligned}
    found |= {tuple(_unaligned(s, m) for s, m in zip(point, largest, strict=True)) for point in unaligned}
    return sorted(found | {tuple(largest)})


def _aligned(share: float, most: int) -> int:
    size = max(BLOCK, round(share * most / BLOCK) * BLOCK)
    return min(size, most)


def _unaligned(share: float, most: int) -> int:
    size = max(1, round(share * most))
    return size if size % 8 or size <= 3 else size - 3


def features(sizes: FloatArray, contracts: bool) -> FloatArray:
    """Return ``[..., features]`` of sizes ``[..., n]``; contractions have products of sizes too."""
    n = sizes.shape[-1]
    one = np.ones((*sizes.shape[:-1], 1))
    if n == 0:
        return one
    if n >= _SUM_FROM:
        total = sizes.sum(axis=-1, keepdims=True)
        return np.concatenate([one, total], axis=-1)
    blocks = np.ceil(sizes / BLOCK) * BLOCK
    unaligned = np.where(sizes % BLOCK != 0, sizes, 0.0)
    columns = [one, sizes, blocks, unaligned]
    if contracts:
        product, in_blocks = sizes[..., 0] * sizes[..., -1], blocks[..., 0] * blocks[..., -1]
        slow_path = np.where((unaligned[..., 0] + unaligned[..., -1]) > 0, product, 0.0)
        columns += [column[..., None] for column in (product, in_blocks, slow_path)]
    return np.concatenate(columns, axis=-1)


@dataclass(frozen=True)
class Curve:
    """The time of a kernel as a function of its sizes.

    Args:
        points: ``[points, n]``: the measured sizes.
        contracts: Whether products of sizes matter.
        weights: ``[features]``: coefficients of the fit.
        residuals: ``[points]``: log of measured over fitted time.
    """

    points: FloatArray
    contracts: bool
    weights: FloatArray
    residuals: FloatArray

    @classmethod
    def of(cls, table: dict[tuple[int, ...], float], contracts: bool) -> Curve:
        """Fit a table of ``sizes -> seconds``; the relative errors of all points count alike.

        >>> curve = Curve.of({(c,): 1e-6 * (5 + c) for c in (3, 16, 27, 48, 64)}, False)
        >>> float(curve.at(np.array([[40]]))[0].round(7))
        4.5e-05
        """
        order = sorted(table)
        points = np.array(order, dtype=np.float64).reshape(len(order), -1)
        seconds = np.array([table[p] for p in order])
        rows = features(points, contracts) / seconds[:, None]
        scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
        weights, _ = nnls(rows / scale, np.ones(len(order)))
        weights = weights / scale
        fitted = np.maximum(features(points, contracts) @ weights, 1e-12)
        return cls(points, contracts, weights, np.log(seconds / fitted))

    def at(self, sizes: IntArray) -> FloatArray:
        """Return ``[...]`` seconds at sizes ``[..., n]``."""
        return evaluate_curves(sizes.astype(np.float64), self.contracts, self.weights, self.points, self.residuals)


def evaluate_curves(
    sizes: FloatArray, contracts: bool, weights: FloatArray, points: FloatArray, residuals: FloatArray
) -> FloatArray:
    """Return seconds ``[...]`` of many curves at sizes ``[..., n]``; all arguments broadcast.

    Args:
        sizes: ``[..., n]``.
        contracts: As in :class:`Curve`.
        weights: ``[..., features]``.
        points: ``[..., points, n]``; NaN if a curve has fewer points.
        residuals: ``[..., points]``; 0 there.
    """
    fitted = np.maximum((features(sizes, contracts) * weights).sum(axis=-1), 1e-12)
    if not sizes.shape[-1]:
        return np.asarray(fitted * np.exp(residuals[..., 0]))
    weight = np.nan_to_num(np.exp(_squared_distance(sizes[..., None, :], points) / (-2 * _BANDWIDTH**2)))
    correction = (weight * residuals).sum(axis=-1) / (weight.sum(axis=-1) + _ZERO_WEIGHT)
    return np.asarray(fitted * np.exp(correction))


def _squared_distance(a: FloatArray, b: FloatArray) -> FloatArray:
    logs = np.log(np.maximum(a, 1.0)) - np.log(np.maximum(b, 1.0))
    apart = (a % BLOCK == 0) != (b % BLOCK == 0)
    return np.asarray((logs**2 + apart * _UNALIGNED_DISTANCE**2).sum(axis=-1))
