"""What a searcher is: it proposes widths and is told their scores.

Searchers live outside the core and come in through the entry-point group ``widthkit.searchers``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from widthkit.budget import Budget
from widthkit.errors import PluginError
from widthkit.graph.space import SearchSpace
from widthkit.registry import Registry

WidthVector = dict[str, int]


class Span(NamedTuple):
    """Of ``of`` parts of the held-out data, as equal as whole batches allow, those from ``start`` up to ``stop``."""

    start: int
    stop: int
    of: int


class Searcher(ABC):
    """Ask for widths, tell their scores, until :attr:`done`.

    Args:
        space: The widths to choose from.
        budget: What the result may cost.
        rng: The only source of randomness.
    """

    compares_scores: ClassVar[bool] = True
    """Whether scores decide what is proposed or chosen; ``False`` for baselines with one proposal."""

    def __init__(self, space: SearchSpace, budget: Budget, rng: np.random.Generator) -> None:
        self.space = space
        self.budget = budget
        self.rng = rng

    @abstractmethod
    def ask(self) -> list[WidthVector]:
        """Propose the next widths to judge; an empty list when the search is done."""

    @property
    def parts(self) -> int:
        """Into how many parts of whole batches the held-out data must be divisible; read once, at the start."""
        return 1

    @property
    def span(self) -> Span | None:
        """The part of the held-out data on which what was asked last is to be judged; ``None`` is all of it.

        It is read after every :meth:`ask`. Judgements on a part are told like others, but are no trials of the result:
        scores on different parts do not compare.
        """
        return None

    @abstractmethod
    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Receive the scores (higher is better; NaN counts as worst) of all widths that were asked."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on later, as JSON values; the generator is kept by the caller."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether there is nothing left to ask."""

    @property
    @abstractmethod
    def progress(self) -> float:
        """How far the search has come, from 0 to 1; an estimate is fine."""

    @property
    def proposals(self) -> int | None:
        """How many width vectors it will propose in all, repeated ones included; ``None`` where that is not known.

        Progress is then counted in them, and :attr:`progress` is not asked.
        """
        return None


class OneShotSearcher(Searcher):
    """Proposes one width vector and is done: a baseline that compares no scores."""

    compares_scores = False

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

    @property
    def proposals(self) -> int:
        """One."""
        return 1


def parts_of(searcher: Searcher) -> int:
    """Return a searcher's number of parts.

    Raises:
        PluginError: If that is no positive whole number.
    """
    parts = searcher.parts
    if not isinstance(parts, int) or parts < 1:
        raise PluginError(f"searcher {type(searcher).__name__}: parts must be a positive whole number, not {parts!r}")
    return parts


SEARCHERS: Registry[type[Searcher]] = Registry("searcher", "widthkit.searchers", Searcher)
register = SEARCHERS.register
