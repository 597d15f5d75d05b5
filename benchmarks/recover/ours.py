"""The ways of widthkit: from widths without any search to supernets, sparse training and pruning in steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.recover.setup import Ledger, Setup
from widthkit.export import export
from widthkit.files import atomic_json
from widthkit.graph import ChannelGraph
from widthkit.run.stages import search_in_stages
from widthkit.search import Judging, SearchResult, search
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.strategy import make_strategy
from widthkit.train import train

CHOICES = 8
MOST_JUDGED = 2048
MIN_WIDTH = "0.125x"
SUPERNET_SHARE = 0.25
"""Share of the total cost that the training of a supernet takes."""


def uniform(setup: Setup, ledger: Ledger, seed: int, macs: float, folder: Path, *, rank: str) -> nn.Module:
    """One multiplier for all groups; the most important units stay."""
    return without_training(setup, ledger, seed, macs, folder, searcher="uniform", rank=rank, k=64)


def without_training(
    setup: Setup,
    ledger: Ledger,
    seed: int,
    macs: float,
    folder: Path,
    *,
    searcher: str,
    rank: str = "magnitude",
    k: int = CHOICES,
    **options: Any,
) -> nn.Module:
    """Search among sub-networks of the ranked network, as it was trained."""
    net = ranked_supernet(setup, ledger, seed, "whole", rank, k)
    return found(setup, ledger, net, seed, macs, folder, searcher, options)


def with_supernet(
    setup: Setup,
    ledger: Ledger,
    seed: int,
    macs: float,
    folder: Path,
    *,
    strategy: str,
    searcher: str = "greedy",
    rank: str | None = "magnitude",
    share: float = SUPERNET_SHARE,
    searching: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Train a supernet that starts from the ranked network, then search in it."""
    net = ranked_supernet(setup, ledger, seed, strategy, rank, CHOICES, macs=macs, **options)
    per_epoch = _expected_cost(net)
    epochs = max(1, int((share * setup.epochs) / per_epoch))
    ran, file = Ran(net), folder / "supernet-macs.json"
    train(
        net, setup.train_batches(seed), epochs, seed=seed, out=folder / "supernet", resume=True, progress=False,
        on_epoch=lambda entry: ran.store(file), **{**setup.final, "schedule": "cosine"},
    )  # fmt: skip
    ledger.trained("supernet", ran.mean(file), epochs * setup.train_images)
    return found(setup, ledger, net, seed, macs, folder, searcher, searching or {})


def iterative(
    setup: Setup,
    ledger: Ledger,
    seed: int,
    macs: float,
    folder: Path,
    *,
    searcher: str,
    rank: str = "magnitude",
    stages: int = 4,
    share: float = SUPERNET_SHARE,
    searching: dict[str, Any] | None = None,
) -> nn.Module:
    """Prune a little, train a little: every stage but the first trains the network that the one before left."""
    graph = setup.graph
    between = [(macs / graph.macs()) ** (stage / stages) for stage in range(1, stages)]
    epochs = max(1, round(share * setup.epochs / sum(between)))
    done = search_in_stages(
        setup.dense, setup.train_batches(seed), setup.held_out(judged_images(setup)), _budget(macs), stages=stages,
        epochs=epochs, first_epochs=0, searcher=searcher, seed=seed, out=folder / "iterative", resume=True,
        training={**setup.final, "schedule": "constant", "lr": setup.final["lr"] / 5, "progress": False},
        searching={"progress": False, "judging": Judging(batch_size=judged_images(setup)), **(searching or {})},
        strategy="whole", graph=graph, k=CHOICES, min_width=MIN_WIDTH, rank=rank,
    )  # fmt: skip
    rows = done.result.settings["stages"]
    for row in rows[:-1]:
        ledger.trained("iterative training", row["macs"], epochs * setup.train_images)
    for stage in range(1, stages + 1):
        judged = SearchResult.load(folder / "iterative" / f"stage-{stage}" / "search.json")
        if _judges(judged):
            ledger.ran("judging", sum(trial.macs for trial in judged.trials), judged_images(setup))
    return export(done.net, done.result)


def _budget(macs: float) -> str:
    return f"{macs / 1e6:.6f}MMACs"


def ranked_supernet(
    setup: Setup,
    ledger: Ledger,
    seed: int,
    strategy: str,
    rank: str | None,
    k: int,
    macs: float | None = None,
    **options: Any,
) -> Supernet:
    """Return a supernet that starts from the trained network, its units ranked."""
    if macs is not None:
        chosen: Any = make_strategy(strategy, options).for_budget(_budget(macs))
        options = {}
    else:
        chosen = strategy
    images = 2048 if rank in ("taylor", "hessian") else 0
    ledger.trained("ranking", setup.graph.macs(), images)
    return make_supernet(
        setup.dense, chosen, graph=setup.graph, k=k, min_width=MIN_WIDTH, seed=seed, rank=rank,
        rank_data=setup.held_out(images) if images else None, **options,
    )  # fmt: skip


def found(
    setup: Setup,
    ledger: Ledger,
    net: Supernet,
    seed: int,
    macs: float,
    folder: Path,
    searcher: str,
    options: dict[str, Any],
) -> nn.Module:
    """Search in a supernet and return the dense network that was found, with the supernet's weights."""
    result = search(
        net, setup.held_out(judged_images(setup)), _budget(macs), searcher, seed=seed, out=folder / "search",
        resume=True, progress=False, judging=Judging(batch_size=judged_images(setup)), **options,
    )  # fmt: skip
    if _judges(result):
        paths = len(net.paths(result.widths))
        ledger.ran("judging", paths * sum(trial.macs for trial in result.trials), judged_images(setup))
    return export(net, result)


def judged_images(setup: Setup) -> int:
    """Return on how many held-out images candidates are judged, so that judging takes about a tenth of the cost."""
    return min(MOST_JUDGED, max(128, round(MOST_JUDGED * setup.epochs / 40 / 64) * 64))


def _judges(result: SearchResult) -> bool:
    """Whether scores were compared; one candidate is judged for the record only."""
    return len(result.trials) > 1


def _expected_cost(net: Supernet) -> float:
    """Cost of one epoch of a supernet, in epochs of the dense network, by its strategy's count of forwards."""
    rng, space, graph = np.random.default_rng(0), net.space, net.graph
    mean = np.mean([graph.macs(space.sample(rng)) for _ in range(200)]) / graph.macs()
    steps = net.strategy.cost
    return float(steps.backwards * (mean if steps.backwards > 1 else 1.0))


class Ran:
    """Counts the MACs of everything that a supernet runs in training.

    Args:
        net: Its ``forward_on`` and ``forward_gated`` are counted from now on.
    """

    def __init__(self, net: Supernet) -> None:
        self.images, self.macs = 0, 0.0
        graph: ChannelGraph = net.wide_graph
        on, gated, step_once = net.forward_on, net.forward_gated, net.train_step

        def forward_on(units: Any, step: Any) -> Any:
            self.macs += graph.macs({name: len(kept) for name, kept in units.items()}) * len(step.inputs)
            return on(units, step)

        def forward_gated(gates: Any, step: Any) -> Any:
            self.macs += graph.macs() * len(step.inputs)
            return gated(gates, step)

        def train_step(step: Any) -> Any:
            self.images += len(step.inputs)
            return step_once(step)

        net.forward_on, net.forward_gated = forward_on, forward_gated  # type: ignore[method-assign]
        net.train_step = train_step  # type: ignore[method-assign]

    def store(self, file: Path) -> None:
        """Write the MACs per image, for a call that finds the training over."""
        atomic_json(file, {"macs": self.macs / self.images})

    def mean(self, file: Path) -> float:
        """Return the MACs per image of a training step; the file has them where training was over already."""
        if self.images:
            self.store(file)
        return float(json.loads(file.read_text())["macs"])
