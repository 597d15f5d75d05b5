"""Several processes search as one does; a killed search goes on to the same result."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from widthkit_plugins.strategies.bc import BilaterallyCoupled

from widthkit.export import export
from widthkit.search import Judging, search
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.train import train

# Every process runs this. The weights of process 0 must win.
SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_search_processes import CALIBRATED, GREEDY, GUIDED, TIGHT, UNSHARED, fails, quiet, sleeps, trained
rank, task = int(os.environ.get("RANK", 0)), sys.argv[3]
seen = []
out = sys.argv[2] + ("" if rank == 0 else "-other")
options = dict(seed=rank, resume=True, progress=lambda t, p: seen.append(t))
if task == "other data":
    from widthkit.errors import DataError
    try:
        quiet(sys.argv[2], first=rank, **GREEDY)
    except DataError as error:
        print("refused:", error)
elif task == "slow":
    quiet(out, **options, **GREEDY, seconds=0.03)
elif task == "tight":
    quiet(out, **options, **GREEDY, **TIGHT, seconds=0.03)
elif task == "slow guided":
    quiet(out, **options, **GUIDED, seconds=0.03)
elif task == "search":
    found = quiet(out, **options, **GREEDY)
    print(len(seen), found.score.hex())
    print(quiet(out + "-guided", **options, **GUIDED).score.hex())
elif task == "unshared":
    print(quiet(out, **options, **UNSHARED).notes)
elif task == "patient":
    from datetime import timedelta
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
    print(quiet(out, **options, **CALIBRATED | {"train_fn": sleeps}).score.hex())
elif task == "fails":
    try:
        quiet(out, **options, **CALIBRATED | {"train_fn": fails})
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    sys.exit()
elif task == "calibrated":
    print(quiet(out, **options, **CALIBRATED).score.hex(), len(trained))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""

GREEDY = {"searcher": "greedy"}
TIGHT = {"judging": Judging(batch_size=8, memory=100)}
GUIDED = {"searcher": "guided", "proposals": "random", "proposals_options": {"n": 30}, "evaluations": 12}
trained = []


def train_alone(widths):
    """Train a network for two epochs of a loader that Accelerate would share out among processes."""
    trained.append(widths)
    slim = export(small_net(), widths, graph=small_graph())
    images, labels = (torch.cat(parts) for parts in zip(*(small_batch(i) for i in range(4)), strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    return train(slim, loader, 2, lr=0.1, loss=F.cross_entropy, device="cpu", progress=False).history[-1]["loss"]


CALIBRATED = {"searcher": "guided", "evaluations": 4, "calibrate": 5, "train_fn": train_alone}


def sleeps(widths):
    if os.environ["RANK"] == "1":
        time.sleep(3)
    return sum(widths.values())


def fails(widths):
    """The second process fails at its second network."""
    trained.append(widths)
    if os.environ["RANK"] == "1" and len(trained) == 2:
        raise RuntimeError("out of luck")
    return sum(widths.values())


EVOLUTION = {"searcher": "evolution", "population": 3, "generations": 4, "pips": False}
UNSHARED = EVOLUTION | {"writes": True}


def write_in_place(module, arguments):
    arguments[0].mul_(1)


def quiet(out, seed=0, first=0, writes=False, seconds=0.0, **options):
    net = make_supernet(small_net(seed), BilaterallyCoupled(), graph=small_graph(), k=4)
    if writes:
        net.model.register_forward_pre_hook(write_in_place)
    if seconds:
        net.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    loader = [small_batch(first + i) for i in range(3)]
    return search(net, loader, "0.5x", loss=F.cross_entropy, out=out, **{"progress": False} | options)


def start(out, task="search", rank=None, port=0):
    place = {"OMP_NUM_THREADS": 1}
    if rank is not None:
        place |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    arguments = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(out), task]
    return subprocess.Popen(arguments, env=environment, text=True, stdout=-1, stderr=-1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pair(out, task="search"):
    """Run two processes to their end and return what they printed."""
    port = free_port()
    workers = [start(out, task, rank, port) for rank in range(2)]
    try:
        outputs = [worker.communicate(timeout=200) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return [out for out, _ in outputs]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a search by one process."""
    folder = tmp_path_factory.mktemp("alone")
    quiet(folder, **GREEDY)
    return folder


def test_two_processes_search_as_one_to_the_last_bit(alone, tmp_path):
    quiet(tmp_path / "alone-guided", **GUIDED)
    outputs = [out.split() for out in pair(tmp_path / "both", "search")]
    for name in ("search-journal.jsonl", "search.json"):
        assert (tmp_path / "both" / name).read_bytes() == (alone / name).read_bytes()
        guided = (tmp_path / "both-guided" / name).read_bytes()
        assert guided == (tmp_path / "alone-guided" / name).read_bytes()
    assert "prediction" in json.loads(guided)["settings"]
    # Only the first process writes and shows; both know the results.
    assert not list(tmp_path.glob("*-other*"))
    trials = json.loads((alone / "search.json").read_text())["trials"]
    assert [out[0] for out in outputs] == [str(len(trials)), "0"]
    assert outputs[0][1:] == outputs[1][1:]


def check_equal(found, expected):
    for name in ("search-journal.jsonl", "search.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_one_process_may_find_out_alone_that_runs_cannot_be_shared(tmp_path):
    """A generation has three networks at most, so the second process judges one of them, and one shares nothing."""
    (note,) = quiet(tmp_path / "one", **UNSHARED).notes
    assert "writes to the model's own tensors or to its input" in note
    assert pair(tmp_path / "both", "unshared") == [f"{[note]}\n"] * 2
    check_equal(tmp_path / "both", tmp_path / "one")


def test_two_processes_share_stand_alone_trainings_which_are_those_of_one(tmp_path):
    trained.clear()
    quiet(tmp_path / "one", **CALIBRATED)
    assert len(trained) == 5
    outputs = [out.split() for out in pair(tmp_path / "both", "calibrated")]
    assert [out[-1] for out in outputs] == ["3", "2"]
    check_equal(tmp_path / "both", tmp_path / "one")
    settings = json.loads((tmp_path / "one" / "search.json").read_text())["settings"]
    assert len(settings["prediction"]["calibrations"]) == 5


def test_what_others_have_trained_is_kept_when_one_process_fails(tmp_path):
    outputs = pair(tmp_path / "out", "fails")
    assert outputs == ["ModelError: process 1 failed: out of luck\n", "RuntimeError: out of luck\n"]
    # The first network of each process, and the second of the first.
    assert (tmp_path / "out" / "search-journal.jsonl").read_text().count("stand-alone") == 3


def test_processes_wait_for_one_that_trains_longer_than_collectives_usually_may(tmp_path):
    outputs = pair(tmp_path / "out", "patient")
    assert len(outputs[0].split()) == 1
    assert outputs[0] == outputs[1]


def test_processes_with_different_data_are_refused(tmp_path):
    assert all("refused: the processes hold different held-out data" in out for out in pair(tmp_path, "other data"))
    assert not (tmp_path / "search.json").exists()


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(n, out, task, processes=1):
    """Start a search, and kill its processes as soon as the journal has so many lines."""
    port = free_port()
    workers = [start(out, task, *((rank, port) if processes > 1 else ())) for rank in range(processes)]
    journal = out / "search-journal.jsonl"
    try:
        deadline = time.monotonic() + 200
        while lines(journal) < n:
            assert all(worker.poll() is None for worker in workers), [worker.communicate() for worker in workers]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        for worker in workers:
            worker.communicate()
    return journal.read_bytes()


@pytest.mark.parametrize("task", ["slow", "slow guided"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_search_loses_at_most_what_was_in_flight(task, processes, tmp_path):
    options = GREEDY if task == "slow" else GUIDED
    quiet(tmp_path / "whole", **options)
    whole = (tmp_path / "whole" / "search-journal.jsonl").read_bytes()
    left = kill_after(6, tmp_path / "cut", task, processes)
    # Six lines were there in the middle of a round: each judgement is written as soon as it is known.
    assert 6 <= left.count(b"\n") < whole.count(b"\n")
    assert whole.startswith(left)
    quiet(tmp_path / "cut", resume=True, **options)
    check_equal(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_where_memory_is_short_a_killed_search_goes_on_to_the_same_result(processes, tmp_path):
    quiet(tmp_path / "whole", **GREEDY, judging=Judging(batch_size=8))
    whole = (tmp_path / "whole" / "search-journal.jsonl").read_bytes()
    left = kill_after(5, tmp_path / "cut", "tight", processes)
    assert left.count(b"\n") < whole.count(b"\n")
    assert whole.startswith(left)
    quiet(tmp_path / "cut", resume=True, **GREEDY, **TIGHT)
    check_equal(tmp_path / "cut", tmp_path / "whole")
