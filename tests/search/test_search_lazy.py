"""Greedy's options that judge less: they follow the contract, and agree with plain greedy where they must."""

from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import stdtr
from scipy.stats import norm, ttest_ind_from_stats
from torch import nn
from widthkit_plugins.searchers.greedy import GreedySearcher
from widthkit_plugins.searchers.greedy_race import Race, _probability

from widthkit.budget import parse_budget
from widthkit.errors import DataError, OptionError, PluginError
from widthkit.graph.space import uniform_space
from widthkit.search import search as whole_search
from widthkit.search.evaluator import Evaluator, Judgement
from widthkit.search.journal import Journal
from widthkit.search.loop import run_loop
from widthkit.search.searcher import Span
from widthkit.supernet import make_supernet
from widthkit.testing import SearcherConformance, small_batch, small_graph, small_net
from widthkit.trace import trace

OPTIONS = [{"lazy": True}, {"race": 4}, {"lazy": True, "race": 5, "risk": 0.2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
class TestConformance(SearcherConformance):
    @pytest.fixture
    def make_searcher(self, options):
        return partial(GreedySearcher, **options)


class Judge:
    """A separable score; every eighth of the data adds an error of its own to every width vector's score."""

    def __init__(self, seed, noise=0.0, span=None):
        self.seed, self.noise, self.span, self.work, self.calls = seed, noise, span, [0.0], [0]
        self.weight, self.power = np.random.default_rng(seed).uniform((1, 0.2), (9, 0.9), size=(9, 2)).T

    def at(self, span):
        assert span.of == 8
        part = Judge(self.seed, self.noise, span)
        part.work, part.calls = self.work, self.calls
        return part

    def __call__(self, widths):
        start, stop, of = self.span or (0, 8, 8)
        self.work[0] += (stop - start) / of if self.span or self.noise == 0 else 0
        self.calls[0] += 1
        score = sum(a * w**p for a, p, w in zip(self.weight, self.power, widths.values(), strict=True))
        error = np.random.default_rng([self.seed, *widths.values()]).normal(size=8)[start:stop].mean()
        score += self.noise * float(error)
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


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_race_without_noise_decides_as_greedy_does(seed, lazy):
    plain, raced = Judge(seed), Judge(seed)
    expected, _ = search(plain)
    found, trials = search(raced, race=8, lazy=lazy)
    assert found == expected
    # The starting point and every round's winner alone are trials of the result.
    assert [t.score for t in trials] == [Judge(seed)(t.widths).score for t in trials]
    assert len(trials) == 1 + sum(8 - w for w in found.values())


def test_less_risk_means_more_work_and_more_of_the_same_widths():
    """Errors are as large as the differences between candidates."""
    seeds = range(12)
    plain = [Judge(seed, noise=0.3) for seed in seeds]
    expected = [search(judge)[0] for judge in plain]
    right, work = [], []
    for risk in (0.4, 0.05, 1e-4):
        judges = [Judge(seed, noise=0.3) for seed in seeds]
        found = [search(judge, race=8, lazy=True, risk=risk)[0] for judge in judges]
        right.append(sum(map(dict.__eq__, found, expected)))
        work.append(sum(judge.work[0] for judge in judges))
    assert right[0] < right[2]
    assert right == sorted(right)
    assert work == sorted(work)
    assert work[2] < sum(judge.calls[0] for judge in plain)


def test_candidates_that_diverge_lose_the_race():
    class Diverging(Judge):
        def __call__(self, widths):
            found = super().__call__(widths)
            return found if list(widths.values())[2] > 6 else Judgement(float("nan"), float("nan"), None)

        def at(self, span):
            part = Diverging(self.seed, self.noise, span)
            part.work, part.calls = self.work, self.calls
            return part

    for options in ({}, {"lazy": True}, {"race": 8}, {"lazy": True, "race": 8}):
        found, trials = search(Diverging(0, noise=0.1), **options)
        assert list(found.values())[2] in (6, 7, 8), options
        assert parse_budget("0.4x", graph()).fits(graph(), found)
        assert sum(not np.isfinite(t.score) for t in trials) <= len(trials) - 5


def test_a_start_that_diverges_costs_one_round_of_knowledge_and_no_more():
    class Start(Judge):
        def __call__(self, widths):
            found = super().__call__(widths)
            return Judgement(float("nan"), float("nan"), None) if min(widths.values()) == 8 else found

        def at(self, span):
            part = Start(self.seed, self.noise, span)
            part.work, part.calls = self.work, self.calls
            return part

    expected, _ = search(Judge(0))
    for options in ({}, {"lazy": True}, {"race": 8}, {"lazy": True, "race": 8}):
        assert search(Start(0), **options)[0] == expected, options


def test_ties_go_to_the_group_that_saves_more_in_a_race_too():
    class Flat(Judge):
        def __call__(self, widths):
            error = np.random.default_rng(sum(widths.values())).normal(size=8)
            start, stop, _ = self.span or (0, 8, 8)
            return Judgement(float(error[start:stop].mean()), 0.0, None)

        def at(self, span):
            return Flat(self.seed, self.noise, span)

    expected, _ = search(Flat(0))
    assert search(Flat(0), race=8)[0] == expected


def test_a_race_is_as_good_a_judge_as_its_statistics():
    """Over many draws, what a round estimates from a part is right on average, with the spread that it states."""
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(400):
        race = Race(8, True, 0.05)
        race.start(0.0, 0, 8)
        race.changes = list(rng.normal(0.1, 0.3, size=60))
        race.spreads["known"] = [0.25] * 60
        old = rng.normal(1, 1, size=8)
        race.before["a"], race.age["a"] = list(old), 1
        new = old + rng.normal(0.1, 0.3) + rng.normal(0, 0.5, size=8)
        race.tell(["a"], [new[:1].mean()], 0, 1)
        race.tell(["a"], [new[1:2].mean()], 1, 2)
        mean, variance, _ = race._estimate("a")
        scores.append((mean - new.mean()) / variance**0.5)
        race.tell(["a"], [new[2:4].mean()], 2, 4)
        race.tell(["a"], [new[4:].mean()], 4, 8)
        assert race._estimate("a") == (pytest.approx(new.mean()), 0.0, np.inf)
    assert abs(np.mean(scores)) < 0.15
    assert 0.85 < np.std(scores) < 1.25


def supernet():
    return make_supernet(small_net(), "bc", graph=small_graph(), k=4)


def test_a_span_is_judged_on_its_own_batches_and_nothing_is_judged_twice(monkeypatch):
    net, data = supernet(), [small_batch(seed) for seed in range(4)]
    judge = Evaluator(net, data, F.cross_entropy, batch_size=8)
    alone = Evaluator(net, data[1:3], F.cross_entropy, batch_size=8)
    vectors = [net.space.smallest, net.space.largest, net.space.sample(np.random.default_rng(0))]
    middle = judge.at(Span(1, 3, 4))
    assert [found for _, found in sorted(middle.many(vectors))] == [alone(v) for v in vectors]
    runs = []
    part = Evaluator._part
    monkeypatch.setattr(Evaluator, "_part", lambda self, batch, run: runs.append(batch) or part(self, batch, run))
    whole = judge(vectors[0])
    assert len(runs) == 2 * len(net.paths(vectors[0]))
    assert whole == Evaluator(net, data, F.cross_entropy, batch_size=8)(vectors[0])
    assert [len(judge.at(Span(i, i + 1, 3)).batches) for i in range(3)] == [1, 1, 2]


def test_parts_make_batches_smaller_or_are_refused():
    net, data = supernet(), [small_batch(seed) for seed in range(2)]
    assert [n for _, _, n in Evaluator(net, data, F.cross_entropy, parts=5).batches] == [4, 3, 3, 3, 3]
    with pytest.raises(DataError, match="17 parts need as many held-out batches; here are 16 of 16 examples"):
        Evaluator(net, data, F.cross_entropy, parts=17)
    judge = Evaluator(net, data, F.cross_entropy)
    with pytest.raises(PluginError, match="but there are 1 batches; the searcher must say parts=2"):
        judge.at(Span(0, 1, 2))
    with pytest.raises(PluginError, match="span="):
        judge.at(Span(1, 1, 1))
    with pytest.raises(PluginError, match=r"span=0\.25 is no Span"):
        judge.at(0.25)


def test_parts_of_any_data_are_equal_and_hold_every_kind():
    net = supernet()
    uneven = Evaluator(net, [small_batch(seed) for seed in range(5)], F.cross_entropy, batch_size=14, parts=2)
    assert [n for _, _, n in uneven.batches] == [10, 10, 10, 10]
    x, y = small_batch(0)
    kinds = Evaluator(net, [(x, y), (x[..., :-1], y)], F.cross_entropy, parts=4)
    assert [tuple({b[0].shape[-1] for b in kinds.at(Span(i, i + 1, 4)).batches}) for i in range(4)] == [
        tuple({x.shape[-1], x.shape[-1] - 1})
    ] * 4


def test_what_parts_said_is_forgotten_once_all_of_the_data_are_judged():
    net, data = supernet(), [small_batch(seed) for seed in range(4)]
    judge = Evaluator(net, data, F.cross_entropy, batch_size=8)
    nested = judge.at(Span(0, 2, 4)).at(Span(0, 1, 2))
    assert (len(nested.batches), len(judge.at(Span(0, 1, 2)).batches)) == (1, 2)
    before = judge.at(Span(0, 4, 4))(net.space.largest)
    assert judge(net.space.largest) == before
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    assert judge(net.space.largest) != before


def test_a_race_is_refused_where_a_score_model_judges():
    with pytest.raises(OptionError, match="pass score_model=None"):
        whole_search(supernet(), [small_batch(0)], "0.5x", race=4)


def test_an_interrupted_race_goes_on_to_the_same_result(tmp_path):
    options = {"loss": F.cross_entropy, "progress": False, "lazy": True, "race": 4}
    options["score_model"] = None
    data = [small_batch(seed) for seed in range(2)]
    expected = whole_search(supernet(), data, "0.5x", out=tmp_path / "whole", **options)
    left = iter(range(3))

    def stop(trial, progress):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole_search(supernet(), data, "0.5x", out=tmp_path / "cut", on_trial=stop, **options)
    journal = (tmp_path / "whole" / "search-journal.jsonl").read_text()
    assert "span" in journal
    assert journal.startswith((tmp_path / "cut" / "search-journal.jsonl").read_text())
    assert whole_search(supernet(), data, "0.5x", out=tmp_path / "cut", resume=True, **options) == expected
    assert (tmp_path / "cut" / "search-journal.jsonl").read_text() == journal


def test_the_probability_of_being_better_is_welchs():
    """Means of samples of different sizes and spreads, against scipy's own test."""
    cases = [((0.1, 2.0, 9), (0.7, 0.5, 4)), ((1.0, 0.1, 3), (1.2, 3.0, 30))]
    for a, b in cases:
        p = ttest_ind_from_stats(*a, *b, equal_var=False, alternative="greater").pvalue
        assert _probability(*((mean, std**2 / n, n - 1) for mean, std, n in (a, b))) == pytest.approx(1 - p)


def test_a_race_is_not_surer_than_its_few_parts_allow():
    """Candidates' spreads differ; a fraction q of what is measured lies below its own quantile q."""
    rng = np.random.default_rng(0)
    tails, normal = [], []
    for _ in range(1500):
        race = Race(16, False, 0.05)
        race.start(0.0, 0, 16)
        # What the spread of earlier rounds is worth: two degrees of freedom.
        sd = 0.5 * np.sqrt(2 / rng.chisquare(2))
        race.spreads["new"] = [0.25] * 60
        new = rng.normal(0, sd, size=16)
        for part in range(3):
            race.tell(["a"], [new[part]], part, part + 1)
        mean, variance, free = race._estimate("a")
        score = (mean - new.mean()) / variance**0.5
        tails.append(stdtr(free, score))
        normal.append(norm.cdf(score))
    assert np.mean(np.array(tails) < 0.02) == pytest.approx(0.02, abs=0.01)
    assert np.mean(np.array(normal) < 0.02) > 0.03, "the normal distribution is surer than it may be"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"race": 0}, "race=0"),
        ({"race": 2.5}, "race=2.5"),
        ({"race": float("inf")}, "race=inf"),
        ({"race": "4"}, "race='4'"),
        ({"risk": 1}, "risk=1"),
        ({"risk": "abc"}, "risk='abc'"),
        ({"lazy": "False"}, "lazy='False'"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        search(Judge(0), **options)
