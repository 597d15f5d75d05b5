"""Greedy slimming: take away, one step at a time, what hurts least (AutoSlim, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from widthkit.budget import Budget
from widthkit.graph.space import SearchSpace
from widthkit.search.searcher import Searcher, WidthVector


class GreedySearcher(Searcher):
    """Take away, step by step, what hurts least (AutoSlim, section 3.3).

    Every step slims the group whose next narrower choice costs the least score, until the budget holds. One pass visits
    every larger budget on the way, so the result's Pareto set is a whole trade-off curve. Ties go to the group that
    saves more.

    Args:
        space: The widths to choose from.
        budget: What the result may cost.
        rng: Not used; greedy slimming draws nothing.
    """

    def __init__(self, space: SearchSpace, budget: Budget, rng: np.random.Generator) -> None:
        super().__init__(space, budget, rng)
        self._now = dict(space.largest)
        self._start = budget.usage(space.graph, self._now)
        self._started = False

    def ask(self) -> list[WidthVector]:
        """The widest network first, then every group one step narrower."""
        if not self._started:
            return [dict(self._now)]
        if self.done:
            return []
        steps = (self.space.narrower(self._now, name) for name in self.space.names)
        return [step for step in steps if step is not None]

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Move to the candidate that scores best; ties go to the one that uses less of the budget."""
        if not self._started:
            self._started = True
            return
        usage = [self.budget.usage(self.space.graph, w) for w in widths]
        worth = [-np.inf if np.isnan(score) else score for score in scores]
        self._now = dict(widths[max(range(len(widths)), key=lambda i: (worth[i], -usage[i]))])

    @property
    def done(self) -> bool:
        """Whether the current widths are inside the budget."""
        return self._started and self.budget.fits(self.space.graph, self._now)

    @property
    def progress(self) -> float:
        """How much of the way down to the budget is done."""
        if self._start <= 1:
            return 1.0
        return float(min(1.0, (self._start - self.budget.usage(self.space.graph, self._now)) / (self._start - 1)))
