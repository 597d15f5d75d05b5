"""A search that a score model guides: few networks are judged, chosen by design; the model decides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from widthkit.budget import Budget
from widthkit.errors import ModelError, OptionError
from widthkit.graph import IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.acquire import CURVES, acquire, ask_model, climb
from widthkit.search.design import candidates, d_optimal, design_columns
from widthkit.search.evaluator import Judgement
from widthkit.search.journal import Journal
from widthkit.search.loop import judge_new, key_of, trial_of
from widthkit.search.near_budget import BAND, fullest
from widthkit.search.result import SearchResult, Trial
from widthkit.search.score_model import SCORE_MODELS, Observations, ScoreModel
from widthkit.search.searcher import Searcher, WidthVector
from widthkit.train.parallel import alone

Judge = Callable[[Mapping[str, int]], Judgement]
TrainFn = Callable[[WidthVector], float]
Watch = Callable[[Trial, float], None]

DEFAULT_MODEL = "log-linear"
"""What ``score_model="auto"`` stands for; docs/score-models.md says why."""
_WORK = 2_000_000
_POOL = (1024, 8192)
"""A design looks at fewer candidates where there are many groups: its time grows with their square."""
_MOST = 256
"""Networks that are judged by default, at most; smoothed scores gain little beyond (docs/score-models.md)."""
_ROUNDS = 4
"""Batches after the first design."""


@dataclass(frozen=True)
class Guidance:
    """How a score model takes part in a search.

    Args:
        model: Name of a registered score model.
        evaluations: Networks that the supernet judges, at most (and the chosen one); if ``None``, as many as the
            searcher alone would propose, up to 256.
        calibrate: Networks that ``train_fn`` trains.
        train_fn: Trains a network of given widths on its own and returns its accuracy (higher is better).
        options: Options of the model.
    """

    model: str
    evaluations: int | None = None
    calibrate: int = 0
    train_fn: TrainFn | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            OptionError: Naming the option.
            PluginError: If no model has that name.
        """
        SCORE_MODELS.get(self.model)
        if self.evaluations is not None and self.evaluations < 2:
            raise OptionError(f"evaluations={self.evaluations}: a score model needs at least 2")
        if self.calibrate < 0 or self.calibrate == 1:
            raise OptionError(f"calibrate={self.calibrate}: 0 for none, or at least 2 stand-alone trainings")
        if self.calibrate and self.train_fn is None:
            raise OptionError(f"calibrate={self.calibrate} needs train_fn, which trains a network of given widths")

    def settings(self) -> dict[str, Any]:
        """What the result depends on."""
        found = {"score_model": self.model, "evaluations": self.evaluations, "calibrate": self.calibrate}
        return {**found, "score_model_options": dict(self.options)} if self.options else found


def make_guidance(
    score_model: str | None,
    searcher: type[Searcher],
    evaluations: int | None,
    calibrate: int,
    train_fn: TrainFn | None,
    options: Mapping[str, Any] | None,
) -> Guidance | None:
    """Read the options of a search; ``None`` where every proposal is judged by the supernet, as in the papers.

    Raises:
        OptionError: If they do not fit together.
    """
    if score_model == "auto":
        score_model = DEFAULT_MODEL if searcher.compares_scores else None
    if score_model is None:
        if calibrate:
            raise OptionError(f"calibrate={calibrate} needs a score model; leave score_model at 'auto'")
        return None
    guidance = Guidance(score_model, evaluations, calibrate, train_fn, options or {})
    guidance.check()
    return guidance


@dataclass(frozen=True)
class Guided:
    """What a guided search found.

    Args:
        trials: Every network that the supernet judged, in order.
        widths: The model's choice.
        mean: What the model expects of it.
        std: How sure it is.
        calibrations: Widths and stand-alone accuracy of every network that was trained.
    """

    trials: list[Trial]
    widths: WidthVector
    mean: float
    std: float
    calibrations: list[tuple[WidthVector, float]]

    def choose(self, result: SearchResult) -> SearchResult:
        """Put the model's choice in the place of the best score."""
        chosen = next(t for t in self.trials if t.widths == self.widths)
        told = {"mean": self.mean, "std": self.std, "calibrations": [list(c) for c in self.calibrations]}
        return dataclasses.replace(
            result,
            widths=dict(chosen.widths),
            score=chosen.score,
            accuracy=chosen.accuracy,
            macs=chosen.macs,
            params=chosen.params,
            settings={**result.settings, "prediction": told},
        )


def make_model(guidance: Guidance, space: SearchSpace) -> ScoreModel:
    """Build the registered model.

    Raises:
        OptionError: If it does not take one of the options.
    """
    return SCORE_MODELS.build(guidance.model, guidance.options, space)  # type: ignore[no-any-return]


class GuidedSearch:
    """One guided search.

    Everything follows from the seed and from what was measured, in order; measurements come from the journal where it
    has them. So a resumed search repeats the same decisions and goes on to the same result.

    Args:
        guidance: How the model takes part.
        make_engine: Builds the searcher afresh, every time in the same state.
        space: The space.
        budget: What the result may cost.
        judge: The supernet.
        journal: Gets every new measurement before anyone else hears of it.
        known: Measurements of an earlier run.
        watchers: Called with every trial and the progress.
    """

    def __init__(
        self,
        guidance: Guidance,
        make_engine: Callable[[], Searcher],
        space: SearchSpace,
        budget: Budget,
        judge: Judge,
        journal: Journal,
        known: dict[str, Judgement],
        watchers: Sequence[Watch] = (),
    ) -> None:
        self.guidance, self.make_engine, self.space, self.budget = guidance, make_engine, space, budget
        self.judge, self.journal, self.known, self.watchers = judge, journal, known, watchers
        self.model = make_model(guidance, space)
        self.trials: list[Trial] = []
        self.calibrations: list[tuple[WidthVector, float]] = []
        self._shown = 0

    def run(self, seed: int = 0) -> Guided:
        """Calibrate, judge a design, then what the model wants to know; return the model's choice.

        Args:
            seed: Draws candidates and breaks ties.

        Raises:
            ModelError: If nothing finite was measured.
        """
        self.rng = np.random.default_rng([seed, len("score model")])
        columns = design_columns(self.space, np.array([list(self.space.largest.values())]), CURVES).shape[1]
        pool = candidates(self.space, self.budget, self.rng, int(np.clip(_WORK // columns**2, *_POOL)))
        self._calibrate(pool)
        n = self.evaluations = self.guidance.evaluations or self._as_many_as_the_searcher()
        first = d_optimal(design_columns(self.space, pool, CURVES), max(2, n // 2), self.rng)
        self._judge_all(pool[first])
        batch = max(1, math.ceil((n - len(first)) / _ROUNDS))
        while len(self.trials) < n:
            self._fit()
            new = self._new(np.concatenate([ask_model(self.make_engine(), self.model, self.budget, 1.0), pool]))
            if not len(new):
                break
            self._judge_all(
                acquire(self.model, self.space, new, self._seen(), min(batch, n - len(self.trials)), self.rng)
            )
        return self._choose()

    def _as_many_as_the_searcher(self) -> int:
        """Count what the searcher proposes where all scores are equal."""
        searcher, count = self.make_engine(), 0
        while not searcher.done and count < _MOST:
            asked = searcher.ask()
            if not asked:
                break
            count += len(asked)
            searcher.tell(asked, [0.0] * len(asked))
        return min(max(count, 2), _MOST)

    def _choose(self) -> Guided:
        self._fit()
        asked = ask_model(self.make_engine(), self.model, self.budget)
        pool = np.concatenate([asked, self._seen()])
        pool = np.concatenate(
            [pool, climb(self.model, self.space, self.budget, asked[0] if len(asked) else pool[0])[None]]
        )
        pool = self._in_band(pool)
        # What diverged is not chosen, whatever the model expects of it.
        bad = {tuple(t.widths.values()) for t in self.trials if not math.isfinite(t.score)}
        pool = np.array([w for w in pool.tolist() if tuple(w) not in bad], dtype=np.int64).reshape(-1, pool.shape[1])
        order = np.argsort(-self.model.predict(pool).mean, kind="stable")
        for start in pool[order]:
            trial = self._measure(start)
            if math.isfinite(trial.score):
                told = self.model.predict(np.asarray(start)[None])
                return Guided(self.trials, trial.widths, float(told.mean[0]), float(told.std[0]), self.calibrations)
        raise ModelError("none of the networks that the score model prefers has a finite score")

    def _in_band(self, pool: IntArray) -> IntArray:
        """Keep what uses almost all of the budget, where the space has such points, and else what holds it."""
        full = np.array([list(fullest(self.space, self.budget).widths.values())], dtype=np.int64)
        pool = np.unique(np.concatenate([pool, full]), axis=0)
        usage = np.asarray(self.budget.usage(self.space.graph, pool))
        band = (usage > BAND) & (usage <= 1)
        return np.asarray(pool[band if band.any() else usage <= 1])

    def _calibrate(self, pool: IntArray) -> None:
        train = self.guidance.train_fn
        if not self.guidance.calibrate or train is None:
            return
        rows = d_optimal(design_columns(self.space, pool), self.guidance.calibrate, self.rng)
        vectors = {"stand-alone " + key_of(widths): widths for widths in map(self._named, pool[rows])}
        for _ in judge_new(partial(_stand_alone, train), vectors, self.journal, self.known):
            pass
        self.calibrations = [(widths, self.known[key].score) for key, widths in vectors.items()]

    def _fit(self) -> None:
        scores = Observations(self._seen(), np.array([t.score for t in self.trials]))
        given = [list(widths.values()) for widths, _ in self.calibrations]
        real = Observations(
            np.array(given, dtype=np.int64).reshape(-1, len(self.space.names)),
            np.array([accuracy for _, accuracy in self.calibrations]),
        )
        if not len(scores):
            raise ModelError(
                f"none of the {len(self.trials)} networks inside the budget has a finite loss; the supernet diverged "
                "or the held-out data holds NaN"
            )
        self.model.fit(scores, real if len(real) else None)

    def _judge_all(self, widths: IntArray) -> None:
        vectors = {key_of(named): named for named in map(self._named, widths)}
        replayed = vectors.keys() & self.known.keys()
        for named, found in judge_new(self.judge, vectors, self.journal, self.known):
            self._show(trial_of(self.space.graph, named, found))
        for key, named in vectors.items():
            self.trials.append(trial_of(self.space.graph, named, self.known[key]))
            if key in replayed:
                self._show(self.trials[-1])

    def _measure(self, row: IntArray) -> Trial:
        """Judge one width vector, or find it among the trials."""
        widths = self._named(row)
        old = next((t for t in self.trials if t.widths == widths), None)
        if old is not None:
            return old
        self._judge_all(np.asarray(row)[None])
        return self.trials[-1]

    def _show(self, trial: Trial) -> None:
        self._shown += 1
        for watch in self.watchers:
            watch(trial, min(1.0, self._shown / (self.evaluations + 1)))

    def _named(self, row: IntArray) -> WidthVector:
        return {name: int(width) for name, width in zip(self.space.names, row, strict=True)}

    def _seen(self) -> IntArray:
        rows = [[t.widths[name] for name in self.space.names] for t in self.trials]
        return np.array(rows, dtype=np.int64).reshape(-1, len(self.space.names))

    def _new(self, pool: IntArray) -> IntArray:
        seen = {tuple(w) for w in self._seen().tolist()}
        rows = [w for w in dict.fromkeys(map(tuple, pool.tolist())) if w not in seen]
        return np.array(rows, dtype=np.int64).reshape(-1, pool.shape[1])


def _stand_alone(train: TrainFn, widths: Mapping[str, int]) -> Judgement:
    with alone():
        accuracy = float(train(dict(widths)))
    return Judgement(accuracy, math.nan, accuracy)
