"""Several processes search as one does; a killed search goes on to the same result."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.nn.functional as F
from widthkit_plugins.bc import BilaterallyCoupled

from widthkit.search import search
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net

# Every process runs this. The weights of process 0 must win.
SCRIPT = """
import os, sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_search_processes import quiet
rank, task = int(os.environ.get("RANK", 0)), sys.argv[3]
if task == "slow":
    from widthkit.search.evaluator import Evaluator
    fast = Evaluator._part
    def slow(self, *args):
        time.sleep(0.05)
        return fast(self, *args)
    Evaluator._part = slow
if task == "other data":
    from widthkit.errors import DataError
    try:
        quiet(sys.argv[2], first=rank)
    except DataError as error:
        print("refused:", error)
    sys.exit()
seen = []
out = sys.argv[2] + ("" if rank == 0 else "-other")
found = quiet(out, seed=rank, resume=True, on_trial=lambda t, p: seen.append(t))
print(len(seen), found.score.hex())
"""


def quiet(out, seed=0, first=0, **options):
    net = make_supernet(small_net(seed), BilaterallyCoupled(), graph=small_graph(), k=4)
    loader = [small_batch(first + i) for i in range(3)]
    return search(net, loader, "0.5x", loss=F.cross_entropy, device="cpu", out=out, progress=False, **options)


def start(out, task="search", rank=None, port=0):
    place = {"OMP_NUM_THREADS": 1}
    if rank is not None:
        place |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    arguments = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(out), task]
    return subprocess.Popen(arguments, env=environment, text=True, stdout=-1, stderr=-1)


def pair(out, task="search"):
    """Run two processes to their end and return what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
    quiet(folder)
    return folder


def test_two_processes_search_as_one_to_the_last_bit(alone, tmp_path):
    first, second = pair(tmp_path / "both")
    for name in ("search-journal.jsonl", "search.json"):
        assert (tmp_path / "both" / name).read_bytes() == (alone / name).read_bytes()
    # Only the first process writes and shows; both know the result.
    assert not (tmp_path / "both-other").exists()
    trials = json.loads((alone / "search.json").read_text())["trials"]
    assert first.split()[0] == str(len(trials))
    assert second.split()[0] == "0"
    assert first.split()[1] == second.split()[1]


def test_processes_with_different_data_are_refused(tmp_path):
    assert all("refused: the processes hold different held-out data" in out for out in pair(tmp_path, "other data"))
    assert not (tmp_path / "search.json").exists()


def test_a_killed_search_loses_at_most_what_was_in_flight(alone, tmp_path):
    journal = tmp_path / "search-journal.jsonl"
    worker = start(tmp_path, "slow")
    try:
        deadline = time.monotonic() + 200
        while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
            assert worker.poll() is None, worker.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    whole = (alone / "search-journal.jsonl").read_bytes()
    left = journal.read_bytes()
    # Eight lines were there in the middle of a round: each judgement is written as soon as it is known.
    assert 8 <= left.count(b"\n") < whole.count(b"\n")
    assert whole.startswith(left)
    quiet(tmp_path, resume=True)
    assert journal.read_bytes() == whole
    assert (tmp_path / "search.json").read_bytes() == (alone / "search.json").read_bytes()
