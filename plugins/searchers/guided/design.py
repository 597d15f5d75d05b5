"""Which networks to measure: those that teach most about how scores depend on widths.

A D-optimal design has the largest determinant of the information matrix, so the smallest joint confidence region of a
linear model's weights (Fedorov, Theory of Optimal Experiments, 1972). Here these are the slopes over the log widths.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from widthkit.budget import Budget
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.genes import Genes

_ENUMERABLE = 20_000
_PASSES = 3
_RIDGE = 1e-3
"""Initial diagonal of the information matrix, which keeps it invertible."""


def design_columns(space: SearchSpace, widths: IntArray, degree: int = 1) -> FloatArray:
    """Return ``[n, 1 + degree * free groups]``: a constant and powers of the log widths, each scaled to -1 to 1."""
    free = [i for i, g in enumerate(space.groups) if len(g.options) > 1]
    top = np.log([space.groups[i].widest for i in free])
    span = top - np.log([space.groups[i].narrowest for i in free])
    x = 1 + 2 * (np.log(np.asarray(widths, dtype=np.float64)[:, free]) - top) / np.where(span > 0, span, 1)
    return np.concatenate([np.ones((len(x), 1)), *(x**d for d in range(1, degree + 1))], axis=1)


def d_optimal(columns: FloatArray, n: int, rng: np.random.Generator, given: FloatArray | None = None) -> list[int]:
    """Choose rows that, with the given ones, make the determinant of the information matrix large.

    Rows are added one by one where the prediction is least certain, then exchanged while that helps.

    Args:
        columns: ``[candidates, p]``.
        n: How many rows to choose, at most; none twice.
        rng: Breaks ties.
        given: ``[m, p]``; rows that were measured already.

    Returns:
        Indices of the rows, in the order of choice.

    >>> line = np.stack([np.ones(5), np.linspace(-1, 1, 5)], axis=1)
    >>> sorted(d_optimal(line, 2, np.random.default_rng(0)))
    [0, 4]
    """
    information = _RIDGE * np.eye(columns.shape[1])
    if given is not None:
        information += given.T @ given
    covariance: FloatArray = np.asarray(np.linalg.inv(information), dtype=np.float64)
    tie = 1 + 1e-9 * rng.random(len(columns))
    free = np.ones(len(columns), dtype=bool)
    chosen: list[int] = []
    for _ in range(min(n, len(columns))):
        best = int(np.argmax(np.where(free, _variance(columns, covariance) * tie, -1)))
        chosen.append(best)
        free[best] = False
        covariance = _update(covariance, columns[best], 1)
    for _ in range(_PASSES):
        if not _exchange(columns, chosen, free, covariance, tie):
            break
        covariance = np.asarray(np.linalg.inv(information + columns[chosen].T @ columns[chosen]))
    return chosen


def _exchange(
    columns: FloatArray, chosen: list[int], free: npt.NDArray[np.bool_], covariance: FloatArray, tie: FloatArray
) -> bool:
    """Exchange each chosen row for the candidate that raises the determinant most; return whether any changed."""
    changed = False
    for place, old in enumerate(chosen):
        covariance = _update(covariance, columns[old], -1)
        free[old] = True
        variance = np.where(free, _variance(columns, covariance) * tie, -1)
        new = int(np.argmax(variance))
        if variance[new] <= variance[old] * (1 + 1e-6):
            new = old
        changed = changed or new != old
        chosen[place] = new
        free[new] = False
        covariance = _update(covariance, columns[new], 1)
    return changed


def _variance(columns: FloatArray, covariance: FloatArray) -> FloatArray:
    return np.asarray(((columns @ covariance) * columns).sum(1))


def _update(covariance: FloatArray, row: FloatArray, sign: int) -> FloatArray:
    """Add a measurement of one row to the information, or take it away (Sherman and Morrison)."""
    moved = covariance @ row
    return np.asarray(covariance - sign * np.outer(moved, moved) / (1 + sign * float(row @ moved)))


def candidates(space: SearchSpace, budget: Budget, rng: np.random.Generator, n: int) -> IntArray:
    """Return up to ``n`` different width vectors inside the budget, of all shapes and sizes: ``[<= n, groups]``.

    Small spaces are listed. In large ones, half of the draws prefer the extremes of every group, where a design looks
    first; what is outside the budget loses random steps until it is inside.
    """
    table = Genes(space, budget)
    if space.size <= _ENUMERABLE:
        genes = table.all()
        genes = genes[table.usage(genes) <= 1]
        genes = genes[np.sort(rng.permutation(len(genes))[:n])]
    else:
        u = rng.random((n, len(table.top)))
        u[::2] = rng.beta(0.3, 0.3, size=u[::2].shape)
        genes = table.step_down(np.minimum((u * (table.top + 1)).astype(np.int64), table.top), rng)
        genes = np.unique(genes[table.usage(genes) <= 1], axis=0)
    return table.widths(genes)
