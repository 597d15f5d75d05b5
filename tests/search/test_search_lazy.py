"""Greedy's options that judge less: they follow the contract, and agree with plain greedy where they must."""

from functools import cache, partial

import numpy as np
import pytest
from torch import nn
from widthkit_plugins.greedy import GreedySearcher

from widthkit.budget import parse_budget
from widthkit.errors import OptionError
from widthkit.search.evaluator import Judgement
from widthkit.search.journal import Journal
from widthkit.search.run import run_loop
from widthkit.space import uniform_space
from widthkit.testing import SearcherConformance
from widthkit.trace import trace

OPTIONS = [{"lazy": True}, {"race": 0.25}, {"lazy": True, "race": 0.5, "finalists": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
class TestConformance(SearcherConformance):
    @pytest.fixture
    def make_searcher(self, options):
        return partial(GreedySearcher, **options)


class Judge:
    """A separable score; on a part of the data everything is judged with an error that depends on the widths."""

    def __init__(self, seed, noise=0.0, fraction=1.0):
        self.seed, self.noise, self.fraction, self.work, self.calls = seed, noise, fraction, [0.0], [0]
        self.weight, self.power = np.random.default_rng(seed).uniform((1, 0.2), (9, 0.9), size=(9, 2)).T

    def at(self, fraction):
        part = Judge(self.seed, self.noise, fraction)
        part.work, part.calls = self.work, self.calls
        return part

    def __call__(self, widths):
        self.work[0] += self.fraction
        self.calls[0] += 1
        score = sum(a * w**p for a, p, w in zip(self.weight, self.power, widths.values(), strict=True))
        if self.fraction < 1:
            score += self.noise * np.random.default_rng([self.seed, *widths.values()]).normal()
        return Judgement(float(score), -float(score), None)


@cache
def graph():
    """Nine groups."""
    return trace(nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(10))), (1, 8, 2, 2))


def search(judge, **options):
    space = uniform_space(graph(), 8)
    searcher = GreedySearcher(space, parse_budget("0.4x", space.graph), np.random.default_rng(0), **options)
    trials = run_loop(searcher, space.graph, judge, Journal(None, ""), {})
    return searcher._now, trials


@pytest.mark.parametrize("seed", range(8))
def test_lazy_decides_as_greedy_does_where_later_steps_cost_more(seed):
    """For concave scores an old loss is a lower bound, the case that lazy selection is exact for."""
    plain, lazy = Judge(seed), Judge(seed)
    expected, _ = search(plain)
    found, _ = search(lazy, lazy=True)
    assert found == expected
    assert lazy.work[0] < plain.work[0]


@pytest.mark.parametrize("seed", range(8))
def test_a_race_without_noise_decides_as_greedy_does(seed):
    plain, raced = Judge(seed), Judge(seed)
    expected, _ = search(plain)
    found, trials = search(raced, race=0.25, finalists=2)
    assert found == expected
    # Finalists and the starting point alone are trials of the result.
    assert len(trials) < plain.calls[0]
    assert all(t.score == Judge(seed)(t.widths).score for t in trials)


def test_a_race_lets_finalists_correct_what_the_part_got_wrong():
    seeds = range(8)
    expected = [search(Judge(seed))[0] for seed in seeds]
    alone = [search(Judge(seed, noise=0.5), race=0.25, finalists=1)[0] for seed in seeds]
    corrected = [search(Judge(seed, noise=0.5), race=0.25, finalists=4)[0] for seed in seeds]
    all_of_them = [search(Judge(seed, noise=0.5), race=0.25, finalists=9)[0] for seed in seeds]
    right = [sum(map(dict.__eq__, found, expected)) for found in (alone, corrected, all_of_them)]
    assert right[0] < right[1] <= right[2] == len(seeds)


@pytest.mark.parametrize(
    ("options", "message"), [({"race": 0}, "race=0"), ({"finalists": 0}, "finalists=0"), ({"caution": 2}, "caution=2")]
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        search(Judge(0), **options)
