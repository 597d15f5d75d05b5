"""What is exported after a search is what the search judged best, not the first path."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from runs import stop_after

import widthkit as wk
from widthkit.errors import CheckpointError, OptionError
from widthkit.export.joint import JointNet
from widthkit.search import Judging, SearchResult
from widthkit.search.evaluator import Evaluator
from widthkit.testing import small_batch, small_graph, small_net

LOADER = [small_batch(seed) for seed in range(3)]


def build(strategy, seed=0, **options):
    return wk.make_supernet(small_net(seed), strategy, graph=small_graph(), k=4, seed=seed, **options)


def searched(net, progress=False, **options):
    return wk.search(net, LOADER, "0.5x", "greedy", loss=F.cross_entropy, progress=progress, **options)


def losses(net, widths):
    """The loss of every path's exported network on the held-out data, with the statistics of the batch."""
    return [loss_of(wk.export(net, widths, path=path)) for path in range(len(net.paths(widths)))]


def loss_of(network):
    images, labels = (torch.cat(parts) for parts in zip(*LOADER, strict=True))
    with torch.no_grad():
        return float(F.cross_entropy(network.train()(images), labels))


@pytest.mark.parametrize("strategy", ["bc", "bcv2", "locally-free"])
def test_the_exported_network_is_the_path_that_was_judged_best(strategy):
    best = []
    for seed in range(4):
        net = build(strategy, seed)
        result = searched(net)
        by_path = losses(net, result.widths)
        assert loss_of(wk.export(net, result)) == pytest.approx(min(by_path), abs=1e-12)
        assert by_path[result.best.path] == pytest.approx(min(by_path), abs=1e-12)
        # By the result or by its units, and as the supernet's own sub-network.
        assert loss_of(wk.export(net, result.units)) == loss_of(wk.export(net, result))
        assert {name: len(units) for name, units in result.units.items()} == result.widths
        assert {n: u.tolist() for n, u in net.set_widths(result.units).active.items()} == result.units
        # Every trial, not only the one that won.
        for trial in result.trials:
            found = losses(net, trial.widths)
            assert loss_of(wk.export(net, trial)) == pytest.approx(min(found), abs=1e-12)
        best.append(result.best.path)
    assert set(best) != {0}, "or the first path would do"


def test_trials_can_be_trained_jointly_on_their_own_units():
    net = build("bc")
    trials = searched(net).trials
    chosen = [next(t for t in trials if t.path == path) for path in (0, 1)]
    joint = JointNet(net, chosen)
    for units, trial in zip(joint.units, chosen, strict=True):
        expected = net.units(trial.widths, trial.path)
        assert all((units[name] == expected[name]).all() for name in expected)


def test_the_path_survives_files_and_interruptions(tmp_path):
    whole = searched(build("locally-free"))
    with pytest.raises(KeyboardInterrupt):
        searched(build("locally-free"), out=tmp_path, progress=stop_after(5))
    resumed = searched(build("locally-free"), out=tmp_path, resume=True)
    assert resumed.units == whole.units
    assert [t.path for t in resumed.trials] == [t.path for t in whole.trials]
    assert SearchResult.load(tmp_path / "search.json") == resumed


def test_results_and_journals_without_a_path_still_load(tmp_path):
    net = build("bc")
    searched(net, out=tmp_path)
    data = json.loads((tmp_path / "search.json").read_text())
    del data["units"]
    for trial in (*data["trials"], *data["pareto"]):
        del trial["path"]
    (tmp_path / "search.json").write_text(json.dumps(data))
    old = SearchResult.load(tmp_path / "search.json")
    assert (old.units, old.best.path) == ({}, 0)
    assert loss_of(wk.export(net, old)) == losses(net, old.widths)[0]
    data["trials"][0]["path"] = "left"
    (tmp_path / "search.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="path"):
        SearchResult.load(tmp_path / "search.json")

    journal = tmp_path / "search-journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    journal.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "path"}) + "\n" for line in lines))
    again = searched(net, out=tmp_path, resume=True)
    assert again.widths == old.widths
    assert {t.path for t in again.trials} == {0}


def test_a_path_that_is_not_a_number_is_not_the_best():
    net = build("bc")
    widths = net.space.smallest
    site = net.wide_graph.groups[net.space.names[0]].sites[0]
    with torch.no_grad():
        # The first unit belongs to the left end alone.
        net.model.get_parameter(site.tensor)[0] = math.nan
    judge = Evaluator(net, LOADER, F.cross_entropy)
    assert [math.isnan(loss) for loss in losses(net, widths)] == [True, False]
    assert judge(widths).path == 1
    assert judge(net.space.largest).path == 0  # neither is a number


def test_a_result_names_widths_for_any_other_model():
    net = build("bcv2", min_width="0.5x")
    result = searched(net, seed=1)
    fresh = wk.export(small_net(3), result, graph=small_graph())
    plain = wk.export(small_net(3), result.widths, graph=small_graph())
    assert loss_of(fresh) == loss_of(plain)


@pytest.mark.parametrize("strategy", ["bc", "locally-free"])
def test_networks_can_be_ranked_by_accuracy(strategy):
    net = build(strategy)
    result = searched(net, judging=Judging(criterion="accuracy"))
    images, labels = (torch.cat(parts) for parts in zip(*LOADER, strict=True))
    for trial in result.trials:
        networks = [wk.export(net, trial.widths, path=path).train() for path in range(len(net.paths(trial.widths)))]
        with torch.no_grad():
            right = [float((slim(images).argmax(1) == labels).double().mean()) for slim in networks]
        assert trial.score == trial.accuracy == pytest.approx(net.strategy.combine(right))
        assert right[trial.path] == max(right)
    assert any(t.score != -t.loss for t in result.trials)


def test_a_ranking_by_accuracy_needs_class_scores(tmp_path):
    targets = [(images, torch.zeros(len(images), 4, dtype=images.dtype)) for images, _ in LOADER]
    judge = Evaluator(build("bc"), targets, F.mse_loss, Judging(criterion="accuracy"))
    with pytest.raises(OptionError, match="criterion='accuracy': the outputs are no class scores"):
        judge(small_graph().full)
    with pytest.raises(OptionError, match="criterion='top1'"):
        Judging(criterion="top1")
    # A journal of losses is not gone on with by accuracies.
    searched(build("bc"), out=tmp_path)
    with pytest.raises(CheckpointError, match="another search"):
        searched(build("bc"), out=tmp_path, resume=True, judging=Judging(criterion="accuracy"))
