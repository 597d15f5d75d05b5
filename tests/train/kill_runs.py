"""A program for ``test_train_kill``: kills small runs at random moments, and prints what the runs ended with.

It imports everything once and forks a child for every life of a run, because importing takes seconds. No gradient is
computed before the forks, for PyTorch's threads would not survive them.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import widthkit as wk
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.train import load_data, make_loader
from widthkit.train.checkpoint import load_tree

EPOCHS, KILLS = 4, 20
torch.set_num_threads(1)
DIGITS, GRAPH = load_data("digits", in_channels=1, limit=160, augment=True).train, small_graph()


def thin():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    return net, make_loader(DIGITS, 16, train=True), {"ema": 0.9, "accumulate": 2}


def supernet():
    net = wk.make_supernet(small_net(), "bc", graph=GRAPH, k=4)
    return net, [small_batch(i) for i in range(8)], {}


def live(make, folder):
    net, loader, options = make()
    result = wk.train(
        net, loader, EPOCHS, lr=0.02, out=folder, resume=True, checkpoint_minutes=1e-9, device="cpu", progress=False,
        **options,
    )  # fmt: skip
    history = [{k: v for k, v in e.items() if k not in ("seconds", "images_per_s")} for e in result.history]
    records = net.width_history.records if make is supernet else None
    (folder / "end.json").write_text(json.dumps([net_bits(net), history, records]))


def net_bits(net):
    return {name: tensor.double().flatten().tolist() for name, tensor in net.state_dict().items()}


def life(make, folder, seconds=None):
    """Let a child work on a run, and kill it after so many seconds; return whether it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            live(make, folder)
            code = 0
        finally:
            os._exit(code)
    killed = False
    if seconds is not None:
        time.sleep(seconds)
        killed = os.waitpid(child, os.WNOHANG) == (0, 0)
        if killed:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.WIFSIGNALED(status)
        return False
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the run failed"
    return False


def rehearse(make, folder):
    """Return the end of the uninterrupted run, and how long it takes."""
    start = time.perf_counter()
    life(make, folder)
    return (folder / "end.json").read_text(), time.perf_counter() - start


def main(folder):
    rng, found = random.Random(0), {}
    for make in (thin, supernet):
        expected, seconds = rehearse(make, folder / make.__name__)
        kills, runs, within = 0, [], 0
        while kills < KILLS or not runs:
            run = folder / f"{make.__name__}-{len(runs)}"
            while not (run / "end.json").exists():
                limit = rng.uniform(0, seconds / 4) if kills < KILLS else None
                kills += life(make, run, limit)
                if (run / "checkpoint.safetensors").exists() and not (run / "end.json").exists():
                    within += load_tree(run / "checkpoint.safetensors")["within"] is not None
            runs.append((run / "end.json").read_text() == expected)
        metrics = [len((run / "metrics.jsonl").read_text().splitlines()) for run in sorted(folder.glob("*-0"))]
        found[make.__name__] = {"kills": kills, "runs": runs, "within": within, "metrics": metrics, "seconds": seconds}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
