"""Find the least of several losses that are measured part by part, from what earlier rounds said of them.

In a round of greedy slimming every candidate has a loss on each of several equal parts of the held-out data: how much
worse than the network it is a step from. Rounds resemble one another, so what a candidate lost in the last round
foretells its loss in this one, as a control variate (Lavenberg and Welch, Management Science 1981): only the change has
to be measured, and changes vary less from part to part than losses do. A round goes on until no candidate is likelier
than ``risk`` to be better than the leader, who is then known on all parts.

How much a change varies from part to part differs between candidates, and a few parts cannot tell; so probabilities are
those of Student's t with the few degrees of freedom that there are. They are nominal: what earlier rounds estimated on
parts that they did not measure is taken as known, so mistakes are more frequent than ``risk`` says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtr

_REMEMBERED = 60
"""So many changes, and so many spreads, say what to expect of the next."""
_ENOUGH = 5
"""From so few nothing is expected yet."""
_PRIOR = 2.0
"""As many degrees of freedom earlier rounds have beside a candidate's own: spreads differ that much."""
_TAILS = 4.0
"""Degrees of freedom of changes from one round to the next."""
_GROWTH = 1.25
"""By so much what is known of a candidate grows when it is measured again."""
_TOGETHER = 2
"""How many candidates of whom something is known are measured at a time."""
Estimate = tuple[float, float, float]
"""Mean, variance and degrees of freedom of a loss on all parts."""
_STATE = ("level", "before", "age", "now", "changes", "spreads")


@dataclass
class Race:
    """The rounds of one search. A *chunk* is ``[start, stop, mean loss]`` on consecutive parts.

    Args:
        parts: How many parts there are.
        lazy: Start from what earlier rounds said; otherwise everyone is measured on the first part at least.
        risk: Most probability of being the best with which a candidate is left behind.
        level: Losses of the network that the round starts from, by part.
        before: By how much candidates were worse when they were last measured, by part.
        age: How many rounds ago that was; 2 where it was not on all parts.
        now: Chunks of the candidates of this round.
        changes: By how much candidates became worse from one round to the next.
        spreads: Variances of a part's change, for candidates that were known before, and for new ones.
    """

    parts: int
    lazy: bool
    risk: float
    level: list[float] = field(default_factory=list)
    before: dict[str, list[float]] = field(default_factory=dict)
    age: dict[str, int] = field(default_factory=dict)
    now: dict[str, list[list[float]]] = field(default_factory=dict)
    changes: list[float] = field(default_factory=list)
    spreads: dict[str, list[float]] = field(default_factory=lambda: {"known": [], "new": []})

    def ask(self, names: Sequence[str]) -> tuple[list[str], int, int]:
        """Return whom to measure next, from which part and up to which; nobody once the round is decided.

        Those of whom nothing can be said are measured all together, so that they share what is the same; others
        few at a time, since what one is found to lose may settle the rest.

        Args:
            names: All candidates of the round, in an order that breaks ties.
        """
        found = {name: self._estimate(name) for name in names}
        unknown = [name for name in names if math.isinf(found[name][1])]
        if unknown:
            return self._next(unknown)
        leader = min(names, key=lambda name: found[name][0])
        likely = {name: _probability(found[leader], found[name]) for name in names if name != leader}
        likely = {name: p for name, p in likely.items() if p >= self.risk} | {leader: 1.0}
        order = sorted((n for n in likely if self._done(n) < self.parts), key=lambda n: (-likely[n], names.index(n)))
        asked, start, stop = self._next(order)
        return asked[:_TOGETHER], start, stop

    def _next(self, order: Sequence[str]) -> tuple[list[str], int, int]:
        """Return those of whom the least is known, and the parts that come next for them."""
        if not order:
            return [], 0, 0
        start = min(self._done(name) for name in order)
        return [name for name in order if self._done(name) == start], start, self.until(start)

    def until(self, start: int) -> int:
        """Return up to which part to go on: a quarter more than are known, at least one."""
        return min(self.parts, max(start + 1, math.ceil(_GROWTH * start)))

    def start(self, loss: float, start: int, stop: int) -> None:
        """Take in the first network's mean loss on some parts."""
        self.level += [loss] * (stop - start)

    def tell(self, names: Sequence[str], losses: Sequence[float], start: int, stop: int) -> None:
        """Take in mean losses of candidates on some parts; one that is not finite loses the round."""
        for name, loss in zip(names, losses, strict=True):
            known = float(loss) if math.isfinite(loss) else math.inf
            self.now.setdefault(name, []).append([float(start), float(stop), known])

    def best(self, names: Sequence[str]) -> str:
        """Return the winner of a decided round."""
        return min((n for n in names if self._done(n) == self.parts), key=lambda n: self._estimate(n)[0])

    def end(self, names: Sequence[str], winner: str) -> None:
        """Keep what the round said for the next; the winner has other steps now."""
        for name in names:
            if name in self.now:
                self._remember(name)
            elif name in self.age:
                self.age[name] += 1
        if not self._sound():
            # Nobody was worse than a network that diverged by any amount.
            self.before, self.age = {}, {}
        self.before.pop(winner, None)
        self.age.pop(winner, None)
        self.level = [loss for start, stop, loss in self.now[winner] for _ in range(int(start), int(stop))]
        self.now = {}

    def _remember(self, name: str) -> None:
        chunks = self.now[name]
        old = self.before.get(name)
        change = self._change(name)
        if not math.isfinite(change):
            self.before.pop(name, None)
            self.age.pop(name, None)
            return
        if len(chunks) > 1:
            self._note(self.spreads["new" if old is None else "known"], self._own_spread(name))
        if old is not None and self._done(name) == self.parts:
            self._note(self.changes, change)
        values = [(0.0 if old is None else old[part]) + change for part in range(self.parts)]
        for start, stop, loss in chunks:
            # Parts that were measured together keep their differences, and their mean becomes the measured one.
            span = range(int(start), int(stop))
            shift = loss - self._level(span.start, span.stop) - float(np.mean([values[part] for part in span]))
            for part in span:
                values[part] += shift
        self.before[name] = values
        self.age[name] = 1 if self._done(name) == self.parts else 2

    @staticmethod
    def _note(past: list[float], value: float) -> None:
        past.append(value)
        del past[:-_REMEMBERED]

    def _sound(self) -> bool:
        return all(math.isfinite(loss) for loss in self.level)

    def _level(self, start: int, stop: int) -> float:
        """Mean loss that candidates are compared with; 0 where the network that the round starts from diverged."""
        return float(np.mean(self.level[start:stop])) if self._sound() else 0.0

    def _done(self, name: str) -> int:
        return int(self.now[name][-1][1]) if name in self.now else 0

    def _old(self, name: str, start: int, stop: int) -> float:
        return float(np.mean(self.before[name][start:stop])) if name in self.before else 0.0

    def _residuals(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Sizes of the chunks measured so far, and by how much they are worse than before."""
        spans = [(int(start), int(stop)) for start, stop, _ in self.now[name]]
        expected = [self._level(*span) + self._old(name, *span) for span in spans]
        found = [loss - e for (_, _, loss), e in zip(self.now[name], expected, strict=True)]
        return np.array([stop - start for start, stop in spans]), np.array(found)

    def _change(self, name: str) -> float:
        sizes, residuals = self._residuals(name)
        return float((sizes * residuals).sum() / sizes.sum())

    def _own_spread(self, name: str) -> float:
        """Estimate the variance of one part's residual from chunks of several parts."""
        sizes, residuals = self._residuals(name)
        mean = (sizes * residuals).sum() / sizes.sum()
        return float((sizes * (residuals - mean) ** 2).sum() / (len(sizes) - 1))

    def _spread(self, name: str) -> tuple[float, float]:
        """Return the variance of a part's residual, and its degrees of freedom."""
        past = self.spreads["known" if name in self.before else "new"]
        free = len(self.now[name]) - 1
        own = self._own_spread(name) if free else 0.0
        if len(past) >= _ENOUGH:
            return (_PRIOR * float(np.mean(past)) + free * own) / (_PRIOR + free), _PRIOR + free
        return (own, free) if free else (math.inf, 1.0)

    def _estimate(self, name: str) -> Estimate:
        """Return what is known of a candidate's loss on all parts."""
        done = self._done(name)
        if done == self.parts:
            # Straight from what was measured, so that equal losses tie.
            return sum((stop - start) * loss for start, stop, loss in self.now[name]) / self.parts, 0.0, math.inf
        old = self._level(0, self.parts) + self._old(name, 0, self.parts)
        known = len(self.changes) >= _ENOUGH and self.lazy and name in self.before
        drift = float(np.mean(self.changes)) if known else 0.0
        prior = self.age[name] * float(np.var(self.changes)) if known else math.inf
        if done == 0:
            return (old + drift, prior, _TAILS) if known else (-math.inf, math.inf, 1.0)
        change = self._change(name)
        if not math.isfinite(change):
            return math.inf, 0.0, math.inf
        spread, free = self._spread(name)
        error = spread * (1 / done - 1 / self.parts)
        if not math.isfinite(prior):
            return old + change, error, free
        if not math.isfinite(error):
            return old + change, prior, _TAILS
        weight = prior / (prior + error) if prior + error > 0 else 0.5
        return old + drift + weight * (change - drift), prior * error / max(prior + error, 1e-300), free

    def state_dict(self) -> dict[str, Any]:
        """What goes from round to round, as JSON values."""
        return copy.deepcopy({name: getattr(self, name) for name in _STATE})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name in _STATE:
            setattr(self, name, copy.deepcopy(state[name]))


def _probability(leader: Estimate, other: Estimate) -> float:
    """Return the probability that another candidate's loss is less than the leader's (Welch, Biometrika 1947)."""
    gap, variance = other[0] - leader[0], leader[1] + other[1]
    if not variance > 0 or not math.isfinite(gap):
        return 0.0
    shares = (leader[1] / variance) ** 2 / leader[2] + (other[1] / variance) ** 2 / other[2]
    return float(stdtr(1 / shares, -gap / math.sqrt(variance)))
