"""Results are topped up to their budget: all use more than 97% of it, or say that the space has no such point."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch.nn.functional as F
from runs import let_diverge, stop_after
from torch import nn
from widthkit_plugins.searchers.greedy import GreedySearcher
from widthkit_plugins.strategies.bc import BilaterallyCoupled

from widthkit.budget import Budget, Limit, parse_budget
from widthkit.graph.space import uniform_space
from widthkit.search import search
from widthkit.search.judging import Judgement
from widthkit.search.loop import Loop
from widthkit.search.near_budget import NEAR, fullest
from widthkit.search.top_up import TopUp, remark, top_up
from widthkit.supernet import make_supernet
from widthkit.testing import SearcherConformance, build_space, small_batch, small_graph, small_net
from widthkit.trace import trace

LOADER = [small_batch(seed) for seed in range(2)]


@cache
def chain(*widths):
    convs = [nn.Conv2d(a, b, 1) for a, b in itertools.pairwise((3, *widths, 4))]
    return trace(nn.Sequential(*convs), (1, 3, 4, 4))


def points(space):
    return np.array(list(itertools.product(*(g.options for g in space.groups))))


def log_score(widths):
    score = float(np.log(list(widths.values())).sum())
    return Judgement(score, -score, None)


def play(engine, judge=log_score):
    return Loop(engine.space.graph, lambda vectors: ((i, judge(w)) for i, w in enumerate(vectors))).run(engine)


# --- the number problem -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("text", ["0.35x", "0.5x", "0.9x", "0.5x,0.6x", "0.6x,190params"])
def test_the_fullest_point_is_that_of_brute_force(seed, text):
    """With a share that nothing reaches, the search must find the point of most usage, and prove it."""
    rng = np.random.default_rng(seed)
    space = uniform_space(chain(*rng.integers(3, 12, size=4).tolist()), int(rng.integers(2, 6)))
    budget = parse_budget(text, space.graph)
    if not budget.fits(space.graph, space.smallest):
        pytest.skip("even the narrowest network is outside")
    usage = budget.usage(space.graph, points(space))
    found = fullest(space, budget, near=1.0)
    assert found.proven
    assert found.usage == usage[usage <= 1].max()
    assert budget.usage(space.graph, found.widths) == found.usage
    near = fullest(space, budget)
    assert (near.usage > NEAR) == bool(((usage <= 1) & (usage > NEAR)).any())


def test_a_search_for_the_fullest_point_that_is_cut_off_claims_nothing():
    space = uniform_space(chain(*[30] * 8), 15)
    budget = parse_budget("0.5x", space.graph)
    assert not fullest(space, budget, near=1.0, boxes=50).proven
    assert fullest(space, budget).usage > NEAR


def test_nothing_is_proven_about_costs_that_are_no_polynomials():
    class Odd(Budget):
        """Counts MACs under another name."""

        def costs(self, graph, widths):
            return np.asarray(graph.macs(widths), dtype=np.float64)[..., None] / self.limits[0].value

        def fits(self, graph, widths):
            return graph.macs(widths) <= self.limits[0].value

    space = uniform_space(chain(16), 2)
    limit = int(0.8 * space.graph.macs())
    assert fullest(space, Budget((Limit("macs", limit, "x"),))).proven
    odd = fullest(space, Odd((Limit("other", limit, "x"),)))
    assert (odd.widths, odd.proven) == ({"0": 8}, False)


# --- topping up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 6])
@pytest.mark.parametrize("text", ["0.3x", "0.5x", "0.75x", "0.5x,400params"])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_ends_near_the_budget_wherever_the_space_does(k, text, seed):
    widths = np.random.default_rng(seed).integers(8, 24, size=5).tolist()
    space = uniform_space(chain(*widths), k)
    budget = parse_budget(text, space.graph)
    usage = budget.usage(space.graph, points(space))
    if usage.min() > 1:
        pytest.skip("even the narrowest network is outside")
    trials = play(GreedySearcher(space, budget, np.random.default_rng(0)))
    engine = top_up(space, budget, trials, 0)
    if engine is None:
        return
    more = play(engine)
    assert all(budget.fits(space.graph, t.widths) for t in more)
    reached = any(budget.usage(space.graph, t.widths) > NEAR for t in more)
    assert reached == bool(((usage <= 1) & (usage > NEAR)).any())
    if not reached:
        inside = [budget.usage(space.graph, t.widths) for t in trials + more if budget.fits(space.graph, t.widths)]
        assert max(inside) == usage[usage <= 1].max()
        assert engine.fullest is not None
        assert engine.fullest.proven


@pytest.mark.parametrize("start", [0.3, 0.6, 0.9])
def test_topping_up_takes_the_widenings_that_score_best(start):
    """One group alone decides the score; it must be the one that grows."""
    space = uniform_space(chain(24, 24, 24), 12)
    budget = parse_budget("0.5x", space.graph)
    at = {name: max(2, int(start * 12) // 2 * 2) for name in space.names}
    assert budget.usage(space.graph, at) < NEAR
    engine = TopUp(space, budget, np.random.default_rng(0), at)
    trials = play(engine, lambda w: Judgement(float(w["1"]), -float(w["1"]), None))
    best = max(trials, key=lambda t: t.score)
    assert best.widths["1"] > at["1"]
    assert best.widths["0"] == at["0"]
    assert best.widths["2"] == at["2"]


def test_topping_up_works_from_widths_that_are_no_choices():
    space = uniform_space(chain(24, 24, 24), 4)
    budget = parse_budget("0.5x", space.graph)
    trials = play(TopUp(space, budget, np.random.default_rng(0), {"0": 13, "1": 13, "2": 13}))
    assert any(NEAR < budget.usage(space.graph, t.widths) <= 1 for t in trials)


class TestTopUp(SearcherConformance):
    """From the narrowest network on, where that leaves something to top up."""

    @pytest.fixture
    def make_searcher(self):
        return lambda space, budget, rng: TopUp(space, budget, rng, space.smallest)

    def test_it_ends_and_stays_ended(self, make_searcher):
        super().test_it_ends_and_stays_ended(make_searcher, "0.5x")

    def test_a_space_of_one_point_is_searched(self, make_searcher):
        """There is nothing to top up."""
        space = build_space("single choice", small_graph())
        assert make_searcher(space, parse_budget("2x", space.graph), np.random.default_rng(0)).done


# --- in a search ------------------------------------------------------------------------------------------------------


def build(**options):
    return make_supernet(small_net(), BilaterallyCoupled(), graph=small_graph(), **options)


def quiet(net, budget, searcher, **options):
    options.setdefault("progress", False)
    return search(net, LOADER, budget, searcher, loss=F.cross_entropy, **options)


SPACES = {"coarse": {"k": 3}, "fine": {"k": 8}, "bins": {"bins": 1.0}, "divisor": {"k": 8, "divisor": 4}}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("budget", ["0.4x", "0.7x", "0.6x,350params"])
@pytest.mark.parametrize("searcher", [None, "greedy", "random", "uniform", "importance", "evolution"])
def test_every_result_is_near_its_budget_or_says_why_not(space, budget, searcher):
    net = build(**space)
    limit = parse_budget(budget, net.graph)
    usage = limit.usage(net.graph, points(net.space))
    options = {"evolution": {"population": 4, "generations": 2}, "random": {"n": 5}}.get(searcher, {})
    result = quiet(net, budget, searcher, **options)
    used = limit.usage(net.graph, result.widths)
    assert used <= 1
    if ((usage <= 1) & (usage > NEAR)).any():
        assert used > NEAR
    if used > NEAR:
        assert "remark" not in result.settings
    else:
        most = usage[usage <= 1].max()
        assert (
            f"no network of this space lies in (97%, 100%] of it, the fullest uses {most:.1%}"
            in (result.settings["remark"])
        )


def test_a_budget_above_the_whole_space_is_told():
    result = quiet(build(k=4), "2x", "greedy")
    assert result.widths == small_graph().full
    assert result.settings["remark"] == (
        "it uses 50.0% of the budget; the widest network of this space uses no more than 50.0%"
    )


@pytest.mark.parametrize("searcher", ["greedy", "guided"])
def test_a_budget_near_which_networks_diverge_is_told(searcher):
    net = build(k=3)
    limit = parse_budget("0.7x", net.graph)
    let_diverge(net, lambda widths: NEAR < limit.usage(net.graph, widths) <= 1)
    result = quiet(net, "0.7x", searcher)
    assert limit.usage(net.graph, result.widths) <= NEAR
    assert result.settings["remark"]


def test_an_interrupted_top_up_goes_on_to_the_same_result(tmp_path):
    net = build(k=4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = quiet(net, "0.5x", "uniform", out=whole)
    assert len(expected.trials) > 3  # one by the searcher, the others by topping up
    with pytest.raises(KeyboardInterrupt):
        quiet(net, "0.5x", "uniform", out=cut, progress=stop_after(3))
    assert quiet(net, "0.5x", "uniform", out=cut, resume=True) == expected
    for name in ("search.json", "search-journal.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_remarks_are_honest_about_what_was_not_proven():
    space = uniform_space(chain(*[30] * 8), 15)
    budget = parse_budget("0.5x", space.graph)
    cut_off = fullest(space, budget, near=1.0, boxes=50)
    at = space.smallest
    assert "was found" in remark(space, budget, at, type(cut_off)(cut_off.widths, 0.9, False))
    assert "no network of this space lies" in remark(space, budget, at, type(cut_off)(cut_off.widths, 0.9, True))
