"""Where the next supernet evaluation helps most, and which network is best by the model."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from widthkit.budget import Budget
from widthkit.graph import IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.design import d_optimal, design_columns, to_widths
from widthkit.search.score_model import FloatArray, Prediction, ScoreModel
from widthkit.search.searcher import Searcher

CURVES = 3
"""Degree of the curves that a design of supernet evaluations must tell apart. Stand-alone trainings need lines only,
but a supernet's scores bend: a design for lines or parabolas looks mostly at the ends, where they are worst."""
_SHARE = 2
"""A batch comes from the more promising half of the candidates. Closer to the optimum the model would learn the
supernet's errors there and not the slopes: systematic errors do not average out (docs/score-models.md)."""
_MOST_STEPS = 1000


def expected_improvement(prediction: Prediction, best: float) -> FloatArray:
    """Return ``[n]``: by how much each is expected to exceed ``best`` (Jones et al. 1998, Eq. 15).

    >>> expected_improvement(Prediction(np.array([0.0, 2.0]), np.array([0.0, 0.0])), 1.0).tolist()
    [0.0, 1.0]
    """
    gain = prediction.mean - best
    std = np.maximum(prediction.std, 1e-300)
    return np.asarray(np.maximum(gain * norm.cdf(gain / std) + std * norm.pdf(gain / std), 0.0))


def acquire(
    model: ScoreModel, space: SearchSpace, pool: IntArray, seen: IntArray, n: int, rng: np.random.Generator
) -> IntArray:
    """Choose the next batch: of the half with the largest expected improvement, the ones that teach most.

    Args:
        model: A fitted model.
        space: The space.
        pool: ``[candidates, groups]``; inside the budget and not judged yet.
        seen: ``[m, groups]``; what was judged.
        n: The size of the batch, at most.
        rng: Breaks ties.

    Returns:
        ``[<= n, groups]``.
    """
    prediction = model.predict(pool)
    inside = model.predict(np.concatenate([pool, seen]))
    gain = expected_improvement(prediction, float(inside.mean.max()))
    short = np.lexsort((np.arange(len(pool)), -prediction.mean, -gain))[: max(n, len(pool) // _SHARE)]
    columns, given = design_columns(space, pool[short], CURVES), design_columns(space, seen, CURVES)
    return pool[short][d_optimal(columns, n, rng, given)]


def ask_model(searcher: Searcher, model: ScoreModel, budget: Budget, optimism: float = 0.0) -> IntArray:
    """Let a searcher run to its end on what the model predicts; return what it proposed inside the budget.

    Args:
        searcher: Fresh.
        model: A fitted model.
        budget: What counts.
        optimism: The searcher is told the mean plus this many standard deviations.

    Returns:
        ``[proposals, groups]``; each once.
    """
    space = searcher.space
    found: dict[tuple[int, ...], None] = {}
    while not searcher.done:
        asked = searcher.ask()
        if not asked:
            break
        widths = np.array([[w[name] for name in space.names] for w in asked], dtype=np.int64)
        prediction = model.predict(widths)
        fits = np.asarray(budget.usage(space.graph, widths)) <= 1
        found.update((tuple(w), None) for w in widths[fits].tolist())
        searcher.tell(asked, (prediction.mean + optimism * prediction.std).tolist())
    return np.array(list(found), dtype=np.int64).reshape(-1, len(space.names))


def climb(model: ScoreModel, space: SearchSpace, budget: Budget, start: IntArray) -> IntArray:
    """Improve one width vector ``[groups]`` by the model while a step up, or one up and one down, helps.

    Searchers stop at the budget; the last channels that still fit are found here. Every step takes the best move.
    """
    table = [np.array(g.options, dtype=np.int64) for g in space.groups]
    now = np.asarray(start)
    if any(w not in t for w, t in zip(now, table, strict=True)):
        return now  # between the choices: not of this grid
    genes = np.array([int(np.flatnonzero(t == w)[0]) for t, w in zip(table, now, strict=True)], dtype=np.int64)
    top = np.array([len(t) - 1 for t in table])
    n = len(genes)
    steps = np.concatenate([np.eye(n), (np.eye(n)[:, None] - np.eye(n)[None]).reshape(-1, n)]).astype(np.int64)
    for _ in range(_MOST_STEPS):
        moved = np.concatenate([genes[None], genes + steps])
        moved = moved[((moved >= 0) & (moved <= top)).all(1)]
        widths = to_widths(space, moved)
        usage = np.asarray(budget.usage(space.graph, widths))
        mean = np.where(usage <= 1, model.predict(widths).mean, -np.inf)
        best = int(np.argmax(mean))
        if not mean[best] > mean[0] + 1e-12 * abs(mean[0]):
            break
        genes = moved[best]
    return np.asarray(to_widths(space, genes[None])[0])
