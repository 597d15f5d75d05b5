"""Genes against plain loops over the choices."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from widthkit.budget import parse_budget
from widthkit.graph.space import uniform_space
from widthkit.search.genes import Genes, named, pick, usage_of
from widthkit.testing import SPACES, build_space, small_graph
from widthkit.trace import trace

BUDGETS = ["0.3x", "0.5x", "1x", "10x", "0.6x,350params"]


def table(space="plain", budget="0.5x"):
    found = build_space(space, small_graph())
    return Genes(found, parse_budget(budget, found.graph))


def every_point(space):
    return list(itertools.product(*(range(len(g.options)) for g in space.groups)))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_point_has_the_widths_and_the_usage_of_brute_force(space, budget):
    genes = table(space, budget)
    points = every_point(genes.space)
    listed = genes.all()
    assert sorted(map(tuple, listed.tolist())) == sorted(points)
    assert len(listed) == genes.space.size
    for row, widths, usage in zip(listed.tolist(), genes.widths(listed), genes.usage(listed), strict=True):
        expected = {g.name: g.options[i] for g, i in zip(genes.space.groups, row, strict=True)}
        assert named(genes.space, widths[None]) == [expected]
        assert usage == genes.budget.usage(genes.space.graph, expected)
        assert (usage <= 1) == genes.budget.fits(genes.space.graph, expected)
    assert genes.widths(genes.top[None]).tolist() == [list(genes.space.largest.values())]


@given(seed=st.integers(0, 2**20), budget=st.sampled_from(BUDGETS), space=st.sampled_from(sorted(SPACES)))
@settings(max_examples=60, deadline=None)
def test_stepping_down_ends_inside_or_at_the_narrowest(seed, budget, space):
    genes = table(space, budget)
    points = genes.all()
    start = points[np.random.default_rng(seed).integers(len(points), size=20)]
    kept = start.copy()
    end = genes.step_down(start, np.random.default_rng(seed))
    assert np.array_equal(start, kept)
    assert np.array_equal(end, genes.step_down(start, np.random.default_rng(seed)))
    assert (end <= start).all()
    usage = genes.usage(end)
    assert ((usage <= 1) | (end == 0).all(axis=1)).all()
    fits = genes.usage(start) <= 1
    assert np.array_equal(end[fits], start[fits]), "what fits stays as it is"
    moved = (end != start).any(axis=1)
    assert (moved == (~fits & start.any(axis=1))).all()
    for before, after in zip(start[moved], end[moved], strict=True):
        # The last step was needed: from some neighbour one step wider, which did not fit.
        wider = [after + step for step in np.eye(len(after), dtype=np.int64)]
        wider = np.array([w for w in wider if (w <= before).all()])
        assert (genes.usage(wider) > 1).any()


def test_steps_down_go_through_every_group():
    """Nothing but the generator chooses the group."""
    net = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(6)), nn.Conv2d(16, 2, 1))
    space = uniform_space(trace(net, (1, 3, 6, 6)), 16)
    genes = Genes(space, parse_budget("0.5x", space.graph))
    ends = genes.step_down(np.repeat(genes.top[None], 300, axis=0), np.random.default_rng(0))
    assert (genes.usage(ends) <= 1).all()
    mean = (genes.top - ends).mean(axis=0)
    assert mean.min() > 0.8 * mean.max()


def test_nothing_costs_nothing():
    genes = table()
    assert genes.usage(genes.all()[:0]).shape == (0,)
    assert usage_of(genes.space, genes.budget, np.zeros((0, 3), dtype=np.int64)).shape == (0,)
    assert genes.step_down(genes.all()[:0], np.random.default_rng(0)).shape == (0, 3)


def test_picks_are_allowed_and_even():
    allowed = np.array([[True, False, True], [False, True, False], [True, True, True]])
    drawn = np.array([pick(allowed, np.random.default_rng(seed)) for seed in range(600)])
    counts = np.array([np.bincount(column, minlength=3) for column in drawn.T])
    assert (counts[~allowed] == 0).all()
    assert counts[1, 1] == 600
    assert (np.abs(counts[0, [0, 2]] - 300) < 60).all()
    assert (np.abs(counts[2] - 200) < 60).all()
