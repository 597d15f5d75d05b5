"""Width vectors as indices into the choices ("genes"): from genes to widths to what they cost, many at once."""

from __future__ import annotations

import numpy as np

from widthkit.budget import Budget
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace


class Genes:
    """The choices of a space as one table, priced by a budget.

    A gene is the index of a group's choice; 0 is the narrowest.

    Args:
        space: The choices.
        budget: What networks may cost.

    Attributes:
        top: ``[groups]``; the index of every group's widest choice.

    >>> from widthkit.testing import small_graph
    >>> from widthkit.budget import parse_budget
    >>> from widthkit.graph.space import uniform_space
    >>> graph = small_graph()
    >>> genes = Genes(uniform_space(graph, 4), parse_budget("0.5x", graph))
    >>> float(genes.usage(genes.top[None])[0])  # the whole model is twice the budget
    2.0
    """

    def __init__(self, space: SearchSpace, budget: Budget) -> None:
        self.space, self.budget = space, budget
        self.top: IntArray = np.array([len(g.options) - 1 for g in space.groups], dtype=np.int64)
        self._options = np.zeros((len(space.groups), int(self.top.max(initial=0)) + 1), dtype=np.int64)
        for row, g in zip(self._options, space.groups, strict=True):
            row[: len(g.options)] = g.options

    def widths(self, genes: IntArray) -> IntArray:
        """Return the widths ``[n, groups]`` of genes ``[n, groups]``."""
        return np.asarray(self._options[np.arange(len(self.top)), genes])

    def usage(self, genes: IntArray) -> FloatArray:
        """Return ``[n]``: the share of the budget that genes ``[n, groups]`` use; at most 1 is inside."""
        return usage_of(self.space, self.budget, self.widths(genes))

    def all(self) -> IntArray:
        """Return ``[space.size, groups]``: every point of a space that is small enough to list."""
        return np.asarray(np.indices(tuple(self.top + 1)).reshape(len(self.top), -1).T)

    def step_down(self, genes: IntArray, rng: np.random.Generator) -> IntArray:
        """Take random steps away until everything is inside the budget; what has no step left stays outside.

        All rows take a step at a time: one price may be expensive, and many at once cost little more than one.

        Args:
            genes: ``[n, groups]``; left as they are.
            rng: Chooses the group of every step.

        Returns:
            ``[n, groups]``.
        """
        genes = genes.copy()
        rows = np.arange(len(genes))
        while len(rows := rows[(self.usage(genes[rows]) > 1) & genes[rows].any(axis=1)]):
            genes[rows, pick(genes[rows] > 0, rng)] -= 1
        return genes


def usage_of(space: SearchSpace, budget: Budget, widths: IntArray) -> FloatArray:
    """Return ``[n]``: the share of the budget that widths ``[n, groups]`` use."""
    if not len(widths):
        return np.zeros(0)
    return np.asarray(budget.usage(space.graph, widths), dtype=np.float64).reshape(len(widths))


def pick(allowed: np.ndarray, rng: np.random.Generator) -> IntArray:
    """Return ``[n]``: for every row a random column where ``allowed [n, groups]`` holds."""
    return np.asarray(np.where(allowed, rng.random(allowed.shape), -1.0).argmax(axis=1), dtype=np.int64)


def named(space: SearchSpace, widths: IntArray) -> list[dict[str, int]]:
    """Return width vectors by group name.

    Args:
        space: The space, whose order the columns have.
        widths: ``[n, groups]``.
    """
    return [dict(zip(space.names, row, strict=True)) for row in np.asarray(widths).tolist()]
