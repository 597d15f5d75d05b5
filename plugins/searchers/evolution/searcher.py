"""Evolutionary search: pymoo's NSGA-II over error and MACs under a hard budget (BCNet, sections 4.3 and 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from widthkit_plugins.searchers.evolution.pips import prior_population
from widthkit_plugins.searchers.random_search import draw_near_budget

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.graph import FloatArray
from widthkit.graph.space import SearchSpace
from widthkit.search.genes import Genes
from widthkit.search.searcher import Searcher, WidthVector
from widthkit.train.history import WidthRecord

_WORST = 1e30
"""The error of a candidate without a finite score; NSGA-II needs a number."""


class EvolutionSearcher(Searcher):
    """NSGA-II over error and MACs, hard budget, prior initial population (BCNet, sections 4.3 and 4.4).

    Tournament, two-point crossover, polynomial mutation.

    Genes are indices into the choices of every group. The first population is drawn where training went well (PIPS), or
    at random where no training was recorded, and is near the budget. Children outside the budget take random steps down
    until they are inside, so every judged network could be the result. No width vector is asked twice.

    Args:
        space: The widths to choose from.
        budget: What every candidate may cost.
        rng: Seeds the algorithm.
        population: Candidates per generation (40 in the paper).
        generations: Generations, the first population included (50 in the paper).
        near_budget: The first population uses more than this share of the budget, where the space has such points.
        pips: Draw the first population where training went well, if training was recorded.
        entropy: How far that draw spreads, 0.01 (narrow) to 1 (wide).
        estimate: How the recorded losses become errors of choices: ``"benefit"``, or ``"mean"`` (the paper's Eq. 13).
        keep: From how many of the widths that trained best the first population is drawn (the paper's m). A supernet
            remembers 100.
        history: The width vectors that trained best, with their losses; the search passes the supernet's.
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget,
        rng: np.random.Generator,
        population: int = 40,
        generations: int = 50,
        near_budget: float = 0.9,
        pips: bool = True,
        entropy: float = 0.1,
        estimate: str = "benefit",
        keep: int = 100,
        history: Sequence[WidthRecord] = (),
    ) -> None:
        super().__init__(space, budget, rng)
        if population < 2 or generations < 1:
            raise OptionError("evolution needs a population of at least 2 and at least 1 generation")
        if not 0 <= near_budget < 1:
            raise OptionError(f"near_budget={near_budget}: a share of the budget from 0 to below 1")
        self.population = population
        self.generations = generations
        self._seed = int(rng.integers(2**31))
        if not 0 < entropy < np.inf:
            raise OptionError(f"entropy={entropy}: it must be a positive number, or all draws become one")
        if not 1 <= keep <= 100:
            raise OptionError(f"keep={keep}: from 1 to 100 of the widths that trained best")
        self._table = Genes(space, budget)
        draws, first = np.random.default_rng(self._seed), []
        if pips and history:
            first = prior_population(
                space,
                budget,
                history,
                draws,
                population,
                entropy=entropy,
                near_budget=near_budget,
                estimate=estimate,
                keep=keep,
            )
        if len(first) < population:
            drawn = {tuple(w.values()) for w in first}
            others = draw_near_budget(space, budget, draws, population, near_budget)
            first += [w for w in others if tuple(w.values()) not in drawn][: population - len(first)]
        self._first = [space.encode(w).tolist() for w in first]
        self._generation = 0
        self._start()

    def ask(self) -> list[WidthVector]:
        """The next generation."""
        if self.done:
            return []
        return [self.space.decode(genes) for genes in self._asked]

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Let the generation compete, and breed the next one."""
        self._generation += 1
        self._compete([float(s) if np.isfinite(s) else -_WORST for s in scores])

    @property
    def done(self) -> bool:
        """Whether all generations were judged, or no new child can be bred."""
        return self._generation >= self.generations or not len(self._asked)

    @property
    def proposals(self) -> int:
        """The first population and as many children as all other generations have."""
        return len(self._first) + self.population * (self.generations - 1)

    def _start(self) -> None:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination
        from pymoo.operators.crossover.pntx import TwoPointCrossover
        from pymoo.operators.mutation.pm import PolynomialMutation

        top = self._table.top.astype(np.float64)
        self._problem = Problem(n_var=len(top), n_obj=2, xl=np.zeros(len(top)), xu=np.maximum(top, 1e-9))
        self._archive = _make_archive()
        self._algorithm = NSGA2(
            pop_size=len(self._first),
            n_offsprings=self.population,
            sampling=np.array(self._first, dtype=np.float64),
            crossover=TwoPointCrossover(),
            mutation=PolynomialMutation(),
            repair=_make_repair(self._table, np.random.default_rng(self._seed + 1)),
            eliminate_duplicates=self._archive,
        )
        self._algorithm.setup(self._problem, termination=NoTermination(), seed=self._seed, verbose=False)
        self._breed()

    def _breed(self) -> None:
        self._infills = self._algorithm.ask()
        empty = self._infills is None or not len(self._infills)
        self._asked = np.zeros((0, 0), dtype=np.int64) if empty else _genes(self._infills.get("X"))
        self._archive.asked.update(map(tuple, self._asked.tolist()))

    def _compete(self, scores: Sequence[float]) -> None:
        from pymoo.core.evaluator import Evaluator
        from pymoo.problems.static import StaticProblem

        macs = self.space.graph.macs(self._table.widths(self._asked)).astype(np.float64)
        objectives = np.stack([-np.array(scores), macs], axis=1)
        Evaluator().eval(StaticProblem(self._problem, F=objectives), self._infills)
        self._algorithm.tell(infills=self._infills)
        self._breed()


def _genes(x: FloatArray) -> npt.NDArray[np.int64]:
    return np.rint(x).astype(np.int64)


def _key(individual: Any) -> tuple[int, ...]:
    return tuple(_genes(individual.X).tolist())


def _make_archive() -> Any:
    """Return pymoo's hook that lets through only what was not asked before in this search."""
    from pymoo.core.duplicate import DuplicateElimination

    class Archive(DuplicateElimination):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.asked: set[tuple[int, ...]] = set()

        def _do(self, pop: Any, other: Any, is_duplicate: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
            seen = set(self.asked) if other is None else {_key(individual) for individual in other}
            for i, individual in enumerate(pop):
                key = _key(individual)
                is_duplicate[i] |= key in seen
                if other is None:
                    seen.add(key)
            return is_duplicate

    return Archive()


def _make_repair(table: Genes, rng: np.random.Generator) -> Any:
    """Return pymoo's hook that rounds genes and takes random steps away until a child is inside the budget."""
    from pymoo.core.repair import Repair

    class Inside(Repair):  # type: ignore[misc]
        def _do(self, problem: Any, x: FloatArray, **_: Any) -> FloatArray:
            return table.step_down(np.clip(np.rint(x), 0, table.top).astype(np.int64), rng).astype(np.float64)

    return Inside()
