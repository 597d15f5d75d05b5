"""Uniform shrinking: one multiplier for all groups, the baseline that every search must beat."""

from __future__ import annotations

from widthkit.search.searcher import OneShotSearcher, WidthVector
from widthkit.search.uniform import uniform_widths


class UniformSearcher(OneShotSearcher):
    """One multiplier for all groups, the largest inside the budget."""

    def propose(self) -> WidthVector:
        """The widths of the largest multiplier."""
        return uniform_widths(self.space, self.budget)
