"""What a supernet remembers of its training: the widths with the least loss, whatever the strategy."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from widthkit_plugins.strategies.bc import BilaterallyCoupled

import widthkit as wk
from widthkit.errors import CheckpointError
from widthkit.supernet import make_supernet
from widthkit.supernet.strategy import STRATEGIES
from widthkit.testing import make_step, small_batch, small_graph, small_net
from widthkit.train.history import WidthHistory

BATCHES = [small_batch(i) for i in range(12)]


def build(strategy="bc", **options):
    return make_supernet(small_net(), strategy, graph=small_graph(), k=4, **options)


def train(net, epochs=2, **options):
    return wk.train(net, BATCHES, epochs, lr=0.01, device="cpu", progress=False, **options)


def mean(widths, losses):
    return sum(losses) / len(losses)


def test_the_least_losses_are_kept_in_any_order():
    rng = np.random.default_rng(0)
    seen = [((int(a),), float(x)) for a, x in zip(rng.integers(0, 40, 500), rng.uniform(0, 1, 500), strict=True)]
    least = {}
    for vector, loss in seen:
        least[vector] = min(loss, least.get(vector, math.inf))
    expected = sorted(least.items(), key=lambda item: item[1])[:10]
    for order in (seen, seen[::-1], sorted(seen)):
        history = WidthHistory(("a",), mean, keep=10)
        for vector, loss in order:
            history.add(vector, loss)
        assert [((w["a"],), loss) for w, loss in history.records] == expected


def test_losses_that_are_none_are_left_out():
    history = WidthHistory(("a",), mean)
    for loss in (math.nan, math.inf, -math.inf):
        history.add((1,), loss)
    assert history.records == []


def test_a_recorded_loss_is_the_mean_over_both_ends():
    """bc trains a width at both ends with half the loss each; the record holds Eq. 10's mean."""
    net = build(BilaterallyCoupled(complementary=False))
    step = make_step(seed=3)
    widths = net.space.sample(net.rng(make_step(seed=3)))
    images, labels = step.inputs, step.targets
    losses = [float(F.cross_entropy(net.run(path, images), labels).detach()) for path in net.paths(widths)]
    criterion = step.loss
    shown = net.train_step(step)
    net.width_history.end_epoch()
    assert net.width_history.records == [(widths, pytest.approx(np.mean(losses), abs=1e-12))]
    assert float(shown) == pytest.approx(np.mean(losses), abs=1e-12)
    assert step.loss is criterion


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_every_strategy_is_watched(strategy):
    """Recorded losses are losses on the labels, of widths that the supernet has."""
    net = build(strategy)
    train(net)
    records = net.width_history.records
    losses = [loss for _, loss in records]
    assert losses == sorted(losses)
    assert len({tuple(w.values()) for w, _ in records}) == len(records)
    # A strategy that finds the widths itself trains few of them in so short a time.
    assert len(records) > (10 if net.chosen() is None else 0)
    for widths, loss in records:
        assert list(widths) == list(net.graph.group_names)
        assert all(1 <= width <= g.widest for width, g in zip(widths.values(), net.space.groups, strict=True))
        assert 0 < loss < 5


def test_watching_changes_nothing():
    """Bit-identical weights with a history that is cut off."""
    watched, deaf = build("ua"), build("ua")
    deaf.width_history.ran = lambda units, outputs: None
    train(watched)
    train(deaf)
    assert watched.width_history.records
    assert not deaf.width_history.records
    for a, b in zip(watched.parameters(), deaf.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_training_remembers_the_same(tmp_path):
    whole, cut, again = build(), build(), build()
    train(whole, 3)

    class Stop(Exception):
        pass

    def stop(entry):
        raise Stop

    with pytest.raises(Stop):
        train(cut, 3, out=tmp_path, on_epoch=stop)
    train(again, 3, out=tmp_path, resume=True)
    assert again.width_history.records == whole.width_history.records
    loaded = build()
    train(loaded, 3, out=tmp_path, resume=True)
    assert loaded.width_history.records == whole.width_history.records


def test_an_epoch_that_diverges_leaves_no_trace():
    net = build()
    train(net)
    before = net.width_history.records
    images, labels = BATCHES[0]
    with pytest.raises(wk.WidthkitError, match="diverged"):
        wk.train(net, [*BATCHES, (images * math.nan, labels)], 1, lr=0.01, device="cpu", progress=False)
    net.width_history.end_epoch()
    assert net.width_history.records == before


def test_state_survives_json_and_belongs_to_one_network():
    net = build()
    train(net)
    state = json.loads(json.dumps(net.width_history.state_dict()))
    other = build()
    other.width_history.load_state_dict(state)
    assert other.width_history.records == net.width_history.records
    with pytest.raises(CheckpointError, match="other channel groups"):
        WidthHistory(("a",), mean).load_state_dict(state)


def test_many_steps_are_read_in_between():
    """Losses are read in batches, also within an epoch; nothing is lost."""
    net = build(BilaterallyCoupled(complementary=False))
    for seed in range(1100):
        with net.width_history.watch(step := make_step(batch=(torch.zeros(1), torch.zeros(1)))):
            outputs = torch.tensor([[float(seed), 0.0]])
            net.width_history.ran({name: range(1 + seed % 3) for name in net.graph.group_names}, outputs)
            step.loss(outputs, torch.tensor([0]))
    assert len(net.width_history._pending) < 1024
    net.width_history.end_epoch()
    assert len(net.width_history.records) == 3
