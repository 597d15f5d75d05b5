"""How good searchers are: against brute force, as starting populations, and in speed."""

from __future__ import annotations

import inspect
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from torch import nn
from widthkit.search.build import make_searcher

from widthkit.bench.files import write
from widthkit.budget import Budget, parse_budget
from widthkit.graph.space import SearchSpace, uniform_space
from widthkit.modules.models import create_model
from widthkit.search.evaluator import Evaluator, Judgement
from widthkit.search.journal import Journal
from widthkit.search.loop import run_loop
from widthkit.search.near_budget import BAND
from widthkit.search.result import Trial
from widthkit.search.searcher import SEARCHERS, Searcher
from widthkit.search.top_up import best_inside, filler
from widthkit.supernet import make_supernet
from widthkit.trace import trace
from widthkit.train import load_data, make_loader, train
from widthkit.train.history import WidthRecord
from widthkit.train.losses import cross_entropy

FloatArray = npt.NDArray[np.float64]
_NOISE = 0.05
"""Standard deviation of the noise in simulated training losses."""


class SyntheticScore:
    """A cheap score with a known optimum: concave in every width, coupled between neighbours, a little rugged.

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

    def __call__(self, widths: npt.NDArray[np.int64]) -> FloatArray:
        """Score width vectors ``[n, groups]``."""
        share = widths / self._widest
        loss = (self._a * (1 - share) ** 2).mean(axis=1)
        loss += (self._b[1:] * np.diff(share, axis=1) ** 2).sum(axis=1) / len(self._widest)
        ripple = self._ripple[(widths * np.arange(1, widths.shape[1] + 1) ** 3).sum(axis=1) % len(self._ripple)]
        return np.asarray(ripple - loss)

    def judge(self, widths: Mapping[str, int]) -> Judgement:
        """Score one width vector, as the search's loop wants it."""
        score = float(self(np.array([[widths[name] for name in self.space.names]]))[0])
        return Judgement(score, -score, None)

    def history(self, n: int, seed: int, keep: int = 100) -> list[WidthRecord]:
        """Simulate a supernet's training: random widths, noisy losses, the best of them."""
        rng = np.random.default_rng([seed, 1])
        drawn = [self.space.sample(rng) for _ in range(n)]
        scores = self(np.array([list(w.values()) for w in drawn])) + _NOISE * rng.normal(size=n)
        return sorted(zip(drawn, (-scores).tolist(), strict=True), key=lambda record: record[1])[:keep]


def every_point(space: SearchSpace) -> npt.NDArray[np.int64]:
    """Return ``[size, groups]``: all width vectors of a space."""
    return np.array(list(itertools.product(*(g.options for g in space.groups))), dtype=np.int64)


def build(name: str, space: SearchSpace, budget: Budget, seed: int, history: Sequence[WidthRecord]) -> Searcher:
    """Build a searcher with its own defaults; it gets the history if it wants one."""
    cls = SEARCHERS.get(name)
    given = {"history": history} if "history" in inspect.signature(cls).parameters else {}
    return cls(space, budget, np.random.default_rng(seed), **given)


def searched(engine: Searcher, judge: Callable[[Mapping[str, int]], Judgement], seed: int, most: int) -> list[Trial]:
    """Run a search as :func:`widthkit.search` does, but end it after ``most`` different networks."""
    known: dict[str, Judgement] = {}

    def counted(widths: Mapping[str, int]) -> Judgement:
        if len(known) >= most:
            raise _EnoughError
        return judge(widths)

    trials: list[Trial] = []
    with suppress(_EnoughError):
        run_loop(engine, engine.space.graph, counted, Journal(None, ""), known, [lambda t, _: trials.append(t)])
    rest = filler(engine.space, engine.budget, trials, seed)
    return trials + ([] if rest is None else run_loop(rest, engine.space.graph, judge, Journal(None, ""), known))


class _EnoughError(Exception):
    pass


def gaps(space: SearchSpace, budget: Budget, names: Sequence[str], seeds: int, most: int) -> list[dict[str, Any]]:
    """Compare searchers with brute force; a gap of 0 is the best network in the band, 1 the mean one inside."""
    points = every_point(space)
    usage = np.asarray(budget.usage(space.graph, points))
    rows: dict[str, list[tuple[float, int, float]]] = {name: [] for name in names}
    for seed in range(seeds):
        score = SyntheticScore(space, seed)
        scores = score(points)
        in_band = (usage <= 1) & (usage > BAND)
        best = scores[in_band if in_band.any() else usage <= 1].max()
        blind = scores[usage <= 1].mean()
        for name in names:
            trials = searched(build(name, space, budget, seed, score.history(500, seed)), score.judge, seed, most)
            found = best_inside(space, budget, trials, BAND) or best_inside(space, budget, trials)
            assert found is not None
            judged = len({tuple(t.widths.values()) for t in trials})
            used = float(budget.usage(space.graph, found.widths))
            rows[name].append((float((best - found.score) / (best - blind)), judged, used))
    return [
        {
            "searcher": name,
            "points": len(points),
            "inside": int((usage <= 1).sum()),
            "in_band": int(((usage <= 1) & (usage > BAND)).sum()),
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
        start, cpu = time.perf_counter(), time.process_time()
        engine = SEARCHERS.get(name)(space, budget, np.random.default_rng(seed), n=n)  # type: ignore[call-arg]
        asked = []
        while not engine.done:
            asked += engine.ask()
            engine.tell(asked[-1:], [0.0])
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
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


def populations(
    name: str, model: str, text: str, epochs: int, seeds: int, limit: int | None, strategy: str
) -> list[dict[str, Any]]:
    """Train supernets on digits and judge a searcher's first population with and without what training recorded."""
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
        kinds: dict[str, dict[str, Any]] = {"random": {"history": []}, "recorded": {}}
        for kind, options in kinds.items():
            engine = make_searcher(name, net, budget, np.random.default_rng(seed), options)
            asked = engine.ask()
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
                "recorded_widths": len(net.width_history.records),
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
    """Measure and print all of it."""
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
                    f"{row['searcher']} at {text} of {row['points']} points ({row['in_band']} in the band), "
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
