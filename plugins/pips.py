"""Prior initial population sampling: start the evolution where training went well (BCNet, Eq. 13-15).

Every choice of every group gets a potential error from the widths that trained best; every group gets a distribution
over its choices (:mod:`widthkit_plugins.pips_program`); the first population is drawn from these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from widthkit_plugins.pips_program import Distributions, fit

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.space import SearchSpace
from widthkit.train.history import WidthRecord

FloatArray = npt.NDArray[np.float64]


def potential_errors(
    space: SearchSpace, history: Sequence[WidthRecord], estimate: str = "benefit", keep: int = 100
) -> list[FloatArray]:
    """Return for every group ``[choices]``: the potential error of a choice, from the widths that trained best.

    ``"mean"`` is Eq. 13 as written: the mean loss of the best widths that use the choice. Among the best all losses
    are alike, so what is left in that mean is mostly noise; how *often* the best use a choice says more, and Eq. 13
    leaves it out. ``"benefit"`` counts both, ``worst - sum over its users of (worst - loss) * choices / m``, and as
    wider groups do not hurt, the errors of a group are made non-increasing (isotonic regression). With either, a
    choice that none of the best uses starts from the worst loss among them. A trained width that is no choice counts
    for the nearest one (a complement, or a width of another stage).

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
        errors.append(ESTIMATES[estimate](users, float(losses.max()), len(best) / len(options)))
    return errors


def _mean(users: list[FloatArray], worst: float, expected: float) -> FloatArray:
    """Eq. 13."""
    return np.array([used.mean() if len(used) else worst for used in users])


def _benefit(users: list[FloatArray], worst: float, expected: float) -> FloatArray:
    """As if every choice had been met equally often, and always with the worst loss where it was not among the best."""
    from sklearn.isotonic import IsotonicRegression

    raw = np.array([worst - (worst - used).sum() / expected for used in users])
    return np.asarray(IsotonicRegression(increasing=False).fit_transform(np.arange(len(raw)), raw), dtype=np.float64)


ESTIMATES = {"benefit": _benefit, "mean": _mean}


def sample(
    space: SearchSpace,
    budget: Budget,
    distributions: Distributions,
    rng: np.random.Generator,
    n: int,
    band: float,
    batches: int = 50,
) -> list[dict[str, int]]:
    """Draw up to ``n`` different width vectors inside the budget, those that use more than ``band`` of it first.

    Args:
        space: The choices.
        budget: Holds for every draw, exactly.
        distributions: Every group's distribution over its choices.
        rng: Draws.
        n: How many are wanted; fewer come back where the distributions give no more.
        band: Share of the budget that draws should exceed.
        batches: How many times to draw ``8 n`` before making do with what lies below the band.
    """
    found: dict[tuple[int, ...], float] = {}
    edges = [np.cumsum(p) for p in distributions]
    for _ in range(batches):
        draws = rng.random((8 * n, len(edges)))
        columns = [
            np.minimum(np.searchsorted(e, d, side="right"), len(e) - 1) for e, d in zip(edges, draws.T, strict=True)
        ]
        genes = np.stack(columns, axis=1)
        widths = np.stack([np.array(g.options)[c] for g, c in zip(space.groups, columns, strict=True)], axis=1)
        usage = np.asarray(budget.usage(space.graph, widths)).tolist()
        for key, used in zip(map(tuple, genes.tolist()), usage, strict=True):
            if used <= 1:
                found.setdefault(key, used)
        if sum(used > band for used in found.values()) >= n:
            break
    chosen = sorted(found, key=lambda key: -min(found[key], band))
    return [w for w in map(space.decode, chosen) if budget.fits(space.graph, w)][:n]


def prior_population(
    space: SearchSpace,
    budget: Budget,
    history: Sequence[WidthRecord],
    rng: np.random.Generator,
    n: int,
    *,
    entropy: float,
    band: float,
    estimate: str = "benefit",
) -> list[dict[str, int]]:
    """Return up to ``n`` different width vectors inside the budget, drawn where training went well."""
    distributions = fit(space, budget, potential_errors(space, history, estimate), entropy)
    return sample(space, budget, distributions, rng, n, band)
