import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from widthkit.train import train

# Each of two processes runs this; what they end with is compared with one process below.
SCRIPT = """
import json, sys
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_train_parallel import Branches, Listener, Stream, data, line_net, OPTIONS
from widthkit.train import train

rank, out = int(sys.argv[2]), sys.argv[3]
net = line_net(seed=rank)  # process 0's weights must win
joint = train(net, DataLoader(data(), 4), 3, **OPTIONS)

branches = Branches(rank)
train(branches, DataLoader(data(), 4), 2, **OPTIONS)

class Stop(Exception): pass
def stop(entry):
    raise Stop
def normed(): return nn.Sequential(line_net(0), nn.BatchNorm1d(2).double(), nn.Dropout(0.5))
def shuffled(): return DataLoader(data(), 4, shuffle=True)
whole, cut = normed(), normed()
train(whole, shuffled(), 2, **OPTIONS)
try:
    train(cut, shuffled(), 2, out=out, on_epoch=stop, **OPTIONS)
except Stop:
    torch.manual_seed(rank)
    cut = normed()
    train(cut, shuffled(), 2, out=out, resume=True, **OPTIONS)
heard = {}
for name, loader in {
    "shuffled": DataLoader(data(), 4, shuffle=True),
    "stream": DataLoader(Stream(), 4),
    "indices": DataLoader(data(), None, sampler=[[0, 1, 2], [3, 4], [5, 6]]),
}.items():
    listener = Listener()
    train(listener, loader, 2, **OPTIONS)
    heard[name] = listener.heard
    assert getattr(loader.sampler, "generator", None) is None
import widthkit as wk
from widthkit.testing import small_batch, small_graph, small_net
supernet = wk.make_supernet(small_net(), "bc", graph=small_graph(), k=4)
train(supernet, [small_batch(10 * rank + i) for i in range(6)], 1, lr=0.01, device="cpu", progress=False)
flat = lambda m: [v.flatten().tolist() for v in m.state_dict().values()]
print(json.dumps({"joint": flat(net), "loss": joint.loss, "branches": flat(branches), "seeds": branches.seeds,
                  "whole": flat(whole), "cut": flat(cut),
                  "heard": heard, "records": supernet.width_history.records}))
torch.distributed.destroy_process_group()
"""

OPTIONS = {"loss": mse_loss, "lr": 0.1, "weight_decay": 0.01, "device": "cpu", "progress": False}


def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(24, 3, dtype=torch.float64, generator=generator)
    return TensorDataset(x, x @ torch.randn(3, 2, dtype=torch.float64, generator=generator))


def line_net(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 2).double()


class Branches(nn.Module):
    """Process 0 uses ``left``, process 1 ``right``, nobody ``spare``; one process plays both on a joint batch."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.spare = (nn.Linear(3, 2).double() for _ in range(3))
        self.rank, self.seeds = rank, []

    def train_step(self, step):
        self.seeds.append(torch.rand(1, generator=step.generator).item())
        if self.rank is None:
            halves = zip((self.left, self.right), step.inputs.chunk(2), step.targets.chunk(2), strict=True)
            loss = sum(step.loss(branch(x), y) for branch, x, y in halves) / 2
        else:
            loss = step.loss((self.left, self.right)[self.rank](step.inputs), step.targets)
        step.backward(loss)
        return loss.detach()


class Listener(nn.Linear):
    """Lists the samples of every batch, named by their first number."""

    def __init__(self):
        super().__init__(3, 2, dtype=torch.float64)
        self.heard = []

    def train_step(self, step):
        self.heard.append(step.inputs[:, 0].tolist())
        loss = step.loss(self(step.inputs), step.targets)
        step.backward(loss)
        return loss.detach()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


def flat(module):
    return [value.flatten().tolist() for value in module.state_dict().values()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
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
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_two_processes_take_the_step_of_the_joint_batch(pair):
    net = line_net(seed=0)
    result = train(net, DataLoader(data(), 8), 3, **OPTIONS)
    assert pair[0]["joint"] == pair[1]["joint"]
    for mine, theirs in zip(flat(net), pair[0]["joint"], strict=True):
        # The order of summation differs.
        assert mine == pytest.approx(theirs, abs=1e-12)
    assert result.loss == pytest.approx(pair[0]["loss"], abs=1e-12)


def test_parameters_that_one_process_did_not_use_count_as_zero(pair):
    net = Branches(None)
    start = net.spare.weight.detach().clone()
    train(net, DataLoader(data(), 8), 2, **OPTIONS)
    assert pair[0]["branches"] == pair[1]["branches"]
    for mine, theirs in zip(flat(net), pair[0]["branches"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-12)
    # Used by nobody: not even decayed.
    assert pair[0]["branches"][4] == start.flatten().tolist()


@pytest.mark.parametrize("loader", ["shuffled", "stream"])
def test_processes_divide_every_epoch(pair, loader):
    names = sorted(data().tensors[0][:, 0].tolist())
    for epoch in (slice(0, 3), slice(3, 6)):
        batches = [batch for process in pair for batch in process["heard"][loader][epoch]]
        assert [len(batch) for batch in batches] == [4] * 6
        assert sorted(name for batch in batches for name in batch) == names
    assert all(len(process["heard"][loader]) == 6 for process in pair)


def test_epochs_are_shuffled_differently(pair):
    first, second = pair[0]["heard"]["shuffled"][:3], pair[0]["heard"]["shuffled"][3:]
    assert first != second


def test_processes_take_turns_with_batches_of_indices_and_end_together(pair):
    names = data().tensors[0][:, 0].tolist()
    batches = [[names[i] for i in batch] for batch in ([0, 1, 2], [3, 4], [5, 6])]
    assert pair[0]["heard"]["indices"] == [batches[0], batches[2]] * 2
    # The first batch makes up for the one that is missing.
    assert pair[1]["heard"]["indices"] == [batches[1], batches[0]] * 2


def test_processes_share_what_they_remember_of_widths(pair):
    """Each trains 6 steps with 2 width vectors; both end with the records of all of them."""
    assert pair[0]["records"] == pair[1]["records"]
    assert 12 < len(pair[0]["records"]) <= 24


def test_processes_draw_different_random_choices(pair):
    assert not set(pair[0]["seeds"]) & set(pair[1]["seeds"])


def test_a_resumed_pair_is_the_uninterrupted_pair(pair):
    assert pair[0]["whole"] == pair[0]["cut"] == pair[1]["whole"] == pair[1]["cut"]
