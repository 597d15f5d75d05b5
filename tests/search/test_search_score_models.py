"""Searches that a score model guides: decisions, calibration, resuming; and the figures on real data."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import nn
from widthkit.search.acquire import acquire, ask_model, climb, expected_improvement
from widthkit.search.design import candidates, d_optimal, design_columns
from widthkit_plugins.strategies.bc import BilaterallyCoupled

from benchmarks import channel_bench
from benchmarks.score_model import Benchmark, denoised
from widthkit.budget import parse_budget
from widthkit.errors import CheckpointError, DataError, ModelError, OptionError, PluginError, WidthsError
from widthkit.graph.space import uniform_space
from widthkit.search import SearchResult, search
from widthkit.search.evaluator import Evaluator, Judgement
from widthkit.search.score_model import SCORE_MODELS, Observations, Prediction, ScoreModel
from widthkit.search.searcher import SEARCHERS
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.trace import trace

DATA = Path(os.environ.get("WIDTHKIT_DATA", Path(__file__).parents[3] / "shared" / "data"))
LOADER = [small_batch(seed) for seed in range(2)]


def build(k=4):
    return make_supernet(small_net(), BilaterallyCoupled(), graph=small_graph(), k=k)


def guided(net=None, budget="0.5x", searcher="greedy", **options):
    settings = {"score_model": "log-linear", "evaluations": 12, "progress": False, "loss": F.cross_entropy}
    return search(net or build(), LOADER, budget, searcher, **{**settings, **options})


def accuracy(widths):
    """A stand-alone accuracy that is linear in the log widths."""
    full = small_graph().full
    return 0.9 + sum((i + 1) * math.log(w / full[n]) for i, (n, w) in enumerate(widths.items())) / 30


@pytest.fixture
def judged(monkeypatch):
    seen = []
    original = Evaluator.__call__

    def call(self, widths):
        seen.append(dict(widths))
        return original(self, widths)

    monkeypatch.setattr(Evaluator, "__call__", call)
    return seen


# --- designs ----------------------------------------------------------------------------------------------------------


def determinant(columns):
    return np.linalg.slogdet(columns.T @ columns)[1]


def test_a_design_is_as_good_as_brute_force():
    from itertools import combinations

    rng = np.random.default_rng(0)
    columns = np.concatenate([np.ones((12, 1)), rng.standard_normal((12, 2))], axis=1)
    best = max(determinant(columns[list(c)]) for c in combinations(range(12), 5))
    chosen = d_optimal(columns, 5, rng)
    assert len(set(chosen)) == 5
    assert determinant(columns[chosen]) == pytest.approx(best, abs=0.05)


def test_a_design_beats_chance_and_stays_inside_the_budget():
    space = build(k=8).space
    budget = parse_budget("0.5x", space.graph)
    rng = np.random.default_rng(0)
    pool = candidates(space, budget, rng, 10_000)
    assert (budget.usage(space.graph, pool) <= 1).all()
    assert len(np.unique(pool, axis=0)) == len(pool)
    columns = design_columns(space, pool)
    chosen = determinant(columns[d_optimal(columns, 8, rng)])
    assert chosen > max(determinant(columns[rng.choice(len(pool), 8, replace=False)]) for _ in range(200))


def test_a_design_goes_where_nothing_was_measured():
    line = np.stack([np.ones(5), np.linspace(-1, 1, 5)], axis=1)
    assert d_optimal(line, 1, np.random.default_rng(0), given=line[[0, 0, 0]]) == [4]


def test_candidates_of_a_large_space_are_inside_the_budget_and_reach_the_extremes():
    net = nn.Sequential(*[m for i in range(12) for m in (nn.Conv2d(3 if i == 0 else 16, 16, 3), nn.ReLU())])
    space = uniform_space(trace(net, (1, 3, 32, 32)), 16)
    assert space.size > 20_000
    budget = parse_budget("0.4x", space.graph)
    pool = candidates(space, budget, np.random.default_rng(0), 500)
    assert len(pool) > 450
    assert (budget.usage(space.graph, pool) <= 1).all()
    assert (pool == 1).any(0).all()
    assert (pool == 16).any(0).all()


# --- acquisition ------------------------------------------------------------------------------------------------------


def test_expected_improvement_is_the_integral():
    rng = np.random.default_rng(0)
    mean, std = np.array([0.3, -0.5, 1.0]), np.array([0.2, 1.0, 0.5])
    drawn = np.maximum(mean + std * rng.standard_normal((400_000, 3)) - 0.4, 0).mean(0)
    np.testing.assert_allclose(expected_improvement(Prediction(mean, std), 0.4), drawn, atol=5e-3)


class Known(ScoreModel):
    """Mean and uncertainty by formula."""

    def fit(self, scores, calibration=None):
        pass

    def predict(self, widths):
        return Prediction(np.log(widths) @ np.arange(1.0, widths.shape[1] + 1), np.full(len(widths), 0.1))


def test_new_evaluations_are_promising_and_new():
    space = build().space
    budget = parse_budget("0.6x", space.graph)
    pool = candidates(space, budget, np.random.default_rng(0), 10_000)
    model = Known(space)
    order = np.argsort(-model.predict(pool).mean)
    batch = acquire(model, space, pool[order[3:]], pool[order[:3]], 4, np.random.default_rng(0))
    ranks = [int(np.flatnonzero((pool[order] == w).all(1))[0]) for w in batch]
    assert len(set(ranks)) == 4
    assert min(ranks) >= 3
    assert max(ranks) < 3 + len(pool) // 2


def test_a_climb_ends_where_no_step_helps_and_inside_the_budget():
    space = build(k=6).space
    budget = parse_budget("0.5x", space.graph)
    model = Known(space)
    pool = candidates(space, budget, np.random.default_rng(0), 10_000)
    best = model.predict(pool).mean.max()
    for start in pool[:: len(pool) // 5]:
        end = climb(model, space, budget, start)
        assert budget.usage(space.graph, end) <= 1
        assert model.predict(end[None]).mean[0] >= model.predict(start[None]).mean[0]
        assert np.array_equal(climb(model, space, budget, end), end)
    assert model.predict(climb(model, space, budget, pool[0])[None]).mean[0] == pytest.approx(best, abs=0.3)


def test_a_searcher_runs_on_predictions():
    space = build().space
    budget = parse_budget("0.5x", space.graph)
    engine = SEARCHERS.get("greedy")(space, budget, np.random.default_rng(0))
    asked = ask_model(engine, Known(space), budget)
    assert engine.done
    assert len(asked)
    assert (budget.usage(space.graph, asked) <= 1).all()


# --- whole searches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["log-linear", "gp"])
@pytest.mark.parametrize("searcher", ["greedy", "random"])
def test_a_guided_search_judges_what_it_may_and_stays_inside_the_budget(searcher, model, judged):
    net = build()
    result = guided(net, searcher=searcher, score_model=model)
    budget = parse_budget("0.5x", net.graph)
    assert budget.fits(net.graph, result.widths)
    assert len(judged) == len(result.trials) <= 13
    assert len({json.dumps(w) for w in judged}) == len(judged)
    assert all(budget.fits(net.graph, t.widths) for t in result.trials)
    assert result.widths in [t.widths for t in result.trials]
    assert math.isfinite(result.settings["prediction"]["mean"])
    assert result.settings["score_model"] == model


def test_calibration_decides_and_is_kept(tmp_path):
    """Stand-alone accuracy is known in closed form: the best inside the budget is found, whatever the supernet says."""
    net = build(k=6)
    trained = []
    result = guided(
        net, calibrate=10, train_fn=lambda w: trained.append(dict(w)) or accuracy(w), out=tmp_path, evaluations=20
    )
    budget = parse_budget("0.5x", net.graph)
    pool = candidates(net.space, budget, np.random.default_rng(0), 10_000)
    everyone = [accuracy(dict(zip(net.space.names, w, strict=True))) for w in pool.tolist()]
    assert max(everyone) - accuracy(result.widths) < 0.05 * (max(everyone) - min(everyone))
    assert len(trained) == 10 == len({json.dumps(w) for w in trained})
    assert all(budget.fits(net.graph, w) for w in trained)
    assert result.settings["prediction"]["mean"] == pytest.approx(accuracy(result.widths), abs=0.05)
    loaded = SearchResult.load(tmp_path / "search.json")
    assert [w for w, _ in loaded.settings["prediction"]["calibrations"]] == trained


@pytest.mark.parametrize("stop", [1, 4, 9, 15])
def test_an_interrupted_guided_search_goes_on_to_the_same_bytes(stop, tmp_path, judged):
    """Counted over trainings and judgements together; nothing is done twice."""
    done = []

    def until(limit):
        def train(widths):
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append(("train", json.dumps(widths)))
            return accuracy(widths)

        return train

    guided(out=tmp_path / "whole", calibrate=4, train_fn=until(math.inf))
    total = len(done) + len(judged)
    done.clear(), judged.clear()

    def watch(trial, progress):
        if len(judged) + len(done) >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guided(out=tmp_path / "cut", calibrate=4, train_fn=until(stop), on_trial=watch)
    guided(out=tmp_path / "cut", calibrate=4, train_fn=until(math.inf), resume=True)
    assert (tmp_path / "cut" / "search.json").read_bytes() == (tmp_path / "whole" / "search.json").read_bytes()
    journals = [(tmp_path / name / "search-journal.jsonl").read_bytes() for name in ("cut", "whole")]
    assert sorted(journals[0].splitlines()) == sorted(journals[1].splitlines())
    assert len(done) + len(judged) == total


def test_a_journal_knows_its_score_model(tmp_path):
    guided(out=tmp_path)
    for other in ({"score_model": None}, {"evaluations": 11}, {"score_model": "gp"}):
        with pytest.raises(CheckpointError, match="belongs to another search"):
            guided(out=tmp_path, resume=True, **other)


def test_networks_that_diverge_are_not_chosen(monkeypatch):
    first = small_graph().group_names[0]
    original = Evaluator.__call__

    def call(self, widths):
        return Judgement(math.nan, math.nan, None) if widths[first] < 6 else original(self, widths)

    monkeypatch.setattr(Evaluator, "__call__", call)
    assert guided(budget="0.7x").widths[first] >= 6
    monkeypatch.setattr(Evaluator, "__call__", lambda self, widths: Judgement(math.nan, math.nan, None))
    with pytest.raises(ModelError, match="has a finite loss"):
        guided()


def test_by_default_a_model_guides_searchers_that_compare(judged):
    result = search(build(), LOADER, "0.5x", "random", loss=F.cross_entropy, progress=False, n=5)
    assert "prediction" in result.settings
    assert len(judged) <= 6  # as many as asked for, and the chosen one
    assert "prediction" not in guided(searcher="uniform", score_model="auto").settings
    assert "prediction" not in guided(score_model=None).settings


def test_a_whole_space_can_be_judged():
    result = guided(evaluations=5000, budget="1x")
    assert len(result.trials) == build().space.size


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"score_model": "log-liner"}, PluginError, "unknown score model 'log-liner': did you mean log-linear"),
        ({"evaluations": 1}, OptionError, "evaluations=1"),
        ({"calibrate": 4}, OptionError, "needs train_fn"),
        ({"calibrate": 1, "train_fn": accuracy}, OptionError, "calibrate=1"),
        ({"calibrate": 4, "train_fn": accuracy, "score_model": None}, OptionError, "needs a score model"),
        ({"score_model_options": {"x": 1}}, OptionError, "'log-linear' has no option 'x'; its options are"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_judged(options, error, message, judged):
    with pytest.raises(error, match=message):
        guided(**options)
    assert judged == []


def test_observations_check_their_shapes():
    with pytest.raises(WidthsError, match="observations"):
        Observations(np.zeros((3, 2)), np.zeros(2))
    assert {"log-linear", "gp"} <= set(SCORE_MODELS.names())


# --- Channel-Bench-Macro ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "narrow"), [("MobileNet", 14_285_312), ("ResNet", None)])
def test_the_networks_of_channel_bench_have_their_widths(name, narrow):
    """The README's table of maximal widths, and the smallest network's multiply-adds by hand."""
    widest = {"MobileNet": [128, 768, 768, 768, 256, 1536, 1024], "ResNet": [256, 256, 256, 512, 512, 512, 512]}
    space = uniform_space(trace(channel_bench.NETWORKS[name](), (1, 3, 32, 32)), 4)
    assert [g.widest for g in space.groups] == widest[name]
    assert all(g.options == tuple(g.widest * i // 4 for i in (1, 2, 3, 4)) for g in space.groups)
    if narrow:
        assert space.graph.macs(space.smallest) == narrow


def test_damaged_tables_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        channel_bench.load(tmp_path)
    with pytest.raises(DataError, match="unknown space"):
        channel_bench.load(tmp_path, "VGG")
    file = tmp_path / "Results_MobileNet.json"
    for table in ({}, {"1111111": {"acc": [1, 2, 3], "flops": 1}}, {"1111111": {}}, {"111": {"acc": [], "flops": 1}}):
        file.write_text(json.dumps(table))
        with pytest.raises(DataError):
            channel_bench.load(tmp_path)


def data():
    folder = DATA / "channel-bench-macro"
    if not (folder / "Results_MobileNet.json").exists():
        pytest.skip(f"Channel-Bench-Macro is not in {folder}; WIDTHKIT_DATA names the folder of data sets")
    return folder


@pytest.mark.data
def test_smoothed_scores_rank_real_networks_better_than_raw_ones():
    folder = data()
    bench = channel_bench.load(folder)
    table = Benchmark(bench, seeds=1)
    for name, bar in (("autoslim_3", 0.77), ("bcnet_3", 0.70)):
        values = bench.scores(folder / f"published_scores_{name}.json")
        everything = int(np.isfinite(values).sum())
        raw = table.row(name, values, everything, "none", "raw scores")
        assert raw.tau == pytest.approx(kendalltau(values, table.truth, nan_policy="omit").statistic, abs=1e-3)
        assert table.row(name, values, everything, "none", "log-linear").tau >= bar > raw.tau


@pytest.mark.data
def test_the_denoised_truth_loses_nothing_but_noise():
    bench = channel_bench.load(data())
    noise = np.sqrt(bench.accuracy.var(1, ddof=1).mean() / 3)
    assert (bench.accuracy.mean(1) - denoised(bench)).std() < 1.05 * noise
