"""Two processes that accumulate, average, stop within epochs; runs that go on with another number of processes."""

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from test_train_parallel import data, flat, line_net
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from widthkit.train import train

# Each of two processes runs this.
SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_train_processes import *

rank, out = int(sys.argv[2]), sys.argv[3]
found = {}
net = line_net(seed=rank)
train(net, DataLoader(data(), 2), 2, accumulate=2, ema=0.5, **OPTIONS)
found["grouped"] = flat(net)

whole, cut, again = normed(), normed(), normed()
first = train(whole, shuffled(), 2, out=out + "/whole", ema=0.8, **OPTIONS)
stopped(cut, shuffled(), 2, calls=5, out=out + "/cut", ema=0.8)
torch.manual_seed(rank)
second = train(again, shuffled(), 2, out=out + "/cut", resume=True, ema=0.8, **OPTIONS)
found["whole"], found["cut"] = flat(whole), flat(again)
found["losses"] = [[entry["loss"] for entry in result.history] for result in (first, second)]

stopped(line_net(0), DataLoader(data(), 4), 3, calls=4, out=out + "/two-within")
stopped(line_net(0), DataLoader(data(), 4), 3, calls=3, out=out + "/two-epoch", minutes=1e9)
for name in ("one-within", "one-epoch"):
    net = line_net(seed=9)
    result = train(net, DataLoader(data(), 4), 3, out=f"{out}/{name}", resume=True, **OPTIONS)
    found[name] = [flat(net), result.history]
print(json.dumps(found))
torch.distributed.destroy_process_group()
"""

OPTIONS = {
    "loss": mse_loss,
    "lr": 0.1,
    "weight_decay": 0.01,
    "clip_grad": None,
    "device": "cpu",
    "progress": False,
}


def normed():
    return nn.Sequential(line_net(0), nn.BatchNorm1d(2).double(), nn.Dropout(0.5))


def shuffled():
    return DataLoader(data(), 4, shuffle=True)


class Stop(Exception):
    pass


def stopped(net, loader, epochs, calls, minutes=1e-9, **options):
    """Train until the forward after so many others, with a checkpoint after every update or every epoch."""
    left = [calls]

    def loss(outputs, targets):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return mse_loss(outputs, targets)

    loss.__qualname__ = mse_loss.__qualname__
    with pytest.raises(Stop):
        train(net, loader, epochs, checkpoint_minutes=minutes, **{**OPTIONS, **options, "loss": loss})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes print; their standard error; the folder of their runs."""
    folder = tmp_path_factory.mktemp("pair")
    stopped(line_net(0), DataLoader(data(), 4), 3, calls=8, out=folder / "one-within")
    stopped(line_net(0), DataLoader(data(), 4), 3, calls=6, out=folder / "one-epoch", minutes=1e9)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        arguments = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(rank), str(folder)]
        workers.append(subprocess.Popen(arguments, env=environment, text=True, stdout=-1, stderr=-1))
    try:
        outputs = [worker.communicate(timeout=200) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs], [err for _, err in outputs], folder


def by_hand(updates):
    """Take SGD steps on (epochs done, samples), and return the weights and the mean loss of each epoch."""
    net = line_net(0)
    groups = [{"params": [net.weight], "weight_decay": 0.01}, {"params": [net.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    x, y = data().tensors
    sums = [0.0, 0.0, 0.0]
    for epochs, samples in updates:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * epochs / 3))
        optimizer.zero_grad()
        loss = mse_loss(net(x[samples]), y[samples])
        loss.backward()
        optimizer.step()
        sums[int(epochs + 1e-9)] += loss.item() * (samples.stop - samples.start)
    return flat(net), [total / 24 for total in sums]


def pairs(epoch, first=0, last=3):
    """The updates of two processes in a part of an epoch: 4 samples each."""
    return [(epoch + i / 3, slice(8 * i, 8 * i + 8)) for i in range(first, last)]


def singles(epoch, first=0, last=6):
    """The updates of one process."""
    return [(epoch + i / 6, slice(4 * i, 4 * i + 4)) for i in range(first, last)]


SWITCHES = {
    "two-epoch": [*pairs(0), *singles(1), *singles(2)],
    "two-within": [*pairs(0), *pairs(1, last=1), *singles(1, first=2), *singles(2)],
    "one-epoch": [*singles(0), *pairs(1), *pairs(2)],
    "one-within": [*singles(0), *singles(1, last=2), *pairs(1, first=1), *pairs(2)],
}


def check(name, weights, history):
    expected, losses = by_hand(SWITCHES[name])
    for mine, theirs in zip(expected, weights, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-12)
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert [entry["lr"] for entry in history] == pytest.approx([0.1, 0.075, 0.025], abs=1e-12)
    assert [entry["loss"] for entry in history] == pytest.approx(losses, abs=1e-12)


@pytest.mark.parametrize("name", ["two-epoch", "two-within"])
def test_one_process_goes_on_with_the_run_of_two(pair, name, capsys):
    net = line_net(seed=9)
    result = train(net, DataLoader(data(), 4), 3, out=pair[2] / name, resume=True, **OPTIONS)
    check(name, flat(net), result.history)
    assert capsys.readouterr().err == "the run goes on with 1 process, it had 2 before\n"


@pytest.mark.parametrize("name", ["one-epoch", "one-within"])
def test_two_processes_go_on_with_the_run_of_one(pair, name):
    assert pair[0][0][name][0] == pair[0][1][name][0]
    check(name, *pair[0][0][name])
    assert pair[1][0].count("the run goes on with 2 processes, it had 1 before\n") == 2
    assert "the run goes on" not in pair[1][1]


def test_two_processes_that_accumulate_take_the_step_of_the_joint_batch(pair):
    """2 processes x 2 batches x 2 samples; the averages of the weights agree too."""
    net = line_net(seed=0)
    train(net, DataLoader(data(), 8), 2, ema=0.5, **OPTIONS)
    assert pair[0][0]["grouped"] == pair[0][1]["grouped"]
    for mine, theirs in zip(flat(net), pair[0][0]["grouped"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-12)


def test_a_pair_that_stops_within_an_epoch_is_the_uninterrupted_pair(pair):
    """Each process has its own statistics, dropout and sums until the epoch ends."""
    first, second = pair[0]
    assert first["whole"] == first["cut"] == second["whole"] == second["cut"]
    assert first["losses"][0] == first["losses"][1] == second["losses"][0] == second["losses"][1]
