"""Search in several stages: evolving bins (CafeNet, section 3.3), or iterative pruning.

The widths that a stage finds are the next stage's maximum: its supernet starts from the last one's weights, cut down to
these widths. With FLOPs-sensitive bins the space stays small while the steps become fine. Without them a trained
network becomes narrower little by little: train a little, rank the units anew, search, cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from widthkit.budget import Budget, parse_budget
from widthkit.errors import Option, OptionError
from widthkit.export import export
from widthkit.graph import ChannelGraph
from widthkit.graph.resize import narrow
from widthkit.run.stage_plan import StagePlan
from widthkit.search import search
from widthkit.search.near_budget import NEAR
from widthkit.search.result import SearchResult
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.ranking import Scores, unit_scores
from widthkit.train import train

TrainStage = Callable[[Supernet, int], object]
SearchStage = Callable[[Supernet, Budget, int], SearchResult]
Rank = Callable[[nn.Module, ChannelGraph], Scores]
"""Scores the units of a model, so that the next supernet can order them by importance."""


@dataclass(frozen=True)
class Stages:
    """The outcome of a search in stages.

    Args:
        result: The last stage's result, in terms of the model as it was given; its units are those of :attr:`net`.
        net: The last stage's supernet; the result's weights come from it.
    """

    result: SearchResult
    net: Supernet


def run_stages(
    net: Supernet, plan: StagePlan, train: TrainStage, search: SearchStage, rank: Rank | None = None
) -> Stages:
    """Train and search, stage after stage.

    Args:
        net: The first stage's supernet.
        plan: How to go on.
        train: Called with a supernet and the number of its stage, from 1; leaves it trained.
        search: Called with a supernet, its budget and the number of the stage. To resume an interrupted run, both
            functions go on with what it left.
        rank: Ranks the units of later stages' supernets.

    Raises:
        BudgetError: If no network of a stage fits its budget.
    """
    first = net
    rows: list[dict[str, Any]] = []
    result: SearchResult | None = None
    for stage in range(1, plan.stages + 1):
        if result is not None:
            net = next_supernet(net, rows[-1]["widths"], plan, stage, first, rank, rows[-1]["path"])
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
    net: Supernet,
    widths: Mapping[str, int],
    plan: StagePlan,
    stage: int,
    first: Supernet | None = None,
    rank: Rank | None = None,
    path: int = 0,
) -> Supernet:
    """Return the supernet of a stage: the one before, cut down to the widths that were found, with its weights.

    Args:
        net: The supernet of the stage before.
        widths: What that stage found.
        plan: How to go on.
        stage: The number of the new stage.
        first: The first stage's supernet, whose model sets limits and relative costs; ``net`` by default.
        rank: Ranks the units that are left.
        path: Which of the strategy's paths was judged best at these widths; its units are passed on.
    """
    first = first or net
    model = export(net, dict(widths), path=path)
    _, graph = narrow(net.wide_graph, widths)
    space = plan.space_at(stage, graph, first.space)
    scores = None if rank is None else rank(model, graph)
    return Supernet(model, graph, space, net.strategy, seed=net.seed, scores=scores, reference=first.graph)


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
    return {name: getattr(chosen, name) for name in ("widths", "path", "score", "macs", "params")}


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
        "path": result.best.path,
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
    first_epochs: int | None = None,
    searcher: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    training: Mapping[str, Any] | None = None,
    searching: Mapping[str, Any] | None = None,
    **supernet: Any,
) -> Stages:
    """Train and search in stages, from any model to the widths of the last stage.

    Without ``bins`` this is iterative pruning of a trained network, with any strategy and searcher::

        search_in_stages(model, train, valid, "0.5x", stages=5, epochs=4, first_epochs=0,
                         strategy="whole", rank="magnitude", searcher="importance")

    Args:
        model: Any ``nn.Module``; it stays as it is.
        train_loader: Batches for training, as in :func:`widthkit.train`.
        valid_loader: Held-out batches, as in :func:`widthkit.search`.
        budget: The last stage's budget, as in :func:`widthkit.search`. The budgets of the stages before lie between
            the model's cost and this one: on a line with ``bins``, else in equal ratios.
        stages: How many stages (T; CafeNet takes 3).
        alpha: Bins get finer by this factor from stage to stage (CafeNet takes 2).
        bins: Channels in the first stage's smallest bins (beta); ``alpha ** (stages - 1)`` ends with 1. By default
            there are no bins, and every stage has those of the first stage's choices that are left.
        epochs: Epochs of every stage's supernet; 0 trains none.
        first_epochs: Epochs of the first stage's; as many as of the others by default. A trained model needs none.
        searcher: As in :func:`widthkit.search`.
        seed: Seeds everything that is drawn at random.
        out: Folder; every stage has one of its own in it.
        resume: Go on with an interrupted run in ``out``; the result is the same as without the interruption.
        training: More options of :func:`widthkit.train`.
        searching: More options of :func:`widthkit.search`, those of the searcher included.
        **supernet: Options of :func:`widthkit.make_supernet`. Bounds are on the model's own widths in every stage, and
            ``rank`` ranks the units at the start of every stage.

    Returns:
        The result and the last supernet: ``export(stages.net, stages.result)``.

    Raises:
        WidthkitError: If an option makes no sense here, or no network fits the budget.
    """
    rank = _ranking(stages, **{name: supernet[name] for name in ("rank", "rank_data", "rank_loss") if name in supernet})
    net = make_supernet(model, bins=bins, seed=seed, budget=_as_text(budget), **supernet)
    limits = {name: supernet[name] for name in ("min_width", "divisor", "fixed") if name in supernet}
    plan = StagePlan(parse_budget(budget, net.graph), stages, alpha, bins, **limits)
    plan.check(net.space)
    common: dict[str, Any] = {"seed": seed, "resume": resume}

    def train_one(net: Supernet, stage: int) -> None:
        count = epochs if stage > 1 or first_epochs is None else first_epochs
        if count:
            train(net, train_loader, count, out=_stage_folder(out, stage), **common, **(training or {}))

    def search_one(net: Supernet, limit: Budget, stage: int) -> SearchResult:
        return search(net, valid_loader, limit, searcher, out=_stage_folder(out, stage), **common, **(searching or {}))

    found = run_stages(net, plan, train_one, search_one, rank)
    if out is not None:
        found.result.save(Path(out) / "search.json")
    return found


def _ranking(
    stages: int,
    rank: str | Scores | None = None,
    rank_data: Iterable[Any] | None = None,
    rank_loss: Callable[[Any, Any], Tensor] | None = None,
) -> Rank | None:
    """Return how later stages rank their units.

    Raises:
        OptionError: If there are scores, which only fit the first stage.
    """
    if rank is not None and not isinstance(rank, str) and stages > 1:
        raise OptionError(Option("rank"), ": scores of units fit the first stage only; name a criterion instead")
    return partial(unit_scores, criterion=rank, data=rank_data, loss=rank_loss) if isinstance(rank, str) else None


def _as_text(budget: str | Sequence[str] | Budget) -> str:
    if isinstance(budget, Budget):
        return ",".join(limit.text for limit in budget.limits)
    return budget if isinstance(budget, str) else ",".join(budget)


def _stage_folder(out: str | Path | None, stage: int) -> Path | None:
    return None if out is None else Path(out) / f"stage-{stage}"
