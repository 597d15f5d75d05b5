"""Greedy slimming: take away, one step at a time, what hurts least (AutoSlim, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from widthkit.budget import Budget
from widthkit.search.searcher import Searcher, WidthVector
from widthkit.space import SearchSpace


class GreedySearcher(Searcher):
    """Take away, step by step, what hurts least (AutoSlim, section 3.3).

    Every step slims the group whose next narrower choice costs the least score, until the budget holds.
    One pass visits every budget on the way, so the result's Pareto set is a whole trade-off curve. Ties go to the
    group that saves more.
    """

    def __init__(self, space: SearchSpace, budget: Budget, rng: np.random.Generator) -> None:
        super().__init__(space, budget, rng)
        self._now = dict(space.largest)
        self._start = budget.usage(space.graph, self._now)
        self._judged_first = False

    def ask(self) -> list[WidthVector]:
        """The starting point once, then every group one step narrower."""
        if not self._judged_first:
            return [dict(self._now)]
        if self.done:
            return []
        steps = (self.space.narrower(self._now, name) for name in self.space.names)
        return [step for step in steps if step is not None]

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Move to the best candidate."""
        if not self._judged_first:
            self._judged_first = True
            return
        usage = [self.budget.usage(self.space.graph, w) for w in widths]
        worth = [-math.inf if math.isnan(score) else score for score in scores]
        best = max(range(len(widths)), key=lambda i: (worth[i], -usage[i], -i))
        self._now = dict(widths[best])

    def state_dict(self) -> dict[str, Any]:
        """The current widths."""
        return {"now": dict(self._now), "judged_first": self._judged_first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the current widths."""
        self._now = dict(state["now"])
        self._judged_first = bool(state["judged_first"])

    @property
    def done(self) -> bool:
        """Whether the current widths are inside the budget."""
        return self._judged_first and self.budget.fits(self.space.graph, self._now)

    @property
    def progress(self) -> float:
        """How much of the way down to the budget is done."""
        if self._start <= 1:
            return 1.0
        return float(min(1.0, (self._start - self.budget.usage(self.space.graph, self._now)) / (self._start - 1)))
