"""Measure how good searchers are: against brute force, by their first populations, and by their speed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn

from benchmarks.common import ask_and_tell, timed
from widthkit.bench.files import write
from widthkit.budget import Budget, parse_budget
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace, uniform_space
from widthkit.modules.models import create_model
from widthkit.search.evaluator import Evaluator
from widthkit.search.judging import Judgement
from widthkit.search.result import Trial
from widthkit.search.searcher import SEARCHERS
from widthkit.search.top_up import top_up
from widthkit.supernet import make_supernet
from widthkit.trace import trace
from widthkit.train import load_data, make_loader, train
from widthkit.train.history import WidthRecord
from widthkit.train.losses import cross_entropy

_NOISE = 0.05
"""Standard deviation of the noise in simulated training losses."""
NEAR_BUDGET = 0.97
"""A network that uses more than this share of a budget is near it; results must be, where the space has one."""


class SyntheticScore:
    """A cheap score with a known optimum: concave in every width, coupled between neighbours, slightly rugged.

    ``-(sum_l a_l (1 - r_l)^2 + sum_l b_l (r_l - r_{l+1})^2) / L + ripple``, with r_l the share of group l's width.

    Args:
        space: The space to score; every point gets a ripple of its own.
        seed: Draws a, b and the ripple.
        ripple: Standard deviation of the ripple.
    """

    def __init__(self, space: SearchSpace, seed: int, ripple: float = 0.002) -> None:
        rng = np.random.default_rng(seed)
        self.space = space
        self._a, self._b = rng.uniform(0.1, 1, (2, len(space.groups)))
        self._ripple = ripple * rng.normal(size=1009)
        self._widest = np.array([g.widest for g in space.groups])

    def __call__(self, widths: IntArray) -> FloatArray:
        """Score width vectors ``[n, groups]``."""
        share = widths / self._widest
        loss = (self._a * (1 - share) ** 2).mean(axis=1)
        loss += (self._b[1:] * np.diff(share, axis=1) ** 2).sum(axis=1) / len(self._widest)
        ripple = self._ripple[(widths * np.arange(1, widths.shape[1] + 1) ** 3).sum(axis=1) % len(self._ripple)]
        return np.asarray(ripple - loss)

    def of(self, widths: Mapping[str, int]) -> float:
        """Score one width vector."""
        return float(self(np.array([[widths[name] for name in self.space.names]]))[0])

    def history(self, n: int, seed: int, keep: int = 100) -> list[WidthRecord]:
        """Simulate a supernet's training: random widths, noisy losses, the best of them."""
        rng = np.random.default_rng([seed, 1])
        drawn = [self.space.sample(rng) for _ in range(n)]
        scores = self(np.array([list(w.values()) for w in drawn])) + _NOISE * rng.normal(size=n)
        return sorted(zip(drawn, (-scores).tolist(), strict=True), key=lambda record: record[1])[:keep]


def every_point(space: SearchSpace) -> IntArray:
    """Return ``[size, groups]``: all width vectors of a space."""
    return np.array(list(itertools.product(*(g.options for g in space.groups))), dtype=np.int64)


def searched(name: str, score: SyntheticScore, budget: Budget, seed: int, most: int) -> dict[tuple[int, ...], float]:
    """Search as :func:`widthkit.search` does, top up to the budget included, but end after ``most`` networks.

    The searcher has its own defaults, and a simulated history if it wants one.
    """
    space, history = score.space, {"history": score.history(500, seed)}
    searcher = SEARCHERS.build(name, {}, space, budget, np.random.default_rng(seed), offered=history)
    judged = ask_and_tell(searcher, score.of, most)
    rest = top_up(space, budget, [_trial(space, widths, value) for widths, value in judged.items()], seed)
    return judged | ({} if rest is None else ask_and_tell(rest, score.of))


def _trial(space: SearchSpace, vector: tuple[int, ...], score: float) -> Trial:
    widths = dict(zip(space.names, vector, strict=True))
    return Trial(widths, score, -score, None, space.graph.macs(widths), space.graph.params(widths))


def best_within(space: SearchSpace, budget: Budget, judged: Mapping[tuple[int, ...], float]) -> tuple[float, float]:
    """Return score and usage of the best network near the budget; of the best one inside if none is near it."""
    usage = np.asarray(budget.usage(space.graph, np.array(list(judged)))).reshape(-1)
    scores = np.array(list(judged.values()))
    near = (usage <= 1) & (usage > NEAR_BUDGET)
    scores[~(near if near.any() else usage <= 1)] = -np.inf
    best = int(scores.argmax())
    return float(scores[best]), float(usage[best])


def gaps(space: SearchSpace, budget: Budget, names: Sequence[str], seeds: int, most: int) -> list[dict[str, Any]]:
    """Compare searchers with brute force; a gap of 0 is the best network near the budget, 1 the mean one inside."""
    points = every_point(space)
    usage = np.asarray(budget.usage(space.graph, points))
    rows: dict[str, list[tuple[float, int, float]]] = {name: [] for name in names}
    for seed in range(seeds):
        score = SyntheticScore(space, seed)
        scores = score(points)
        best, _ = best_within(space, budget, dict(zip(map(tuple, points.tolist()), scores.tolist(), strict=True)))
        mean = scores[usage <= 1].mean()
        for name in names:
            judged = searched(name, score, budget, seed, most)
            found, used = best_within(space, budget, judged)
            rows[name].append((float((best - found) / (best - mean)), len(judged), used))
    return [
        {
            "searcher": name,
            "points": len(points),
            "inside": int((usage <= 1).sum()),
            "near_budget": int(((usage <= 1) & (usage > NEAR_BUDGET)).sum()),
            "budget": str(budget),
            "seeds": seeds,
            "mean_gap": statistics.fmean(gap for gap, _, _ in found),
            "worst_gap": max(gap for gap, _, _ in found),
            "optimum_found": sum(gap <= 1e-12 for gap, _, _ in found),
            "mean_networks": statistics.fmean(judged for _, judged, _ in found),
            "least_usage": min(used for _, _, used in found),
        }
        for name, found in rows.items()
    ]


def small_spaces() -> list[SearchSpace]:
    """Return two spaces of 4,096 width vectors: six groups of four choices, four groups of eight."""

    def chain(depth: int) -> nn.Sequential:
        widths = [3, *[16] * depth, 4]
        convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
        return nn.Sequential(*[part for conv in convs for part in (conv, nn.ReLU())])

    return [uniform_space(trace(chain(depth), (1, 3, 6, 6)), k) for depth, k in ((6, 4), (4, 8))]


def draws(name: str, model: str, text: str, n: int, repeats: int) -> dict[str, Any]:
    """Time how long a searcher takes to make its ``n`` valid proposals on a large model."""
    space = uniform_space(trace(create_model(model)), 20)
    budget = parse_budget(text, space.graph)
    seconds, cpu_seconds = [], []
    for seed in range(repeats):
        asked, times = timed(partial(_asked, name, space, budget, n, seed))
        seconds.append(times.clock)
        cpu_seconds.append(times.processor)
    usage = np.asarray(budget.usage(space.graph, asked))
    assert all(budget.fits(space.graph, widths) for widths in asked)
    distinct = len({tuple(widths.values()) for widths in asked})
    return {
        "searcher": name,
        "model": model,
        "budget": text,
        "draws": len(asked),
        "distinct": distinct,
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "least_usage": float(usage.min()),
    }


def _asked(name: str, space: SearchSpace, budget: Budget, n: int, seed: int) -> list[dict[str, int]]:
    """Return all proposals of a searcher whose option ``n`` is their number; every score is 0."""
    searcher = SEARCHERS.build(name, {"n": n}, space, budget, np.random.default_rng(seed))
    asked: list[dict[str, int]] = []
    while not searcher.done:
        new = searcher.ask()
        asked += new
        searcher.tell(new, [0.0] * len(new))
    return asked


def populations(
    name: str, model: str, text: str, epochs: int, seeds: int, limit: int | None, strategy: str
) -> list[dict[str, Any]]:
    """Train supernets on digits; judge a searcher's first population with and without the history of training."""
    data = load_data("digits", image_size=16, limit=limit)
    rows = []
    for seed in range(seeds):
        dense = create_model(model, num_classes=data.num_classes)
        net = make_supernet(dense, strategy, example_inputs=(1, 3, 16, 16), k=10, min_width="0.1x", seed=seed)
        loader = make_loader(data.train, 32, train=True, seed=seed)
        train(net, loader, epochs, lr=0.02, clip_grad=5.0, seed=seed, device="cpu", progress=False)
        judge = Evaluator(net, make_loader(data.valid, 512, train=False), cross_entropy())
        budget = parse_budget(text, net.graph)
        first: dict[str, list[Judgement]] = {}
        recorded = net.width_history.records
        for kind, history in (("random", []), ("recorded", recorded)):
            rng = np.random.default_rng(seed)
            asked = SEARCHERS.build(name, {}, net.space, budget, rng, offered={"history": history}).ask()
            assert all(budget.fits(net.graph, widths) for widths in asked)
            first[kind] = [judge(widths) for widths in asked]
        scores = {kind: [j.score for j in found] for kind, found in first.items()}
        means = {kind: statistics.fmean(found) for kind, found in scores.items()}
        rows.append(
            {
                "searcher": name,
                "model": model,
                "strategy": strategy,
                "budget": text,
                "seed": seed,
                "epochs": epochs,
                "recorded_widths": len(recorded),
                **{f"{kind}_n": len(found) for kind, found in scores.items()},
                **{f"{kind}_mean_loss": -statistics.fmean(found) for kind, found in scores.items()},
                **{f"{kind}_best_loss": -max(found) for kind, found in scores.items()},
                **{
                    f"{kind}_mean_accuracy": statistics.fmean(j.accuracy or 0.0 for j in found)
                    for kind, found in first.items()
                },
                "gain_in_deviations": (means["recorded"] - means["random"]) / statistics.stdev(scores["random"]),
            }
        )
    return rows


def run(
    searchers: Sequence[str], seeds: int, evaluations: int, epochs: int, model: str, limit: int | None, out: Path | None
) -> None:
    """Measure and print all three comparisons."""
    console = Console(width=200)
    rows: list[dict[str, Any]] = []

    def say(row: dict[str, Any], text: str) -> None:
        rows.append(row)
        console.print(text, highlight=False)

    for space in small_spaces():
        for text in ("0.3x", "0.5x"):
            for row in gaps(space, parse_budget(text, space.graph), searchers, seeds, evaluations):
                say(
                    {"kind": "brute force", "most_networks": evaluations, **row},
                    f"{row['searcher']} at {text} of {row['points']} points ({row['near_budget']} near the budget), "
                    f"{row['mean_networks']:.0f} judged: mean gap {row['mean_gap']:.3f}, worst {row['worst_gap']:.3f}, "
                    f"optimum in {row['optimum_found']}/{seeds}, least usage {row['least_usage']:.3f}",
                )
    fast = draws("random", "timm/efficientnet_b0", "0.5x", 2000, 5)
    say(
        {"kind": "draws", **fast},
        f"{fast['draws']} draws on {fast['model']} at {fast['budget']}: {fast['seconds']:.2f} s, of these "
        f"{fast['cpu_seconds']:.2f} s on the processor; {fast['distinct']} distinct, "
        f"least usage {fast['least_usage']:.3f}",
    )
    for row in populations("evolution", model, "0.5x", epochs, 3, limit, "bc") if epochs else []:
        say(
            {"kind": "first population", **row},
            f"first population, seed {row['seed']}: mean loss {row['recorded_mean_loss']:.4f} where training went "
            f"well, {row['random_mean_loss']:.4f} at random; best {row['recorded_best_loss']:.4f} and "
            f"{row['random_best_loss']:.4f}; gain {row['gain_in_deviations']:+.2f} standard deviations",
        )
    write(out, "search", rows, seeds=seeds)
