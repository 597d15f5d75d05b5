"""The convex programs behind prior initial population sampling (BCNet, Eq. 14 and 15).

Every group gets a distribution over its choices. They minimise the expected potential error under the expected cost
and are not too sure of themselves:

    min  sum_l P_l . E_l - tau * sum_l H(P_l)   s.t.  E[cost_k(w)] <= bound_k  for every bound k

The expected cost is a polynomial in the groups' moments, so it is linear in one distribution when the others are held:
bilinear for a chain of layers. Every round holds, for each group, all others at the last round's distributions and
solves one convex program for all groups together, so that groups can trade cost with one another. The exact expectation
then decides: the step is shortened, or the program is tightened, until it holds every bound.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from widthkit.budget import Budget
from widthkit.graph import FloatArray
from widthkit.graph.expectation import Expectation, moments
from widthkit.graph.space import SearchSpace
from widthkit.search.uniform import uniform_widths

Distributions = list[FloatArray]
_ROUNDS = 40
_TIGHTER = 12
_SETTLED = 1e-4
_SLACK = 1e-9


@dataclass(frozen=True)
class Bounds:
    """Expected costs as shares of their bounds.

    Args:
        space: The choices.
        costs: An expected cost and its bound for every bound that is a polynomial.
    """

    space: SearchSpace
    costs: tuple[tuple[Expectation, float], ...]

    @classmethod
    def of(cls, space: SearchSpace, budget: Budget) -> Bounds:
        """Take the bounds on MACs and parameters; where there is none, the MACs of the uniform network that fits."""
        model = space.graph.cost
        polynomials = {"macs": model.macs_polynomial, "params": model.params_polynomial}
        known = [(limit.kind, float(limit.value)) for limit in budget.limits if limit.kind in polynomials]
        if not known:
            known = [("macs", float(space.graph.macs(uniform_widths(space, budget))))]
        return cls(space, tuple((Expectation.of(polynomials[kind]), value) for kind, value in known))

    def usage(self, distributions: Distributions) -> FloatArray:
        """Return ``[bounds]``: every expected cost as a share of its bound, exactly."""
        return np.array([e.value(self._moments(distributions, e)) / value for e, value in self.costs])

    def slopes(self, distributions: Distributions) -> FloatArray:
        """Return ``[bounds, all choices]``: the derivative of every share by every probability."""
        rows = []
        for expectation, value in self.costs:
            by_moment = expectation.gradient(self._moments(distributions, expectation))
            powers = np.arange(by_moment.shape[1])
            parts = [
                (np.array(g.options, dtype=np.float64)[:, None] ** powers) @ slope
                for g, slope in zip(self.space.groups, by_moment, strict=True)
            ]
            rows.append(np.concatenate(parts) / value)
        return np.stack(rows)

    def _moments(self, distributions: Distributions, expectation: Expectation) -> FloatArray:
        return moments([np.array(g.options) for g in self.space.groups], distributions, expectation.degree)


def fit(space: SearchSpace, budget: Budget, errors: Sequence[FloatArray], entropy: float) -> Distributions:
    """Return every group's distribution over its choices (Eq. 14 and 15).

    Args:
        space: The choices.
        budget: What a draw may cost on average; bounds that are no polynomials are left to whoever draws.
        errors: Potential error of every choice.
        entropy: Weight of the entropy, in units of the errors' mean range; 0 lets distributions become single choices.
    """
    bounds = Bounds.of(space, budget)
    scale = float(np.mean([error.max() - error.min() for error in errors])) or 1.0
    flat = np.concatenate([(error - error.min()) / scale for error in errors])
    program = _Program(space, flat, entropy, len(bounds.costs))
    now = _start(bounds)
    for _ in range(_ROUNDS):
        step = _round(program, bounds, now)
        moved = max(float(np.abs(a - b).max()) for a, b in zip(step, now, strict=True))
        now = step
        if moved < _SETTLED:
            break
    return now


def _round(program: _Program, bounds: Bounds, now: Distributions) -> Distributions:
    """Solve the program at ``now``; return a better point that holds every bound exactly, or ``now`` itself."""
    usage, slopes = bounds.usage(now), bounds.slopes(now)
    flat = np.concatenate(now)
    before, tighter = program.value(flat), np.zeros(len(usage))
    for _ in range(_TIGHTER):
        target = program.solve(slopes, slopes @ flat + 1 - usage - tighter)
        if target is None:
            break
        length = 1.0
        while length > 0.2:
            trial = program.split(flat + length * (target - flat))
            if (bounds.usage(trial) <= 1 + _SLACK).all() and program.value(np.concatenate(trial)) <= before:
                return trial
            length /= 2
        tighter = tighter + np.maximum(bounds.usage(program.split(target)) - 1, _SLACK)
    return now


def _start(bounds: Bounds) -> Distributions:
    """Return the most even mixture of "any choice" and "the narrowest" that holds every bound."""
    even = [np.full(len(g.options), 1 / len(g.options)) for g in bounds.space.groups]

    def mixed(share: float) -> Distributions:
        parts = [share * p for p in even]
        for part in parts:
            part[0] += 1 - share
        return parts

    low, high = 0.0, 1.0
    if (bounds.usage(even) <= 1).all():
        return even
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (bounds.usage(mixed(middle)) <= 1).all() else (low, middle)
    return mixed(low)


class _Program:
    """The convex program, compiled once; rounds change its constraint only."""

    def __init__(self, space: SearchSpace, errors: FloatArray, entropy: float, n_bounds: int) -> None:
        import cvxpy as cp

        self._ends = np.cumsum([len(g.options) for g in space.groups])[:-1]
        self._errors, self._entropy = errors, entropy
        owner = np.repeat(np.arange(len(space.groups)), [len(g.options) for g in space.groups])
        member = (owner == np.arange(len(space.groups))[:, None]).astype(np.float64)
        self._p = cp.Variable(len(errors), nonneg=True)
        self._slopes = cp.Parameter((n_bounds, len(errors)))
        self._room = cp.Parameter(n_bounds)
        objective = errors @ self._p
        if entropy:
            objective = objective - entropy * cp.sum(cp.entr(self._p))
        constraints = [member @ self._p == 1, self._slopes @ self._p <= self._room]
        self._problem = cp.Problem(cp.Minimize(objective), constraints)

    def solve(self, slopes: FloatArray, room: FloatArray) -> FloatArray | None:
        """Return all probabilities in one row, or ``None`` where the solver finds none."""
        import cvxpy as cp

        self._slopes.value, self._room.value = slopes, room
        with warnings.catch_warnings():
            # An inaccurate solution is fine: the exact expectation decides about it.
            warnings.simplefilter("ignore")
            try:
                self._problem.solve(solver=cp.CLARABEL)
            except cp.SolverError:
                return None
        if self._p.value is None:
            return None
        parts = np.split(np.maximum(self._p.value, 0), self._ends)
        return np.concatenate([part / part.sum() for part in parts])

    def value(self, flat: FloatArray) -> float:
        """Return the objective."""
        return float(self._errors @ flat + self._entropy * np.sum(flat * np.log(np.maximum(flat, 1e-300))))

    def split(self, flat: FloatArray) -> Distributions:
        """Return one distribution per group."""
        return [np.asarray(part, dtype=np.float64) for part in np.split(flat, self._ends)]
