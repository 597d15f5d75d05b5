"""Searches from end to end on a small supernet: results, resuming, refusals."""

import copy
import inspect
import json
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import Runs, let_diverge, stop_after
from widthkit_plugins.strategies.bc import BilaterallyCoupled
from widthkit_plugins.strategies.ua import UniversallyAligned

import widthkit as wk
from widthkit.errors import BudgetError, CheckpointError, ModelError, OptionError, PluginError
from widthkit.export.dense import export
from widthkit.search import SEARCHERS, Judging, Searcher, SearchResult, Trial, search
from widthkit.search.outcome import describe
from widthkit.search.progress_bar import SearchBar
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net

LOADER = [small_batch(seed) for seed in range(3)]


def build(strategy=None, seed=0, **options):
    return make_supernet(small_net(seed), strategy or BilaterallyCoupled(), graph=small_graph(), k=4, **options)


def quiet(net, budget="0.5x", searcher="greedy", loader=LOADER, **options):
    options.setdefault("progress", False)
    return search(net, loader, budget, searcher, loss=options.pop("loss", F.cross_entropy), **options)


def test_a_search_has_at_most_twelve_parameters():
    assert len(inspect.signature(wk.search).parameters) <= 12


def test_the_default_searcher_is_the_one_that_the_plugins_mark():
    result = search(build(), LOADER, "0.5x", progress=False)
    assert result.searcher == SEARCHERS.default
    assert result == quiet(build(), searcher=SEARCHERS.default, loss=None)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("searcher", ["greedy", "random", "uniform"])
def test_a_search_finds_the_best_of_what_it_judged(searcher):
    net = build()
    runs = Runs(net)
    result = quiet(net, "0.5x", searcher)
    trials = result.trials
    distinct = {json.dumps(t.widths): t.widths for t in trials}
    # The evaluator chooses the order within a round.
    assert sorted(map(repr, distinct.values())) == sorted(map(repr, runs.networks))
    inside = [t for t in trials if 0.97 * 0.5 * net.graph.macs() < t.macs <= net.graph.macs() // 2]
    assert (result.widths, result.score) == (lambda t: (t.widths, t.score))(max(inside, key=lambda t: t.score))
    assert all((t.macs, t.params) == (net.graph.macs(t.widths), net.graph.params(t.widths)) for t in trials)
    assert result.full == {"widths": small_graph().full, "macs": small_graph().macs(), "params": small_graph().params()}
    assert (result.budget, result.searcher, result.seed) == ("0.5x", searcher, 0)
    assert result.settings["space_size"] == str(net.space.size)
    slim = export(net, result.widths)
    assert sum(p.numel() for p in slim.parameters()) == result.params
    assert f"{len(trials)} networks judged" in describe(result)


def test_the_full_network_is_the_result_where_it_fits():
    net = build()
    result = quiet(net, "1x")
    assert result.widths == small_graph().full
    assert len(result.trials) == 1


def test_several_bounds_all_hold():
    result = quiet(build(), ["0.6x", "350params"])
    assert result.macs <= 0.6 * small_graph().macs()
    assert result.params <= 350
    assert result.budget == "0.6x and 350params"


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    scores = [*rng.integers(0, 12, 60).astype(float), math.nan, -math.inf, math.inf]
    trials = [Trial({"a": i}, s, -s, None, int(rng.integers(1, 40)), 1) for i, s in enumerate(scores)]
    result = SearchResult({}, 0.0, None, 1, 1, "1x", "greedy", 0, {"macs": 1}, trials)
    finite = [t for t in trials if math.isfinite(t.score)]

    def beaten(t):
        return any((u.macs <= t.macs and u.score > t.score) or (u.macs < t.macs and u.score >= t.score) for u in finite)

    expected = sorted({(t.macs, t.score) for t in finite if not beaten(t)})
    assert [(t.macs, t.score) for t in result.pareto] == expected
    assert len(expected) > 3


def test_results_survive_a_file(tmp_path):
    net = build()
    result = quiet(net, out=tmp_path / "deep" / "run")
    path = tmp_path / "deep" / "run" / "search.json"
    assert SearchResult.load(path) == result
    assert [t["macs"] for t in json.loads(path.read_text())["pareto"]] == [t.macs for t in result.pareto]
    again = copy.deepcopy(result)
    again.trials.append(Trial({"a": 1}, math.nan, math.nan, None, 1, 1))
    again.save(path)
    loaded = SearchResult.load(path)
    assert math.isnan(loaded.trials[-1].score)
    assert loaded.pareto == result.pareto


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"format": 1}', '{"format": 99}', '{"format": 1, "trials": [{}]}', "\x00"]
)
def test_files_that_are_no_results(tmp_path, text):
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"search\.json"):
        SearchResult.load(path)
    with pytest.raises(CheckpointError, match="not a search result"):
        SearchResult.load(tmp_path / "missing.json")


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("searcher", ["greedy", "random", "guided"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_an_interrupted_search_goes_on_to_the_same_result(searcher, n, tmp_path):
    net = build()
    runs = Runs(net)
    expected = quiet(net, searcher=searcher, out=tmp_path / "whole")
    total = len(runs.networks)
    runs.clear()
    with pytest.raises(KeyboardInterrupt):
        quiet(net, searcher=searcher, out=tmp_path / "cut", progress=stop_after(n))
    assert len(runs.networks) == n
    result = quiet(net, searcher=searcher, out=tmp_path / "cut", resume=True)
    assert result == expected
    for name in ("search.json", "search-journal.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Nothing was judged twice, over both runs together.
    assert len(runs.networks) == total
    assert len({json.dumps(w) for w in runs.networks}) == total


@pytest.mark.parametrize("searcher", ["greedy", "guided"])
def test_a_search_interrupted_many_times_still_ends(searcher, tmp_path):
    net = build()
    runs = Runs(net)
    expected = quiet(net, searcher=searcher)
    total = len(runs.networks)
    runs.clear()
    for _ in range(100):
        before = len(runs.networks)
        try:
            result = quiet(net, searcher=searcher, out=tmp_path, resume=True, progress=stop_after(before + 4))
            break
        except KeyboardInterrupt:
            continue
    assert result == expected
    assert len(runs.networks) == total


def test_a_finished_search_is_read_from_its_journal(tmp_path):
    net = build()
    first = quiet(net, out=tmp_path)
    runs = Runs(net)
    assert quiet(net, out=tmp_path, resume=True) == first
    assert runs.widths == []


def test_without_resume_a_search_starts_over(tmp_path):
    net = build()
    runs = Runs(net)
    quiet(net, out=tmp_path)
    n = len(runs.networks)
    quiet(net, out=tmp_path)
    assert len(runs.networks) == 2 * n
    assert len((tmp_path / "search-journal.jsonl").read_text().splitlines()) == n + 1


def changed_weights():
    net = build()
    with torch.no_grad():
        net.model.head.weight[[0, 1]] = net.model.head.weight[[1, 0]]  # the sum stays
    return net


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (build, {"budget": "0.4x"}),
        (build, {"seed": 1}),
        (build, {"searcher": "random"}),
        (build, {"loader": LOADER[:2]}),
        (build, {"loader": LOADER[::-1]}),
        (build, {"judging": Judging(batch_size=8)}),
        (build, {"judging": Judging(training=True)}),
        (build, {"loss": F.nll_loss}),
        (changed_weights, {}),
        (lambda: build(UniversallyAligned()), {}),
        (lambda: build(min_width=3), {}),
    ],
    ids=[
        "budget",
        "seed",
        "searcher",
        "less data",
        "order",
        "batch size",
        "mode",
        "loss",
        "weights",
        "strategy",
        "space",
    ],
)
def test_a_journal_of_another_search_is_refused(net, options, tmp_path):
    quiet(build(), out=tmp_path)
    before = (tmp_path / "search-journal.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="belongs to another search"):
        quiet(net(), out=tmp_path, resume=True, **options)
    assert (tmp_path / "search-journal.jsonl").read_bytes() == before


def test_a_journal_of_the_same_search_is_recognised_in_another_copy(tmp_path):
    """Memory and progress change no result."""
    quiet(build(), out=tmp_path)
    net = build()
    runs = Runs(net)
    quiet(net, out=tmp_path, resume=True, progress=True, judging=Judging(memory="1MB"))
    assert runs.widths == []


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("searcher", ["greedy", "random", "guided"])
def test_networks_that_diverge_are_not_chosen(searcher, tmp_path):
    first = small_graph().group_names[0]
    net = let_diverge(build(), lambda widths: widths[first] < 6)
    result = quiet(net, "0.6x", searcher, out=tmp_path)
    assert result.widths[first] >= 6
    assert math.isfinite(result.score)
    assert any(math.isnan(trial.score) for trial in result.trials)
    assert "of them without a finite loss" in describe(result)
    loaded = SearchResult.load(tmp_path / "search.json")
    assert repr(loaded) == repr(result)
    assert loaded.pareto == result.pareto
    with pytest.raises(KeyboardInterrupt):
        quiet(net, "0.6x", searcher, out=tmp_path / "cut", progress=stop_after(len(result.trials) - 1))
    assert repr(quiet(net, "0.6x", searcher, out=tmp_path / "cut", resume=True)) == repr(result)


@pytest.mark.parametrize("searcher", ["greedy", "random", "guided"])
def test_a_supernet_that_diverged_everywhere_is_named(searcher):
    with pytest.raises(ModelError, match="has a finite loss"):
        quiet(let_diverge(build(), lambda widths: True), searcher=searcher)


def test_a_budget_that_nothing_meets_is_refused_before_anything_is_judged():
    net = build(min_width="0.9x")
    runs = Runs(net)
    with pytest.raises(BudgetError, match="below the narrowest network"):
        quiet(net, "0.2x")
    assert runs.widths == []


def test_what_is_no_supernet_is_refused():
    with pytest.raises(OptionError, match="SmallNet is no supernet"):
        quiet(small_net())


class Stubborn(Searcher):
    """Proposes the widest network three times, with NumPy's ints, and nothing else."""

    def __init__(self, space, budget, rng, **anything):
        super().__init__(space, budget, rng)
        self.told = 0

    def ask(self):
        return [{name: np.int64(width) for name, width in self.space.largest.items()}]

    def tell(self, widths, scores):
        self.told += 1

    @property
    def done(self):
        return self.told == 3

    @property
    def progress(self):
        return self.told / 3


def test_a_searcher_that_proposes_nothing_inside_the_budget(add_searcher):
    add_searcher("stubborn", Stubborn)
    net = build()
    runs = Runs(net)
    with pytest.raises(BudgetError, match=r"no judged network was inside the budget 0.5x; the searcher proposed 3"):
        quiet(net, "0.5x", "stubborn", whatever=1)
    assert len(runs.networks) == 1
    assert quiet(net, "1x", "stubborn").widths == small_graph().full


def test_unknown_searchers_and_options():
    with pytest.raises(PluginError, match="unknown searcher 'gredy': did you mean greedy"):
        quiet(build(), searcher="gredy")
    with pytest.raises(OptionError, match="searcher 'random' has no option 'm'; its options are: n, near_budget"):
        quiet(build(), searcher="random", m=3)
    with pytest.raises(OptionError, match="searcher 'uniform' has no option 'n'; it has none"):
        quiet(build(), searcher="uniform", n=3)
    assert "random" in SEARCHERS.names()


def test_options_reach_the_searcher_and_are_kept():
    result = quiet(build(), "0.9x", searcher="random", n=1, near_budget=0.98)
    assert len(result.trials) == 1
    assert result.settings["options"] == {"n": 1, "near_budget": 0.98}


def test_watchers_see_every_trial_and_rising_progress():
    seen = []
    result = quiet(build(), progress=lambda trial, progress: seen.append((trial, progress)))
    # Of a round, the evaluator chooses the order.
    assert sorted(repr(trial) for trial, _ in seen) == sorted(map(repr, result.trials))
    progress = [p for _, p in seen]
    assert progress == sorted(progress)
    assert all(0 <= p <= 1 for p in progress)


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"searcher": "evolution", "population": 4, "generations": 3}, 4 * 3),
        ({"searcher": "guided", "evaluations": 9}, 9 + 1),
    ],
    ids=["evolution", "guided"],
)
def test_progress_counts_networks_not_rounds(options, total):
    seen = []
    quiet(build(), progress=lambda trial, progress: seen.append(progress), **options)
    assert seen[:8] == [min(1.0, (i + 1) / total) for i in range(8)]


def test_time_left_is_the_pace_of_timed_networks_and_nothing_before_two(monkeypatch):
    """10 networks in all: three were in the journal, the others take 2 s each after the first."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    bar, trial = SearchBar(), Trial({}, -1.0, 1.0, None, 1, 1)
    told = []
    for i, seconds in enumerate([50.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]):
        now[0] += seconds
        bar(trial, (i + 1) / 10)
        told.append(bar.seconds_left)
    assert told[:4] == [None] * 4
    assert told[4:9] == pytest.approx([10.0, 8.0, 6.0, 4.0, 2.0])
    assert told[9] is None
