"""Top a result up to its budget: every result uses more than 97% of it, or says why not.

A search may end below its budget: it stops at the first step inside, or coarse choices leave gaps. Then groups of the
best network are widened step by step, and every step is judged. Where nothing wider fits, one group is widened and
another narrowed; where that fails too, any point near the budget is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from widthkit.budget import Budget
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.genes import named, usage_of
from widthkit.search.near_budget import NEAR, Fullest, fullest
from widthkit.search.result import Trial
from widthkit.search.searcher import Searcher, WidthVector

_PRICED = 1 << 17
_WALKS = 256


def top_up(space: SearchSpace, budget: Budget, trials: Sequence[Trial], seed: int) -> TopUp | None:
    """Return a searcher that goes on from the best trial inside the budget; ``None`` if that one is near it."""
    best = best_inside(space, budget, trials)
    if best is None or budget.usage(space.graph, best.widths) > NEAR:
        return None
    return TopUp(space, budget, np.random.default_rng([seed, 97]), best.widths)


def best_inside(space: SearchSpace, budget: Budget, trials: Sequence[Trial], least: float = 0.0) -> Trial | None:
    """Return the best trial with a finite score that uses more than ``least`` of the budget and holds it."""
    inside = [
        t
        for t in trials
        if math.isfinite(t.score) and budget.fits(space.graph, t.widths) and budget.usage(space.graph, t.widths) > least
    ]
    return max(inside, key=lambda t: (t.score, -t.macs)) if inside else None


class TopUp(Searcher):
    """Widen what scores best until the budget is almost used.

    Args:
        space: The choices.
        budget: What the result may cost.
        rng: Used where no widening and no exchange of two groups comes near the budget.
        start: Where to begin: inside the budget, not near it. Its widths need not be choices.

    Attributes:
        fullest: The point that uses most of the budget, where it was looked for.
    """

    def __init__(self, space: SearchSpace, budget: Budget, rng: np.random.Generator, start: Mapping[str, int]) -> None:
        super().__init__(space, budget, rng)
        self.fullest: Fullest | None = None
        self._now = dict(start)
        self._last = False
        self._asked = self._propose()

    def ask(self) -> list[WidthVector]:
        """The next widenings, at most one per group, or the points near the budget that end the search."""
        return [dict(widths) for widths in self._asked]

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Move to the best."""
        worth = [-math.inf if math.isnan(score) else score for score in scores]
        usage = [self.budget.usage(self.space.graph, w) for w in widths]
        self._now = dict(widths[max(range(len(widths)), key=lambda i: (worth[i], usage[i], -i))])
        self._asked = [] if self._last else self._propose()

    @property
    def done(self) -> bool:
        """Whether the budget is almost used, or nothing more can be done."""
        return not self._asked

    @property
    def progress(self) -> float:
        """The search that is topped up is over."""
        return 1.0

    def _propose(self) -> list[WidthVector]:
        wider = self._moves(1)
        usage = self._usage(wider)
        landed = wider[(usage > NEAR) & (usage <= 1)]
        if len(landed):
            self._last = True
            return self._named(_one_per_group(landed, self._vector(), np.ones(len(landed))))
        if (usage <= 1).any():
            return self._named(self._steps(wider[usage <= 1], usage[usage <= 1]))
        self._last = True
        return self._named(self._exchanged(wider)) or self._named(self._walked()) or self._anywhere()

    def _steps(self, wider: IntArray, usage: FloatArray) -> IntArray:
        """For every group the largest step that takes at most a third of what is left, else its smallest."""
        now = self._vector()
        left = 1 - float(self._usage(now[None])[0])
        taken = usage - (1 - left)
        # Prefer the largest step that uses at most a third of what is left; of larger ones the smallest.
        return _one_per_group(wider, now, np.where(taken <= left / 3, taken, -taken))

    def _exchanged(self, wider: IntArray) -> IntArray:
        """Points near the budget where one group is wider and another narrower, the smallest changes first."""
        narrower = self._moves(-1)
        if not len(narrower) or not len(wider):
            return wider[:0]
        now = self._vector()
        total = len(narrower) * len(wider)
        picked = np.arange(total) if total <= _PRICED else np.sort(self.rng.choice(total, _PRICED, replace=False))
        first, second = narrower[picked // len(wider)], wider[picked % len(wider)]
        both = first + second - now
        both = both[((first != now) != (second != now)).sum(axis=1) == 2]
        usage = self._usage(both)
        return self._nearest(both[(usage > NEAR) & (usage <= 1)])

    def _walked(self) -> IntArray:
        """Points near the budget at the end of random walks: some groups narrower, then others wider while they fit."""
        found = []
        for walk in range(_WALKS):
            here = self._vector()
            for _ in range(1 + walk % 8):
                here = self._stepped(here, -1)
            while (used := float(self._usage(here[None])[0])) <= NEAR:
                there = self._stepped(here, 1)
                if (there == here).all():
                    break
                here = there
            if used > NEAR:
                found.append(here)
        return self._nearest(np.array(found, dtype=np.int64).reshape(-1, len(self.space.groups)))

    def _stepped(self, here: IntArray, direction: int) -> IntArray:
        """Move one random group a step, where that stays inside the budget."""
        for g in self.rng.permutation(len(here)):
            options = [o for o in self.space.groups[g].options if (o - here[g]) * direction > 0]
            if options:
                there: IntArray = here.copy()
                there[g] = min(options) if direction > 0 else max(options)
                if self._usage(there[None])[0] <= 1:
                    return there
        return here

    def _anywhere(self) -> list[WidthVector]:
        self.fullest = fullest(self.space, self.budget)
        used = float(self._usage(self._vector()[None])[0])
        return [dict(self.fullest.widths)] if self.fullest.usage > used else []

    def _nearest(self, points: IntArray) -> IntArray:
        """The distinct points with the smallest changes, at most two per group of the space."""
        points = np.unique(points, axis=0)
        now = self._vector()
        change = np.abs(np.log(points / now)).sum(axis=1)
        return np.asarray(points[np.argsort(change, kind="stable")[: 2 * len(now)]])

    def _moves(self, direction: int) -> IntArray:
        """Return ``[n, groups]``: one group at any of its wider (or narrower) choices."""
        now = self._vector()
        moves = []
        for g, choices in enumerate(self.space.groups):
            for option in choices.options:
                if (option - now[g]) * direction > 0:
                    moves.append(now.copy())
                    moves[-1][g] = option
        return np.array(moves, dtype=np.int64).reshape(-1, len(now))

    def _vector(self) -> IntArray:
        return np.array([self._now[name] for name in self.space.names], dtype=np.int64)

    def _usage(self, vectors: IntArray) -> FloatArray:
        return usage_of(self.space, self.budget, vectors)

    def _named(self, vectors: IntArray) -> list[WidthVector]:
        return [widths for widths in named(self.space, vectors) if self.budget.fits(self.space.graph, widths)]


def _one_per_group(moves: IntArray, now: IntArray, worth: FloatArray) -> IntArray:
    """Keep, for every group, its move of most worth; of equal ones the widest."""
    group = (moves != now).argmax(axis=1)
    order = np.lexsort((moves[np.arange(len(moves)), group], worth))
    last = {int(group[i]): int(i) for i in order}
    return np.asarray(moves[sorted(last.values())])


def remark(space: SearchSpace, budget: Budget, widths: Mapping[str, int], found: Fullest | None) -> str | None:
    """Say why a result is not near its budget; ``None`` if it is.

    Args:
        space: The space.
        budget: The budget.
        widths: The result.
        found: The point that uses most of the budget, where it is known already.
    """
    used = budget.usage(space.graph, dict(widths))
    if used > NEAR:
        return None
    why = f"it uses {used:.1%} of the budget"
    most = budget.usage(space.graph, space.largest)
    if most <= NEAR:
        return f"{why}; the widest network of this space uses no more than {most:.1%}"
    found = found or fullest(space, budget)
    if found.usage > NEAR:
        return f"{why}; the networks in ({NEAR:.0%}, 100%] of it that were judged have no finite score"
    if found.proven:
        return f"{why}; no network of this space lies in ({NEAR:.0%}, 100%] of it, the fullest uses {found.usage:.1%}"
    return f"{why}; no network in ({NEAR:.0%}, 100%] of it was found, the fullest one found uses {found.usage:.1%}"
