"""One-shot importance pruning against a hand-made ranking, and what a search provides to searchers."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from widthkit_plugins.searchers.importance import ImportanceSearcher, prune

from widthkit.budget import parse_budget
from widthkit.errors import OptionError
from widthkit.graph.space import uniform_space
from widthkit.search import SEARCHERS, search
from widthkit.search.resources import Resources, make_searcher
from widthkit.supernet import make_supernet
from widthkit.supernet.ranking import unit_scores
from widthkit.testing import SearcherConformance, small_batch, small_graph, small_net

LOADER = [small_batch(seed) for seed in range(2)]


class TestImportance(SearcherConformance):
    @pytest.fixture(params=[{}, {"criterion": "lamp"}], ids=str)
    def make_searcher(self, request):
        return partial(ImportanceSearcher, **request.param)


class TestImportanceWithScores(SearcherConformance):
    @pytest.fixture
    def make_searcher(self):
        def scores(_):
            rng = np.random.default_rng(0)
            return {name: rng.random(2 * width) for name, width in small_graph().full.items()}

        return partial(ImportanceSearcher, unit_scores=scores)


def space():
    graph = small_graph()
    return graph, uniform_space(graph, 100)


@pytest.mark.parametrize("budget", ["0.3x", "0.5x", "0.8x"])
def test_widths_count_the_units_above_one_threshold_until_a_group_no_longer_fits(budget):
    """Brute force: take units one by one, the best first, each group stopping at its first misfit."""
    graph, every_width = space()
    rng = np.random.default_rng(3)
    scores = {name: rng.random(width) for name, width in graph.full.items()}
    limit = parse_budget(budget, graph)
    # The best unit of every group is always there.
    units = sorted(((s, n) for n, values in scores.items() for s in np.sort(values)[:-1]), reverse=True)
    widths, stopped = dict.fromkeys(graph.full, 1), set()
    for _, name in units:
        wider = {**widths, name: widths[name] + 1}
        if name in stopped or graph.macs(wider) > float(budget[:-1]) * graph.macs():
            stopped.add(name)
        else:
            widths = wider
    assert prune(every_width, limit, scores) == widths
    assert limit.fits(graph, widths)


def test_without_a_limit_everything_stays():
    graph, every_width = space()
    assert prune(every_width, parse_budget("1x", graph), {n: np.ones(w) for n, w in graph.full.items()}) == graph.full


def test_a_group_without_importance_is_slimmed_most():
    graph, every_width = space()
    name = graph.group_names[1]
    scores = {n: np.full(w, 1e-6 if n == name else 1.0) for n, w in graph.full.items()}
    widths = prune(every_width, parse_budget("0.6x", graph), scores)
    assert widths[name] / graph.full[name] == min(w / graph.full[n] for n, w in widths.items())


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_a_search_provides_the_importance_of_the_trained_supernet(criterion):
    net = make_supernet(small_net(), "bcv2", graph=small_graph(), k=4, min_width="0.25x")
    with torch.no_grad():
        net.model.expand[0].weight[3:] *= 1e-4
    result = search(net, LOADER, "0.5x", "importance", loss=F.cross_entropy, criterion=criterion, progress=False)
    scores = unit_scores(net.model, net.wide_graph, criterion, data=LOADER, loss=F.cross_entropy)
    assert len(result.trials) == 1
    assert result.widths == prune(net.space, parse_budget("0.5x", net.graph), scores)
    assert result.macs <= 0.5 * net.graph.macs()


def test_a_given_value_goes_before_a_provided_one():
    net = make_supernet(small_net(), "ua", graph=small_graph(), k=4)
    calls = []

    def mine(criterion):
        calls.append(criterion)
        return {n: np.ones(w) for n, w in net.graph.full.items()}

    search(net, LOADER, "0.5x", "importance", loss=F.cross_entropy, unit_scores=mine, progress=False)
    assert calls == ["magnitude"]


def test_searchers_that_ask_for_nothing_get_nothing():
    net = make_supernet(small_net(), "ua", graph=small_graph(), k=4)
    limit = parse_budget("0.5x", net.graph)
    for name in SEARCHERS.names():
        assert make_searcher(name, Resources(net), limit, np.random.default_rng(0), {}).space is net.space


def test_an_unknown_criterion_is_refused_before_anything_runs():
    net = make_supernet(small_net(), "ua", graph=small_graph(), k=4)
    with pytest.raises(OptionError, match="unknown importance criterion 'tailor': did you mean taylor"):
        search(net, LOADER, "0.5x", "importance", criterion="tailor", progress=False)
