"""Evolution: conformance, budgets, and brute force on a space small enough to enumerate."""

import itertools
from functools import partial

import numpy as np
import pytest
from torch import nn
from widthkit_plugins.searchers.evolution.searcher import EvolutionSearcher

from widthkit.budget import parse_budget
from widthkit.errors import OptionError
from widthkit.graph.space import uniform_space
from widthkit.testing import SearcherConformance
from widthkit.trace import trace


class TestEvolution(SearcherConformance):
    @pytest.fixture(params=[{"population": 6, "generations": 4}, {"population": 2, "generations": 1}], ids=str)
    def make_searcher(self, request):
        return partial(EvolutionSearcher, **request.param)


def four_groups(k=4):
    layers = []
    for n_in, n_out in ((3, 8), (8, 8), (8, 8), (8, 8), (8, 4)):
        layers += [nn.Conv2d(n_in, n_out, 1), nn.ReLU()]
    return uniform_space(trace(nn.Sequential(*layers), (1, 3, 4, 4)), k=k)


def run(space, budget, score, seed=0, **options):
    engine = EvolutionSearcher(space, budget, np.random.default_rng(seed), **options)
    judged = []
    while not engine.done:
        asked = engine.ask()
        judged.append([(w, score(w)) for w in asked])
        engine.tell(asked, [s for _, s in judged[-1]])
    return judged


@pytest.mark.parametrize("seed", range(3))
def test_every_candidate_is_inside_the_budget_and_children_are_new(seed):
    space = four_groups()
    budget = parse_budget("0.5x", space.graph)
    judged = run(space, budget, lambda w: sum(w.values()), seed, population=10, generations=8)
    assert all(budget.fits(space.graph, w) for generation in judged for w, _ in generation)
    for generation in judged:
        keys = [tuple(w.values()) for w, _ in generation]
        assert len(set(keys)) == len(keys)


def test_it_finds_the_best_of_an_enumerable_space():
    space = four_groups()
    budget = parse_budget("0.5x", space.graph)
    weights = np.random.default_rng(1).uniform(0.5, 2, len(space.names))

    def score(widths):
        return float(np.dot(weights, np.log(list(widths.values()))))

    inside = [
        space.decode(genes)
        for genes in itertools.product(*(range(len(g.options)) for g in space.groups))
        if budget.fits(space.graph, space.decode(genes))
    ]
    best = max(score(w) for w in inside)
    found = [
        max(s for g in run(space, budget, score, seed, population=16, generations=15) for _, s in g)
        for seed in range(5)
    ]
    spread = best - min(score(w) for w in inside)
    assert max(found) == best
    assert all(best - f <= 0.05 * spread for f in found)


def test_later_generations_are_better_than_the_first():
    space = four_groups(k=8)
    budget = parse_budget("0.5x", space.graph)
    wanted = dict(zip(space.names, (2, 7, 1, 6), strict=True))

    def score(widths):
        return -float(sum((widths[n] - w) ** 2 for n, w in wanted.items()))

    gains = []
    for seed in range(5):
        generations = run(space, budget, score, seed, population=8, generations=12)
        gains.append(max(s for g in generations for _, s in g) - max(s for _, s in generations[0]))
    assert min(gains) >= 0
    assert np.median(gains) > 0


@pytest.mark.parametrize("options", [{"population": 1}, {"generations": 0}, {"near_budget": 1.0}])
def test_senseless_options_are_refused(options):
    space = four_groups()
    with pytest.raises(OptionError):
        EvolutionSearcher(space, parse_budget("0.5x", space.graph), np.random.default_rng(0), **options)
