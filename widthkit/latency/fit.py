"""From measured points of a kernel to its time at any sizes.

Time grows with products of sizes, but in steps: kernels work on blocks of 16 channels, and channel counts that are no
multiple of 16 may take a slower path altogether. So the time is a non-negative combination of the sizes, of the sizes
rounded up to blocks, of the sizes where they are no multiple, and of their products; what is left between fit and
table is interpolated, smoothly, from the nearest points.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BLOCK = 16
"""Channels that vectorised kernels handle at once."""
_MANY = 3
"""From this many open sizes on, only their sum counts."""
_REACH = 0.35
"""How far a measured point reaches, in units of log size."""
_TRUST = 0.3
"""Weight of "no correction" against that of one point at distance 0."""
_RAGGED = 0.7
"""Distance between a multiple of 16 and its neighbours, in units of log size."""


def design(largest: Sequence[int]) -> list[tuple[int, ...]]:
    """Choose the sizes at which a kernel is measured: multiples of 16 and others, small and large.

    Args:
        largest: The largest value of every open size.

    >>> design([64])
    [(3,), (16,), (29,), (32,), (45,), (48,), (58,), (64,)]
    >>> len(design([64, 128])), design([])
    (18, [()])
    """
    n = len(largest)
    if n == 0:
        return [()]
    aligned: list[tuple[float, ...]]
    ragged: list[tuple[float, ...]]
    if n == 1:
        aligned, ragged = [(1.0,), (0.7,), (0.45,), (0.25,)], [(0.9,), (0.7,), (0.45,), (0.05,)]
    elif n == 2:
        aligned = list(itertools.product((1.0, 0.5, 0.25), repeat=2))
        ragged = [(0.9, 0.9), (0.6, 0.3), (0.3, 0.6), (0.15, 0.5), (0.5, 0.15), (0.08, 0.08), (0.9, 0.45), (0.45, 0.9)]
        ragged.append((0.25, 0.8))
    else:
        rng = np.random.default_rng(0)
        aligned = [tuple([share] * n) for share in (1.0, 0.5, 0.2)]
        ragged = [tuple(rng.uniform(0.1, 1.0, n).tolist()) for _ in range(5)]
    found = {tuple(_aligned(s, m) for s, m in zip(point, largest, strict=True)) for point in aligned}
    found |= {tuple(_ragged(s, m) for s, m in zip(point, largest, strict=True)) for point in ragged}
    return sorted(found | {tuple(largest)})


def _aligned(share: float, most: int) -> int:
    size = max(BLOCK, round(share * most / BLOCK) * BLOCK)
    return min(size, most)


def _ragged(share: float, most: int) -> int:
    size = max(1, round(share * most))
    return size if size % 8 or size <= 3 else size - 3


def features(sizes: FloatArray, contracts: bool) -> FloatArray:
    """Return ``[..., features]`` of sizes ``[..., n]``: 1, sizes, in blocks, ragged, and products for contractions."""
    n = sizes.shape[-1]
    one = np.ones((*sizes.shape[:-1], 1))
    if n == 0:
        return one
    if n >= _MANY:
        total = sizes.sum(axis=-1, keepdims=True)
        return np.concatenate([one, total], axis=-1)
    blocks = np.ceil(sizes / BLOCK) * BLOCK
    ragged = np.where(sizes % BLOCK != 0, sizes, 0.0)
    columns = [one, sizes, blocks, ragged]
    if contracts:
        pairs = [(i, j) for i in range(n) for j in range(i, n)] if n == 1 else [(0, 1)]
        for i, j in pairs:
            columns += [(kind[..., i] * kind[..., j])[..., None] for kind in (sizes, blocks)]
            columns.append(
                np.where((ragged[..., i] + ragged[..., j]) > 0, sizes[..., i] * sizes[..., j], 0.0)[..., None]
            )
    return np.concatenate(columns, axis=-1)


@dataclass(frozen=True)
class Curve:
    """A kernel's time as a function of its sizes.

    Args:
        points: ``[points, n]``: where it was measured.
        seconds: ``[points]``.
        contracts: Whether products of sizes matter.
        weights: ``[features]``: the fitted combination.
        rest: ``[points]``: log of measured over fitted.
    """

    points: FloatArray
    seconds: FloatArray
    contracts: bool
    weights: FloatArray
    rest: FloatArray

    @classmethod
    def of(cls, table: dict[tuple[int, ...], float], contracts: bool) -> Curve:
        """Fit a table of ``sizes -> seconds``, all points equally important in relative terms.

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
        return cls(points, seconds, contracts, weights, np.log(seconds / fitted))

    def at(self, sizes: IntArray) -> FloatArray:
        """Return ``[...]`` seconds at sizes ``[..., n]``."""
        return evaluate(sizes.astype(np.float64), self.contracts, self.weights, self.points, self.rest)


def evaluate(
    sizes: FloatArray, contracts: bool, weights: FloatArray, points: FloatArray, rest: FloatArray
) -> FloatArray:
    """Return seconds ``[...]`` of curves at sizes ``[..., n]``.

    Args:
        sizes: Where.
        contracts: As in :class:`Curve`.
        weights: ``[..., features]``, broadcast against ``sizes``, like the points and their rest.
        points: ``[..., points, n]``; NaN where a curve has fewer.
        rest: ``[..., points]``.
    """
    fitted = np.maximum((features(sizes, contracts) * weights).sum(axis=-1), 1e-12)
    if not sizes.shape[-1]:
        return np.asarray(fitted * np.exp(rest[..., 0]))
    weight = np.nan_to_num(np.exp(_squared_distance(sizes[..., None, :], points) / (-2 * _REACH**2)))
    correction = (weight * rest).sum(axis=-1) / (weight.sum(axis=-1) + _TRUST)
    return np.asarray(fitted * np.exp(correction))


def _squared_distance(a: FloatArray, b: FloatArray) -> FloatArray:
    logs = np.log(np.maximum(a, 1.0)) - np.log(np.maximum(b, 1.0))
    apart = (a % BLOCK == 0) != (b % BLOCK == 0)
    return np.asarray((logs**2 + apart * _RAGGED**2).sum(axis=-1))
