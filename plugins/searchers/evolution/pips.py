"""Prior initial population sampling: start the evolution where training went well (BCNet, Eq. 13-15).

Every choice of every group gets a potential error from the widths that trained best; every group gets a distribution
over its choices (:mod:`widthkit_plugins.searchers.evolution.pips_program`); the first population is drawn from these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from widthkit_plugins.searchers.evolution.pips_program import Distributions, fit

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.genes import Genes
from widthkit.train.history import WidthRecord


def potential_errors(
    space: SearchSpace, history: Sequence[WidthRecord], estimate: str = "benefit", keep: int = 100
) -> list[FloatArray]:
    """Return for every group ``[choices]``: the potential error of a choice, from the widths that trained best.

    ``"mean"`` is Eq. 13 as written: the mean loss of the best widths that use the choice, and the worst loss among
    the best for a choice that none of them uses. Among the best all losses are alike, so what is left in that mean is
    mostly noise; how *often* the best use a choice says more, and Eq. 13 leaves it out. ``"benefit"`` counts both,
    ``worst - sum over its users of (worst - loss) * choices / m``, which is the worst again where there is no user,
    and smooths it by a line over the log of the width that does not rise. A trained width that is no choice counts for
    the nearest one (a complement, or a width of another stage).

    Args:
        space: The choices.
        history: Width vectors with their training losses, in any order.
        estimate: ``"benefit"`` or ``"mean"``.
        keep: How many of the best to use (m in the paper).

    Raises:
        OptionError: If there is no record, one lacks a group, or the estimate is unknown.
    """
    if estimate not in ESTIMATES:
        raise OptionError(f"estimate '{estimate}': pips knows {' and '.join(ESTIMATES)}")
    best = sorted(history, key=lambda record: record[1])[:keep]
    if not best:
        raise OptionError("no width was recorded in training; train the supernet, or pass pips=false")
    losses = np.array([loss for _, loss in best])
    errors = []
    for g in space.groups:
        try:
            widths = np.array([widths[g.name] for widths, _ in best])
        except KeyError:
            raise OptionError(f"the history of trained widths does not name group '{g.name}'") from None
        options = np.array(g.options)
        inside = (widths >= g.narrowest) & (widths <= g.widest)
        nearest = np.abs(widths[:, None] - options).argmin(axis=1)
        users = [losses[inside & (nearest == choice)] for choice in range(len(options))]
        errors.append(ESTIMATES[estimate](users, float(losses.max()), options, len(best)))
    return errors


def _mean(users: list[FloatArray], worst: float, options: IntArray, n: int) -> FloatArray:
    """Eq. 13."""
    return np.array([used.mean() if len(used) else worst for used in users])


def _benefit(users: list[FloatArray], worst: float, options: IntArray, n: int) -> FloatArray:
    """Estimate as if every choice had equally many records; a missing record counts as the worst loss."""
    raw = np.array([worst - (worst - used).sum() * len(options) / n for used in users])
    log = np.log(options) - np.log(options).mean()
    fall = max(0.0, -float(log @ (raw - raw.mean())) / max(float(log @ log), 1e-12))
    return np.asarray(raw.mean() - fall * log)


ESTIMATES = {"benefit": _benefit, "mean": _mean}


def sample(
    space: SearchSpace,
    budget: Budget,
    distributions: Distributions,
    rng: np.random.Generator,
    n: int,
    near_budget: float,
    batches: int = 30,
) -> list[dict[str, int]]:
    """Draw up to ``n`` different width vectors inside the budget, those that use more than ``near_budget`` of it first.

    Where too few draws are inside, because a bound is no polynomial or the distributions are nearly certain, draws
    outside lose random steps until they are inside.

    Args:
        space: The choices.
        budget: Holds for every draw, exactly.
        distributions: Every group's distribution over its choices.
        rng: Draws.
        n: How many are wanted; fewer come back where the distributions give no more.
        near_budget: Share of the budget that draws should exceed.
        batches: How many times to draw ``8 n`` before making do with what uses less.
    """
    table = Genes(space, budget)
    found: dict[tuple[int, ...], float] = {}
    outside: list[IntArray] = []
    for _ in range(batches):
        genes = _drawn(distributions, rng, 8 * n)
        usage = table.usage(genes)
        _keep(found, genes, usage)
        outside.append(genes[usage > 1])
        if sum(used > near_budget for used in found.values()) >= n:
            break
    if len(found) < n:
        genes = table.step_down(np.concatenate(outside)[: 8 * n], rng)
        _keep(found, genes, table.usage(genes))
    chosen = sorted(found, key=lambda key: -min(found[key], near_budget))
    return [w for w in map(space.decode, chosen) if budget.fits(space.graph, w)][:n]


def _drawn(distributions: Distributions, rng: np.random.Generator, n: int) -> IntArray:
    draws = rng.random((n, len(distributions)))
    edges = [np.cumsum(p) for p in distributions]
    columns = [
        np.minimum(np.searchsorted(edge, draw, side="right"), len(edge) - 1)
        for edge, draw in zip(edges, draws.T, strict=True)
    ]
    return np.stack(columns, axis=1).astype(np.int64)


def _keep(found: dict[tuple[int, ...], float], genes: IntArray, usage: FloatArray) -> None:
    for key, used in zip(map(tuple, genes.tolist()), usage.tolist(), strict=True):
        if used <= 1:
            found.setdefault(key, used)


def prior_population(
    space: SearchSpace,
    budget: Budget,
    history: Sequence[WidthRecord],
    rng: np.random.Generator,
    n: int,
    *,
    entropy: float,
    near_budget: float,
    estimate: str = "benefit",
    keep: int = 100,
) -> list[dict[str, int]]:
    """Return up to ``n`` different width vectors inside the budget, drawn where training went well."""
    distributions = fit(space, budget, potential_errors(space, history, estimate, keep), entropy)
    return sample(space, budget, distributions, rng, n, near_budget)
