"""A loss that takes the inputs gets those of its batch, wherever a loss is called."""

import copy

import pytest
import torch
import torch.nn.functional as F

import widthkit as wk
from widthkit.search.evaluator import Evaluator
from widthkit.supernet import make_supernet
from widthkit.supernet.ranking import unit_scores
from widthkit.supernet.strategy import STRATEGIES
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.train import evaluate

BATCHES = [small_batch(seed) for seed in range(3)]
IN_TARGETS = [(images, (images, labels)) for images, labels in BATCHES]
"""The same batches for a loss that finds the images in the targets."""


def weighted(outputs, targets, inputs):
    """Samples with large pixels count more."""
    return (F.cross_entropy(outputs, targets, reduction="none") * inputs.square().mean((1, 2, 3))).mean()


def of_targets(outputs, targets):
    images, labels = targets
    return weighted(outputs, labels, images)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def build(strategy):
    return make_supernet(small_net(), strategy, graph=small_graph(), k=4)


def trained(net, batches, loss):
    result = wk.train(net, batches, 2, loss=loss, lr=0.01, device="cpu", progress=False)
    return [entry["loss"] for entry in result.history]


def test_training_a_module():
    ours, truth = small_net(), small_net()
    assert trained(ours, BATCHES, weighted) == trained(truth, IN_TARGETS, of_targets)
    assert same_state(ours, truth)
    other = small_net()
    trained(other, BATCHES, F.cross_entropy)
    assert not same_state(ours, other)


@pytest.mark.parametrize("strategy", sorted(info.name for info in STRATEGIES.infos()))
def test_training_a_supernet(strategy):
    ours, truth = build(strategy), build(strategy)
    assert trained(ours, BATCHES, weighted) == trained(truth, IN_TARGETS, of_targets)
    assert same_state(ours, truth)
    assert ours.width_history.records == truth.width_history.records


def test_evaluating():
    net = small_net()
    ours, truth = evaluate(net, BATCHES, loss=weighted), evaluate(net, IN_TARGETS, loss=of_targets)
    assert ours["loss"] == truth["loss"] != evaluate(net, BATCHES)["loss"]


def test_ranking():
    for criterion in ("taylor", "hessian"):
        ours = unit_scores(small_net(), small_graph(), criterion, data=BATCHES, loss=weighted)
        truth = unit_scores(small_net(), small_graph(), criterion, data=IN_TARGETS, loss=of_targets)
        assert all((ours[name] == truth[name]).all() for name in truth)


@pytest.mark.parametrize("strategy", ["ua", "bc"])
def test_judging_one_by_one_and_together(strategy):
    net = build(strategy)
    vectors = [net.space.largest, *(net.space.narrower(net.space.largest, name) for name in net.space.names)]
    together = Evaluator(net, BATCHES, weighted)
    shared = dict(together.judge_many(vectors))
    assert together.peak_bytes > 0
    alone = Evaluator(net, BATCHES, weighted)
    images, labels = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    truth = Evaluator(net, [(images, (images, labels))], of_targets)
    for place, widths in enumerate(vectors):
        assert shared[place] == alone(widths)
        assert shared[place].loss == truth(widths).loss


def test_searching_with_gradients_of_that_loss():
    """The searcher asks for scores of units, the search judges: both call the loss."""
    seen = []

    def loss(outputs, targets, inputs):
        seen.append(inputs.shape[0] == targets.shape[0] == outputs.shape[0])
        return weighted(outputs, targets, inputs)

    net = copy.deepcopy(build("ua"))
    result = wk.search(net, BATCHES, "0.7x", "importance", loss=loss, criterion="taylor", progress=False)
    assert result.trials
    assert len(seen) > len(BATCHES)
    assert all(seen)
