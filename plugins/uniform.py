"""Uniform shrinking: one multiplier for all groups, the baseline that every search must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from widthkit.budget import Budget
from widthkit.multiplier import uniform_widths
from widthkit.search.searcher import Searcher, WidthVector
from widthkit.space import SearchSpace


class UniformSearcher(Searcher):
    """One multiplier for all groups, the largest inside the budget."""

    compares_scores = False

    def __init__(self, space: SearchSpace, budget: Budget, rng: np.random.Generator) -> None:
        super().__init__(space, budget, rng)
        self._told = False

    def ask(self) -> list[WidthVector]:
        """The one candidate."""
        return [] if self._told else [uniform_widths(self.space, self.budget)]

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """There is nothing to learn."""
        self._told = True

    def state_dict(self) -> dict[str, Any]:
        """Whether the candidate was judged."""
        return {"told": self._told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore that."""
        self._told = bool(state["told"])

    @property
    def done(self) -> bool:
        """Whether the candidate was judged."""
        return self._told

    @property
    def progress(self) -> float:
        """0 or 1."""
        return float(self._told)
