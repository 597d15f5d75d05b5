"""What a searcher is: it proposes widths and is told their scores.

Searchers live outside the core and come in through the entry-point group ``widthkit.searchers``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from widthkit.budget import Budget
from widthkit.graph.space import SearchSpace
from widthkit.registry import Registry

WidthVector = dict[str, int]
"""Group name -> width, for every group of the space, in its order."""


class StandAlone(list[WidthVector]):
    """Width vectors to train on their own, instead of judging them inside the supernet.

    :meth:`Searcher.ask` may return one; their stand-alone accuracies are then told as scores.
    """


class Searcher(ABC):
    """Ask for widths, tell their scores, until :attr:`done`.

    A searcher is deterministic: what it asks follows from its arguments, its generator and what it was told. So an
    interrupted search is resumed by telling it again what is known.

    A constructor may have more parameters: options, which users set, and these, which the search fills in unless the
    user does: ``unit_scores`` (criterion -> group name -> importance of every unit) and ``history`` (the width vectors
    that trained best, with their losses).

    Args:
        space: The widths to choose from.
        budget: What the result may cost.
        rng: The only source of randomness.
    """

    def __init__(self, space: SearchSpace, budget: Budget, rng: np.random.Generator) -> None:
        self.space = space
        self.budget = budget
        self.rng = rng

    @abstractmethod
    def ask(self) -> list[WidthVector] | StandAlone:
        """Propose the next widths to judge; an empty list when the search is done."""

    @abstractmethod
    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Receive the scores (higher is better; one that is not finite comes as minus infinity) of what was asked."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether there is nothing left to ask."""

    # What follows has a default that suits most searchers.

    @property
    def progress(self) -> float:
        """How far the search has come, from 0 to 1; an estimate is fine."""
        return float(self.done)

    @property
    def proposals(self) -> int | None:
        """How many width vectors it will propose in all, repeated ones included; ``None`` where that is not known.

        Progress is then counted in them, and :attr:`progress` is not asked.
        """
        return None

    @property
    def trainings(self) -> int:
        """How many networks it will ask to train on their own, at most; the search refuses early where nobody can."""
        return 0

    def choice(self) -> WidthVector | None:
        """Return the searcher's own choice among what was judged; ``None`` takes the best score near the budget."""
        return None

    def summary(self) -> dict[str, Any]:
        """Return what the result should say of the search, as JSON values."""
        return {}


class OneShotSearcher(Searcher):
    """Proposes one width vector and is done: a baseline that compares no scores."""

    def __init__(self, space: SearchSpace, budget: Budget, rng: np.random.Generator) -> None:
        super().__init__(space, budget, rng)
        self._told = False

    @abstractmethod
    def propose(self) -> WidthVector:
        """Return the one candidate."""

    def ask(self) -> list[WidthVector]:
        """The one candidate, once."""
        return [] if self._told else [self.propose()]

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """There is nothing to learn."""
        self._told = True

    @property
    def done(self) -> bool:
        """Whether the candidate was judged."""
        return self._told


SEARCHERS: Registry[type[Searcher]] = Registry("searcher", "widthkit.searchers", Searcher)
register = SEARCHERS.register
