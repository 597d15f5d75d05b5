"""Greedy slimming: take away, one step at a time, what hurts least (AutoSlim, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from widthkit_plugins.searchers.greedy_race import Race

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.graph.space import SearchSpace
from widthkit.search.searcher import Searcher, Span, WidthVector


class GreedySearcher(Searcher):
    """Take away, step by step, what hurts least (AutoSlim, section 3.3).

    Every step slims the group whose next narrower choice costs the least score, until the budget holds.
    One pass visits every budget on the way, so the result's Pareto set is a whole trade-off curve. Ties go to the
    group that saves more.

    Two options judge less and may decide differently. With ``lazy`` a round starts from what candidates cost in the
    rounds before, and judges again only who may be the best now, as lazy greedy selection does (Minoux, 1978). With
    ``race`` candidates are judged part by part of the held-out data, and those fall out early that can hardly be the
    best. ``risk`` is what "may" and "hardly" mean.

    Args:
        space: The widths to choose from.
        budget: What the result may cost.
        rng: Not used; greedy slimming draws nothing.
        lazy: Judge again only what may be the best.
        race: Into how many parts the held-out data are divided, each a batch or more; 1 is no race.
        risk: Most probability of being the best with which a candidate is not looked at further; nominal, so that
            small values are no luxury (docs/evaluation.md has what came of them).
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget,
        rng: np.random.Generator,
        lazy: bool = False,
        race: int = 1,
        risk: float = 0.05,
    ) -> None:
        super().__init__(space, budget, rng)
        if not isinstance(lazy, bool):
            raise OptionError(f"lazy={lazy!r}: true or false")
        if not _is_number(race) or race < 1 or race != int(race):
            raise OptionError(f"race={race!r}: a whole number of parts of the held-out data; 1 is no race")
        if not _is_number(risk) or not 0 < risk < 1:
            raise OptionError(f"risk={risk!r}: a probability above 0 and below 1")
        self._now = dict(space.largest)
        self._start = budget.usage(space.graph, self._now)
        self._stage = "start"
        self._candidates: tuple[WidthVector, dict[str, WidthVector], list[str]] = {}, {}, []
        self._race = Race(int(race), lazy, risk)

    def ask(self) -> list[WidthVector]:
        """The starting point, then groups one step narrower: all of them, or those that may be the best."""
        if self._stage == "start":
            return [dict(self._now)]
        return [] if self.done else [dict(self._steps()[0][name]) for name in self._next()[0]]

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Take in what was judged, and move to the best candidate once the round is decided."""
        losses = [math.inf if math.isnan(score) else -float(score) for score in scores]
        names, start, stop = self._next()
        confirmed = start == stop or self._race.parts == 1
        if self._stage == "start":
            self._race.start(losses[0], start, stop)
            self._stage = "round" if confirmed else "start"
            return
        if start < stop:
            self._race.tell(names, losses, start, stop)
        steps, order = self._steps()
        if confirmed and not self._race.ask(order)[0]:
            winner = self._race.best(order)
            self._race.end(order, winner)
            self._now = steps[winner]

    @property
    def parts(self) -> int:
        """As many as a race has."""
        return int(self._race.parts)

    @property
    def span(self) -> Span | None:
        """Part of the data in a race, but all of it for the starting point and for every winner."""
        _, start, stop = self._next()
        return None if start == stop or self._race.parts == 1 else Span(start, stop, self._race.parts)

    def _steps(self) -> tuple[dict[str, WidthVector], list[str]]:
        """Return the candidates, and their names in the order in which they win ties."""
        of, found, order = self._candidates
        if of != self._now:
            steps = {name: self.space.narrower(self._now, name) for name in self.space.names}
            found = {name: step for name, step in steps.items() if step is not None}
            order = sorted(found, key=lambda name: self.budget.usage(self.space.graph, found[name]))
            self._candidates = dict(self._now), found, order
        return found, order

    def _next(self) -> tuple[list[str], int, int]:
        """Name what to judge next, and from which part of the data to which; none for what all parts have judged."""
        if self._stage == "start":
            known = len(self._race.level)
            return ([], known, self._race.until(known)) if known < self._race.parts else ([], 0, 0)
        steps, order = self._steps()
        if not steps:
            return [], 0, 0
        names, start, stop = self._race.ask(order)
        return [name for name in steps if name in names] or [self._race.best(order)], start, stop

    def state_dict(self) -> dict[str, Any]:
        """The current widths, and what is known of the next steps."""
        return {"now": dict(self._now), "stage": self._stage, "race": self._race.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._now = dict(state["now"])
        self._stage = str(state["stage"])
        self._race.load_state_dict(state["race"])

    @property
    def done(self) -> bool:
        """Whether the current widths are inside the budget."""
        return self._stage != "start" and self.budget.fits(self.space.graph, self._now)

    @property
    def progress(self) -> float:
        """How much of the way down to the budget is done."""
        if self._start <= 1:
            return 1.0
        return float(min(1.0, (self._start - self.budget.usage(self.space.graph, self._now)) / (self._start - 1)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
