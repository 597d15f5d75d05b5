"""Guided search: few networks are judged, chosen by design; a score model that learns from them decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
from widthkit_plugins.searchers.guided.acquisition import CURVES, acquisition_batch, ask_model, climb
from widthkit_plugins.searchers.guided.design import candidates, d_optimal, design_columns

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.graph import IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.genes import named, usage_of
from widthkit.search.near_budget import NEAR, fullest
from widthkit.search.score_model import SCORE_MODELS, Observations, ScoreModel
from widthkit.search.searcher import SEARCHERS, Searcher, StandAlone, WidthVector

_WORK = 2_000_000
_POOL = (1024, 8192)
"""A design looks at fewer candidates where there are many groups, because its time grows with their square."""
_MOST = 256
"""Networks that are judged by default, at most; smoothed scores gain little beyond (docs/score-models.md)."""
_ROUNDS = 4
"""Batches after the first design."""

Steps = Generator[list[WidthVector], Sequence[float], None]
"""Yields what to judge next and receives the scores."""


class GuidedSearcher(Searcher):
    """Judge few networks, chosen by design; a score model that learns from them decides.

    Another searcher proposes networks by the model's predictions, and the supernet judges those that teach the model
    most. At the end the model chooses. Where networks are trained on their own (``calibrate``), the model predicts
    their accuracy.

    Args:
        space: The widths to choose from.
        budget: What networks may cost.
        rng: Draws candidates and breaks ties.
        model: Name of a registered score model; the default one if ``None``.
        model_options: Its options.
        proposals: Name of the searcher that proposes by the model's predictions.
        proposals_options: Its options.
        evaluations: How many networks the supernet judges, at most, and the chosen one; by default as many as the
            proposing searcher alone would ask for, but at most 256.
        calibrate: How many networks are trained on their own, chosen by design.
        unit_scores: Importance of units; the search provides it, for the proposing searcher.
        history: The width vectors that trained best; likewise.

    Raises:
        OptionError: If a number is too small.
        PluginError: If there is no such score model or searcher.
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget,
        rng: np.random.Generator,
        model: str | None = None,
        model_options: Mapping[str, Any] | None = None,
        proposals: str = "greedy",
        proposals_options: Mapping[str, Any] | None = None,
        evaluations: int | None = None,
        calibrate: int = 0,
        unit_scores: Callable[[str], Any] | None = None,
        history: Sequence[Any] = (),
    ) -> None:
        super().__init__(space, budget, rng)
        if evaluations is not None and evaluations < 2:
            raise OptionError(f"evaluations={evaluations}: a score model needs at least 2")
        if calibrate < 0 or calibrate == 1:
            raise OptionError(f"calibrate={calibrate}: 0 for none, or at least 2 stand-alone trainings")
        if proposals == "guided":
            raise OptionError("proposals='guided': a guided search cannot guide itself; name another searcher")
        self.model: ScoreModel = SCORE_MODELS.build(model or SCORE_MODELS.default, model_options or {}, space)
        self.calibrate = calibrate
        self._proposer = proposals, dict(proposals_options or {}), {"unit_scores": unit_scores, "history": history}
        self._seed = int(rng.integers(2**31))
        self._make_proposer()  # Its name and options are refused before anything is judged.
        self.evaluations = evaluations or self._as_many_as_the_proposer()
        self._seen: list[WidthVector] = []
        self._scores: list[float] = []
        self._calibrations: list[tuple[WidthVector, float]] = []
        self._choice: WidthVector | None = None
        self._prediction: dict[str, Any] = {}
        self._steps = self._run()
        self._asked = next(self._steps)

    def ask(self) -> list[WidthVector] | StandAlone:
        """The next networks to train or to judge."""
        return type(self._asked)(dict(widths) for widths in self._asked)

    def tell(self, widths: Sequence[WidthVector], scores: Sequence[float]) -> None:
        """Learn, and decide what to ask next."""
        asked, self._asked = self._asked, []
        if isinstance(asked, StandAlone):
            self._calibrations += zip(asked, scores, strict=True)
        else:
            self._seen += asked
            self._scores += scores
        self._asked = next(self._steps, [])

    @property
    def done(self) -> bool:
        """Whether the model has chosen."""
        return not self._asked

    @property
    def proposals(self) -> int:
        """The evaluations, and the model's choice."""
        return self.evaluations + 1

    @property
    def trainings(self) -> int:
        """As many as it calibrates with."""
        return self.calibrate

    def choice(self) -> WidthVector | None:
        """The network near the budget of which the model expects most."""
        return self._choice

    def summary(self) -> dict[str, Any]:
        """What the model expects of its choice, and what it was calibrated with."""
        calibrations = [list(pair) for pair in self._calibrations]
        return {"prediction": {**self._prediction, "calibrations": calibrations}}

    def _run(self) -> Steps:
        """Train a design, judge a design, judge batches that teach the model most, then choose by prediction."""
        columns = design_columns(self.space, np.array([list(self.space.largest.values())]), CURVES).shape[1]
        pool = candidates(self.space, self.budget, self.rng, int(np.clip(_WORK // columns**2, *_POOL)))
        if self.calibrate:
            rows = d_optimal(design_columns(self.space, pool), self.calibrate, self.rng)
            yield StandAlone(named(self.space, pool[rows]))
        first = d_optimal(design_columns(self.space, pool, CURVES), max(2, self.evaluations // 2), self.rng)
        yield named(self.space, pool[first])
        batch = max(1, math.ceil((self.evaluations - len(first)) / _ROUNDS))
        while len(self._seen) < self.evaluations:
            rows = self._next(pool, min(batch, self.evaluations - len(self._seen)))
            if not len(rows):
                break
            yield named(self.space, rows)
        if self._fit():
            yield from self._choose()

    def _next(self, pool: IntArray, n: int) -> IntArray:
        """Return ``[<= n, groups]``: what the model wants to know; where every score diverged, more of a design."""
        if self._fit():
            new = self._new(np.concatenate([ask_model(self._make_proposer(), self.model, self.budget, 1.0), pool]))
            return acquisition_batch(self.model, self.space, new, self._seen_widths(), n, self.rng) if len(new) else new
        new = self._new(pool)
        seen = design_columns(self.space, self._seen_widths(), CURVES)
        return np.asarray(new[d_optimal(design_columns(self.space, new, CURVES), n, self.rng, seen)])

    def _choose(self) -> Steps:
        """Judge what the model expects most of, until a network has a finite score: that one is chosen."""
        for row in self._finalists():
            widths = named(self.space, row[None])[0]
            if widths not in self._seen:
                yield [widths]
            if math.isfinite(self._scores[self._seen.index(widths)]):
                told = self.model.predict(row[None])
                self._choice = widths
                self._prediction = {"mean": float(told.mean[0]), "std": float(told.std[0])}
                return

    def _finalists(self) -> IntArray:
        """Return ``[n, groups]``: proposed or judged, those near the budget first, the most promising ones first."""
        asked = ask_model(self._make_proposer(), self.model, self.budget)
        pool = np.concatenate([asked, self._seen_widths()])
        start = asked[0] if len(asked) else pool[0]
        full = list(fullest(self.space, self.budget).widths.values())
        pool = np.concatenate([pool, climb(self.model, self.space, self.budget, start)[None], np.array([full])])
        pool = np.unique(pool, axis=0)
        pool = pool[usage_of(self.space, self.budget, pool) <= 1]
        diverged = [w for w, score in zip(self._seen, self._scores, strict=True) if not math.isfinite(score)]
        pool = pool[[widths not in diverged for widths in named(self.space, pool)]]
        near = usage_of(self.space, self.budget, pool) > NEAR
        return np.asarray(pool[np.lexsort((-self.model.predict(pool).mean, ~near))])

    def _fit(self) -> bool:
        """Fit the model; ``False`` where no score is finite."""
        scores = Observations(self._seen_widths(), np.array(self._scores))
        given = [list(widths.values()) for widths, _ in self._calibrations]
        real = Observations(
            np.array(given, dtype=np.int64).reshape(-1, len(self.space.names)),
            np.array([accuracy for _, accuracy in self._calibrations]),
        )
        if not len(scores):
            return False
        self.model.fit(scores, real if len(real) else None)
        return True

    def _make_proposer(self) -> Searcher:
        """Build the proposing searcher afresh, every time in the same state."""
        name, options, offered = self._proposer
        rng = np.random.default_rng(self._seed)
        made: Searcher = SEARCHERS.build(name, options, self.space, self.budget, rng, offered=offered)
        if made.trainings:
            raise OptionError(f"proposals='{name}': it wants networks trained on their own; name another searcher")
        return made

    def _as_many_as_the_proposer(self) -> int:
        """Count what the proposing searcher asks for where all scores are equal."""
        searcher, count = self._make_proposer(), 0
        while not searcher.done and count < _MOST:
            asked = searcher.ask()
            if not asked:
                break
            count += len(asked)
            searcher.tell(asked, [0.0] * len(asked))
        return min(max(count, 2), _MOST)

    def _seen_widths(self) -> IntArray:
        rows = [list(widths.values()) for widths in self._seen]
        return np.array(rows, dtype=np.int64).reshape(-1, len(self.space.names))

    def _new(self, pool: IntArray) -> IntArray:
        """Return the distinct rows that were not judged yet."""
        seen = {tuple(w) for w in self._seen_widths().tolist()}
        rows = [w for w in dict.fromkeys(map(tuple, pool.tolist())) if w not in seen]
        return np.array(rows, dtype=np.int64).reshape(-1, pool.shape[1])
