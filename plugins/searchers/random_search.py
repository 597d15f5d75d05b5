"""Random search inside the budget band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.graph import IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.searcher import Searcher, WidthVector

Usage = npt.NDArray[np.float64]
_ENUMERABLE = 20_000
_BATCH = 256
_IDLE_BATCHES = 20


class RandomSearcher(Searcher):
    """Random widths that use almost all of the budget.

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
        return [dict(self._draws[self._told])] if self._told < len(self._draws) else []

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Count."""
        self._told += len(widths)

    def state_dict(self) -> dict[str, Any]:
        """Draws and how many were judged."""
        return {"draws": [dict(d) for d in self._draws], "told": self._told}

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
    """Return up to ``n`` different width vectors inside the budget, those that use more than ``band`` of it first.

    Where the band has too few, the ones that use most of the budget fill up; fewer than ``n`` come back only when the
    space has fewer that a walk can reach. Small spaces are listed, not walked.
    """
    table = _Table(space, budget)
    if space.size <= _ENUMERABLE:
        genes = np.indices([len(g.options) for g in space.groups]).reshape(len(space.groups), -1).T
        genes = genes[rng.permutation(len(genes))]
        usage = table.usage(genes)
        found = {tuple(g): float(u) for g, u in zip(genes.tolist(), usage.tolist(), strict=True) if u <= 1}
    else:
        found = _walked(table, rng, n, band)
    # The sort is stable: inside the band the order stays random, below it the fullest come first.
    chosen = sorted(found, key=lambda genes: -min(found[genes], band))[:n]
    return [space.decode(genes) for genes in chosen]


def _walked(table: _Table, rng: np.random.Generator, n: int, band: float) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {}
    inside, idle = 0, 0
    while inside < n and idle < _IDLE_BATCHES:
        before = inside
        genes, usage = _walk(table, rng, min(_BATCH, max(n, 16)), band)
        for key, used in zip(map(tuple, genes.tolist()), usage.tolist(), strict=True):
            if used <= 1 and key not in found:
                found[key] = used
                inside += used > band
        idle = 0 if inside > before else idle + 1
    return found


class _Table:
    """All groups' options as one array, so that many width vectors are priced at once."""

    def __init__(self, space: SearchSpace, budget: Budget) -> None:
        self.space, self.budget = space, budget
        self.top = np.array([len(g.options) - 1 for g in space.groups])
        self._options = np.zeros((len(space.groups), int(self.top.max(initial=0)) + 1), dtype=np.int64)
        for row, g in zip(self._options, space.groups, strict=True):
            row[: len(g.options)] = g.options

    def usage(self, genes: IntArray) -> Usage:
        """Return ``[n]``: the share of the budget that genes ``[n, groups]`` use."""
        widths = self._options[np.arange(len(self.top)), genes]
        return np.asarray(self.budget.usage(self.space.graph, widths))


def _walk(table: _Table, rng: np.random.Generator, n: int, band: float) -> tuple[IntArray, Usage]:
    """Start ``n`` walks anywhere: step down into the budget, then up until in the band or nothing wider fits."""
    # Skewed starts spread the draws over narrow and wide shapes alike.
    skew = rng.uniform(0.5, 2, size=(n, 1))
    genes = np.rint(rng.beta(1, skew, size=(n, len(table.top))) * table.top).astype(np.int64)
    usage = table.usage(genes)
    rows = np.flatnonzero((usage > 1) & genes.any(axis=1))
    while len(rows):
        genes[rows, _pick(genes[rows] > 0, rng)] -= 1
        usage[rows] = table.usage(genes[rows])
        rows = rows[(usage[rows] > 1) & genes[rows].any(axis=1)]
    open_groups = genes < table.top
    rows = np.flatnonzero((usage <= band) & open_groups.any(axis=1))
    while len(rows):
        groups = _pick(open_groups[rows], rng)
        genes[rows, groups] += 1
        wider = table.usage(genes[rows])
        fits = wider <= 1
        genes[rows[~fits], groups[~fits]] -= 1
        usage[rows[fits]] = wider[fits]
        # What does not fit now never will: the walk only widens. A step up may use a group up.
        open_groups[rows, groups] = fits & (genes[rows, groups] < table.top[groups])
        rows = rows[(usage[rows] <= band) & open_groups[rows].any(axis=1)]
    return genes, usage


def _pick(allowed: npt.NDArray[np.bool_], rng: np.random.Generator) -> IntArray:
    """Return ``[n]``: for every row a random column where ``allowed [n, groups]`` holds."""
    return np.asarray(np.where(allowed, rng.random(allowed.shape), -1.0).argmax(axis=1), dtype=np.int64)
