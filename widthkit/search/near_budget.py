"""Points of a space that use almost all of a budget: a number problem, without a network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from widthkit.budget import Budget
from widthkit.graph.space import SearchSpace

BAND = 0.97
"""A result uses more than this share of its budget."""
_BOXES = 1 << 18
_DEAR_BOXES = 1 << 13
_BATCH = 1024
_EXACT = ("macs", "params")

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fullest:
    """The point of a space that uses most of a budget, as far as it was looked for.

    Args:
        widths: The point.
        usage: The share of the budget that it uses.
        proven: Whether no point uses more without leaving the budget, or this one lies in the band.
    """

    widths: dict[str, int]
    usage: float
    proven: bool


def fullest(space: SearchSpace, budget: Budget, band: float = BAND, boxes: int | None = None) -> Fullest:
    """Look for a point in the band: branch and bound over boxes of the space.

    A box is two width vectors, its narrowest and its widest. MACs and parameters do not fall with widths, so a box is
    settled when its narrowest point is outside the budget or its widest one inside; all others are halved. The search
    ends at the first point in the band; it is complete unless it runs out of ``boxes``.

    Args:
        space: The space.
        budget: Its narrowest network must fit.
        band: A point that uses more than this share ends the search.
        boxes: How many boxes to look at before giving up; fewer by default where a cost is not a polynomial.
    """
    monotone = all(limit.kind in _EXACT for limit in budget.limits)
    boxes = boxes or (_BOXES if monotone else _DEAR_BOXES)
    table = _Options(space)
    low = np.zeros((1, len(space.groups)), dtype=np.int64)
    high = table.top[None].copy()
    best, best_usage, seen = low[0], float(table.usage(budget, low)[0]), 0
    stack = [(low, high)]
    while stack and best_usage <= band and seen < boxes:
        low, high = stack.pop()
        seen += len(low)
        low_usage, high_usage = table.usage(budget, low), table.usage(budget, high)
        for genes, usage in ((low, low_usage), (high, high_usage)):
            inside = np.where(usage <= 1, usage, -1.0)
            at = int(inside.argmax()) if len(inside) else 0
            if len(inside) and inside[at] > best_usage:
                best, best_usage = genes[at].copy(), float(inside[at])
        # A box whose widest point fits has no fuller one; one whose narrowest does not fit has none at all.
        open_boxes = (low_usage <= 1) & (high_usage > 1)
        stack += _halves(table, budget, low[open_boxes], high[open_boxes])
    proven = best_usage > band or (monotone and not stack)
    return Fullest(space.decode(best), best_usage, proven)


def _halves(table: _Options, budget: Budget, low: IntArray, high: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Halve every box along the group that changes its cost most, and make batches of the halves."""
    if not len(low):
        return []
    spread = table.widths(high) - table.widths(low)
    weight = table.slopes(budget)
    along = (spread * (np.maximum(weight, 0) + 1e-12)).argmax(axis=1)  # never a group without a choice left
    rows = np.arange(len(low))
    middle = (low[rows, along] + high[rows, along]) // 2
    left, right = high.copy(), low.copy()
    left[rows, along], right[rows, along] = middle, middle + 1
    lows, highs = np.concatenate([low, right]), np.concatenate([left, high])
    parts = max(1, math.ceil(len(lows) / _BATCH))
    return list(zip(np.array_split(lows, parts), np.array_split(highs, parts), strict=True))


class _Options:
    """All groups' choices as one array, to price many genes at once."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.top = np.array([len(g.options) - 1 for g in space.groups], dtype=np.int64)
        self._table = np.zeros((len(space.groups), int(self.top.max(initial=0)) + 1), dtype=np.int64)
        for row, g in zip(self._table, space.groups, strict=True):
            row[: len(g.options)] = g.options
        self._slopes: FloatArray | None = None

    def widths(self, genes: IntArray) -> IntArray:
        """Return the widths of genes ``[n, groups]``."""
        return np.asarray(self._table[np.arange(len(self.top)), genes])

    def usage(self, budget: Budget, genes: IntArray) -> FloatArray:
        """Return ``[n]``: the share of the budget that genes ``[n, groups]`` use."""
        return np.asarray(budget.usage(self.space.graph, self.widths(genes)), dtype=np.float64).reshape(len(genes))

    def slopes(self, budget: Budget) -> FloatArray:
        """Return ``[groups]``: about how much of the budget one unit of each group costs."""
        if self._slopes is None:
            full = np.repeat(self.widths(self.top[None]), len(self.top) + 1, axis=0)
            span = np.maximum(self._table[np.arange(len(self.top)), self.top] - self._table[:, 0], 1)
            full[np.arange(len(self.top)), np.arange(len(self.top))] -= span * (self.top > 0)
            usage = np.asarray(budget.usage(self.space.graph, full), dtype=np.float64)
            self._slopes = (usage[-1] - usage[:-1]) / span
        return self._slopes
