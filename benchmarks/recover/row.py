"""One row: slim the trained network in one way with one seed, train what is left of the cost, test once."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.oracles.macs import counted_macs
from benchmarks.recover.setup import FORWARD, Ledger, Setup
from benchmarks.recover.ways import Way
from widthkit.errors import OptionError
from widthkit.files import atomic_json
from widthkit.train import evaluate, recalibrate, train

CALIBRATED_IMAGES = 2048


@dataclass(frozen=True)
class Task:
    """One row to make.

    Args:
        way: Its name.
        speedup: How many times fewer MACs.
        seed: Seeds training and search.
    """

    way: str
    speedup: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.way}-{self.speedup:g}x-{self.seed}"


def make_row(setup: Setup, task: Task, way: Way, folder: Path) -> dict[str, Any]:
    """Make a row, or go on where an earlier call was interrupted.

    Args:
        setup: Network, data, cost.
        task: Which row.
        way: How to slim.
        folder: Checkpoints and ``row.json``.
    """
    file = folder / "row.json"
    settings = {"model": setup.model, "epochs": setup.epochs, "limit": setup.limit, "final": setup.final}
    if file.exists():
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        if found["settings"] != settings:
            raise OptionError(f"{file} was made with {found['settings']}; choose another folder")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    started, dense = time.perf_counter(), counted_macs(setup.dense, setup.example)
    ledger = Ledger(setup, dense)
    net = way.slim(setup, ledger, task.seed, dense / task.speedup, folder)
    macs = counted_macs(net, setup.example)
    net.to(memory_format=torch.channels_last)
    recalibrate(net, setup.fixed_batches(CALIBRATED_IMAGES))
    before = evaluate(net, setup.held_out(len(setup.splits.valid)))["accuracy"]
    per_epoch = macs / dense + (FORWARD if way.teacher else 0.0)
    epochs = int((setup.epochs - ledger.total) / per_epoch + 1e-9)
    if epochs < 1:
        raise ValueError(f"{task.name}: {ledger.total:.1f} of {setup.epochs:g} epochs are spent before the training")
    train(
        net, setup.train_batches(task.seed), epochs, seed=task.seed, out=folder / "final", resume=True, progress=False,
        teacher=setup.copy() if way.teacher else None, **{**setup.final, **dict(way.changes)},
    )  # fmt: skip
    ledger.trained("final training", per_epoch * dense, epochs * setup.train_images)
    row = {
        "settings": settings,
        "way": task.way,
        "whose": way.whose,
        "speedup": task.speedup,
        "seed": task.seed,
        "macs": macs,
        "params": sum(p.numel() for p in net.parameters()),
        "final_epochs": epochs,
        "cost": ledger.entries,
        "cost_total": ledger.total,
        "held_out_before": before,
        "held_out": evaluate(net, setup.held_out(len(setup.splits.valid)))["accuracy"],
        "test": evaluate(net, setup.test_batches)["accuracy"],
        "convolutions": [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)],
        "seconds": time.perf_counter() - started,
    }
    atomic_json(file, row)
    return row
