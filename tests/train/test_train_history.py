import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from widthkit_plugins.strategies.bc import BilaterallyCoupled

import widthkit as wk
from widthkit.errors import CheckpointError, PluginError
from widthkit.supernet import make_supernet
from widthkit.supernet.strategy import STRATEGIES
from widthkit.testing import make_step, small_batch, small_graph, small_net
from widthkit.train.history import WidthHistory

BATCHES = [small_batch(i) for i in range(12)]


def build(strategy="bc", **options):
    return make_supernet(small_net(), strategy, graph=small_graph(), k=4, **options)


def train(net, epochs=2, **options):
    return wk.train(net, BATCHES, epochs, lr=0.01, device="cpu", progress=False, **options)


def history_of(seen, **options):
    """Record widths of one group, as a strategy does in one epoch."""
    history = WidthHistory(("a",), **options)
    for width, loss in seen:
        history.record({"a": width}, torch.tensor(loss, dtype=torch.float64))
    history.end_epoch()
    return history


def test_the_least_losses_are_kept_in_any_order():
    rng = np.random.default_rng(0)
    seen = [(int(a), float(x)) for a, x in zip(rng.integers(0, 40, 500), rng.uniform(0, 1, 500), strict=True)]
    least = {}
    for width, loss in seen:
        least[width] = min(loss, least.get(width, math.inf))
    expected = sorted(least.items(), key=lambda item: item[1])[:10]
    for order in (seen, seen[::-1], sorted(seen)):
        assert [(w["a"], loss) for w, loss in history_of(order, keep=10).records] == expected


def test_losses_that_are_none_are_left_out():
    assert history_of([(1, loss) for loss in (math.nan, math.inf, -math.inf)]).records == []


@pytest.mark.parametrize("n", [1023, 1024, 5000])
def test_many_records_of_one_epoch_are_all_kept(n):
    assert history_of([(i, float(i)) for i in range(n)], keep=n).records == [({"a": i}, float(i)) for i in range(n)]


def test_a_record_needs_every_group_and_one_loss():
    net = build()
    widths, loss = net.space.largest, torch.tensor(1.0)
    first = net.graph.group_names[0]
    with pytest.raises(PluginError, match=f"group '{first}' is missing"):
        net.record({name: width for name, width in widths.items() if name != first}, loss)
    with pytest.raises(PluginError, match="group 'other'"):
        net.record({**widths, "other": 1}, loss)
    with pytest.raises(PluginError, match="one loss, a scalar tensor"):
        net.record(widths, torch.zeros(2))
    net.width_history.end_epoch()
    assert net.width_history.records == []


def test_a_recorded_loss_is_the_mean_over_both_ends():
    """bc trains a width at both ends with half the loss each; the record holds Eq. 10's mean."""
    net = build(BilaterallyCoupled(complementary=False))
    step = make_step(seed=3)
    widths = net.space.sample(net.rng(make_step(seed=3)))
    images, labels = step.inputs, step.targets
    losses = [float(F.cross_entropy(net.run(path, images), labels).detach()) for path in net.paths(widths)]
    shown = net.train_step(step)
    net.width_history.end_epoch()
    assert net.width_history.records == [(widths, pytest.approx(np.mean(losses), abs=1e-12))]
    assert float(shown) == pytest.approx(np.mean(losses), abs=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_every_strategy_whose_widths_are_searched_records(strategy):
    """Recorded losses are losses on the labels, of widths that the supernet has."""
    net = build(strategy)
    train(net)
    records = net.width_history.records
    losses = [loss for _, loss in records]
    assert losses == sorted(losses)
    assert len({tuple(w.values()) for w, _ in records}) == len(records)
    # Nothing reads the records where training chooses the widths, and some train the whole network only.
    trains_widths = net.chosen() is None and strategy not in ("whole", "sparse")
    assert len(records) > 10 if trains_widths else not records
    for widths, loss in records:
        assert list(widths) == list(net.graph.group_names)
        assert all(1 <= width <= g.widest for width, g in zip(widths.values(), net.space.groups, strict=True))
        assert 0 < loss < 5


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_recording_changes_nothing(strategy):
    """Bit-identical weights without a history."""
    recorded, plain = build(strategy), build(strategy)
    plain.record = lambda widths, loss: None
    train(recorded)
    train(plain)
    assert not plain.width_history.records
    for a, b in zip(recorded.parameters(), plain.parameters(), strict=True):
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
        WidthHistory(("a",)).load_state_dict(state)
