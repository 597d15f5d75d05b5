"""Measure what sharing saves: one greedy round judged candidate by candidate, and together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks.common import timed
from widthkit.bench.files import write
from widthkit.graph import ChannelGraph
from widthkit.latency.timing import keep_pages
from widthkit.modules.models import create_model
from widthkit.search.evaluator import Evaluator
from widthkit.search.judging import Judging
from widthkit.supernet import make_supernet

DEFAULT = ["torchvision/resnet50", "torchvision/mobilenet_v2", "torchvision/densenet121"]


def bounds(graph: ChannelGraph, candidates: Sequence[Mapping[str, int]]) -> tuple[float, float]:
    """Return how much faster a round can become, by the MACs of its layers.

    Args:
        graph: Prices the layers.
        candidates: Width vectors that differ from their common widths (per group the widest) in one group each.

    Returns:
        Two ratios of all MACs of all candidates. The first is over the MACs of the layers behind each candidate's first
        changed layer, that layer included. The second also counts what the candidates share, once; no program can
        be faster than that.

    >>> from torch import nn
    >>> from widthkit.trace import trace
    >>> net = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(4)))
    >>> bounds(trace(net, (1, 4, 2, 2)), [{"0": 2}, {"1": 2}, {"2": 2}])
    (1.5, 1.125)
    """
    polynomial = graph.cost.macs_polynomial
    vectors = graph.vector(list(candidates))
    costs = polynomial.per_term(vectors)
    slopes = np.array([np.any([form[1:] != 0 for form in term.forms], axis=0) for term in polynomial.terms])
    changed = (vectors < vectors.max(axis=0)) @ slopes.T.astype(int) > 0
    first = changed.argmax(axis=1)
    own = sum(cost[start:].sum() for cost, start in zip(costs, first, strict=True))
    last = first.argmax()
    return float(costs.sum() / own), float(costs.sum() / (own + costs[last, : first[last]].sum()))


def run(models: list[str], size: int, batch: int, repeats: int, memory: str, device: str, out: Path | None) -> None:
    """Measure and print the gain for every model.

    Both ways take turns, candidate by candidate, so that a busy machine disturbs both alike; the gain is the ratio of
    their times over all candidates. ``cpu_gain`` is the same for the process's own time.
    """
    kept = keep_pages()
    rows = []
    for name in models:
        rows.append(measure(name, size, batch, repeats, memory, device))
        row = rows[-1]
        Console().print(
            f"{name}: {row['candidates']} candidates, plain {row['plain_s']:.1f} s, shared {row['shared_s']:.1f} s, "
            f"gain {row['gain']:.2f} ({row['cpu_gain']:.2f} by process time); bound {row['bound']:.2f} "
            f"({row['gain'] / row['bound']:.0%} of it); kept at most {row['peak_bytes'] / 1e6:.0f} MB",
            highlight=False,
            soft_wrap=True,
        )
        write(out, "greedy", rows, device, size=size, batch=batch, repeats=repeats, memory=memory, pages_kept=kept)


def measure(name: str, size: int, batch: int, repeats: int, memory: str, device: str) -> dict[str, Any]:
    """Measure the first greedy round of one model.

    Raises:
        AssertionError: If a single loss differs in a single bit.
    """
    net = make_supernet(create_model(name), "ua", k=10)
    candidates = [c for c in (net.space.narrower(net.space.largest, g) for g in net.space.names) if c is not None]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(0, 1000, (batch,), generator=generator)
    net.to(device)
    judging = Judging(memory=memory)
    judge = Evaluator(net, [(images, labels)], F.cross_entropy, judging)
    alone = Evaluator(net, [(images, labels)], F.cross_entropy, judging, share=False)
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "shared": []}
    list(judge.judge_many(candidates[:2]))
    for _ in range(repeats):
        together = judge.judge_many(candidates)
        for _ in candidates:
            (place, shared), seconds = timed(partial(next, together), device)
            times["shared"].append(seconds)
            plain, seconds = timed(partial(alone, candidates[place]), device)
            times["plain"].append(seconds)
            assert plain == shared, "a shared loss differs from the plain one"
    bound, attainable = bounds(net.graph, candidates)
    total = {kind: np.array(seconds).sum(axis=0) / repeats for kind, seconds in times.items()}
    gain, cpu_gain = total["plain"] / total["shared"]
    return {
        "model": name,
        "candidates": len(candidates),
        **{f"{kind}_s": float(seconds[0]) for kind, seconds in total.items()},
        "gain": float(gain),
        "cpu_gain": float(cpu_gain),
        "bound": bound,
        "attainable": attainable,
        "share_of_bound": float(gain) / bound,
        "identical": True,
        "unshared": judge.unshared,
        "peak_bytes": judge.peak_bytes,
    }
