"""Random search: widths that use almost all of the budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.genes import Genes, pick
from widthkit.search.searcher import Searcher, WidthVector

_ENUMERABLE = 20_000
_BATCH = 256
_IDLE_BATCHES = 20


class RandomSearcher(Searcher):
    """Random widths that use almost all of the budget.

    Uniform draws are nearly always far below or above a budget. A draw here starts from random genes and moves random
    groups a step up or down until it is near the budget, so that hardly any draw is thrown away.

    Args:
        space: The widths to choose from.
        budget: What a draw may cost.
        rng: Draws.
        n: How many different width vectors to judge.
        near_budget: Draws use more than this share of the budget, where the space has such points.
    """

    def __init__(
        self, space: SearchSpace, budget: Budget, rng: np.random.Generator, n: int = 100, near_budget: float = 0.97
    ) -> None:
        super().__init__(space, budget, rng)
        if n < 1:
            raise OptionError(f"n={n}: random search needs at least one draw")
        if not 0 <= near_budget < 1:
            raise OptionError(f"near_budget={near_budget}: a share of the budget from 0 to below 1")
        self.n = n
        self.near_budget = near_budget
        self._told = 0
        self._draws = draw_near_budget(space, budget, rng, n, near_budget)

    def ask(self) -> list[WidthVector]:
        """The next draw."""
        return [dict(self._draws[self._told])] if self._told < len(self._draws) else []

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Count."""
        self._told += len(widths)

    @property
    def done(self) -> bool:
        """Whether all draws were judged."""
        return self._told >= len(self._draws)

    @property
    def proposals(self) -> int:
        """All draws."""
        return len(self._draws)


def draw_near_budget(
    space: SearchSpace, budget: Budget, rng: np.random.Generator, n: int, near_budget: float
) -> list[WidthVector]:
    """Return up to ``n`` different width vectors inside the budget, those that use over ``near_budget`` of it first.

    Where too few do, those that use most of the budget follow. Fewer than ``n`` come back only where walks
    reach no more. Small spaces are listed, not walked.
    """
    table = Genes(space, budget)
    if space.size <= _ENUMERABLE:
        genes = rng.permutation(table.all())
        usage = table.usage(genes)
        found = {tuple(g): float(u) for g, u in zip(genes.tolist(), usage.tolist(), strict=True) if u <= 1}
    else:
        found = _walked(table, rng, n, near_budget)
    # The sort is stable: near the budget the order stays random, then the fullest come first.
    chosen = sorted(found, key=lambda genes: -min(found[genes], near_budget))[:n]
    return [space.decode(genes) for genes in chosen]


def _walked(table: Genes, rng: np.random.Generator, n: int, near_budget: float) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {}
    inside, idle = 0, 0
    while inside < n and idle < _IDLE_BATCHES:
        before = inside
        genes, usage = _walk(table, rng, min(_BATCH, max(n, 16)), near_budget)
        for key, used in zip(map(tuple, genes.tolist()), usage.tolist(), strict=True):
            if used <= 1 and key not in found:
                found[key] = used
                inside += used > near_budget
        idle = 0 if inside > before else idle + 1
    return found


def _walk(table: Genes, rng: np.random.Generator, n: int, near_budget: float) -> tuple[IntArray, FloatArray]:
    """Start ``n`` walks anywhere: step down into the budget, then up until near it or nothing wider fits."""
    # Skewed starts spread the draws over narrow and wide shapes alike.
    skew = rng.uniform(0.5, 2, size=(n, 1))
    genes = np.rint(rng.beta(1, skew, size=(n, len(table.top))) * table.top).astype(np.int64)
    genes = table.step_down(genes, rng)
    usage = table.usage(genes)
    open_groups = genes < table.top
    rows = np.flatnonzero((usage <= near_budget) & open_groups.any(axis=1))
    while len(rows):
        groups = pick(open_groups[rows], rng)
        genes[rows, groups] += 1
        wider = table.usage(genes[rows])
        fits = wider <= 1
        genes[rows[~fits], groups[~fits]] -= 1
        usage[rows[fits]] = wider[fits]
        # The walk only widens, so what does not fit now never will. A step up may use a group up.
        open_groups[rows, groups] = fits & (genes[rows, groups] < table.top[groups])
        rows = rows[(usage[rows] <= near_budget) & open_groups[rows].any(axis=1)]
    return genes, usage
