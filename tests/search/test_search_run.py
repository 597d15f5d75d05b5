"""Searches from end to end on a small supernet: judging, resuming, results."""

import copy
import json
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit.search.progress import SearchBar
from widthkit_plugins.strategies.bc import BilaterallyCoupled
from widthkit_plugins.strategies.ua import UniversallyAligned

from widthkit.errors import BudgetError, CheckpointError, DataError, ModelError, OptionError, PluginError
from widthkit.export.dense import export
from widthkit.search import SEARCHERS, Searcher, SearchResult, Trial, search
from widthkit.search.evaluator import Evaluator, Judgement
from widthkit.search.journal import Journal
from widthkit.search.outcome import describe
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.train import batch_statistics

LOADER = [small_batch(seed) for seed in range(3)]


def build(strategy=None, seed=0, **options):
    return make_supernet(small_net(seed), strategy or BilaterallyCoupled(), graph=small_graph(), k=4, **options)


def quiet(net, budget="0.5x", searcher="greedy", loader=LOADER, **options):
    options.setdefault("progress", False)
    options.setdefault("score_model", None)  # the searcher alone; test_search_score_models.py has the other kind
    return search(net, loader, budget, searcher, loss=options.pop("loss", F.cross_entropy), **options)


@pytest.fixture
def judged(monkeypatch):
    """Every width vector that is really run, in order."""
    seen = []
    original = Evaluator.__call__

    def call(self, widths):
        seen.append(dict(widths))
        return original(self, widths)

    monkeypatch.setattr(Evaluator, "__call__", call)
    return seen


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [UniversallyAligned(), BilaterallyCoupled()])
def test_a_judgement_is_the_loss_of_the_exported_networks_with_batch_statistics(strategy):
    net = build(strategy)
    widths = net.space.sample(np.random.default_rng(1))
    images, labels = (torch.cat(parts) for parts in zip(*LOADER, strict=True))
    losses, hits = [], []
    for path in range(len(net.paths(widths))):
        slim = export(net, widths, path=path).train()  # training mode normalises by the batch
        with torch.no_grad():
            outputs = slim(images)
        losses.append(float(F.cross_entropy(outputs, labels)))
        hits.append(float((outputs.argmax(1) == labels).double().mean()))
    judgement = Evaluator(net, LOADER, F.cross_entropy)(widths)
    assert judgement.loss == pytest.approx(np.mean(losses), abs=1e-12)
    assert judgement.score == pytest.approx(-np.mean(losses), abs=1e-12)
    assert judgement.accuracy == pytest.approx(np.mean(hits), abs=1e-12)


def test_several_batches_count_by_their_examples():
    net = build(UniversallyAligned())
    widths = net.space.smallest
    judge = Evaluator(net, LOADER, F.cross_entropy, batch_size=10)
    assert [n for _, _, n in judge.batches] == [8, 8, 8]
    assert sum(n for _, _, n in Evaluator(net, LOADER, F.cross_entropy, batch_size=7).batches) == 24
    slim = export(net, widths)
    losses = []
    for images, labels in LOADER:
        with torch.no_grad(), batch_statistics(slim):
            losses.append(float(F.cross_entropy(slim(images), labels)))
    assert judge(widths).loss == pytest.approx(np.mean(losses), abs=1e-12)


def test_parts_of_the_data_are_as_equal_as_they_can_be():
    images, labels = torch.zeros(10, 3), torch.zeros(10, dtype=torch.long)
    judge = Evaluator(build(), [(images, labels)], F.cross_entropy, batch_size=4)
    assert [n for _, _, n in judge.batches] == [4, 3, 3]


@pytest.mark.parametrize("training", [True, False])
def test_judging_leaves_the_supernet_bit_identical(training):
    net = build().train(training)
    net.model.top.eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    scattered = {name: list(range(0, width, 2)) for name, width in small_graph().full.items()}
    judge = Evaluator(net, LOADER, F.cross_entropy)
    judge(net.space.smallest)
    judge._judge(net.units(scattered), (), 0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None and not p.is_inference() for p in net.parameters())


def test_judging_is_repeatable_and_needs_no_running_statistics():
    net = build()
    judge = Evaluator(net, LOADER, F.cross_entropy)
    first = judge(net.space.largest)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(1e3)
    assert judge(net.space.largest) == first


def test_outputs_that_are_no_class_scores_have_no_accuracy():
    loader = [(images, torch.zeros(len(images), 4, dtype=torch.float64)) for images, _ in LOADER]
    judgement = Evaluator(build(), loader, F.mse_loss)(small_graph().full)
    assert judgement.accuracy is None
    assert judgement.score == -judgement.loss < 0


def test_batches_of_other_kinds_stay_as_they_come():
    """Keyword inputs, lists of targets, images of two sizes."""
    net = build(UniversallyAligned())
    images, labels = LOADER[0]
    keyword = Evaluator(net, [({"x": images}, {"labels": labels})], lambda o, t: F.cross_entropy(o, t["labels"]))
    assert [n for _, _, n in keyword.batches] == [8]
    plain = Evaluator(net, [LOADER[0]], F.cross_entropy)
    assert keyword(net.space.smallest).loss == pytest.approx(plain(net.space.smallest).loss)
    sizes = Evaluator(net, [LOADER[0], (images[..., :5], labels), LOADER[1]], F.cross_entropy)
    assert sorted(n for _, _, n in sizes.batches) == [8, 16]
    lists = Evaluator(net, [(images, list(labels))], lambda o, t: F.cross_entropy(o, torch.stack(t)))
    assert lists(net.space.smallest).loss == pytest.approx(plain(net.space.smallest).loss)


@pytest.mark.parametrize(
    "loader",
    [[], [torch.zeros(2)], [(torch.zeros(0, 3, 6, 6), torch.zeros(0))], [(torch.zeros(2, 3), torch.zeros(3))]],
    ids=["none", "no pair", "empty", "unequal"],
)
def test_held_out_data_that_is_not(loader):
    with pytest.raises(DataError, match="held-out"):
        Evaluator(build(), loader, F.cross_entropy)


def test_options_of_judging_that_make_no_sense():
    with pytest.raises(OptionError, match="batch_size=0"):
        quiet(build(), batch_size=0)
    with pytest.raises(OptionError, match="device"):
        quiet(build(), device="no-such-device")


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("searcher", ["greedy", "random", "uniform"])
def test_a_search_finds_the_best_of_what_it_judged(searcher, judged):
    net = build()
    result = quiet(net, "0.5x", searcher)
    trials = result.trials
    distinct = {json.dumps(t.widths): t.widths for t in trials}
    # The evaluator chooses the order within a round.
    assert sorted(map(repr, distinct.values())) == sorted(map(repr, judged))
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


def stop_after(n):
    left = [n]

    def watch(trial, progress):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("searcher", ["greedy", "random"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_an_interrupted_search_goes_on_to_the_same_result(searcher, n, tmp_path, judged):
    net = build()
    expected = quiet(net, searcher=searcher, out=tmp_path / "whole")
    total = len(judged)
    judged.clear()
    with pytest.raises(KeyboardInterrupt):
        quiet(net, searcher=searcher, out=tmp_path / "cut", on_trial=stop_after(n))
    assert len(judged) == n
    result = quiet(net, searcher=searcher, out=tmp_path / "cut", resume=True)
    assert result == expected
    assert (tmp_path / "cut" / "search.json").read_bytes() == (tmp_path / "whole" / "search.json").read_bytes()
    # Nothing was judged twice, over both runs together.
    assert len(judged) == total
    assert len({json.dumps(w) for w in judged}) == total


def test_a_search_interrupted_many_times_still_ends(tmp_path, judged):
    net = build()
    expected = quiet(net)
    total = len(judged)
    judged.clear()
    for _ in range(100):
        before = len(judged)
        try:
            result = quiet(net, out=tmp_path, resume=True, on_trial=stop_after(before + 4))
            break
        except KeyboardInterrupt:
            continue
    assert result == expected
    assert len(judged) == total


def test_a_finished_search_is_read_from_its_journal(tmp_path, judged):
    net = build()
    first = quiet(net, out=tmp_path)
    judged.clear()
    assert quiet(net, out=tmp_path, resume=True) == first
    assert judged == []


def test_without_resume_a_search_starts_over(tmp_path, judged):
    net = build()
    quiet(net, out=tmp_path)
    n = len(judged)
    quiet(net, out=tmp_path)
    assert len(judged) == 2 * n
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
        (build, {"batch_size": 8}),
        (build, {"loss": F.nll_loss}),
        (changed_weights, {}),
        (lambda: build(UniversallyAligned()), {}),
        (lambda: build(min_width=3), {}),
    ],
    ids=["budget", "seed", "searcher", "less data", "order", "batch size", "loss", "weights", "strategy", "space"],
)
def test_a_journal_of_another_search_is_refused(net, options, tmp_path):
    quiet(build(), out=tmp_path)
    before = (tmp_path / "search-journal.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="belongs to another search"):
        quiet(net(), out=tmp_path, resume=True, **options)
    assert (tmp_path / "search-journal.jsonl").read_bytes() == before


def test_a_journal_of_the_same_search_is_recognised_in_another_copy(tmp_path, judged):
    quiet(build(), out=tmp_path)
    judged.clear()
    quiet(build(), out=tmp_path, resume=True, progress=True)
    assert judged == []


# --- the journal ------------------------------------------------------------------------------------------------------

ENTRIES = {
    "a": Judgement(-0.1 - 1e-17, 1 / 3, None),
    "b": Judgement(-2.0, 2.0, 0.125),
    "c": Judgement(math.nan, math.nan, 0.0),
    "d": Judgement(-math.inf, math.inf, None),
}


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "new" / "journal.jsonl", "me")
    for key, judgement in ENTRIES.items():
        journal.add(key, judgement)
    return journal.path


def test_a_journal_gives_back_what_it_got_to_the_last_bit(path):
    assert repr(Journal(path, "me").read()) == repr(ENTRIES)


def test_lines_are_appended_and_old_ones_never_touched(path):
    before = path.read_bytes()
    journal = Journal(path, "me")
    journal.read()
    journal.add("e", Judgement(-1.0, 1.0, None))
    assert path.read_bytes().startswith(before)
    assert len(path.read_bytes()) - len(before) < 80
    assert [*Journal(path, "me").read()] == [*ENTRIES, "e"]


def test_a_journal_torn_at_any_byte_keeps_its_whole_lines_and_goes_on(path):
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        journal = Journal(path, "me")
        known = journal.read()
        whole = max(0, data[:cut].count(b"\n") - 1)
        assert repr(known) == repr(dict(list(ENTRIES.items())[:whole]))
        for key in list(ENTRIES)[whole:]:
            journal.add(key, ENTRIES[key])
        assert path.read_bytes() == data


def test_a_torn_line_longer_than_what_follows_leaves_nothing_behind(path):
    path.write_bytes(path.read_bytes() + b'{"widths": "' + b"x" * 500)
    journal = Journal(path, "me")
    assert list(journal.read()) == list(ENTRIES)
    journal.add("e", Judgement(-1.0, 1.0, None))
    assert list(Journal(path, "me").read()) == [*ENTRIES, "e"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], b"{", *lines[2:]],
        lambda lines: [lines[0], b"\x00" * 20, *lines[2:]],
        lambda lines: [lines[0], b"\xff\xfe", *lines[2:]],
        lambda lines: [lines[0], b'{"widths": "a"}', *lines[2:]],
        lambda lines: [lines[0], b"[]", *lines[2:]],
        lambda lines: [lines[0], b'{"widths": "a", "score": "x", "loss": 1, "accuracy": null}', *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [b"[]", *lines[1:]],
        lambda lines: [b"3", *lines[1:]],
    ],
)
def test_a_damaged_journal_is_refused(path, damage):
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(CheckpointError, match=r"journal\.jsonl is damaged .*; delete it to search from the start"):
        Journal(path, "me").read()


def test_a_journal_of_someone_else_is_refused(path):
    with pytest.raises(CheckpointError, match="belongs to another search"):
        Journal(path, "you").read()


def test_a_journal_without_a_path_keeps_nothing():
    journal = Journal(None, "me")
    journal.add("a", ENTRIES["a"])
    assert journal.read() == {}


def test_a_journal_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write"):
        Journal(tmp_path / "file" / "journal.jsonl", "me").add("a", ENTRIES["a"])


# --- what goes wrong --------------------------------------------------------------------------------------------------


def spoil(monkeypatch, bad):
    """Let the networks for which ``bad`` holds diverge."""
    original = Evaluator.__call__

    def call(self, widths):
        return Judgement(math.nan, math.nan, None) if bad(widths) else original(self, widths)

    monkeypatch.setattr(Evaluator, "__call__", call)


@pytest.mark.parametrize("searcher", ["greedy", "random"])
def test_networks_that_diverge_are_not_chosen(searcher, monkeypatch, tmp_path):
    first = small_graph().group_names[0]
    spoil(monkeypatch, lambda widths: widths[first] < 6)
    net = build()
    result = quiet(net, "0.6x", searcher, out=tmp_path)
    assert result.widths[first] >= 6
    assert math.isfinite(result.score)
    loaded = SearchResult.load(tmp_path / "search.json")
    assert repr(loaded) == repr(result)
    assert loaded.pareto == result.pareto
    with pytest.raises(KeyboardInterrupt):
        quiet(net, "0.6x", searcher, out=tmp_path / "cut", on_trial=stop_after(9))
    assert repr(quiet(net, "0.6x", searcher, out=tmp_path / "cut", resume=True)) == repr(result)


def test_a_supernet_that_diverged_everywhere_is_named(monkeypatch):
    spoil(monkeypatch, lambda widths: True)
    with pytest.raises(ModelError, match="has a finite loss"):
        quiet(build())


def test_a_budget_that_nothing_meets_is_refused_before_anything_is_judged(judged):
    with pytest.raises(BudgetError, match="below the narrowest network"):
        quiet(build(min_width="0.9x"), "0.2x")
    assert judged == []


class Stubborn(Searcher):
    """Proposes the widest network three times, with NumPy's ints, and nothing else."""

    def __init__(self, space, budget, rng, **anything):
        super().__init__(space, budget, rng)
        self.told = 0

    def ask(self):
        return [{name: np.int64(width) for name, width in self.space.largest.items()}]

    def tell(self, widths, scores):
        self.told += 1

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    @property
    def done(self):
        return self.told == 3

    @property
    def progress(self):
        return self.told / 3


def test_a_searcher_that_proposes_nothing_inside_the_budget(monkeypatch, judged):
    monkeypatch.setattr(SEARCHERS, "get", lambda name: Stubborn)
    with pytest.raises(BudgetError, match=r"no judged network was inside the budget 0.5x; the searcher proposed 3"):
        quiet(build(), "0.5x", "stubborn", whatever=1)
    assert len(judged) == 1
    assert quiet(build(), "1x", "stubborn").widths == small_graph().full


def test_unknown_searchers_and_options():
    with pytest.raises(PluginError, match="unknown searcher 'gredy': did you mean greedy"):
        quiet(build(), searcher="gredy")
    with pytest.raises(OptionError, match="searcher 'random' has no option 'm'; its options are: n, band"):
        quiet(build(), searcher="random", m=3)
    with pytest.raises(OptionError, match="searcher 'uniform' has no option 'n'; it has none"):
        quiet(build(), searcher="uniform", n=3)
    assert "random" in SEARCHERS.names()


def test_options_reach_the_searcher_and_are_kept():
    result = quiet(build(), "0.9x", searcher="random", n=1, band=0.98)
    assert len(result.trials) == 1
    assert result.settings["options"] == {"n": 1, "band": 0.98}


def test_watchers_see_every_trial_and_rising_progress():
    seen = []
    result = quiet(build(), on_trial=lambda trial, progress: seen.append((trial, progress)))
    assert [trial for trial, _ in seen] == result.trials
    progress = [p for _, p in seen]
    assert progress == sorted(progress)
    assert all(0 <= p <= 1 for p in progress)


@pytest.mark.parametrize(
    "options", [{"score_model": None}, {"score_model": "log-linear", "evaluations": 9}], ids=["plain", "guided"]
)
def test_progress_of_an_evolution_counts_networks_not_generations(options):
    seen = []
    quiet(
        build(),
        searcher="evolution",
        population=4,
        generations=3,
        on_trial=lambda trial, progress: seen.append(progress),
        **options,
    )
    total = 4 * 3 if "evaluations" not in options else 9 + 1
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
