"""Search in several stages with evolving bins (CafeNet, section 3.3).

The widths that a stage finds are the next stage's maximum: its supernet starts from the last one's weights, cut down to
these widths. So the space stays small while the steps become fine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from widthkit.budget import Budget, parse_budget
from widthkit.export import export
from widthkit.graph import ChannelGraph
from widthkit.graph.resize import narrow
from widthkit.run.stage_plan import StagePlan, first_beta
from widthkit.search import search
from widthkit.search.near_budget import NEAR
from widthkit.search.result import SearchResult
from widthkit.supernet import Supernet, make_supernet
from widthkit.train import train

TrainStage = Callable[[Supernet, int], object]
SearchStage = Callable[[Supernet, Budget, int], SearchResult]


@dataclass(frozen=True)
class Stages:
    """The outcome of a search in stages.

    Args:
        result: The last stage's result, in terms of the model as it was given.
        net: The last stage's supernet; the result's weights come from it.
    """

    result: SearchResult
    net: Supernet


def run_stages(net: Supernet, plan: StagePlan, train: TrainStage, search: SearchStage) -> Stages:
    """Train and search, stage after stage.

    Args:
        net: The first stage's supernet.
        plan: How to go on.
        train: Called with a supernet and the number of its stage, from 1; leaves it trained.
        search: Called with a supernet, its budget and the number of the stage. To resume an interrupted run, both
            functions go on with what it left.

    Raises:
        BudgetError: If no network of a stage fits its budget.
    """
    first = net
    rows: list[dict[str, Any]] = []
    result: SearchResult | None = None
    for stage in range(1, plan.stages + 1):
        if result is not None:
            net = next_supernet(net, rows[-1]["widths"], plan, stage, first)
        train(net, stage)
        budget = plan.budget_at(stage, first.space)
        result = search(net, budget, stage)
        row = _row(stage, plan, net, result)
        if stage < plan.stages:
            row |= _with_room(result, budget, plan.budget_at(stage + 1, first.space), net.graph)
        rows.append(row)
    assert result is not None
    full = {"widths": first.graph.full, "macs": first.graph.macs(), "params": first.graph.params()}
    return Stages(replace(result, full=full, settings={**result.settings, "stages": rows}), net)


def next_supernet(
    net: Supernet, widths: Mapping[str, int], plan: StagePlan, stage: int, first: Supernet | None = None
) -> Supernet:
    """Return the supernet of a stage: the one before, cut down to the widths that were found, with its weights.

    Args:
        net: The supernet of the stage before.
        widths: What that stage found.
        plan: How to go on.
        stage: The number of the new stage.
        first: The first stage's supernet, whose model sets the limits; ``net`` by default.
    """
    model = export(net, dict(widths))
    _, graph = narrow(net.wide_graph, widths)
    space = plan.space_at(stage, graph, (first or net).graph.full)
    return Supernet(model, graph, space, net.strategy, seed=net.seed)


def _with_room(result: SearchResult, budget: Budget, following: Budget, graph: ChannelGraph) -> dict[str, Any]:
    """Return what replaces a stage's result that is too small to be the next stage's maximum; nothing if it is not.

    That happens where the stage's own space has no network near its budget. The best judged network that exceeds the
    next budget takes its place, or the largest one.
    """
    if following.usage(graph, result.widths) > NEAR:
        return {}
    inside = [t for t in result.trials if math.isfinite(t.score) and budget.fits(graph, t.widths)]
    larger = [t for t in inside if following.usage(graph, t.widths) > 1]
    chosen = (
        max(larger, key=lambda t: t.score) if larger else max(inside, key=lambda t: following.usage(graph, t.widths))
    )
    return {"widths": chosen.widths, "score": chosen.score, "macs": chosen.macs, "params": chosen.params}


def _row(stage: int, plan: StagePlan, net: Supernet, result: SearchResult) -> dict[str, Any]:
    return {
        "stage": stage,
        "beta": plan.beta_at(stage),
        "budget": result.budget,
        "space_size": str(net.space.size),
        "networks": len(result.trials),
        "score": result.score,
        "macs": result.macs,
        "params": result.params,
        "widths": result.widths,
        "remark": result.settings.get("remark"),
    }


def search_in_stages(
    model: nn.Module,
    train_loader: Iterable[Any],
    valid_loader: Iterable[Any],
    budget: str | Sequence[str] | Budget,
    *,
    stages: int = 3,
    alpha: float = 2.0,
    bins: float | None = None,
    epochs: int = 10,
    searcher: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    training: Mapping[str, Any] | None = None,
    searching: Mapping[str, Any] | None = None,
    **supernet: Any,
) -> Stages:
    """Train and search in stages, from any model to the widths of the last stage.

    Args:
        model: Any ``nn.Module``; it stays as it is.
        train_loader: Batches for training, as in :func:`widthkit.train`.
        valid_loader: Held-out batches, as in :func:`widthkit.search`.
        budget: The last stage's budget, as in :func:`widthkit.search`.
        stages: How many stages (T; the paper takes 3).
        alpha: Bins get finer by this factor from stage to stage (the paper takes 2).
        bins: Channels in the first stage's smallest bins (beta); by default so many that the last stage has 1.
        epochs: Epochs of every stage's supernet.
        searcher: As in :func:`widthkit.search`.
        seed: Seeds everything that is drawn at random.
        out: Folder; every stage has one of its own in it.
        resume: Go on with an interrupted run in ``out``; the result is the same as without the interruption.
        training: More options of :func:`widthkit.train`.
        searching: More options of :func:`widthkit.search`, those of the searcher included.
        **supernet: Options of :func:`widthkit.make_supernet`; bounds are on the model's own widths in every stage.

    Returns:
        The result and the last supernet: ``export(stages.net, stages.result.widths)``.

    Raises:
        WidthkitError: If an option makes no sense here, or no network fits the budget.
    """
    beta = first_beta(alpha, stages) if bins is None else bins
    net = make_supernet(model, bins=beta, seed=seed, **supernet)
    limits = {name: supernet[name] for name in ("min_width", "divisor", "fixed") if name in supernet}
    plan = StagePlan(parse_budget(budget, net.graph), stages, alpha, beta, **limits)
    plan.check(net.space)
    common: dict[str, Any] = {"seed": seed, "resume": resume}

    def train_one(net: Supernet, stage: int) -> object:
        return train(net, train_loader, epochs, out=_stage_folder(out, stage), **common, **(training or {}))

    def search_one(net: Supernet, limit: Budget, stage: int) -> SearchResult:
        return search(net, valid_loader, limit, searcher, out=_stage_folder(out, stage), **common, **(searching or {}))

    found = run_stages(net, plan, train_one, search_one)
    if out is not None:
        found.result.save(Path(out) / "search.json")
    return found


def _stage_folder(out: str | Path | None, stage: int) -> Path | None:
    return None if out is None else Path(out) / f"stage-{stage}"
