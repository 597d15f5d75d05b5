"""Greedy slimming: take away, one step at a time, what hurts least (AutoSlim, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.search.searcher import Searcher, WidthVector
from widthkit.space import SearchSpace

_BATCH = 3
"""Candidates that a lazy round judges at a time: together they share what is the same."""
_REMEMBERED = 200
"""Changes of estimates from which the slack of a lazy round follows."""


class GreedySearcher(Searcher):
    """Take away, step by step, what hurts least (AutoSlim, section 3.3).

    Every step slims the group whose next narrower choice costs the least score, until the budget holds.
    One pass visits every budget on the way, so the result's Pareto set is a whole trade-off curve. Ties go to the
    group that saves more.

    Two options judge less and may decide differently. A lazy round judges first what cost least when it was last
    judged, and stops when nothing else can be expected to cost less, as lazy greedy selection does (Minoux, 1978). A
    race judges on a part of the data, and only those that lead on all of it.

    Args:
        space: The widths to choose from.
        budget: What the result may cost.
        rng: Not used; greedy slimming draws nothing.
        lazy: Judge again only what may be the best.
        race: Share of the held-out examples that every candidate is judged on first; 1 is no race.
        finalists: How many candidates of a race are judged on all examples.
        caution: How much of the change of estimates seen so far a lazy round allows for, from 0 to 1.
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget,
        rng: np.random.Generator,
        lazy: bool = False,
        race: float = 1.0,
        finalists: int = 3,
        caution: float = 0.9,
    ) -> None:
        super().__init__(space, budget, rng)
        if not 0 < race <= 1:
            raise OptionError(f"race={race}: a share of the held-out examples above 0 and up to 1")
        if finalists < 1:
            raise OptionError(f"finalists={finalists}: at least 1 candidate must reach the end of a race")
        if not 0 <= caution <= 1:
            raise OptionError(f"caution={caution}: a share from 0 to 1")
        self._lazy, self._race, self._n_finalists, self._caution = lazy, race, finalists, caution
        self._now = dict(space.largest)
        self._start = budget.usage(space.graph, self._now)
        self._stage = "start" if race == 1 else "start of race"
        self._level = 0.0
        self._loss: dict[str, float] = {}
        self._fresh: dict[str, float] = {}
        self._changes: list[float] = []

    def ask(self) -> list[WidthVector]:
        """The starting point once, then groups one step narrower: all of them, or those that may be the best."""
        if self._stage.startswith("start"):
            return [dict(self._now)]
        steps = self._steps()
        return [] if self.done else [steps[name] for name in self._asked()]

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Move to the best candidate once the round is over."""
        scores = [-math.inf if math.isnan(score) else float(score) for score in scores]
        if self._stage.startswith("start"):
            if self._stage == "start of race" or self._race == 1:
                self._level = scores[0]
            self._stage = "start" if self._stage == "start of race" else "round"
            return
        told = dict(zip(self._asked(), scores, strict=True))
        if self._stage == "round":
            self._note(told)
            if self._asked():
                return
            told = dict(self._fresh)
            if self._race < 1:
                self._stage = "final"
                return
        self._move(told)

    @property
    def fraction(self) -> float:
        """The race's share of the examples, but 1 for its finalists and for the starting point."""
        return self._race if self._stage in ("round", "start of race") else 1.0

    def _steps(self) -> dict[str, WidthVector]:
        steps = {name: self.space.narrower(self._now, name) for name in self.space.names}
        return {name: step for name, step in steps.items() if step is not None}

    def _asked(self) -> list[str]:
        """Name the groups to judge next; none when the round is over."""
        names = list(self._steps())
        if self._stage == "final":
            first = sorted(self._fresh, key=lambda name: (-self._fresh[name], names.index(name)))
            return sorted(first[: self._n_finalists], key=names.index)
        if not self._lazy:
            return [] if self._fresh else names
        new = [name for name in names if name not in self._loss]
        stale = sorted((n for n in names if n in self._loss and n not in self._fresh), key=lambda n: self._loss[n])
        if self._fresh:
            best = min(self._loss[name] for name in self._fresh)
            stale = [name for name in stale if self._loss[name] - self._slack() <= best]
        return sorted(new + stale[:_BATCH], key=names.index)

    def _slack(self) -> float:
        """By how much an estimate may have fallen since."""
        return max(0.0, float(np.quantile(self._changes, self._caution))) if self._changes else math.inf

    def _note(self, told: Mapping[str, float]) -> None:
        for name, score in told.items():
            loss = self._level - score if math.isfinite(score) else math.inf
            if math.isfinite(loss - self._loss.get(name, math.inf)):
                self._changes = [*self._changes[1 - _REMEMBERED :], self._loss[name] - loss]
            self._loss[name], self._fresh[name] = loss, score

    def _move(self, told: Mapping[str, float]) -> None:
        steps = self._steps()
        usage = {name: self.budget.usage(self.space.graph, steps[name]) for name in told}
        order = list(steps)
        best = max(told, key=lambda name: (told[name], -usage[name], -order.index(name)))
        self._now = steps[best]
        self._level = self._fresh[best]
        del self._loss[best]
        self._fresh = {}
        self._stage = "round"

    def state_dict(self) -> dict[str, Any]:
        """The current widths, and what is known of the next steps."""
        return {
            "now": dict(self._now),
            "stage": self._stage,
            "level": self._level,
            "loss": dict(self._loss),
            "fresh": dict(self._fresh),
            "changes": list(self._changes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._now = dict(state["now"])
        self._stage = str(state["stage"])
        self._level = float(state["level"])
        self._loss, self._fresh = dict(state["loss"]), dict(state["fresh"])
        self._changes = list(state["changes"])

    @property
    def done(self) -> bool:
        """Whether the current widths are inside the budget."""
        return not self._stage.startswith("start") and self.budget.fits(self.space.graph, self._now)

    @property
    def progress(self) -> float:
        """How much of the way down to the budget is done."""
        if self._start <= 1:
            return 1.0
        return float(min(1.0, (self._start - self.budget.usage(self.space.graph, self._now)) / (self._start - 1)))
