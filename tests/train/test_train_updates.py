"""What an update is: decay, accumulated gradients, averages of weights, memory formats, precisions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import mse_loss

import widthkit as wk
from widthkit.errors import OptionError
from widthkit.testing import make_step, small_batch, small_graph, small_net
from widthkit.train import train

QUIET = {"device": "cpu", "progress": False}
PLAIN = {"optimizer": "momentum", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "clip_grad": None}


def images(count=4, size=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator, dtype=dtype),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def conv_net(norm=True, dtype=torch.float64):
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(64, 5)).to(dtype)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, atol=1e-12):
    for name, tensor in a.state_dict().items():
        # Gates are single precision.
        one = max(atol, 1e-6) if tensor.dtype == torch.float32 else atol
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=0, atol=one)


# --- weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay_norms", [False, True])
def test_norms_and_biases_decay_on_request(decay_norms):
    """One step on a loss of zero gradient shrinks what decays by ``lr * decay``."""
    net = conv_net()
    before = copy.deepcopy(net)
    options = {**PLAIN, "weight_decay": 0.1, "lr": 0.5, "decay_norms": decay_norms}
    train(net, images(1), 1, loss=lambda outputs, targets: 0 * outputs.sum(), **options, **QUIET)
    for name, parameter in net.named_parameters():
        old = before.get_parameter(name)
        shrinks = old.ndim > 1 or decay_norms
        torch.testing.assert_close(parameter, old * (0.95 if shrinks else 1.0), rtol=0, atol=1e-12)


# --- accumulated gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_grad", [None, 0.3])
def test_accumulated_gradients_are_those_of_a_larger_batch(clip_grad):
    """Without batch norm; 7 batches make groups of 3, 3 and 1."""
    small, epochs = images(7), 2
    groups = [small[:3], small[3:6], small[6:]]
    large = [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]
    nets = [conv_net(norm=False), conv_net(norm=False)]
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "schedule": "constant", "clip_grad": clip_grad}
    results = [
        train(nets[0], small, epochs, accumulate=3, **options, **QUIET),
        train(nets[1], large, epochs, **options, **QUIET),
    ]
    close(*nets)
    assert not same(nets[0], conv_net(norm=False))
    assert results[0].history[0]["accuracy"] == results[1].history[0]["accuracy"]
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-12)


def test_updates_are_counted_and_the_rate_follows_the_position():
    seen = []

    class Meter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def train_step(self, step):
            seen.append((step.index, step.epoch, self.weight.item(), torch.rand((), generator=step.generator).item()))
            step.backward(self.weight.clone())
            return self.weight.detach()

    net = Meter()
    train(
        net, [(torch.zeros(1), torch.zeros(1))] * 5, 2, accumulate=2, **{**PLAIN, "schedule": "linear"}, lr=1.0, **QUIET
    )
    assert [step[:2] for step in seen] == [(i, 0) for i in (0, 0, 1, 1, 2)] + [(i, 1) for i in (3, 3, 4, 4, 5)]
    # Updates are before the batches 0, 2, 4 of 10, and 5, 7, 9; the mean gradient is always 1.
    rates = [1 - position / 10 for position in (0, 2, 4, 5, 7, 9)]
    levels = [-sum(rates[: step[0]]) for step in seen]
    assert [step[2] for step in seen] == pytest.approx(levels, abs=1e-12)
    assert net.weight.item() == pytest.approx(-sum(rates), abs=1e-12)
    assert len({step[3] for step in seen}) == 10


@pytest.mark.parametrize("strategy", ["ua", "bc", "locally-free", "dbc"])
def test_strategies_accumulate_without_knowing(strategy):
    """Two steps by hand, with the engine's generators, whose gradients are averaged, are one update."""
    batches, nets = [small_batch(i) for i in range(2)], [None, None]
    for i in range(2):
        nets[i] = wk.make_supernet(small_net(), strategy, graph=small_graph(), k=4)
    step_of, states = nets[0].train_step, []

    def listen(step):
        states.append(step.generator.get_state())
        return step_of(step)

    nets[0].train_step = listen
    train(nets[0], batches, 1, accumulate=2, lr=0.05, **PLAIN, **QUIET)
    for index, batch in enumerate(batches):
        step = make_step(batch=batch)
        step.generator.set_state(states[index])
        nets[1].train_step(step)
    with torch.no_grad():
        for parameter in nets[1].parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / 2
    nets[1].end_epoch()
    close(*nets)


# --- the average of the weights ---------------------------------------------------------------------------------------


def trajectory(epochs, **options):
    """Every state after an update."""
    net, steps = conv_net(), []

    def hook(module, inputs):
        if module.training:
            steps.append(copy.deepcopy(net.state_dict()))

    net.register_forward_pre_hook(hook)
    train(net, images(4), epochs, **options, **QUIET)
    return [*steps[1:], copy.deepcopy(net.state_dict())]


def test_the_network_ends_with_the_average_of_parameters_and_buffers():
    options = {"lr": 0.2, "momentum": 0.5}
    average = None
    for state in trajectory(3, **options):
        if average is None:
            average = state
        for name, value in state.items():
            average[name] = 0.8 * average[name] + 0.2 * value if value.is_floating_point() else value
    net = conv_net()
    train(net, images(4), 3, ema=0.8, **options, **QUIET)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=0, atol=1e-12)
    assert net.state_dict()["1.num_batches_tracked"] == 12


def test_an_average_without_memory_is_the_network():
    nets = [conv_net(), conv_net()]
    train(nets[0], images(), 2, **QUIET)
    train(nets[1], images(), 2, ema=0.0, **QUIET)
    assert same(*nets)


def test_the_average_belongs_to_the_end_of_the_run(tmp_path):
    """While it trains, the network has its own weights; a finished run that is loaded has the average."""
    plain, averaged, during = [], [], []
    net = conv_net()
    train(net, images(), 3, on_epoch=lambda _: plain.append(copy.deepcopy(net)), **QUIET)
    other = conv_net()
    train(other, images(), 3, ema=0.9, out=tmp_path, on_epoch=lambda _: during.append(copy.deepcopy(other)), **QUIET)
    assert all(same(a, b) for a, b in zip(plain, during, strict=True))
    assert not same(other, during[-1])
    averaged = conv_net()
    train(averaged, images(), 3, ema=0.9, out=tmp_path, resume=True, **QUIET)
    assert same(averaged, other)


# --- memory format and precision --------------------------------------------------------------------------------------


def test_channels_last_reaches_every_layer_and_changes_no_result():
    nets, formats = [conv_net(), conv_net()], []

    def look(module, inputs):
        formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last) and not inputs[0].is_contiguous())

    nets[0][0].register_forward_pre_hook(look)
    batches = [({"input": x}, y) for x, y in images()]
    train(nets[0], batches, 2, channels_last=True, lr=0.1, **QUIET)
    train(nets[1], batches, 2, lr=0.1, **QUIET)
    assert formats == [True] * 8
    assert nets[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    # The order of summation differs.
    close(*nets, atol=1e-10)


@pytest.mark.parametrize("strategy", ["bc", "dbc"])
def test_supernets_train_in_channels_last(strategy):
    batches = [small_batch(i) for i in range(4)]
    nets = [wk.make_supernet(small_net(), strategy, graph=small_graph(), k=4) for _ in range(2)]
    for net, channels_last in zip(nets, (True, False), strict=True):
        train(net, batches, 1, channels_last=channels_last, lr=0.05, **QUIET)
    close(*nets, atol=1e-9)


def test_label_smoothing_is_that_of_torch():
    nets = [conv_net(), conv_net()]
    train(nets[0], images(), 2, label_smoothing=0.2, **QUIET)
    train(nets[1], images(), 2, loss=lambda o, t: F.cross_entropy(o, t, label_smoothing=0.2), **QUIET)
    assert same(*nets)
    with pytest.raises(OptionError, match=r"label_smoothing=0\.2 goes with the default loss only"):
        train(nets[0], images(), 2, loss=mse_loss, label_smoothing=0.2, **QUIET)


def test_bf16_on_a_cpu_computes_in_bf16_and_keeps_float32_weights():
    net, kinds = conv_net(dtype=torch.float32), []
    net[3].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    reference = conv_net(dtype=torch.float32)
    batches = images(2, 64, dtype=torch.float32)
    result = train(net, batches, 20, mixed_precision="bf16", lr=0.1, **QUIET)
    plain = train(reference, batches, 20, lr=0.1, **QUIET)
    assert set(kinds) == {torch.bfloat16}
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    # bfloat16 has 8 bits of mantissa; losses start at log 5 = 1.61.
    assert result.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], abs=0.05)
    assert result.loss < 1.0
