"""One-shot importance pruning: no candidates are compared, the least important units go (torch-pruning's criteria)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from widthkit.budget import Budget
from widthkit.errors import OptionError, close_matches
from widthkit.graph import FloatArray
from widthkit.graph.space import SearchSpace
from widthkit.search.searcher import OneShotSearcher, WidthVector
from widthkit.supernet.ranking import CRITERIA

Scores = Mapping[str, FloatArray]


class ImportanceSearcher(OneShotSearcher):
    """One-shot pruning: the units that matter least go, over all groups (DepGraph, Fang et al. 2023).

    Widths start at the narrowest choice and grow, the most important unit first, as long as the budget holds; a group
    that cannot take its next choice any more keeps its width. One width vector is proposed, the baseline of every
    search that judges networks.

    Args:
        space: The widths to choose from.
        budget: What the result may cost.
        rng: Not used.
        criterion: ``magnitude``, ``bn-scale``, ``lamp``, ``fpgm``, ``taylor`` or ``hessian``.
        unit_scores: From a criterion to a score per unit; the search provides it. Without it all units count alike.
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget,
        rng: np.random.Generator,
        criterion: str = "magnitude",
        unit_scores: Callable[[str], Scores] | None = None,
    ) -> None:
        super().__init__(space, budget, rng)
        if criterion not in CRITERIA:
            raise OptionError(f"unknown importance criterion '{criterion}': {close_matches(criterion, CRITERIA)}")
        self.criterion = criterion
        self._unit_scores = unit_scores

    def propose(self) -> WidthVector:
        """The widths that one ranking of all units leaves."""
        even = {g.name: np.ones(g.widest) for g in self.space.groups}
        scores = even if self._unit_scores is None else self._unit_scores(self.criterion)
        return prune(self.space, self.budget, scores)


def prune(space: SearchSpace, budget: Budget, scores: Scores) -> WidthVector:
    """Return the widths that one global ranking of units leaves inside a budget.

    A choice of c units is worth the score of the c-th best unit of its group: above that threshold there are c.
    """
    steps = []
    for index, g in enumerate(space.groups):
        best = np.sort(np.asarray(scores[g.name], dtype=np.float64))[::-1]
        steps += [(-best[option - 1], option / g.widest, index, option) for option in g.options[1:]]
    widths, full = dict(space.smallest), set()
    for _, _, index, option in sorted(steps):
        name = space.groups[index].name
        wider = {**widths, name: option}
        if name in full or not budget.fits(space.graph, wider):
            full.add(name)
        else:
            widths = wider
    return widths
