"""Random search inside the budget band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.search.searcher import Searcher, WidthVector
from widthkit.space import SearchSpace


class RandomSearcher(Searcher):
    """Draw width vectors that use almost all of the budget.

    Uniform draws are nearly always far below or above a budget. A draw here starts from random genes and moves random
    groups a step up or down until it lies in the band, so that hardly any draw is thrown away.

    Args:
        space: The widths to choose from.
        budget: What a draw may cost.
        rng: Draws.
        n: How many different width vectors to judge.
        band: Draws use more than this share of the budget, where the space has such points.
    """

    def __init__(
        self, space: SearchSpace, budget: Budget, rng: np.random.Generator, n: int = 100, band: float = 0.97
    ) -> None:
        super().__init__(space, budget, rng)
        if n < 1:
            raise OptionError(f"n={n}: random search needs at least one draw")
        if not 0 <= band < 1:
            raise OptionError(f"band={band}: a share of the budget from 0 to below 1")
        self.n = n
        self.band = band
        self._told = 0
        self._draws = draw_in_band(space, budget, rng, n, band)

    def ask(self) -> list[WidthVector]:
        """The next draw."""
        return [self._draws[self._told]] if self._told < len(self._draws) else []

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Count."""
        self._told += len(widths)

    def state_dict(self) -> dict[str, Any]:
        """Draws and how many were judged."""
        return {"draws": self._draws, "told": self._told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same draws."""
        self._draws = [dict(d) for d in state["draws"]]
        self._told = int(state["told"])

    @property
    def done(self) -> bool:
        """Whether all draws were judged."""
        return self._told >= len(self._draws)

    @property
    def progress(self) -> float:
        """Share of the draws that were judged."""
        return self._told / max(len(self._draws), 1)


def draw_in_band(
    space: SearchSpace, budget: Budget, rng: np.random.Generator, n: int, band: float
) -> list[WidthVector]:
    """Return up to ``n`` different width vectors inside the budget, preferring those that use more than ``band`` of it.

    Fewer come back only when the space has fewer that the walk can reach.
    """
    found: dict[tuple[int, ...], float] = {}
    misses = 0
    while len(found) < n and misses < 10 * n + 100:
        genes, usage = _walk(space, budget, rng, band)
        if usage <= 1 and tuple(genes) not in found:
            found[tuple(genes)] = usage
        else:
            misses += 1
    return [space.decode(genes) for genes in found]


def _walk(
    space: SearchSpace, budget: Budget, rng: np.random.Generator, band: float
) -> tuple[tuple[int, ...], float]:
    """Start anywhere and step towards the band; a step that leaves the budget for good is undone."""
    top = np.array([len(g.options) - 1 for g in space.groups])
    options = [np.array(g.options) for g in space.groups]
    # Skewed starts spread the draws over narrow and wide shapes alike.
    genes = np.rint(rng.beta(1, rng.uniform(0.5, 2), size=len(top)) * top).astype(np.int64)
    vector = np.array([o[g] for o, g in zip(options, genes, strict=True)])
    usage = budget.usage(space.graph, vector)
    while usage > 1 and genes.any():
        g = int(rng.choice(np.flatnonzero(genes)))
        genes[g] -= 1
        vector[g] = options[g][genes[g]]
        usage = budget.usage(space.graph, vector)
    for g in rng.permutation(np.repeat(np.arange(len(top)), np.minimum(top, 4))):
        if usage > band:
            break
        if genes[g] < top[g]:
            vector[g] = options[g][genes[g] + 1]
            wider = budget.usage(space.graph, vector)
            if wider <= 1:
                genes[g] += 1
                usage = wider
            else:
                vector[g] = options[g][genes[g]]
    return tuple(genes.tolist()), float(usage)
