"""Guided search: designs, decisions, calibration, resuming."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch.nn.functional as F
from runs import Runs, let_diverge
from torch import nn
from widthkit_plugins.searchers.guided.acquisition import acquisition_batch, ask_model, climb, expected_improvement
from widthkit_plugins.searchers.guided.design import candidates, d_optimal, design_columns
from widthkit_plugins.strategies.bc import BilaterallyCoupled

from widthkit.budget import parse_budget
from widthkit.errors import CheckpointError, ModelError, OptionError, PluginError, WidthsError
from widthkit.graph.space import uniform_space
from widthkit.search import SEARCHERS, SearchResult, search
from widthkit.search.score_model import SCORE_MODELS, Observations, Prediction, ScoreModel
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.trace import trace

LOADER = [small_batch(seed) for seed in range(2)]


def build(k=4):
    return make_supernet(small_net(), BilaterallyCoupled(), graph=small_graph(), k=k)


def guided(net=None, budget="0.5x", **options):
    settings = {"evaluations": 12, "progress": False, "loss": F.cross_entropy}
    return search(net or build(), LOADER, budget, "guided", **{**settings, **options})


def accuracy(widths):
    """A stand-alone accuracy that is linear in the log widths."""
    full = small_graph().full
    return 0.9 + sum((i + 1) * math.log(w / full[n]) for i, (n, w) in enumerate(widths.items())) / 30


# --- designs ----------------------------------------------------------------------------------------------------------


def determinant(columns):
    return np.linalg.slogdet(columns.T @ columns)[1]


def test_a_design_is_as_good_as_brute_force():
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
    batch = acquisition_batch(model, space, pool[order[3:]], pool[order[:3]], 4, np.random.default_rng(0))
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


@pytest.mark.parametrize("model", [None, "log-linear"])
@pytest.mark.parametrize("proposals", ["greedy", "random", "evolution", "uniform"])
def test_a_guided_search_judges_what_it_may_and_stays_inside_the_budget(proposals, model):
    net = build()
    runs = Runs(net)
    result = guided(net, proposals=proposals, model=model)
    budget = parse_budget("0.5x", net.graph)
    assert budget.fits(net.graph, result.widths)
    assert len(runs.networks) == len(result.trials) <= 13
    assert len({json.dumps(w) for w in runs.networks}) == len(runs.networks)
    assert all(budget.fits(net.graph, t.widths) for t in result.trials)
    assert result.widths in [t.widths for t in result.trials]
    assert math.isfinite(result.settings["prediction"]["mean"])
    assert result.settings["options"]["model"] == model


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
def test_an_interrupted_guided_search_goes_on_to_the_same_bytes(stop, tmp_path):
    """Counted over trainings and judgements together; nothing is done twice."""
    net, trained = build(), []
    runs = Runs(net)

    def done():
        return len(trained) + len(runs.networks)

    def until(limit):
        def train(widths):
            if done() == limit:
                raise KeyboardInterrupt
            trained.append(json.dumps(widths))
            return accuracy(widths)

        return train

    def watch(trial, progress):
        if done() >= stop:
            raise KeyboardInterrupt

    guided(net, out=tmp_path / "whole", calibrate=4, train_fn=until(math.inf))
    total = done()
    trained.clear(), runs.clear()
    with pytest.raises(KeyboardInterrupt):
        guided(net, out=tmp_path / "cut", calibrate=4, train_fn=until(stop), progress=watch)
    assert stop <= done() <= stop + 1
    guided(net, out=tmp_path / "cut", calibrate=4, train_fn=until(math.inf), resume=True)
    for name in ("search.json", "search-journal.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert done() == total


def test_a_journal_knows_its_options(tmp_path):
    guided(out=tmp_path)
    for other in ({"evaluations": 11}, {"model_options": {"interactions": False}}, {"proposals": "random"}):
        with pytest.raises(CheckpointError, match="belongs to another search"):
            guided(out=tmp_path, resume=True, **other)


def test_networks_that_diverge_are_not_chosen():
    first = small_graph().group_names[0]
    assert guided(let_diverge(build(), lambda widths: widths[first] < 6), "0.7x").widths[first] >= 6
    with pytest.raises(ModelError, match="has a finite loss"):
        guided(let_diverge(build(), lambda widths: True))


def test_where_the_first_design_diverges_the_rest_of_the_evaluations_decide():
    """Only one network of the space is finite, so that no model could be fitted after most rounds."""
    net = build()
    one = [w for w in _inside(net, "0.5x") if w["top.0"] == 3][-1]
    result = guided(let_diverge(net, lambda widths: widths != one), evaluations=100)
    assert result.widths == one


def _inside(net, text):
    budget = parse_budget(text, net.graph)
    pool = candidates(net.space, budget, np.random.default_rng(0), 10_000)
    return [dict(zip(net.space.names, w, strict=True)) for w in pool.tolist()]


def test_by_default_it_judges_as_many_as_the_proposing_searcher_would():
    net = build()
    runs = Runs(net)
    result = search(
        net, LOADER, "0.5x", loss=F.cross_entropy, progress=False, proposals="random", proposals_options={"n": 5}
    )
    assert "prediction" in result.settings
    assert len(runs.networks) <= 6  # as many as asked for, and the chosen one


def test_importance_and_history_reach_the_proposing_searcher():
    """What the search offers to searchers, it offers to this one too."""
    net = build()
    calls = []

    def mine(criterion):
        calls.append(criterion)
        return {name: np.ones(width) for name, width in net.graph.full.items()}

    guided(net, proposals="importance", proposals_options={"criterion": "lamp"}, unit_scores=mine)
    assert set(calls) == {"lamp"}


def test_a_whole_space_can_be_judged():
    result = guided(evaluations=5000, budget="1x")
    assert len(result.trials) == build().space.size


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "log-liner"}, PluginError, "unknown score model 'log-liner': did you mean log-linear"),
        ({"proposals": "gredy"}, PluginError, "unknown searcher 'gredy': did you mean greedy"),
        ({"proposals": "guided"}, OptionError, "a guided search cannot guide itself"),
        ({"evaluations": 1}, OptionError, "evaluations=1"),
        ({"calibrate": 4}, OptionError, "'guided' wants 4 networks trained on their own; pass train_fn"),
        ({"calibrate": 1, "train_fn": accuracy}, OptionError, "calibrate=1"),
        ({"calibrate": -2, "train_fn": accuracy}, OptionError, "calibrate=-2"),
        ({"model_options": {"x": 1}}, OptionError, "'log-linear' has no option 'x'; its options are"),
        ({"proposals_options": {"x": 1}}, OptionError, "'greedy' has no option 'x'; it has none"),
        ({"score_model": "log-linear"}, OptionError, "'guided' has no option 'score_model'; its options are: model,"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_judged(options, error, message):
    net = build()
    runs = Runs(net)
    with pytest.raises(error, match=message):
        guided(net, **options)
    assert runs.widths == []


def test_observations_check_their_shapes():
    with pytest.raises(WidthsError, match="observations"):
        Observations(np.zeros((3, 2)), np.zeros(2))
    assert SCORE_MODELS.default in SCORE_MODELS.names()
