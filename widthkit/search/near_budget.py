"""Points of a space that use almost all of a budget, found from costs alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from widthkit.budget import Budget
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.genes import Genes, usage_of

NEAR = 0.97
"""A result uses more than this share of its budget, where the space has such a point."""
_BOXES = 1 << 18
_COSTLY_BOXES = 1 << 13
_BATCH = 1024
_EXACT = ("macs", "params")


@dataclass(frozen=True)
class Fullest:
    """The point of a space that uses most of a budget, as far as the search went.

    Args:
        widths: The point.
        usage: The share of the budget that it uses.
        proven: Whether no point uses more without leaving the budget, or this one is near it.
    """

    widths: dict[str, int]
    usage: float
    proven: bool


def fullest(space: SearchSpace, budget: Budget, near: float = NEAR, boxes: int | None = None) -> Fullest:
    """Look for a point near the budget: branch and bound over boxes of the space.

    A box is two width vectors, its narrowest and its widest. MACs and parameters do not fall with widths, so a box is
    settled when its narrowest point is outside the budget or its widest one inside; all others are halved. The search
    ends at the first point near the budget; it is complete unless it runs out of ``boxes``.

    Args:
        space: The space.
        budget: Its narrowest network must fit.
        near: A point that uses more than this share ends the search.
        boxes: How many boxes to look at before giving up; fewer by default where a cost is not a polynomial.
    """
    monotone = all(limit.kind in _EXACT for limit in budget.limits)
    boxes = boxes or (_BOXES if monotone else _COSTLY_BOXES)
    table = Genes(space, budget)
    slopes = _slopes(table)
    low = np.zeros((1, len(space.groups)), dtype=np.int64)
    high = table.top[None].copy()
    best, best_usage, seen = low[0], float(table.usage(low)[0]), 0
    stack = [(low, high)]
    while stack and best_usage <= near and seen < boxes:
        low, high = stack.pop()
        seen += len(low)
        low_usage, high_usage = table.usage(low), table.usage(high)
        for genes, usage in ((low, low_usage), (high, high_usage)):
            inside = np.where(usage <= 1, usage, -1.0)
            at = int(inside.argmax()) if len(inside) else 0
            if len(inside) and inside[at] > best_usage:
                best, best_usage = genes[at].copy(), float(inside[at])
        # A box whose widest point fits has no fuller one; one whose narrowest does not fit has none at all.
        open_boxes = (low_usage <= 1) & (high_usage > 1)
        stack += _halves(table, slopes, low[open_boxes], high[open_boxes])
    proven = best_usage > near or (monotone and not stack)
    return Fullest(space.decode(best), best_usage, proven)


def _halves(table: Genes, slopes: FloatArray, low: IntArray, high: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Halve every box along the group that changes its cost most, and make batches of the halves."""
    if not len(low):
        return []
    spread = table.widths(high) - table.widths(low)
    along = (spread * (np.maximum(slopes, 0) + 1e-12)).argmax(axis=1)  # never a group without a choice left
    rows = np.arange(len(low))
    middle = (low[rows, along] + high[rows, along]) // 2
    left, right = high.copy(), low.copy()
    left[rows, along], right[rows, along] = middle, middle + 1
    lows, highs = np.concatenate([low, right]), np.concatenate([left, high])
    parts = max(1, math.ceil(len(lows) / _BATCH))
    return list(zip(np.array_split(lows, parts), np.array_split(highs, parts), strict=True))


def _slopes(genes: Genes) -> FloatArray:
    """Return ``[groups]``: about how much of the budget one unit of each group costs."""
    n = len(genes.top)
    widest, narrowest = genes.widths(genes.top[None]), genes.widths(np.zeros_like(genes.top)[None])
    span = np.maximum(widest - narrowest, 1)[0]
    vectors = np.repeat(widest, n + 1, axis=0)
    vectors[np.arange(n), np.arange(n)] -= span * (genes.top > 0)
    usage = usage_of(genes.space, genes.budget, vectors)
    return np.asarray((usage[-1] - usage[:-1]) / span)
