"""What judging less does to greedy's decisions: lazy rounds and races against the plain loop, on trained supernets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from widthkit.bench.files import write
from widthkit.bench.small import MODELS
from widthkit.budget import parse_budget
from widthkit.models import create_model
from widthkit.search.build import make_searcher
from widthkit.search.evaluator import Evaluator, Judgement
from widthkit.search.journal import Journal
from widthkit.search.loop import run_loop
from widthkit.supernet import Supernet, make_supernet
from widthkit.train import load_data, make_loader, train
from widthkit.train.losses import cross_entropy

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lazy": {"lazy": True},
    "lazy, cautious": {"lazy": True, "caution": 1.0},
    "race": {"race": 0.25},
    "lazy race": {"lazy": True, "race": 0.25},
}


class _Counted:
    """Passes on to an evaluator and counts examples times MACs."""

    def __init__(self, judge: Evaluator, net: Supernet, work: dict[str, float]) -> None:
        self._judge, self._net, self.work = judge, net, work
        self._examples = sum(n for _, _, n in judge.batches)

    def at(self, fraction: float) -> _Counted:
        return _Counted(self._judge.at(fraction), self._net, self.work)

    def order(self, vectors: Any) -> list[int]:
        return self._judge.order(vectors)

    def many(self, vectors: Any) -> Any:
        for widths in vectors:
            self.work["networks"] += 1
            self.work["macs"] += self._examples * self._net.graph.macs(widths)
        return self._judge.many(vectors)

    def __call__(self, widths: Mapping[str, int]) -> Judgement:
        self.work["networks"] += 1
        self.work["macs"] += self._examples * self._net.graph.macs(widths)
        return self._judge(widths)


def run(model: str, seeds: int, epochs: int, k: int, image_size: int, budget: str, out: Path | None) -> None:
    """Train a supernet per seed on digits, search it with every set of options, and compare the final widths.

    Work is in MACs over all judged examples; what sharing saves comes on top and shows in the seconds.
    """
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        net, judge = trained(model, seed, epochs, k, image_size)
        found: dict[str, Any] = {}
        for name, options in OPTIONS.items():
            found[name] = _search(net, judge, budget, options)
        rows.append({"seed": seed} | found)
        for name in OPTIONS:
            result = found[name]
            result["same"] = result["widths"] == found["plain"]["widths"]
            result["groups_that_differ"] = sum(w != found["plain"]["widths"][g] for g, w in result["widths"].items())
            result["loss_above_plain"] = result["loss"] - found["plain"]["loss"]
            result["work_gain"] = found["plain"]["work"]["macs"] / result["work"]["macs"]
            Console().print(
                f"seed {seed}, {name}: {result['work']['networks']} networks, {result['work_gain']:.1f}x less work, "
                f"{result['seconds']:.1f} s, loss {result['loss']:.4f} ({result['loss_above_plain']:+.4f}), "
                f"{result['groups_that_differ']} groups differ",
                highlight=False,
            )
        summary = {
            name: {
                "same": sum(row[name]["same"] for row in rows),
                "of": len(rows),
                "groups_that_differ": float(np.mean([row[name]["groups_that_differ"] for row in rows])),
                "loss_above_plain": float(np.mean([row[name]["loss_above_plain"] for row in rows])),
                "work_gain": float(np.median([row[name]["work_gain"] for row in rows])),
            }
            for name in OPTIONS
        }
        settings: dict[str, Any] = {
            "model": model,
            "epochs": epochs,
            "k": k,
            "image_size": image_size,
            "budget": budget,
        }
        write(out, "lazy", rows, summary=summary, options=OPTIONS, **settings)
    for name, line in summary.items():
        Console().print(f"{name}: {line}", highlight=False)


def trained(model: str, seed: int, epochs: int, k: int, image_size: int) -> tuple[Supernet, Evaluator]:
    """Train a supernet on digits; its evaluator holds the validation part.

    Args:
        model: One of :data:`widthkit.bench.small.MODELS`, or a model that takes ``width_mult``.
        seed: Seeds data, weights and training.
        epochs: Epochs of training.
        k: Choices per group.
        image_size: Pixels.
    """
    data = load_data("digits", image_size=image_size, in_channels=3, seed=seed)
    torch.manual_seed(seed)
    dense = MODELS[model]() if model in MODELS else create_model(model, num_classes=data.num_classes, width_mult=0.25)
    net = make_supernet(dense, "ua", example_inputs=(1, 3, image_size, image_size), k=k, min_width="0.25x", seed=seed)
    loader = make_loader(data.train, 64, train=True, seed=seed)
    train(net, loader, epochs, lr=0.05, seed=seed, progress=False, clip_grad=5.0)
    return net, Evaluator(net, make_loader(data.valid, 512, train=False), cross_entropy())


def _search(net: Supernet, judge: Evaluator, budget: str, options: Mapping[str, Any]) -> dict[str, Any]:
    limit = parse_budget(budget, net.graph)
    engine = make_searcher("greedy", net, limit, np.random.default_rng(0), options)
    counted = _Counted(judge, net, {"networks": 0, "macs": 0})
    start = time.perf_counter(), time.process_time()
    trials = run_loop(engine, net.graph, counted, Journal(None, ""), {})
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    inside = [t for t in trials if limit.fits(net.graph, t.widths)]
    best = max(inside, key=lambda t: t.score)
    return {
        "widths": best.widths,
        "loss": best.loss,
        "accuracy": best.accuracy,
        "work": counted.work,
        "seconds": seconds[0],
        "process_seconds": seconds[1],
        "examples": counted._examples,
    }
