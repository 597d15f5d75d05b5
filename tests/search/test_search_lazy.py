"""Greedy's options that judge less: they follow the contract, and agree with plain greedy where they must."""

from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.greedy import GreedySearcher

from widthkit.budget import parse_budget
from widthkit.errors import OptionError
from widthkit.search import search as whole_search
from widthkit.search.evaluator import Evaluator, Judgement
from widthkit.search.journal import Journal
from widthkit.search.loop import run_loop
from widthkit.space import uniform_space
from widthkit.supernet import make_supernet
from widthkit.testing import SearcherConformance, small_batch, small_graph, small_net
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


def supernet():
    return make_supernet(small_net(), "bc", graph=small_graph(), k=4)


def test_a_part_of_the_data_is_the_first_examples_of_every_batch():
    net, data = supernet(), [small_batch(seed) for seed in range(2)]
    judge = Evaluator(net, data, F.cross_entropy, batch_size=8)
    halves = Evaluator(net, [(x[:4], y[:4]) for x, y in data], F.cross_entropy, batch_size=4)
    assert [n for _, _, n in judge.at(0.45).batches] == [4, 4]
    assert judge.at(0.45)(net.space.smallest) == halves(net.space.smallest)
    assert judge.at(1e-9).batches[0][2] == 1
    with pytest.raises(OptionError, match="fraction=0"):
        judge.at(0)
    lists = Evaluator(net, [(data[0][0], list(data[0][1]))], lambda o, t: F.cross_entropy(o, torch.stack(t)))
    with pytest.raises(OptionError, match="cannot be cut"):
        lists.at(0.5)


def test_an_interrupted_race_goes_on_to_the_same_result(tmp_path):
    options = {"loss": F.cross_entropy, "progress": False, "lazy": True, "race": 0.5, "finalists": 2}
    options["score_model"] = None
    data = [small_batch(seed) for seed in range(2)]
    expected = whole_search(supernet(), data, "0.5x", out=tmp_path / "whole", **options)
    left = iter(range(5))

    def stop(trial, progress):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole_search(supernet(), data, "0.5x", out=tmp_path / "cut", on_trial=stop, **options)
    journal = (tmp_path / "whole" / "search-journal.jsonl").read_text()
    assert "fraction" in journal
    assert journal.startswith((tmp_path / "cut" / "search-journal.jsonl").read_text())
    assert whole_search(supernet(), data, "0.5x", out=tmp_path / "cut", resume=True, **options) == expected
    assert (tmp_path / "cut" / "search-journal.jsonl").read_text() == journal


@pytest.mark.parametrize(
    ("options", "message"), [({"race": 0}, "race=0"), ({"finalists": 0}, "finalists=0"), ({"caution": 2}, "caution=2")]
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        search(Judge(0), **options)
