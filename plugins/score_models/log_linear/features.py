"""Features of the log-linear score model: what is trusted of a supernet, and the errors it is expected to make."""

from __future__ import annotations

from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.polynomial.legendre import legval

from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace

_DRAWS = 512
_ALL_PAIRS = 16
"""Up to this many groups all pairs may interact; with more, only neighbours in depth: pairs grow with the square."""


class Features:
    """Columns for every width vector, from what any space of widths has: widths relative to the widest, and MACs.

    The trusted part is linear in the log of the widths: a slope that all groups share, one in proportion to the MACs
    elasticity of the groups, and a deviation per group. The errors are, per group, a random curve over the log width
    (Legendre polynomials of degree 1 to 3 with amplitudes ``1 / degree``, as Brownian motion has), curves that all
    groups share, and interactions of two groups.

    Args:
        space: Says how far every group reaches. Groups with one choice have no columns.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.free = np.array([i for i, g in enumerate(space.groups) if len(g.options) > 1], dtype=np.int64)
        groups = [space.groups[i] for i in self.free]
        self._widest = np.array([g.widest for g in groups], dtype=np.float64)
        self._span = np.log(self._widest / np.array([g.narrowest for g in groups], dtype=np.float64))
        self._degrees = np.array([min(3, len(g.options) - 1) for g in groups], dtype=np.int64)

    @property
    def n_groups(self) -> int:
        """Groups that have a choice."""
        return len(self.free)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The groups that may interact, in the order of the graph."""
        n = self.n_groups
        return list(combinations(range(n), 2)) if n <= _ALL_PAIRS else [(i, i + 1) for i in range(n - 1)]

    def log_widths(self, widths: IntArray) -> FloatArray:
        """Return ``[n, free groups]``: log widths in one unit for all groups, about -1.7 to 1.7."""
        logs = np.log(np.asarray(widths, dtype=np.float64)[:, self.free] / self._widest)
        return np.asarray(np.sqrt(3.0) + self.per_log * logs)

    @property
    def per_log(self) -> float:
        """How much :meth:`log_widths` grows per unit of natural log width."""
        return float(2 * np.sqrt(3.0) / self._span.mean()) if len(self._span) else 1.0

    @cached_property
    def elasticity(self) -> FloatArray:
        """Return ``[free groups]`` of norm 1: d log MACs / d log width, averaged over the space by regression."""
        rng = np.random.default_rng(0)
        genes = np.stack([rng.integers(len(g.options), size=_DRAWS) for g in self.space.groups], axis=1)
        widths = np.stack([np.array(g.options)[genes[:, i]] for i, g in enumerate(self.space.groups)], axis=1)
        x = self.log_widths(widths)
        y = np.log(np.maximum(self.space.graph.macs(widths), 1).astype(np.float64))
        slopes: FloatArray = np.linalg.lstsq(x - x.mean(0), y - y.mean(), rcond=None)[0]
        norm = float(np.linalg.norm(slopes))
        return slopes / norm if norm > 0 else slopes

    def trusted(self, widths: IntArray) -> FloatArray:
        """Return ``[n, 2 + free groups]``: common slope, slope by elasticity, deviations."""
        x = self.log_widths(widths)
        return np.asarray(x @ self.slopes)

    @cached_property
    def slopes(self) -> FloatArray:
        """``[free groups, 2 + free groups]``: maps the trusted weights to every group's slope."""
        n = self.n_groups
        common = np.full((n, 1), 1 / np.sqrt(max(n, 1)))
        return np.concatenate([common, self.elasticity[:, None], np.eye(n)], axis=1)

    def errors(self, widths: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return curves ``[n, curves]`` and interactions ``[n, pairs]`` that a supernet's scores may hold on top."""
        logs = np.log(np.asarray(widths, dtype=np.float64)[:, self.free] / self._widest)
        place = 1 + 2 * logs / self._span if len(self._span) else logs
        levels = [_legendre(place, degree) / degree for degree in (1, 2, 3)]
        own = [levels[d - 1][:, [j]] for d in (1, 2, 3) for j in np.flatnonzero(self._degrees >= d)]
        shared = [levels[d - 1][:, self._degrees >= d].sum(axis=1, keepdims=True) for d in (2, 3)]
        curves = np.concatenate([*own, *shared, place[:, :0]], axis=1)
        products = [levels[0][:, [i]] * levels[0][:, [j]] for i, j in self.pairs]
        return curves, np.concatenate([*products, place[:, :0]], axis=1)

    @cached_property
    def membership(self) -> tuple[FloatArray, FloatArray]:
        """Which groups every error column belongs to: ``[curves, free groups]`` and ``[pairs, free groups]``."""
        own = [j for d in (1, 2, 3) for j in np.flatnonzero(self._degrees >= d)]
        curves, products = np.zeros((len(own) + 2, self.n_groups)), np.zeros((len(self.pairs), self.n_groups))
        for row, j in enumerate(own):
            curves[row, j] = 1
        for row, pair in enumerate(self.pairs):
            products[row, list(pair)] = 1
        return curves, products


def _legendre(x: FloatArray, degree: int) -> FloatArray:
    """Evaluate the Legendre polynomial that has variance 1 where ``x`` is uniform over -1 to 1."""
    return np.asarray(np.sqrt(2 * degree + 1) * legval(x, [0.0] * degree + [1.0]))
