"""Where the next supernet evaluation helps most, and which network is best by the model."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm
from widthkit_plugins.searchers.guided.design import d_optimal, design_columns

from widthkit.budget import Budget
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.genes import Genes, usage_of
from widthkit.search.score_model import Prediction, ScoreModel
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


def acquisition_batch(
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
    return np.asarray(pool[short][d_optimal(columns, n, rng, given)])


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
        fits = usage_of(space, budget, widths) <= 1
        found.update((tuple(w), None) for w in widths[fits].tolist())
        searcher.tell(asked, (prediction.mean + optimism * prediction.std).tolist())
    return np.array(list(found), dtype=np.int64).reshape(-1, len(space.names))


def climb(model: ScoreModel, space: SearchSpace, budget: Budget, start: IntArray) -> IntArray:
    """Improve one width vector ``[groups]`` by the model while a step up, or one up and one down, helps.

    Searchers stop at the budget; the last channels that still fit are found here. Every step takes the best move.
    """
    now = np.asarray(start)
    if any(width not in g.options for width, g in zip(now.tolist(), space.groups, strict=True)):
        return now  # A width between two choices has no gene.
    table = Genes(space, budget)
    genes = np.array([g.options.index(w) for w, g in zip(now.tolist(), space.groups, strict=True)], dtype=np.int64)
    n = len(genes)
    steps = np.concatenate([np.eye(n), (np.eye(n)[:, None] - np.eye(n)[None]).reshape(-1, n)]).astype(np.int64)
    for _ in range(_MOST_STEPS):
        moved = np.concatenate([genes[None], genes + steps])
        moved = moved[((moved >= 0) & (moved <= table.top)).all(1)]
        mean = np.where(table.usage(moved) <= 1, model.predict(table.widths(moved)).mean, -np.inf)
        best = int(np.argmax(mean))
        if not mean[best] > mean[0] + 1e-12 * abs(mean[0]):
            break
        genes = moved[best]
    return np.asarray(table.widths(genes[None])[0])
