"""One multiplier for all groups: the baseline that every search must beat."""

from __future__ import annotations

import math

import numpy as np

from widthkit.budget import Budget
from widthkit.graph.space import SearchSpace


def uniform_widths(space: SearchSpace, budget: Budget) -> dict[str, int]:
    """Return the widths of the largest multiplier inside the budget, to the unit (or to the space's divisor).

    The choices of the space bound the multiplier's widths but do not round them: a baseline that could only take
    every eighth of a width would use less of the budget than the searched network.
    """
    marks = {0.0, 1.0}
    for g in space.groups:
        steps = np.arange(g.narrowest // space.divisor, g.widest // space.divisor + 1)
        marks.update(((steps + 0.5) * space.divisor / g.widest).tolist())
    order = sorted(mark for mark in marks if mark <= 1)
    first, last = 0, len(order) - 1
    while first < last:  # the cost grows with the multiplier, so bisection finds the last mark inside
        middle = (first + last + 1) // 2
        if budget.fits(space.graph, _at(space, order[middle])):
            first = middle
        else:
            last = middle - 1
    return _at(space, order[first])


def _at(space: SearchSpace, ratio: float) -> dict[str, int]:
    widths = {}
    for g in space.groups:
        # Halfway between two multiples the wider one is taken.
        units = math.floor(ratio * g.widest / space.divisor + 0.5 + 1e-9) * space.divisor
        widths[g.name] = g.widest if ratio >= 1 else min(max(units, g.narrowest), g.widest)
    return widths
