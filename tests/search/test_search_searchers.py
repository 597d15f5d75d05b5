"""Greedy and random against plain re-implementations and brute force, on scores that need no network."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from torch import nn
from widthkit_plugins.searchers.greedy import GreedySearcher
from widthkit_plugins.searchers.random_search import RandomSearcher, draw_near_budget
from widthkit_plugins.searchers.uniform import UniformSearcher

from widthkit.budget import parse_budget
from widthkit.errors import OptionError
from widthkit.graph.space import flops_bins, uniform_space
from widthkit.search.judging import Judgement
from widthkit.search.loop import Loop
from widthkit.trace import trace


@cache
def graph():
    """Four groups: 256 width vectors with 4 choices each."""
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 16, 3, stride=2), nn.Conv2d(16, 8, 1)]
    return trace(nn.Sequential(*layers, nn.Conv2d(8, 4, 1)), (1, 3, 12, 12))


def every_point(space):
    return [space.decode(genes) for genes in itertools.product(*(range(len(g.options)) for g in space.groups))]


def run(searcher, score):
    """All trials of a search whose judge is a plain function of the widths."""

    def judge(vectors):
        return ((i, Judgement(score(w), -score(w), None)) for i, w in enumerate(vectors))

    return Loop(searcher.space.graph, judge).run(searcher)


def steps(space, now):
    """What greedy compares next, of which it is known where it has come to."""
    return [step for step in (space.narrower(now, name) for name in space.names) if step is not None]


def best_inside(trials, budget):
    return max((t for t in trials if budget.fits(graph(), t.widths)), key=lambda t: t.score)


def separable(seed):
    """A sum of concave functions of the widths, one per group."""
    weight, power = np.random.default_rng(seed).uniform((1, 0.2), (9, 0.9), size=(4, 2)).T
    return lambda widths: sum(a * w**p for a, p, w in zip(weight, power, widths.values(), strict=True))


def rugged(seed):
    """A score that no structure helps with, rising with the widths on the whole."""

    def score(widths):
        noise = np.random.default_rng([seed, *widths.values()]).normal()
        return sum(math.log(w) for w in widths.values()) + 0.3 * noise

    return score


# --- greedy -----------------------------------------------------------------------------------------------------------


def autoslim(space, budget, score):
    """AutoSlim, section 3.3, as the paper words it, with nothing of the searcher's.

    Start with the largest; compare the networks in which each layer is slimmed by one channel group; slim the layer
    with minimal drop; stop when the constraint holds.
    """
    now = {g.name: max(g.options) for g in space.groups}
    visited, way = [now], [now]
    while space.graph.macs(now) > budget.limits[0].value:
        candidates = []
        for g in space.groups:
            smaller = [option for option in g.options if option < now[g.name]]
            if smaller:
                candidates.append({**now, g.name: max(smaller)})
        visited += candidates
        now = min(candidates, key=lambda c: (-score(c), space.graph.macs(c)))
        way.append(now)
    return visited, way


SPACES = {
    "uniform": lambda: uniform_space(graph(), 4),
    "fine": lambda: uniform_space(graph(), 8),
    "wide": lambda: uniform_space(graph(), 5, min_width="0.2x", max_width="1.5x"),
    "bins": lambda: flops_bins(graph(), 1.0),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("ratio", ["0.2x", "0.5x", "0.8x"])
@pytest.mark.parametrize("score", [separable(0), rugged(1), lambda w: 0.0], ids=["separable", "rugged", "constant"])
def test_greedy_is_the_loop_of_autoslim(space, ratio, score):
    space = space()
    budget = parse_budget(ratio, graph())
    visited, way = autoslim(space, budget, score)
    searcher = GreedySearcher(space, budget, np.random.default_rng(0))
    trials = run(searcher, score)
    assert [t.widths for t in trials] == visited
    assert budget.fits(graph(), way[-1])
    assert searcher.done
    assert searcher.progress == 1.0


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_optimal_where_every_step_costs_the_same(seed):
    """Separable, concave scores and equal prices: taking what hurts least is optimal, the marginal argument."""
    space = uniform_space(trace(parallel_branches(), (1, 3, 6, 6)), 4)
    budget = parse_budget("0.5x", space.graph)
    assert len(set(space.graph.sensitivity())) == 1
    score = separable(seed)
    trials = run(GreedySearcher(space, budget, np.random.default_rng(0)), score)
    best = max((p for p in every_point(space) if budget.fits(space.graph, p)), key=score)
    found = max((t for t in trials if budget.fits(space.graph, t.widths)), key=lambda t: t.score)
    assert found.widths == best


def parallel_branches():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.ModuleList(nn.Conv2d(3, 8, 1) for _ in range(4))
            self.second = nn.ModuleList(nn.Conv2d(8, 5, 1) for _ in range(4))

        def forward(self, x):
            return sum(b(a(x)) for a, b in zip(self.first, self.second, strict=True))

    return Parallel()


@pytest.mark.parametrize("make_score", [separable, rugged])
def test_greedy_and_random_come_close_to_brute_force(make_score, capsys):
    """The gap is measured against the spread of all networks inside the budget."""
    space = uniform_space(graph(), 4)
    budget = parse_budget("0.5x", graph())
    gaps = {"greedy": [], "random": []}
    for seed in range(8):
        score = make_score(seed)
        inside = [score(p) for p in every_point(space) if budget.fits(graph(), p)]
        for name, searcher in {
            "greedy": GreedySearcher(space, budget, np.random.default_rng(seed)),
            "random": RandomSearcher(space, budget, np.random.default_rng(seed), n=20),
        }.items():
            found = best_inside(run(searcher, score), budget)
            assert budget.fits(graph(), found.widths)
            assert found.score <= max(inside)
            gaps[name].append((max(inside) - found.score) / (max(inside) - min(inside)))
    with capsys.disabled():
        shown = ", ".join(f"{name} {np.mean(g):.3f} (worst {max(g):.3f})" for name, g in gaps.items())
        print(f"\n  gap to brute force on {make_score.__name__} scores: {shown}")
    # Both are far above a blind pick, whose mean gap is about 0.5.
    assert np.mean(gaps["greedy"]) < 0.15
    assert np.mean(gaps["random"]) < 0.15


def test_greedy_judges_the_full_network_and_stops_where_it_fits():
    space = uniform_space(graph(), 4)
    searcher = GreedySearcher(space, parse_budget("1x", graph()), np.random.default_rng(0))
    assert [t.widths for t in run(searcher, separable(0))] == [space.largest]
    assert (searcher.done, searcher.progress, searcher.ask()) == (True, 1.0, [])


def test_greedy_slims_the_wider_network_down_to_the_models_cost():
    space = SPACES["wide"]()
    budget = parse_budget("1x", graph())
    trials = run(GreedySearcher(space, budget, np.random.default_rng(0)), separable(0))
    assert trials[0].widths == space.largest
    assert trials[0].macs > graph().macs() >= best_inside(trials, budget).macs


def test_greedy_breaks_ties_towards_the_group_that_saves_more():
    space = uniform_space(graph(), 4)
    searcher = GreedySearcher(space, parse_budget("0.5x", graph()), np.random.default_rng(0))
    asked = searcher.ask()
    searcher.tell(asked, [0.0])
    asked = searcher.ask()
    searcher.tell(asked, [1.0] * len(asked))
    assert searcher.ask() == steps(space, min(asked, key=graph().macs))


def test_greedy_never_moves_to_a_network_without_a_score():
    space = uniform_space(graph(), 4)
    for bad in (math.nan, -math.inf):
        searcher = GreedySearcher(space, parse_budget("0.5x", graph()), np.random.default_rng(0))
        searcher.tell(searcher.ask(), [0.0])
        asked = searcher.ask()
        searcher.tell(asked, [bad, bad, -5.0, bad])
        assert searcher.ask() == steps(space, asked[2])


def test_progress_of_greedy_rises_to_one():
    searcher = GreedySearcher(SPACES["fine"](), parse_budget("0.3x", graph()), np.random.default_rng(0))
    seen = [searcher.progress]
    while not searcher.done:
        asked = searcher.ask()
        searcher.tell(asked, [separable(2)(w) for w in asked])
        seen.append(searcher.progress)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)


# --- random -----------------------------------------------------------------------------------------------------------


@cache
def deep_graph():
    """Twelve groups of 32: 20 ** 12 width vectors."""
    layers = [nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(12)]
    return trace(nn.Sequential(*layers, nn.Conv2d(32, 4, 1)), (1, 3, 6, 6))


@pytest.mark.parametrize("text", ["0.1x", "0.5x", "0.95x", "0.5x,0.6x", "0.6x,40kparams"])
def test_draws_of_a_large_space_are_distinct_and_near_the_budget(text):
    space = uniform_space(deep_graph(), 20)
    budget = parse_budget(text, deep_graph())
    draws = draw_near_budget(space, budget, np.random.default_rng(0), 300, 0.97)
    assert len({tuple(d.values()) for d in draws}) == len(draws) == 300
    usage = budget.usage(deep_graph(), draws)
    assert usage.min() > 0.97
    assert usage.max() <= 1
    assert all(budget.fits(deep_graph(), d) for d in draws)
    assert all(space.decode(space.encode(d)) == d for d in draws)


def test_draws_differ_in_shape():
    """Not one profile with noise: every group is found narrow and wide."""
    space = uniform_space(deep_graph(), 20)
    draws = draw_near_budget(space, parse_budget("0.5x", deep_graph()), np.random.default_rng(0), 500, 0.97)
    table = np.array([list(d.values()) for d in draws])
    assert (np.percentile(table, 10, axis=0) <= 14).all()
    assert (np.percentile(table, 90, axis=0) >= 29).all()


@pytest.mark.parametrize("seed", range(3))
def test_draws_of_a_small_space_take_those_near_the_budget_first_and_then_the_fullest(seed):
    space = uniform_space(graph(), 4)
    budget = parse_budget("0.5x", graph())
    usage = {tuple(p.values()): budget.usage(graph(), p) for p in every_point(space)}
    inside = [u for u in usage.values() if u <= 1]
    near = [u for u in inside if u > 0.97]
    assert 0 < len(near) < 20 < len(inside)
    drawn = [usage[tuple(d.values())] for d in draw_near_budget(space, budget, np.random.default_rng(seed), 20, 0.97)]
    assert sorted(drawn[: len(near)]) == sorted(near)
    assert drawn[len(near) :] == sorted(inside, reverse=True)[len(near) : 20]
    # All there is, no more.
    assert len(draw_near_budget(space, budget, np.random.default_rng(seed), 10_000, 0.97)) == len(inside)
    few = draw_near_budget(space, budget, np.random.default_rng(seed), 1, 0.97)
    assert usage[tuple(few[0].values())] > 0.97


def test_draws_where_nothing_is_near_the_budget():
    """Coarse groups can leave a gap below the budget; the fullest networks are drawn then."""
    space = uniform_space(deep_graph(), 20, divisor=8)
    assert space.size > 1e6
    budget = parse_budget("0.2x", deep_graph())
    draws = draw_near_budget(space, budget, np.random.default_rng(0), 50, 0.99999)
    usage = budget.usage(deep_graph(), draws)
    assert len({tuple(d.values()) for d in draws}) == 50
    assert usage.min() > 0.9
    assert usage.max() <= 1


def test_draws_repeat_with_the_seed():
    space = uniform_space(deep_graph(), 20)
    budget = parse_budget("0.5x", deep_graph())
    first, second, other = (draw_near_budget(space, budget, np.random.default_rng(s), 40, 0.97) for s in (1, 1, 2))
    assert first == second != other


def test_a_budget_above_everything_draws_the_widest():
    space = uniform_space(graph(), 4)
    draws = draw_near_budget(space, parse_budget("5x", graph()), np.random.default_rng(0), 3, 0.97)
    assert draws[0] == space.largest


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"n": -1}, {"near_budget": -0.1}, {"near_budget": 1.0}, {"near_budget": math.nan}]
)
def test_options_of_random_that_make_no_sense(options):
    with pytest.raises(OptionError, match=r"n=|near_budget="):
        RandomSearcher(uniform_space(graph(), 4), parse_budget("0.5x", graph()), np.random.default_rng(0), **options)


# --- uniform ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0.2x", "0.5x", "0.77x", "1x", "0.5x,500params"])
def test_uniform_proposes_the_largest_multiplier_inside(text):
    space = uniform_space(graph(), 4)
    budget = parse_budget(text, graph())
    trials = run(UniformSearcher(space, budget, np.random.default_rng(0)), separable(0))
    assert len(trials) == 1
    found = trials[0].widths
    assert budget.fits(graph(), found)
    if text != "1x":
        ratios = np.linspace(0.2, 1, 4001)
        inside = [r for r in ratios if budget.fits(graph(), multiplied(space, r))]
        assert found == multiplied(space, max(inside))


def multiplied(space, ratio):
    return {g.name: max(g.narrowest, math.floor(ratio * g.width + 0.5)) for g in space.groups}
