"""The cost polynomials against counting by hand, brute force and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from topologies import CASES, Inception, PlainChain, Residual

from widthkit.errors import WidthsError
from widthkit.graph.cost import Polynomial, Term
from widthkit.trace import trace

SHAPE = (2, 3, 8, 8)
all_cases = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_width_of_a_chain_by_hand():
    graph = trace(PlainChain(), SHAPE)
    for a, b in itertools.product(range(1, 7), range(1, 9)):
        macs = 64 * (9 * 3 * a + 9 * a * b + b * 4)
        params = 9 * 3 * a + 2 * a + 9 * a * b + 2 * b + b * 4 + 4
        widths = {"stem.conv": a, "mid.conv": b}
        assert (graph.macs(widths), graph.params(widths)) == (macs, params)


def test_every_width_of_a_residual_net_by_hand():
    graph = trace(Residual(), SHAPE)
    for a, b in itertools.product(range(1, 9), range(1, 7)):
        widths = {"stem.conv": a, "a.conv": b}
        assert graph.macs(widths) == 64 * (27 * a + 9 * a * b + 9 * b * a + 4 * a)
        assert graph.params(widths) == 27 * a + 2 * a + 9 * a * b + 2 * b + 9 * b * a + 2 * a + 4 * a + 4


def test_many_vectors_at_once_are_the_single_ones():
    graph = trace(Inception(), SHAPE)
    rng = np.random.default_rng(0)
    many = [{n: int(rng.integers(1, w + 1)) for n, w in graph.full.items()} for _ in range(20)]
    assert graph.macs(many).tolist() == [graph.macs(w) for w in many]
    assert graph.params(graph.vector(many)).tolist() == [graph.params(w) for w in many]
    assert isinstance(graph.macs(), int)
    assert graph.macs(many).dtype == np.int64


def test_macs_are_per_example():
    assert trace(Residual(), (1, 3, 8, 8)).macs() == trace(Residual(), (5, 3, 8, 8)).macs()


@all_cases
def test_sensitivity_is_the_finite_difference(case):
    graph = trace(case.model(), case.shape)
    rng = np.random.default_rng(0)
    widths = {n: int(rng.integers(1, w + 1)) for n, w in graph.full.items()}
    slopes = graph.sensitivity(widths)
    for name, slope in zip(graph.group_names, slopes, strict=True):
        up = graph.macs({**widths, name: widths[name] + 1})
        down = graph.macs({**widths, name: widths[name] - 1})
        # A group enters a layer at most as its input and its output, so the central difference is exact.
        assert slope == (up - down) / 2


@all_cases
def test_terms_add_up_and_shares_are_shares(case):
    graph = trace(case.model(), case.shape)
    widths = graph.vector()
    assert graph.cost.macs_polynomial.per_term(widths).sum() == graph.macs() * graph.cost.macs_polynomial.divisor
    assert 0 < graph.cost.searchable_share(widths) <= 1
    assert ((graph.cost.group_share(widths) >= 0) & (graph.cost.group_share(widths) <= 1)).all()


def test_values_that_would_not_be_exact_are_refused():
    term = Term("m", "linear", 2**40, (np.array([0, 1]),))
    polynomial = Polynomial.of([term], 1)
    assert polynomial.value(np.array([2])) == 2**41
    with pytest.raises(WidthsError, match="exact"):
        polynomial.value(np.array([2**13]))


def test_an_empty_polynomial_is_zero():
    assert Polynomial.of([], 2).value(np.array([[1, 2]])).tolist() == [0]
    assert Polynomial.of([], 2).gradient(np.array([1, 2])).tolist() == [0, 0]
