"""Runs that diverge: they stop at that step, put the module back, and store the step."""

import copy
import math
import os
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import widthkit as wk
from widthkit.errors import OptionError
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.train import train
from widthkit.train.checkpoint import load_tree
from widthkit.train.finite import Watch

QUIET = {"device": "cpu", "progress": False}


def line_net():
    torch.manual_seed(1)
    return nn.Linear(3, 2).double()


def batches(count=4, size=5):
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randn(size, n, dtype=torch.float64, generator=generator)  # noqa: E731
    return [(draw(3), draw(2)) for _ in range(count)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(loader, epochs=3, loss=mse_loss, net=None, **options):
    """Train until it diverges; return the network, its states after every epoch, and the message."""
    net, states = net or line_net(), []
    states.append(copy.deepcopy(net.state_dict()))
    with pytest.raises(OptionError, match="diverged") as caught:
        train(
            net,
            loader,
            epochs,
            loss=loss,
            on_epoch=lambda _: states.append(copy.deepcopy(net.state_dict())),
            **{"lr": 0.1, **options},
            **QUIET,
        )
    assert "\n" not in str(caught.value)
    return net, states, str(caught.value)


def spoil(calls):
    """A loss that is NaN in one call."""
    count = iter(range(10**9))
    return lambda outputs, targets: mse_loss(outputs, targets) * (math.nan if next(count) in calls else 1)


def test_the_step_is_stored_with_all_that_is_needed_to_repeat_it(tmp_path):
    """Update 6 is the third one of epoch 2; the weights before it come from the same training without the NaN."""
    data, weights = batches(), []
    net = line_net()
    net.register_forward_pre_hook(lambda *_: weights.append(copy.deepcopy(net.state_dict())))
    train(net, data, 3, loss=mse_loss, lr=0.1, seed=7, **QUIET)
    net, states, message = run(data, loss=spoil({6}), seed=7, out=tmp_path)
    file = tmp_path / "not-finite-6.safetensors"
    assert "in epoch 2, after 6 updates" in message
    assert f"the loss is nan. The model is as the last epoch left it; {file} has its batch; lower lr" in message
    stored = load_tree(file)
    names = ["what", "inputs", "targets", "update", "epoch", "batch", "process", "seed", "widths", "weights"]
    assert list(stored) == [*names, "weights_before_update"]
    assert [stored[name] for name in names[3:9]] == [6, 1, 2, 0, 7, []]
    assert torch.equal(stored["inputs"], data[2][0])
    assert torch.equal(stored["targets"], data[2][1])
    assert stored["weights_before_update"] == 6
    assert same(stored["weights"], weights[6])
    assert same(net.state_dict(), states[1])
    assert len(states) == 2


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    calls = iter(range(100))

    def loss(outputs, targets):
        value = mse_loss(outputs, targets)
        # The value is finite, its gradient is not.
        return value + (value * 0).sqrt() if next(calls) == 5 else value

    for clip_grad in (None, 5.0):
        calls = iter(range(100))
        _, _, message = run(batches(), loss=loss, clip_grad=clip_grad, out=tmp_path)
        assert "after 5 updates of the run: the norm of the gradient is not finite" in message
        stored = load_tree(tmp_path / "not-finite-5.safetensors")
        assert stored["weights_before_update"] == 5
        assert all(tensor.isfinite().all() for tensor in stored["weights"].values())
        outputs = functional_call(line_net(), stored["weights"], (stored["inputs"],))
        assert mse_loss(outputs, stored["targets"]).isfinite()


def test_the_batch_of_a_group_that_was_not_finite_is_the_one_stored(tmp_path):
    data = batches()
    _, _, message = run(data, loss=spoil({2}), accumulate=4, out=tmp_path)
    assert "after 0 updates" in message
    stored = load_tree(tmp_path / "not-finite-0.safetensors")
    assert torch.equal(stored["inputs"], data[2][0])
    assert stored["batch"] == 2


def test_an_update_that_overflows_is_noticed_at_the_end_of_its_epoch(tmp_path):
    options = {"optimizer": "momentum", "momentum": 0.0, "weight_decay": 0.0, "clip_grad": None, "lr": 1e308}
    net, states, message = run(batches(1), loss=lambda outputs, targets: 1e3 * outputs.sum(), out=tmp_path, **options)
    assert "a weight is not finite" in message
    stored = load_tree(tmp_path / "not-finite-0.safetensors")
    assert stored["weights_before_update"] == 0
    assert same(stored["weights"], states[0])
    assert same(net.state_dict(), states[0])


@pytest.mark.parametrize("strategy", ["ua", "bc", "dbc"])
def test_the_widths_of_the_step_are_stored_and_its_records_forgotten(tmp_path, strategy):
    data = [small_batch(i) for i in range(4)]
    nets, seen = [wk.make_supernet(small_net(), strategy, graph=small_graph(), k=4) for _ in range(2)], []
    record = nets[0].record
    nets[0].record = lambda widths, loss: (seen.append((nets[0].steps, dict(widths))), record(widths, loss))
    step_of = nets[0].train_step

    def count(step):
        nets[0].steps = step.index
        return step_of(step)

    nets[0].train_step = count
    train(nets[0], data, 1, lr=0.01, **QUIET)
    images, labels = data[2]
    run([*data[:2], (images * math.nan, labels), data[3]], loss=None, net=nets[1], lr=0.01, out=tmp_path)
    stored = load_tree(tmp_path / "not-finite-2.safetensors")
    assert stored["widths"] == [widths for index, widths in seen if index == 2]
    assert bool(stored["widths"]) == (strategy != "dbc")
    assert stored["inputs"].isnan().all()
    assert nets[1].width_history.records == []


def test_after_a_resume_within_an_epoch_the_module_is_as_the_checkpoint_left_it(tmp_path):
    class Stop(Exception):
        pass

    def stop(outputs, targets, calls=iter(range(100))):  # noqa: B008
        if next(calls) == 6:
            raise Stop
        return mse_loss(outputs, targets)

    def loss(outputs, targets, calls=iter(range(100))):  # noqa: B008
        return mse_loss(outputs, targets) * (math.nan if next(calls) == 1 else 1)

    stop.__qualname__ = loss.__qualname__ = "loss"
    with pytest.raises(Stop):
        train(line_net(), batches(), 3, loss=stop, lr=0.1, checkpoint_minutes=1e-9, out=tmp_path, **QUIET)
    before = load_tree(tmp_path / "checkpoint.safetensors")["state"]["model"]
    net, _, message = run(batches(), loss=loss, out=tmp_path, resume=True)
    assert "after 7 updates" in message
    assert "The model is as the last checkpoint left it" in message
    assert same(net.state_dict(), before)


def test_what_cannot_be_stored_is_said_and_hides_nothing(tmp_path):
    data = batches(1)
    _, _, message = run(
        [((data[0][0]), {"a": data[0][1], "b": {1}})], loss=lambda o, t: o.sum() * math.nan, out=tmp_path
    )
    assert "not-finite-0.safetensors could not be written" in message
    assert "cannot hold a set" in message
    assert os.listdir(tmp_path) == []


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, message = run(batches(), loss=spoil({1}))
    assert "not-finite" not in message
    assert os.listdir(tmp_path) == []


def test_cross_entropy_of_infinite_logits_is_noticed():
    net = nn.Linear(2, 2)
    x = torch.tensor([[math.inf, 0.0]])
    run([(x, torch.tensor([0]))], loss=F.cross_entropy, net=net)


# --- accelerators, which are looked at now and then -------------------------------------------------------------------


@pytest.fixture
def seldom(monkeypatch):
    """Look as seldom as on an accelerator, on the CPU."""
    # Not by its path in a string: ``widthkit.train`` is also the name of a function.
    monkeypatch.setattr(import_module("widthkit.train.loop"), "Watch", lambda device: Watch(torch.device("cuda")))


@pytest.mark.parametrize(("bad", "noticed"), [(26, 40), (40, 45)])
def test_where_looking_is_costly_the_batch_is_read_again(tmp_path, seldom, bad, noticed):
    """Epochs have 45 batches; looks follow 20, 40 and 45."""
    data, calls = batches(45), []

    def loss(outputs, targets):
        calls.append(1)
        return mse_loss(outputs, targets) * (math.nan if len(calls) == 45 + bad + 1 else 1)

    net, states, message = run(data, loss=loss, out=tmp_path)
    assert len(calls) == 45 + noticed
    assert f"in epoch 2, after {45 + bad} updates of the run: the loss is nan" in message
    stored = load_tree(tmp_path / f"not-finite-{45 + bad}.safetensors")
    assert torch.equal(stored["inputs"], data[bad][0])
    assert torch.equal(stored["targets"], data[bad][1])
    assert [stored[name] for name in ("update", "batch", "weights_before_update")] == [45 + bad, bad, 45]
    assert same(stored["weights"], states[1])
    assert same(net.state_dict(), states[1])


def test_a_loader_that_cannot_be_read_again_leaves_the_rest(tmp_path, seldom):
    _, _, message = run(iter(batches(45)), epochs=1, loss=spoil({3}), out=tmp_path)
    assert "after 3 updates" in message
    stored = load_tree(tmp_path / "not-finite-3.safetensors")
    assert stored["inputs"] is stored["targets"] is None
    assert stored["batch"] == 3
