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
from widthkit.search import search
from widthkit.search.evaluator import Evaluator, Judgement, Piece
from widthkit.search.journal import Journal
from widthkit.search.loop import judge_new
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.train import train

# Every process runs this. The weights of process 0 must win.
SCRIPT = """
import os, sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_search_processes import CALIBRATED, GUIDED, UNSHARED, fails, quiet, sleeps, trained
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
if task == "tight":
    from widthkit.search.evaluator import Evaluator
    judge_part = Evaluator._part
    def counted(self, *args):
        print("piece", flush=True)
        time.sleep(0.02)
        return judge_part(self, *args)
    Evaluator._part = counted
seen = []
out = sys.argv[2] + ("" if rank == 0 else "-other")
options = dict(seed=rank, resume=True, on_trial=lambda t, p: seen.append(t))
if task not in ("patient", "fails"):
    found = quiet(out, **options | ({"memory": 100, "batch_size": 8} if task == "tight" else {}))
    print(len(seen), found.score.hex())
if task == "guided too":
    print(quiet(out + "-guided", **options, **GUIDED).score.hex())
if task == "unshared":
    print(quiet(out + "-unshared", **options, **UNSHARED).score.hex())
if task == "patient":
    from datetime import timedelta
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
    print(quiet(out + "-patient", **options, **CALIBRATED | {"train_fn": sleeps}).score.hex())
if task == "fails":
    try:
        quiet(out, **options, **CALIBRATED | {"train_fn": fails})
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    sys.exit()
if task == "calibrated":
    print(quiet(out + "-calibrated", **options, **CALIBRATED).score.hex(), len(trained))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""

GUIDED = {"searcher": "random", "n": 30, "evaluations": 12}
trained = []


def train_alone(widths):
    """Train a network for two epochs of a loader that Accelerate would share out among processes."""
    trained.append(widths)
    slim = export(small_net(), widths, graph=small_graph())
    images, labels = (torch.cat(parts) for parts in zip(*(small_batch(i) for i in range(4)), strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    return train(slim, loader, 2, lr=0.1, loss=F.cross_entropy, device="cpu", progress=False).history[-1]["loss"]


CALIBRATED = {"searcher": "random", "n": 9, "evaluations": 4, "calibrate": 5, "train_fn": train_alone}


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


EVOLUTION = {"searcher": "evolution", "population": 3, "generations": 4, "pips": False, "score_model": None}
UNSHARED = EVOLUTION | {"writes": True}


def write_in_place(module, arguments):
    arguments[0].mul_(1)


def quiet(out, seed=0, first=0, writes=False, **options):
    net = make_supernet(small_net(seed), BilaterallyCoupled(), graph=small_graph(), k=4)
    if writes:
        net.model.register_forward_pre_hook(write_in_place)
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
    quiet(folder)
    return folder


def test_two_processes_search_as_one_to_the_last_bit(alone, tmp_path):
    quiet(tmp_path / "alone-guided", **GUIDED)
    outputs = [out.split() for out in pair(tmp_path / "both", "guided too")]
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


def test_one_process_may_find_out_alone_that_runs_cannot_be_shared(tmp_path):
    """A generation has three networks at most, so the second process judges one of them, and one shares nothing."""
    quiet(tmp_path / "one", **UNSHARED)
    pair(tmp_path / "both", "unshared")
    for name in ("search-journal.jsonl", "search.json"):
        assert (tmp_path / "both-unshared" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_two_processes_share_stand_alone_trainings_which_are_those_of_one(tmp_path):
    quiet(tmp_path / "one", **CALIBRATED)
    assert len(trained) == 5
    outputs = [out.split() for out in pair(tmp_path / "both", "calibrated")]
    assert [out[-1] for out in outputs] == ["3", "2"]
    for name in ("search-journal.jsonl", "search.json"):
        one = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "both-calibrated" / name).read_bytes() == one
    assert len(json.loads(one)["settings"]["prediction"]["calibrations"]) == 5


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


def whole_lines(path):
    return path.read_bytes().count(b"\n")


def check_resumed(out, pieces_run, tmp_path, monkeypatch):
    """Go on from a folder, and check that only what no file holds is computed."""
    run, again = Evaluator._part, []
    quiet(tmp_path / "whole", batch_size=8)
    journal = "search-journal.jsonl"
    kept = whole_lines(out / "search-journal-pieces.jsonl") - 1
    judged = whole_lines(out / journal) - 1
    # Three batches on two paths make a judgement.
    assert pieces_run[0] <= kept + 6 * judged <= pieces_run[1]
    monkeypatch.setattr(Evaluator, "_part", lambda *args: again.append(0) or run(*args))
    quiet(out, batch_size=8, memory=100, resume=True)
    assert len(again) == 6 * (whole_lines(tmp_path / "whole" / journal) - 1 - judged) - kept
    for name in (journal, "search.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "search-journal-pieces.jsonl").exists()


@pytest.mark.parametrize("n", [6 + 5, 6 + 9, 6 + 14])
def test_a_search_interrupted_while_judgements_wait_for_memory_loses_one_network(tmp_path, monkeypatch, n):
    """Under a memory of 100 bytes the last batches run after all others, so a round's judgements come at its end."""
    run, count = Evaluator._part, []

    def stops(self, *args):
        if len(count) == n:
            raise KeyboardInterrupt
        count.append(0)
        return run(self, *args)

    monkeypatch.setattr(Evaluator, "_part", stops)
    with pytest.raises(KeyboardInterrupt):
        quiet(tmp_path / "out", batch_size=8, memory=100)
    monkeypatch.setattr(Evaluator, "_part", run)
    # What has run of the network in flight is not written yet.
    check_resumed(tmp_path / "out", (n - 5, n), tmp_path, monkeypatch)


class Waiting:
    """Judgements that all wait for their pieces; only so many pieces are made before an interruption."""

    def __init__(self, pieces, n):
        self.held, self.left = {p.widths for p in pieces}, n

    def events(self, vectors):
        for widths in vectors:
            key = tuple(widths.items())
            if key not in self.held:
                if not self.left:
                    raise KeyboardInterrupt
                self.left -= 1
                yield Piece(key, 0, 0, 1.0, None)
        for place in range(len(vectors)):
            yield place, Judgement(-1.0, 1.0, None)

    many = events


def test_pieces_outlive_any_number_of_interruptions(tmp_path):
    """Also where a resumed search first repeats whole rounds from the journal."""
    rounds = [{f"{r}-{n}": {"a": r, "b": n} for n in range(9)} for r in range(2)]
    made = 0
    for _ in range(9):
        journal = Journal(tmp_path / "search-journal.jsonl", "me")
        known = journal.read()
        judge = Waiting(journal.read_pieces(), 2)
        try:
            for vectors in rounds:
                list(judge_new(judge, vectors, journal, known))
            break
        except KeyboardInterrupt:
            made += 2
    assert made + 2 - judge.left == 18, "every piece is made once"
    assert len(known) == 18


def test_killed_processes_lose_one_network_each(tmp_path, monkeypatch):
    out, port = tmp_path / "out", free_port()
    pieces = out / "search-journal-pieces.jsonl"
    workers = [start(out, "tight", rank, port) for rank in range(2)]
    try:
        deadline = time.monotonic() + 200
        while not pieces.exists() or whole_lines(pieces) < 5:
            assert all(worker.poll() is None for worker in workers), [worker.communicate() for worker in workers]
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        run = sum(worker.communicate()[0].count("piece\n") for worker in workers)
    check_resumed(out, (run - 2 * 6, run), tmp_path, monkeypatch)
