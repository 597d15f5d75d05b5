"""What judging less does to greedy's decisions: lazy rounds and races against the plain loop, on trained supernets."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import ConcatDataset, Subset
from widthkit.search.build import make_searcher

from benchmarks.small import MODELS
from widthkit.bench.files import write
from widthkit.budget import parse_budget
from widthkit.errors import OptionError
from widthkit.modules.models import create_model
from widthkit.search.evaluator import Evaluator
from widthkit.search.journal import Journal
from widthkit.search.loop import run_loop
from widthkit.supernet import Supernet, make_supernet
from widthkit.train import DataSplits, load_data, make_loader, train
from widthkit.train.losses import cross_entropy

PARTS = 32
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lazy": {"lazy": True, "risk": 0.03},
    "race": {"race": PARTS, "risk": 0.001},
    "lazy race": {"lazy": True, "race": PARTS, "risk": 0.005},
    "lazy race, bold": {"lazy": True, "race": PARTS, "risk": 0.05},
}
OTHER = "plain, other images"
"""The yardstick: what the plain loop decides on as many other held-out images."""


class _Counting(Evaluator):
    """Counts examples times MACs of what it computes, for supernets with one path."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.work = {"examples": 0, "macs": 0}

    def _judge(self, units: Any, name: Any, path: int) -> Any:
        fresh = [
            n for i, (_, _, n) in zip(self._numbers, self.batches, strict=True) if (name, path, i) not in self._parts
        ]
        self._count(dict(name), sum(fresh))
        return super()._judge(units, name, path)

    def _fill(self, sharing: Any, who: int, widths: Mapping[str, int], path: int, batch: int) -> bool:
        self._count(widths, self._batch(batch)[2])
        return super()._fill(sharing, who, widths, path, batch)

    def _count(self, widths: Mapping[str, int], examples: int) -> None:
        self.work["examples"] += examples
        self.work["macs"] += examples * self.net.graph.macs(widths)


def run(
    model: str,
    seeds: int,
    epochs: int,
    k: int,
    image_size: int,
    budget: str,
    data: str,
    data_dir: str | None,
    limit: int | None,
    images: int,
    jobs: int,
    out: Path | None,
) -> None:
    """Train a supernet per seed, search it with every set of options, and compare the final widths.

    Losses are those of images that no search has seen. Work is in MACs over all judged examples; what sharing saves
    comes on top and shows in the seconds. The yardstick searches images of its own, and is judged on the same others.
    """
    settings: dict[str, Any] = {
        "model": model,
        "data": data,
        "limit": limit,
        "images": images,
        "epochs": epochs,
        "k": k,
        "image_size": image_size,
        "budget": budget,
    }
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    # Processes of their own, with the threads of this one.
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        for row in pool.map(partial(compare, data_dir=data_dir, **settings), range(seeds)):
            rows.append(row)
            summary = {name: _summary([row[name] for row in rows]) for name in (*OPTIONS, OTHER)}
            write(out, "lazy", rows, summary=summary, options=OPTIONS, jobs=jobs, **settings)
    for name, line in summary.items():
        Console().print(f"{name}: {line}", highlight=False)


def compare(
    seed: int,
    model: str,
    data: str,
    data_dir: str | None,
    limit: int,
    images: int,
    epochs: int,
    k: int,
    image_size: int,
    budget: str,
) -> dict[str, Any]:
    """Train one supernet, search it in all ways, and return what they found."""
    splits = load_data(data, data_dir=data_dir, image_size=image_size, in_channels=3, seed=seed)
    n = len(splits.train)  # type: ignore[arg-type]
    held_out: Any = ConcatDataset([splits.valid, Subset(splits.train, range(min(limit, n), n))])
    if 2 * images > len(held_out):
        raise OptionError(f"images={images}: two searches need twice as many held-out images; here are {len(held_out)}")
    splits = replace(splits, train=Subset(splits.train, range(min(limit, n))))
    net = trained(model, splits, seed, epochs, k, image_size)
    judge, other = (
        _Counting(net, make_loader(Subset(held_out, part), 512, train=False), cross_entropy(), parts=PARTS)
        for part in (range(images), range(images, 2 * images))
    )
    size = max(n for _, _, n in judge.batches)
    fresh = Evaluator(net, make_loader(splits.test, 512, train=False), cross_entropy(), batch_size=size)
    found: dict[str, Any] = {"seed": seed, "groups": len(net.space.names)}
    for name in (*OPTIONS, OTHER):
        result = _search(net, other if name == OTHER else judge, budget, OPTIONS.get(name, {}))
        result["fresh_loss"] = fresh(result["widths"]).loss
        plain = found.setdefault("plain", result)
        result["same"] = result["widths"] == plain["widths"]
        result["groups_that_differ"] = sum(w != plain["widths"][g] for g, w in result["widths"].items())
        result["loss_above_plain"] = result["fresh_loss"] - plain["fresh_loss"]
        result["work_gain"] = plain["work"]["macs"] / result["work"]["macs"]
        found[name] = result
        Console().print(
            f"seed {seed}, {name}: {result['work_gain']:.1f}x less work, {result['process_seconds']:.1f} s, loss "
            f"{result['fresh_loss']:.4f} ({result['loss_above_plain']:+.4f}), "
            f"{result['groups_that_differ']} groups differ",
            highlight=False,
        )
    return found


def _summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    above = [r["loss_above_plain"] for r in results]
    return {
        "same": sum(r["same"] for r in results),
        "of": len(results),
        "groups_that_differ": float(np.mean([r["groups_that_differ"] for r in results])),
        "loss_above_plain": float(np.mean(above)),
        "standard_error": float(np.std(above, ddof=1) / len(above) ** 0.5) if len(above) > 1 else None,
        "work_gain": float(np.median([r["work_gain"] for r in results])),
        "process_seconds": float(np.median([r["process_seconds"] for r in results])),
    }


def trained(model: str, splits: DataSplits, seed: int, epochs: int, k: int, image_size: int) -> Supernet:
    """Train a supernet.

    Args:
        model: One of :data:`benchmarks.small.MODELS`, or a model that takes ``width_mult``.
        splits: The data.
        seed: Seeds weights and training.
        epochs: Epochs of training.
        k: Choices per group.
        image_size: Pixels.
    """
    torch.manual_seed(seed)
    dense = MODELS[model]() if model in MODELS else create_model(model, num_classes=splits.num_classes, width_mult=0.25)
    net = make_supernet(dense, "ua", example_inputs=(1, 3, image_size, image_size), k=k, min_width="0.25x", seed=seed)
    loader = make_loader(splits.train, 64, train=True, seed=seed)
    train(net, loader, epochs, lr=0.05, seed=seed, progress=False, clip_grad=5.0)
    return net


def _search(net: Supernet, judge: _Counting, budget: str, options: Mapping[str, Any]) -> dict[str, Any]:
    limit = parse_budget(budget, net.graph)
    engine = make_searcher("greedy", net, limit, np.random.default_rng(0), options)
    judge.work.update(examples=0, macs=0)
    start = time.process_time()
    trials = run_loop(engine, net.graph, judge, Journal(None, ""), {})
    seconds = time.process_time() - start
    # Where the steps led, not the luckiest candidate on the way.
    end = engine.state_dict()["now"]
    best = next(t for t in reversed(trials) if t.widths == end)
    return {
        "widths": best.widths,
        "loss": best.loss,
        "accuracy": best.accuracy,
        "work": dict(judge.work),
        "process_seconds": seconds,
    }
