"""Measure how well score models rank networks whose accuracy is known (Channel-Bench-Macro)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau
from widthkit_plugins.searchers.guided.design import d_optimal, design_columns
from widthkit_plugins.searchers.guided.searcher import GuidedSearcher

from benchmarks.channel_bench import ChannelBench, load
from widthkit.bench.files import write
from widthkit.budget import Budget, Limit
from widthkit.errors import DataError
from widthkit.graph import FloatArray, IntArray
from widthkit.search.score_model import SCORE_MODELS, Observations
from widthkit.version import versions

EVALUATIONS = (64, 256, 1024)
CALIBRATIONS = 32
Predict = Callable[[Observations, Observations | None], FloatArray]


@dataclass(frozen=True)
class Ranking:
    """One line of the table.

    Args:
        scores: Name of the published scores; ``-`` for none.
        evaluations: How many of them the method saw.
        calibration: Which networks were trained: ``none``, ``random`` or ``design``, the latter inside the budget.
        method: The score model, or what else ranks.
        tau: Kendall's tau over all networks against the mean of three trainings, averaged over seeds.
        tau_std: Its standard deviation over seeds.
        regret: How far the network picked inside the budget is below the highest mean of three trainings there.
        expected_regret: The same on the ground truth without the noise of training (:func:`denoised`).
        unseen_regret: As ``regret``, with the pick's accuracy from the trainings that the method did not see.
    """

    scores: str
    evaluations: int
    calibration: str
    method: str
    tau: float
    tau_std: float
    regret: float
    expected_regret: float
    unseen_regret: float


class Benchmark:
    """The table of one space.

    Args:
        bench: The space and its ground truth.
        share: The budget as a share of the largest network's MACs.
        seeds: How many draws of networks and trainings every random figure is averaged over.
    """

    def __init__(self, bench: ChannelBench, share: float = 0.5, seeds: int = 20) -> None:
        self.bench, self.seeds = bench, seeds
        self.truth = bench.accuracy.mean(1)
        self.smooth = denoised(bench)
        limit = int(bench.macs.max() * share)
        self.budget = Budget((Limit("macs", limit, f"{share:g}x"),))
        self.inside = np.flatnonzero(bench.macs <= limit)
        if not len(self.inside):
            raise DataError(f"no network of {bench.name} has at most {share:g} of the largest one's MACs")

    def row(self, scores: str, values: FloatArray, n: int, calibration: str, method: str) -> Ranking:
        """Run one method over the seeds (once where nothing is drawn)."""
        known = np.flatnonzero(np.isfinite(values))
        drawn = calibration != "none" or 0 < n < len(known)
        found = []
        for seed in range(self.seeds if drawn else 1):
            rng = np.random.default_rng(seed)
            some = rng.choice(known, n, replace=False) if 0 < n < len(known) else known[: n or 0]
            real, run = self._calibrated(calibration, rng)
            prediction = self._predict(method, values, some, real, run)
            found.append([*self.judge(prediction, real, run)])
        tau, regret, expected, unseen = np.mean(found, axis=0).tolist()
        spread = float(np.std([f[0] for f in found]))
        return Ranking(scores, len(some), calibration, method, tau, spread, regret, expected, unseen)

    def guided(self, scores: str, values: FloatArray, n: int, model: str) -> Ranking:
        """Let a search choose the networks to evaluate, and pick one; published scores stand in for the supernet."""
        place = {tuple(w): i for i, w in enumerate(self.bench.widths.tolist())}
        space, nobody = self.bench.space, np.zeros(0, dtype=np.int64)

        found = []
        for seed in range(self.seeds):
            search = GuidedSearcher(
                space, self.budget, np.random.default_rng(seed), model=model, proposals="random", evaluations=n
            )
            while not search.done:
                asked = search.ask()
                search.tell(asked, [float(values[place[tuple(widths.values())]]) for widths in asked])
            choice = search.choice()
            assert choice is not None
            pick = place[tuple(choice.values())]
            tau = self.judge(search.model.predict(self.bench.widths).mean, nobody, nobody)[0]
            found.append([tau, *self.regrets(pick, nobody, nobody)])
        tau, regret, expected, unseen = np.mean(found, axis=0).tolist()
        return Ranking(
            scores, n, "none", f"search, {model}", tau, float(np.std(found, axis=0)[0]), regret, expected, unseen
        )

    def judge(self, prediction: FloatArray, real: IntArray, run: IntArray) -> tuple[float, float, float, float]:
        """Return tau, regret, expected regret and unseen regret of a prediction ``[n]``."""
        tau = float(kendalltau(prediction, self.truth).statistic)
        order = np.lexsort((self.bench.macs[self.inside], -prediction[self.inside]))
        return tau, *self.regrets(int(self.inside[order[0]]), real, run)

    def regrets(self, pick: int, real: IntArray, run: IntArray) -> tuple[float, float, float]:
        """Return regret, expected regret and unseen regret of one network."""
        best = self.truth[self.inside].max()
        unseen = np.delete(self.bench.accuracy[pick], run[real == pick]).mean()
        expected = self.smooth[self.inside].max() - self.smooth[pick]
        return float(best - self.truth[pick]), float(expected), float(best - unseen)

    def _calibrated(self, how: str, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Return which networks are trained, and which of its three runs each gets."""
        if how == "none":
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if how == "random":
            chosen = rng.choice(len(self.truth), CALIBRATIONS, replace=False)
        else:
            pool = self.inside
            chosen = pool[d_optimal(design_columns(self.bench.space, self.bench.widths[pool]), CALIBRATIONS, rng)]
        return chosen, rng.integers(self.bench.accuracy.shape[1], size=len(chosen))

    def _predict(self, method: str, values: FloatArray, some: IntArray, real: IntArray, run: IntArray) -> FloatArray:
        widths, accuracy = self.bench.widths, self.bench.accuracy[real, run]
        if method == "raw scores":
            return np.where(np.isfinite(values), values, np.nanmin(values))
        if method == "MACs":
            return self.bench.macs.astype(np.float64)
        if method == "ridge":
            return self._ridge(*((widths[some], values[some]) if len(some) else (widths[real], accuracy)))
        model = SCORE_MODELS.get(method)(self.bench.space)
        model.fit(Observations(widths[some], values[some]), Observations(widths[real], accuracy) if len(real) else None)
        return model.predict(widths).mean

    def _ridge(self, widths: IntArray, values: FloatArray) -> FloatArray:
        from sklearn.linear_model import Ridge

        widest = self.bench.widths.max(0)
        fitted = Ridge(alpha=1.0).fit(np.log(widths / widest), values)
        return np.asarray(fitted.predict(np.log(self.bench.widths / widest)))


def denoised(bench: ChannelBench) -> FloatArray:
    """Return ``[n]``: the ground truth smoothed by regression on all trainings.

    The regressors are powers of the log widths up to the third, and products of the log widths of two groups. The
    residuals are as large as the noise of three trainings, so only noise is lost.
    """
    x = np.log(bench.widths / bench.widths.max(0))
    n = x.shape[1]
    powers = [x, x**2, x**3]
    products = [(x[:, i] * x[:, j])[:, None] for i in range(n) for j in range(i + 1, n)]
    columns = np.concatenate([np.ones((len(x), 1)), *powers, *products], axis=1)
    truth = bench.accuracy.mean(1)
    return np.asarray(columns @ np.linalg.lstsq(columns, truth, rcond=None)[0])


def run(
    folder: Path, name: str, scores: list[Path] | None, seeds: int, share: float, models: list[str], out: Path | None
) -> list[Ranking]:
    """Fill the table, print it, and write it to a file."""
    bench = load(folder, name)
    table = Benchmark(bench, share, seeds)
    files = scores if scores is not None else sorted(folder.glob("published_scores_*.json"))
    if name != "MobileNet" and scores is None:
        files = []  # the published files beside the data are of the MobileNet space
    rows = [table.row("-", np.zeros(len(bench.keys)), 0, "none", "MACs")]
    nothing = np.full(len(bench.keys), np.nan)
    for how in ("random", "design"):
        rows += [table.row("-", nothing, 0, how, method) for method in ("ridge", *models)]
    for file in files:
        rows += _of_scores(table, file.stem.removeprefix("published_scores_"), bench.scores(file), models)
    _print(rows, table)
    noise = float(np.sqrt(bench.accuracy.var(1, ddof=1).mean() / bench.accuracy.shape[1]))
    more: dict[str, Any] = {
        "space": name,
        "seeds": list(range(seeds)),
        "budget": str(table.budget),
        "calibrations": CALIBRATIONS,
        "networks": len(bench.keys),
        "ceiling": _ceiling(table),
        "noise_of_the_truth": noise,
        "residual_of_the_denoised_truth": float((table.truth - table.smooth).std()),
        "libraries": {k: v for k, v in _libraries().items() if k not in versions()},
    }
    write(out, "score-model", [vars(row) for row in rows], **more)
    return rows


def _of_scores(table: Benchmark, name: str, values: FloatArray, models: list[str]) -> list[Ranking]:
    everything = int(np.isfinite(values).sum())
    rows = [table.row(name, values, everything, "none", "raw scores")]
    for n in (*EVALUATIONS, everything):
        rows += [table.row(name, values, n, "none", method) for method in ("ridge", *models)]
    rows += [table.guided(name, values, n, model) for n in EVALUATIONS[:2] for model in models]
    for n in (256, everything):
        rows += [table.row(name, values, n, how, method) for how in ("random", "design") for method in models]
    return rows


def _ceiling(table: Benchmark) -> dict[str, float]:
    """Return what a perfect model reaches: the denoised truth against the measured one."""
    nobody = np.zeros(0, dtype=np.int64)
    tau, regret, _, _ = table.judge(table.smooth, nobody, nobody)
    return {"tau": tau, "regret": regret}


def _libraries() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("scikit-learn", "scipy", "numpy")}


def _print(rows: list[Ranking], table: Benchmark) -> None:
    shown = Table(
        box=None, title=f"{table.bench.name}: {len(table.truth)} networks, budget {table.budget}, {table.seeds} seeds"
    )
    for heading in ("scores", "seen", "trained", "method", "tau", "± seeds", "regret", "expected", "unseen"):
        shown.add_column(heading, justify="left" if heading in ("scores", "trained", "method") else "right")
    for r in rows:
        figures = [f"{r.tau:.4f}", f"{r.tau_std:.4f}", *(f"{v:.3f}" for v in (r.regret, r.expected_regret))]
        shown.add_row(r.scores, str(r.evaluations), r.calibration, r.method, *figures, f"{r.unseen_regret:.3f}")
    console = Console()
    console.width = max(console.width, 100)
    console.print(shown)
    ceiling = _ceiling(table)
    console.print(
        f"the denoised truth itself: tau {ceiling['tau']:.4f}, regret {ceiling['regret']:.3f}", highlight=False
    )
