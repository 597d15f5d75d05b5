"""Every built-in plug-in runs the suites that a stranger's runs."""

from functools import partial

import pytest
from widthkit_plugins.searchers.greedy import GreedySearcher
from widthkit_plugins.searchers.guided.searcher import GuidedSearcher
from widthkit_plugins.searchers.random_search import RandomSearcher
from widthkit_plugins.searchers.uniform import UniformSearcher
from widthkit_plugins.strategies.bc import BilaterallyCoupled
from widthkit_plugins.strategies.ua import UniversallyAligned

from widthkit.testing import SearcherConformance, StrategyConformance


class TestUniversallyAligned(StrategyConformance):
    @pytest.fixture(params=[{}, {"n_random": 0}, {"distill": False}], ids=str)
    def strategy(self, request):
        return UniversallyAligned(**request.param)


class TestBilaterallyCoupled(StrategyConformance):
    @pytest.fixture(params=[{}, {"complementary": False}], ids=str)
    def strategy(self, request):
        return BilaterallyCoupled(**request.param)


class TestGreedy(SearcherConformance):
    @pytest.fixture
    def make_searcher(self):
        return GreedySearcher


class TestRandom(SearcherConformance):
    @pytest.fixture(params=[{"n": 10}, {"n": 7, "near_budget": 0.0}], ids=str)
    def make_searcher(self, request):
        return partial(RandomSearcher, **request.param)


class TestUniform(SearcherConformance):
    @pytest.fixture
    def make_searcher(self):
        return UniformSearcher


class TestGuided(SearcherConformance):
    @pytest.fixture(
        params=[
            {},
            {"evaluations": 6, "proposals": "random", "proposals_options": {"n": 5}},
            {"evaluations": 4, "calibrate": 3},
            {"evaluations": 5, "model_options": {"interactions": False}},
        ],
        ids=str,
    )
    def make_searcher(self, request):
        return partial(GuidedSearcher, **request.param)
