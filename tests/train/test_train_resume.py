"""Runs that stop within an epoch, damaged checkpoints, and the figures beside them."""

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import widthkit as wk
from widthkit.errors import CheckpointError, OptionError
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.train import load_data, make_loader, train
from widthkit.train.checkpoint import load_tree
from widthkit.train.runfile import epochs_done

QUIET = {"device": "cpu", "progress": False}
ALWAYS = {"checkpoint_minutes": 1e-9}
FILE, BEFORE, METRICS = "checkpoint.safetensors", "checkpoint-before.safetensors", "metrics.jsonl"


class Kill(Exception):
    pass


class KillAfter:
    """Cross entropy that stops the run in a forward."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, outputs, targets):
        self.calls -= 1
        if self.calls < 0:
            raise Kill
        return F.cross_entropy(outputs, targets)


def thin_net(seed=0):
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


def wide_net(seed=0):
    torch.manual_seed(seed)
    convs = nn.Conv2d(1, 17, 3), nn.BatchNorm2d(17), nn.ReLU(), nn.Conv2d(17, 23, 3), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(23, 10))


def digits(workers=0):
    """Five batches of augmented images in random order."""
    data = load_data("digits", in_channels=1, limit=80, augment=True).train
    return make_loader(data, 16, train=True, workers=workers)


def supernet(strategy, seed=0):
    return wk.make_supernet(small_net(seed), strategy, graph=small_graph(), k=4)


class Doubles:
    """Random batches for supernets, drawn while they are read; the length is not known."""

    def __iter__(self):
        for _ in range(5):
            yield small_batch(int(torch.randint(1000, ())))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def without_time(history):
    return [{k: v for k, v in entry.items() if k not in ("seconds", "images_per_s")} for entry in history]


CASES = {
    "plain": (thin_net, digits, {}),
    "workers": (thin_net, lambda: digits(workers=2), {}),
    "adamw, average, groups of 2": (thin_net, digits, {"optimizer": "adamw", "ema": 0.9, "accumulate": 2}),
    # LAMB takes norms of its state, whose rounding depends on the memory format.
    "channels last, warm-up": (wide_net, digits, {"channels_last": True, "warmup_epochs": 1, "optimizer": "lamb"}),
    "plateau, bf16": (thin_net, digits, {"schedule": "plateau", "patience": 0, "mixed_precision": "bf16"}),
    "bc": (lambda seed=0: supernet("bc", seed), Doubles, {"ema": 0.5}),
    "dbc": (lambda seed=0: supernet("dbc", seed), Doubles, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [3, 9, 10])
def test_a_run_that_stops_within_an_epoch_is_the_uninterrupted_run(tmp_path, case, stop):
    """It stops in the forward after ``stop`` others, of 15; 10 is the last one of an epoch."""
    make, loader, options = CASES[case]
    options = {"lr": 0.02, "seed": 3, **ALWAYS, **options, **QUIET}
    per_step = {"bc": 4}.get(case, 1)
    whole, endless = make(), KillAfter(10**9)
    first = train(whole, loader(), 3, out=tmp_path / "whole", loss=endless, **options)
    with pytest.raises(Kill):
        train(make(), loader(), 3, out=tmp_path / "cut", loss=KillAfter(stop * per_step), **options)
    # Another process would have other weights and other random states.
    torch.manual_seed(99)
    resumed, counter = make(seed=5), KillAfter(10**9)
    second = train(resumed, loader(), 3, out=tmp_path / "cut", resume=True, loss=counter, **options)
    group = options.get("accumulate", 1)
    # With groups, the batches since the last update are trained again.
    done = stop if group == 1 else {3: 2, 9: 9, 10: 10}[stop]
    assert 10**9 - counter.calls == (15 - done) * per_step
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(without_time(first.history), without_time(second.history))
    files = [load_tree(tmp_path / name / FILE) for name in ("whole", "cut")]
    assert same(files[0]["state"], files[1]["state"])
    if "bc" in case:
        assert whole.width_history.records == resumed.width_history.records


def test_checkpoints_wait_for_their_time(tmp_path):
    with pytest.raises(Kill):
        train(thin_net(), digits(), 3, out=tmp_path, loss=KillAfter(4), **QUIET)
    assert os.listdir(tmp_path) == []
    with pytest.raises(Kill):
        train(thin_net(), digits(), 3, out=tmp_path, loss=KillAfter(4), **ALWAYS, **QUIET)
    assert load_tree(tmp_path / FILE)["within"]["batches"] == 4
    assert load_tree(tmp_path / BEFORE)["within"]["batches"] == 3
    assert epochs_done(tmp_path) == 0


@pytest.mark.parametrize("minutes", [0, -1, math.nan, "ten", True])
def test_a_time_that_is_none_is_refused(minutes):
    with pytest.raises(OptionError, match="checkpoint_minutes must be a number greater than 0"):
        train(thin_net(), digits(), 1, checkpoint_minutes=minutes, **QUIET)


@pytest.mark.parametrize("within", [False, True])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, within, capsys):
    whole = thin_net()
    train(whole, digits(), 4, **QUIET)
    options = {**QUIET, **(ALWAYS if within else {})}
    with pytest.raises(Kill):
        train(thin_net(), digits(), 4, out=tmp_path, loss=KillAfter(18), **options)
    damage(tmp_path / FILE)
    capsys.readouterr()
    resumed = thin_net(seed=1)
    with pytest.raises(CheckpointError, match="loss="):
        train(resumed, digits(), 4, out=tmp_path, resume=True, **options)
    assert epochs_done(tmp_path) == (3 if within else 2)
    counter = KillAfter(10**9)
    train(resumed, digits(), 4, out=tmp_path, resume=True, loss=counter, **options)
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged" in line
    assert line.endswith(f"Going on from {BEFORE}, the one before.")
    assert 10**9 - counter.calls == (20 - 17 if within else 20 - 10)
    assert same(whole.state_dict(), resumed.state_dict())
    assert [load_tree(tmp_path / name)["done"] for name in (FILE, BEFORE)] == [4, 3]


def test_the_good_one_stays_until_there_are_two(tmp_path):
    loss = KillAfter(12)
    with pytest.raises(Kill):
        train(thin_net(), digits(), 4, out=tmp_path, loss=loss, **QUIET)
    damage(tmp_path / FILE)
    with pytest.raises(Kill):
        train(thin_net(), digits(), 4, out=tmp_path, resume=True, loss=KillAfter(7), **QUIET)
    assert load_tree(tmp_path / FILE)["done"] == 2
    assert load_tree(tmp_path / BEFORE)["done"] == 1


def test_two_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    train(thin_net(), digits(), 2, out=tmp_path, **QUIET)
    for name in (FILE, BEFORE):
        damage(tmp_path / name)
    net, before = thin_net(1), thin_net(1)
    for use in (
        lambda: train(net, digits(), 2, out=tmp_path, resume=True, **QUIET),
        lambda: epochs_done(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"damaged.*checkpoint-before.*cannot be read either") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert same(net.state_dict(), before.state_dict())


def test_a_crash_between_two_renames_leaves_the_one_before(tmp_path):
    train(thin_net(), digits(), 2, out=tmp_path, **QUIET)
    (tmp_path / FILE).unlink()
    assert epochs_done(tmp_path) == 1
    net, other = thin_net(1), thin_net()
    train(net, digits(), 2, out=tmp_path, resume=True, **QUIET)
    train(other, digits(), 2, **QUIET)
    assert same(net.state_dict(), other.state_dict())


def test_a_new_run_leaves_nothing_of_the_old_one(tmp_path):
    train(thin_net(), digits(), 3, out=tmp_path, **QUIET)
    train(thin_net(), digits(), 1, out=tmp_path, lr=0.01, **QUIET)
    assert sorted(os.listdir(tmp_path)) == [FILE, METRICS]
    assert len((tmp_path / METRICS).read_text().splitlines()) == 1


def test_a_loader_that_has_become_shorter_is_refused(tmp_path):
    class Shrinking:
        count = 5

        def __iter__(self):
            return iter([small_batch(i) for i in range(self.count)])

    options = {**QUIET, **ALWAYS, "out": tmp_path}
    with pytest.raises(Kill):
        train(small_net(), Shrinking(), 2, loss=KillAfter(4), **options)
    Shrinking.count = 3
    with pytest.raises(wk.WidthkitError, match="seen 4 batches of this epoch and the loader gives 3"):
        train(small_net(), Shrinking(), 2, loss=KillAfter(4), resume=True, **options)


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def lines(folder):
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / METRICS).read_text().splitlines()]


def test_every_epoch_has_one_line_of_figures(tmp_path):
    result = train(thin_net(), digits(), 3, out=tmp_path, **QUIET)
    assert lines(tmp_path) == result.history
    with pytest.raises(Kill):
        train(thin_net(), digits(), 4, out=tmp_path / "cut", loss=KillAfter(17), **QUIET)
    assert [entry["epoch"] for entry in lines(tmp_path / "cut")] == [1, 2, 3]
    damage(tmp_path / "cut" / FILE)  # epoch 3 is trained again
    result = train(thin_net(), digits(), 4, out=tmp_path / "cut", loss=KillAfter(99), resume=True, **QUIET)
    assert lines(tmp_path / "cut") == result.history
    assert [entry["epoch"] for entry in lines(tmp_path / "cut")] == [1, 2, 3, 4]


def test_lost_lines_come_back(tmp_path):
    with pytest.raises(Kill):
        train(thin_net(), digits(), 4, out=tmp_path, loss=KillAfter(17), **QUIET)
    (tmp_path / METRICS).write_text('{"epoch": 1}\n')
    with pytest.raises(Kill):
        train(thin_net(), digits(), 4, out=tmp_path, resume=True, loss=KillAfter(1), **QUIET)
    assert [(entry["epoch"], "loss" in entry) for entry in lines(tmp_path)] == [(1, True), (2, True), (3, True)]


def test_a_finished_run_is_left_alone(tmp_path):
    train(thin_net(), digits(), 2, out=tmp_path, **QUIET)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    train(thin_net(), digits(), 2, out=tmp_path, resume=True, **QUIET)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_figures_that_are_no_numbers_are_null(tmp_path):
    net, batch = nn.Linear(2, 2), (torch.ones(3, 2), torch.ones(3, 2))
    train(net, [batch], 1, loss=F.mse_loss, out=tmp_path, **QUIET)
    assert lines(tmp_path)[0]["accuracy"] is None


def damage(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
