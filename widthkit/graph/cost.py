"""Exact cost of every width vector: MACs and parameters are polynomials in the widths.

A layer costs ``scale * in(widths) * out(widths)``. Both factors are affine: concatenation adds, flattening multiplies,
fixed channels are the constant. One matrix product in float64 gives all values. They are exact, since every
intermediate is an integer below 2**53, which is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from widthkit.errors import WidthsError
from widthkit.graph.arrays import FloatArray, IntArray

_EXACT = 2.0**53


@dataclass(frozen=True)
class Term:
    """One product ``scale * prod(forms)``; a form is an affine function ``[1 + groups]`` (constant, then slopes).

    >>> import numpy as np
    >>> term = Term("conv", "conv2d", 9, (np.array([3, 0]), np.array([0, 1])))
    >>> Polynomial.of([term], 1).value(np.array([[8], [16]])).tolist()
    [216, 432]
    """

    module: str
    operator: str
    scale: int
    forms: tuple[IntArray, ...]


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of affine forms, evaluated for many width vectors at once.

    Args:
        terms: The terms, in the order of the traced run.
        n_groups: How many widths a vector has.
        divisor: Every value is divided by this number (the batch size of the traced run).
    """

    terms: tuple[Term, ...]
    n_groups: int
    divisor: int = 1

    @classmethod
    def of(cls, terms: Sequence[Term], n_groups: int, divisor: int = 1) -> Polynomial:
        """Build from a sequence of terms."""
        return cls(tuple(terms), n_groups, divisor)

    @cached_property
    def _packed(self) -> tuple[FloatArray, IntArray, FloatArray]:
        """``(forms [F, 1 + groups], form of each factor [T, D], scales [T])``; a missing factor is the form "1"."""
        one = np.zeros(self.n_groups + 1, dtype=np.int64)
        one[0] = 1
        rows: dict[bytes, int] = {one.tobytes(): 0}
        table = [one]
        degree = max((len(t.forms) for t in self.terms), default=1)
        factors = np.zeros((len(self.terms), degree), dtype=np.int64)
        for i, term in enumerate(self.terms):
            for j, form in enumerate(term.forms):
                key = form.astype(np.int64).tobytes()
                if key not in rows:
                    rows[key] = len(table)
                    table.append(form.astype(np.int64))
                factors[i, j] = rows[key]
        scales = np.array([t.scale for t in self.terms], dtype=np.float64)
        return np.stack(table).astype(np.float64), factors, scales

    def per_term(self, widths: IntArray) -> FloatArray:
        """Return ``[..., terms]``, before the division by ``divisor``."""
        forms, factors, scales = self._packed
        values = widths.astype(np.float64) @ forms[:, 1:].T + forms[:, 0]
        product: FloatArray = np.broadcast_to(scales, (*values.shape[:-1], len(scales))).copy()
        for column in factors.T:
            product *= values[..., column]
        return product

    def value(self, widths: IntArray) -> IntArray:
        """Return the int64 value ``[...]`` of every width vector ``[..., groups]``.

        Raises:
            WidthsError: If a value is too large to be exact (2**53).
        """
        total = self.per_term(widths).sum(axis=-1)
        if np.any(total >= _EXACT):
            raise WidthsError("the cost of these widths exceeds 2**53 and would not be exact; use smaller widths")
        return np.asarray(np.rint(total / self.divisor), dtype=np.int64)

    def gradient(self, widths: IntArray) -> FloatArray:
        """Return ``[groups]``: the derivative by every width at one width vector."""
        forms, factors, scales = self._packed
        values = forms[:, 1:] @ widths.astype(np.float64) + forms[:, 0]
        slope = np.zeros(self.n_groups)
        for j in range(factors.shape[1]):
            others = scales.copy()
            for k in range(factors.shape[1]):
                if k != j:
                    others *= values[factors[:, k]]
            slope += others @ forms[factors[:, j], 1:]
        return slope / self.divisor


@dataclass(frozen=True)
class CostModel:
    """MACs and parameters of every width vector."""

    macs_polynomial: Polynomial
    params_polynomial: Polynomial

    def macs(self, widths: IntArray) -> Any:
        """MACs per example: ``int`` for one vector, int64 array for many."""
        return _scalar(self.macs_polynomial.value(widths))

    def params(self, widths: IntArray) -> Any:
        """Parameters: ``int`` for one vector, int64 array for many."""
        return _scalar(self.params_polynomial.value(widths))

    def sensitivity(self, widths: IntArray) -> FloatArray:
        """Return ``[groups]``: d MACs / d width (CafeNet, Eq. 7)."""
        return self.macs_polynomial.gradient(widths)

    def searchable_share(self, widths: IntArray) -> float:
        """Share of the MACs in layers whose cost depends on at least one width."""
        values = self.macs_polynomial.per_term(widths)
        free = np.array([any(f[1:].any() for f in t.forms) for t in self.macs_polynomial.terms], dtype=bool)
        return float(values[free].sum() / max(values.sum(), 1.0)) if len(values) else 0.0

    def group_share(self, widths: IntArray) -> FloatArray:
        """Return ``[groups]``: share of the MACs in layers that each group takes part in."""
        values = self.macs_polynomial.per_term(widths)
        share = np.zeros(self.macs_polynomial.n_groups)
        for term, value in zip(self.macs_polynomial.terms, values, strict=True):
            touched = np.zeros(len(share), dtype=bool)
            for form in term.forms:
                touched |= form[1:] != 0
            share[touched] += value
        return np.asarray(share / max(values.sum(), 1.0), dtype=np.float64)


def _scalar(value: IntArray) -> Any:
    return int(value) if value.ndim == 0 else value
