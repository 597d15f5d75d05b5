"""The expected value of a cost polynomial when every group's width is drawn independently.

A product of affine forms is expanded into monomials. Widths of different groups are independent, so the expectation of
a monomial is the product of its groups' moments. This is exact for all distributions, also where a group occurs
twice (a convolution inside a residual trunk costs ``w ** 2``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from widthkit.graph.arrays import FloatArray
from widthkit.graph.cost import Polynomial, Term

Monomial = tuple[tuple[int, int], ...]
"""Pairs (group, exponent), by group."""


@dataclass(frozen=True)
class Expectation:
    """Expected cost as a function of the widths' moments.

    Args:
        monomials: Monomial -> coefficient.
        n_groups: How many widths a vector has.

    >>> from widthkit.graph.cost import Polynomial, Term
    >>> square = Polynomial.of([Term("conv", "conv2d", 2, (np.array([0, 1]), np.array([1, 1])))], 1)
    >>> expectation = Expectation.of(square)
    >>> expectation.monomials
    {((0, 1),): 2.0, ((0, 2),): 2.0}
    >>> half = [np.array([0.5, 0.5])]
    >>> expectation.value(moments([np.array([1, 3])], half, expectation.degree))  # mean of 2 * 1 * 2 and 2 * 3 * 4
    14.0
    """

    monomials: dict[Monomial, float]
    n_groups: int

    @classmethod
    def of(cls, polynomial: Polynomial) -> Expectation:
        """Expand a cost polynomial."""
        total: dict[Monomial, float] = {}
        for term in polynomial.terms:
            for monomial, value in _expanded(term).items():
                total[monomial] = total.get(monomial, 0.0) + value / polynomial.divisor
        return cls(total, polynomial.n_groups)

    @property
    def degree(self) -> int:
        """The highest power of one width."""
        return max((exponent for monomial in self.monomials for _, exponent in monomial), default=1)

    def value(self, moments: FloatArray) -> float:
        """Return the expected cost.

        Args:
            moments: ``[groups, degree + 1]``; the mean of every power of every group's width.
        """
        coefficients, factors = self._packed
        return float(coefficients @ self._padded(moments)[factors].prod(axis=1))

    def gradient(self, moments: FloatArray) -> FloatArray:
        """Return ``[groups, degree + 1]``: the derivative by every moment."""
        coefficients, factors = self._packed
        flat = self._padded(moments)
        values = flat[factors]
        slope = np.zeros(len(flat))
        for column in range(factors.shape[1]):
            others = np.delete(values, column, axis=1).prod(axis=1)
            np.add.at(slope, factors[:, column], coefficients * others)
        slope[-1] = 0.0
        return slope[:-1].reshape(moments.shape)

    @cached_property
    def _packed(self) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """``(coefficients [M], factors [M, D])``; a factor indexes the flat moments, its last entry is 1."""
        width = self.degree + 1
        longest = max((len(monomial) for monomial in self.monomials), default=1)
        factors = np.full((len(self.monomials), max(longest, 1)), self.n_groups * width, dtype=np.int64)
        for row, monomial in zip(factors, self.monomials, strict=True):
            row[: len(monomial)] = [group * width + exponent for group, exponent in monomial]
        return np.array(list(self.monomials.values())), factors

    def _padded(self, moments: FloatArray) -> FloatArray:
        return np.append(moments.reshape(-1), 1.0)


def moments(options: Sequence[npt.NDArray[np.int64]], probabilities: Sequence[FloatArray], degree: int) -> FloatArray:
    """Return ``[groups, degree + 1]``: the mean of every power of every group's width, the zeroth included."""
    powers = np.arange(degree + 1)
    return np.stack(
        [p @ (o[:, None].astype(np.float64) ** powers) for o, p in zip(options, probabilities, strict=True)]
    )


def _expanded(term: Term) -> dict[Monomial, float]:
    product: dict[Monomial, float] = {(): float(term.scale)}
    for form in term.forms:
        parts = [(i - 1, float(form[i])) for i in np.flatnonzero(form).tolist()]
        longer: dict[Monomial, float] = {}
        for monomial, value in product.items():
            for group, slope in parts:
                key = monomial if group < 0 else _times(monomial, group)
                longer[key] = longer.get(key, 0.0) + value * slope
        product = longer
    return product


def _times(monomial: Monomial, group: int) -> Monomial:
    powers = dict(monomial)
    powers[group] = powers.get(group, 0) + 1
    return tuple(sorted(powers.items()))
