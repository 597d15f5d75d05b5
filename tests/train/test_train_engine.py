import copy
import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from widthkit.errors import CheckpointError, DataError, ModelError, OptionError
from widthkit.train import evaluate, load_data, make_loader, train
from widthkit.train.checkpoint import load_tree

QUIET = {"device": "cpu", "progress": False}


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


def digits_loader(seed=0, augment=True):
    return make_loader(load_data("digits", in_channels=1, limit=48, augment=augment).train, 16, train=True, seed=seed)


def regression(count=24, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(count, 3, dtype=torch.float64)
    return TensorDataset(x, x @ torch.randn(3, 2, dtype=torch.float64))


def line_net():
    torch.manual_seed(1)
    return nn.Linear(3, 2).double()


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def same_tree(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b or (a != a and b != b)


# --- what an update is ------------------------------------------------------------------------------------------------


def test_training_is_sgd_by_the_book():
    net = line_net()
    reference = copy.deepcopy(net)
    loader = DataLoader(regression(), 8)
    result = train(net, loader, 3, loss=mse_loss, lr=0.1, weight_decay=0.01, momentum=0.9, schedule="cosine", **QUIET)
    groups = [{"params": [reference.weight], "weight_decay": 0.01}, {"params": [reference.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    losses = []
    for update in range(9):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * update / 9))
        x, y = list(loader)[update % 3]
        optimizer.zero_grad()
        loss = mse_loss(reference(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(net.weight, reference.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.bias, reference.bias, rtol=0, atol=1e-12)
    assert [entry["loss"] for entry in result.history] == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)])
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3]
    assert math.isnan(result.accuracy)


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("step", 0, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("constant", 1, [0.01, 1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("known_length", [True, False])
def test_schedules(schedule, warmup, rates, known_length):
    class Stream:
        def __iter__(self):
            return iter(DataLoader(regression(), 8))

    loader = DataLoader(regression(), 8) if known_length else Stream()
    options = {"loss": mse_loss, "lr": 1e-3, "schedule": schedule, "warmup_epochs": warmup}
    result = train(line_net(), loader, 6, **options, **QUIET)
    assert [entry["lr"] for entry in result.history] == pytest.approx([1e-3 * rate for rate in rates])


def test_gradients_are_clipped():
    net = line_net()
    before = net.weight.detach().clone()
    options = {"loss": mse_loss, "lr": 1.0, "optimizer": "momentum", "momentum": 0.0, "weight_decay": 0.0}
    train(net, DataLoader(regression(), 24), 1, clip_grad=1e-3, schedule="constant", **options, **QUIET)
    moved = torch.cat([(net.weight - before).flatten()])
    assert 0 < moved.norm() <= 1e-3 * (1 + 1e-6)


def test_tuple_and_dict_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 2))

        def forward(self, left, right):
            return (left - right) @ self.weight.expand(1, 2)

    left, right, labels = torch.ones(4, 1), torch.zeros(4, 1), torch.ones(4, dtype=torch.int64)
    ways = [(left, right), {"right": right, "left": left}]
    nets = [Two(), Two()]
    for net, inputs in zip(nets, ways, strict=True):
        assert train(net, [(inputs, labels)], 2, **QUIET).history[-1]["accuracy"] == 1.0
        assert evaluate(net, [(inputs, labels)])["images"] == 4
    assert same_state(*nets)


def test_a_network_that_trains_itself_gets_all_it_needs():
    steps = []

    class Super(nn.Linear):
        def train_step(self, step):
            assert all(p.grad is None for p in self.parameters())
            assert self.training
            for factor in (1.0, 2.0):
                with step.amp():
                    loss = factor * step.loss(self(step.inputs), step.targets)
                step.backward(loss)
            step.outputs = torch.eye(4, 2)[:, [1, 0]]
            steps.append((step.index, step.epoch, torch.rand(1, generator=step.generator).item()))
            return loss.detach()

    x, y = torch.randn(4, 3), torch.tensor([1, 0, 0, 0])
    torch.manual_seed(0)
    net, plain = Super(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(net.state_dict())
    result = train(net, [(x, y)] * 3, 2, **QUIET)
    assert [step[:2] for step in steps] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    assert len({step[2] for step in steps}) == 6
    assert result.accuracy == 1.0
    train(plain, [(x, y)] * 3, 2, loss=lambda o, t: 3 * nn.functional.cross_entropy(o, t), **QUIET)
    torch.testing.assert_close(net.weight, plain.weight)
    first = [step[2] for step in steps]
    steps.clear()
    train(net, [(x, y)] * 3, 2, **QUIET)
    assert [step[2] for step in steps] == first
    steps.clear()
    train(net, [(x, y)] * 3, 2, seed=1, **QUIET)
    assert [step[2] for step in steps] != first


# --- stopping and going on --------------------------------------------------------------------------------------------


class Kill(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("during_epoch", [False, True])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, optimizer, during_epoch):
    options = {"optimizer": optimizer, "lr": 0.01, "warmup_epochs": 1, "seed": 3, **QUIET}
    whole = small_net()
    train(whole, digits_loader(), 4, out=tmp_path / "whole", **options)

    def kill(entry):
        if entry["epoch"] == 2:
            raise Kill

    def kill_late(module, inputs):
        calls.append(1)
        if len(calls) == 8:
            raise Kill

    stopped, calls = small_net(), []
    if during_epoch:
        stopped.register_forward_pre_hook(kill_late)
    with pytest.raises(Kill):
        train(stopped, digits_loader(), 4, out=tmp_path / "cut", on_epoch=None if during_epoch else kill, **options)
    # Another process would have other weights, another loader and other random states.
    torch.manual_seed(99)
    resumed, seen = small_net(seed=5), []
    result = train(resumed, digits_loader(), 4, out=tmp_path / "cut", resume=True, on_epoch=seen.append, **options)
    assert [entry["epoch"] for entry in seen] == [3, 4]
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4]
    assert same_state(whole, resumed)
    files = [load_tree(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "cut")]
    assert same_tree(files[0]["state"], files[1]["state"])
    losses = [[entry["loss"] for entry in file["history"]] for file in files]
    assert losses[0] == losses[1]


def test_two_loaders_that_differ_in_seed_train_differently():
    nets = [small_net(), small_net(), small_net()]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        train(net, digits_loader(seed), 1, **QUIET)
    assert same_state(nets[0], nets[1])
    assert not same_state(nets[0], nets[2])


def test_a_finished_run_returns_at_once_with_its_weights(tmp_path):
    net = small_net()
    first = train(net, digits_loader(), 2, out=tmp_path, **QUIET)
    other = small_net(seed=8)
    again = train(other, digits_loader(), 2, out=tmp_path, resume=True, on_epoch=pytest.fail, **QUIET)
    assert again == first
    assert same_state(net, other)


def test_resume_without_a_checkpoint_starts_from_scratch_and_no_resume_starts_over(tmp_path):
    nets = [small_net(), small_net(), small_net()]
    train(nets[0], digits_loader(), 2, **QUIET)
    train(nets[1], digits_loader(), 2, out=tmp_path / "new" / "deep", resume=True, **QUIET)
    train(nets[2], digits_loader(), 2, out=tmp_path / "new" / "deep", **QUIET)
    assert same_state(nets[0], nets[1])
    assert same_state(nets[0], nets[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.5}, "run with lr=0.05, this one has lr=0.5"),
        ({"epochs": 3}, "epochs=2, this one has epochs=3"),
        ({"optimizer": "adamw"}, "optimizer='sgd'"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss=cross_entropy"),
        ({"net": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}, "shapes=1.weight"),
    ],
)
def test_another_run_s_checkpoint_is_refused_before_anything_changes(tmp_path, change, message):
    train(small_net(), digits_loader(), 2, out=tmp_path, **QUIET)
    options = {"net": small_net(seed=2), "epochs": 2, **change}
    net, epochs = options.pop("net"), options.pop("epochs")
    before = copy.deepcopy(net)
    with pytest.raises(CheckpointError, match=message) as caught:
        train(net, digits_loader(), epochs, out=tmp_path, resume=True, **options, **QUIET)
    assert "\n" not in str(caught.value)
    assert same_state(net, before)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    train(small_net(), digits_loader(), 1, out=tmp_path, **QUIET)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        train(small_net(), digits_loader(), 1, out=tmp_path, resume=True, **QUIET)


def test_a_keyboard_interrupt_goes_through_and_leaves_the_last_epoch_s_checkpoint(tmp_path):
    net, calls = small_net(), []
    net[3].eval()

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    net.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(net, digits_loader(), 2, out=tmp_path, **QUIET)
    assert load_tree(tmp_path / "checkpoint.safetensors")["done"] == 1
    assert net.training
    assert not net[3].training


@pytest.mark.parametrize("last", [False, True])
def test_a_diverged_run_stops_with_the_weights_of_the_last_epoch(tmp_path, last):
    net, copies, calls = small_net(), [], []

    def loss(outputs, targets):
        calls.append(1)
        value = nn.functional.cross_entropy(outputs, targets)
        if len(calls) == (9 if last else 7):
            # In the last update of an epoch, only the gradient is spoiled.
            return value + (value * 0).sqrt() if last else value * math.nan
        return value

    with pytest.raises(OptionError, match=r"epoch 3.*lower lr") as caught:
        train(net, digits_loader(), 4, loss=loss, on_epoch=lambda _: copies.append(copy.deepcopy(net)), **QUIET)
    assert "\n" not in str(caught.value)
    assert len(copies) == 2
    assert same_state(net, copies[-1])
    assert all(parameter.grad is None for parameter in net.parameters())


def test_samplers_and_data_sets_are_told_the_epoch_also_of_a_resumed_run(tmp_path):
    class Told(TensorDataset):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    def stop(entry):
        raise Kill

    epochs, data = [], Told(*regression().tensors)
    with pytest.raises(Kill):
        train(line_net(), DataLoader(data, 8), 3, loss=mse_loss, out=tmp_path, on_epoch=stop, **QUIET)
    train(line_net(), DataLoader(data, 8), 3, loss=mse_loss, out=tmp_path, resume=True, **QUIET)
    assert epochs == [0, 1, 2]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "not with DeepSpeed; use torchrun"),
        ({"ACCELERATE_USE_FSDP": "1"}, "not with FSDP; use torchrun"),
        ({}, r"cannot be joined: .*RANK.* Start them with torchrun"),
    ],
)
def test_launches_that_cannot_be_joined_are_refused_before_anything_changes(variables, message, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    net = small_net()
    before = copy.deepcopy(net)
    with pytest.raises(OptionError, match=message) as caught:
        train(net, digits_loader(), 1, **QUIET)
    assert "\n" not in str(caught.value)
    assert same_state(net, before)


# --- what must not change ---------------------------------------------------------------------------------------------


def test_random_states_flags_and_accelerators_are_the_user_s(tmp_path):
    mine = Accelerator(cpu=True)
    loader, net = digits_loader(), small_net()
    net[1].eval()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), loader.generator.get_state()
    train(net, loader, 2, mixed_precision="bf16", **QUIET)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert torch.equal(loader.generator.get_state(), before[3])
    assert [module.training for module in net] == [True, False, True, True, True, True, True]
    assert mine.mixed_precision == AcceleratorState().mixed_precision == "no"
    assert mine.device.type == "cpu"


def test_evaluation_changes_nothing_and_is_a_mean_over_samples():
    net = small_net()
    data = load_data("digits", in_channels=1, limit=50).valid
    before = copy.deepcopy(net)
    whole = evaluate(net, make_loader(data, 50, train=False))
    parts = evaluate(net, make_loader(data, 16, train=False))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert (parts["accuracy"], parts["images"]) == (whole["accuracy"], 50)
    other = evaluate(net, make_loader(data, 50, train=False), statistics="batch")
    assert other["loss"] != pytest.approx(whole["loss"], rel=1e-3)
    assert same_state(net, before)
    assert net.training
    net.eval()
    images, labels = next(iter(make_loader(data, 50, train=False)))
    assert whole["accuracy"] == (net(images).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"lr": 0}, "lr must be greater than 0"),
        ({"lr": math.nan}, "lr must be a finite number, not nan"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"weight_decay": -1}, "weight_decay must be at least 0"),
        ({"clip_grad": 0}, "clip_grad must be greater"),
        ({"seed": -1}, "seed must be"),
        ({"warmup_epochs": 1}, "leaves no epoch"),
        ({"optimizer": "sgdd"}, "did you mean sgd"),
        ({"optimizer": "bnbsgd"}, "optimizer 'bnbsgd' cannot be used"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"mixed_precision": "fp8"}, "unknown mixed_precision 'fp8'"),
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16' cannot be used"),
        ({"device": "gpu"}, "device='gpu' cannot be used"),
        ({"out": "/dev/null/x"}, "cannot make the folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_changes(options, message):
    net = small_net()
    before = copy.deepcopy(net)
    options = {"epochs": 1, **QUIET, **options}
    with pytest.raises(OptionError, match=message) as caught:
        train(net, digits_loader(), **options)
    assert "\n" not in str(caught.value)
    assert same_state(net, before)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no batches"),
        (5, "not an iterable"),
        ([torch.zeros(2, 1, 8, 8)], "must be a pair"),
        ([(1, 2, 3)], "tuple of 3"),
        (iter([]), "no batch in epoch 1"),
    ],
)
def test_wrong_loaders_are_refused(loader, message):
    with pytest.raises(DataError, match=message):
        train(small_net(), loader, 1, **QUIET)


def test_a_loader_that_is_used_up_is_noticed():
    with pytest.raises(DataError, match="no batch in epoch 2"):
        train(small_net(), iter(list(digits_loader())), 2, **QUIET)
    with pytest.raises(DataError, match="gave no batch"):
        evaluate(small_net(), iter([]))
    with pytest.raises(OptionError, match="unknown statistics"):
        evaluate(small_net(), digits_loader(), statistics="none")


def test_nothing_to_train_and_no_loss_are_refused():
    with pytest.raises(ModelError, match="no parameter"):
        train(nn.ReLU(), digits_loader(), 1, **QUIET)

    class Silent(nn.Linear):
        def train_step(self, step):
            return None

    with pytest.raises(ModelError, match="Silent must return one loss"):
        train(Silent(2, 2), [(torch.zeros(1, 2), torch.zeros(1))], 1, **QUIET)


def test_progress_is_one_line_per_epoch_where_there_is_no_terminal(capsys):
    train(small_net(), digits_loader(), 2, device="cpu")
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split("  ")[0] for line in err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert "accuracy" in err
    assert "images/s" in err
    train(small_net(), digits_loader(), 1, **QUIET)
    assert capsys.readouterr() == ("", "")


def test_training_learns_digits():
    data = load_data("digits", in_channels=1, limit=600)
    net = small_net()
    train(net, make_loader(data.train, 50, train=True), 5, lr=0.2, **QUIET)
    # A tenth is chance.
    assert evaluate(net, make_loader(data.valid, 100, train=False))["accuracy"] > 0.5


def test_a_batch_too_small_for_batch_norm_is_refused_in_words():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"batch of 1 .*larger batches"):
        train(net, [(torch.zeros(1, 4), torch.tensor([0]))], 1, **QUIET)
