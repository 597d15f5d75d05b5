"""Search in several stages with evolving bins (CafeNet, section 3.3, Eq. 10).

The budget falls linearly from the full network's cost to the target, bins get finer by a factor from stage to stage,
and the widths that a stage finds are the next stage's maximum: its supernet starts from the last one's weights, cut
down to these widths. So the space stays small while the steps become fine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.export import export
from widthkit.graph import ChannelGraph
from widthkit.graph.narrow import narrow
from widthkit.graph.space import Limit, SearchSpace, flops_bins, resolve_limit
from widthkit.search.near_budget import NEAR
from widthkit.search.result import SearchResult
from widthkit.supernet import Supernet
from widthkit.supernet.strategy import Strategy

TrainStage = Callable[[Supernet, int], object]
SearchStage = Callable[[Supernet, Budget, int], SearchResult]


def first_beta(alpha: float, stages: int) -> float:
    """Return the first stage's beta for which the last one has 1.

    Raises:
        OptionError: If ``alpha`` is not a positive number, or too extreme for so many stages.

    >>> first_beta(2, 3)
    4.0
    """
    _check_alpha(alpha)
    try:
        beta = float(alpha) ** (stages - 1)
    except OverflowError:
        beta = math.inf
    if not 0 < beta < math.inf:
        raise OptionError(f"alpha={alpha}: bins of alpha ** (stages - 1) channels make no sense; take one near 2")
    return beta


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise OptionError(f"alpha={alpha}: it must be a positive number")


@dataclass(frozen=True)
class StagePlan:
    """How a search goes on from stage to stage.

    Args:
        budget: The last stage's budget.
        stages: How many stages (T).
        alpha: Bins get finer by this factor from stage to stage.
        beta: Channels in a bin of the most sensitive group, in the first stage.
        min_width: As in :func:`widthkit.make_supernet`, in terms of the model's own widths.
        divisor: Widths are multiples of this.
        fixed: Group name -> the one width that it keeps.
    """

    budget: Budget
    stages: int = 3
    alpha: float = 2.0
    beta: float = 1.0
    min_width: Limit = 1
    divisor: int = 1
    fixed: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stages, bool) or not isinstance(self.stages, int) or self.stages < 1:
            raise OptionError(f"stages={self.stages}: a search has at least 1 stage")
        _check_alpha(self.alpha)

    def beta_at(self, stage: int) -> float:
        """Channels in a bin of the most sensitive group, in stage 1, 2...

        >>> plan = StagePlan(Budget(()), beta=4.0)
        >>> [plan.beta_at(stage) for stage in (1, 2, 3)]
        [4.0, 2.0, 1.0]
        """
        return float(self.beta / self.alpha ** (stage - 1))

    def budget_at(self, stage: int, first: SearchSpace) -> Budget:
        """Return the budget of stage 1, 2...: on a line from the first space's widest network to the target.

        Every bound falls on a line of its own; one that the widest network holds stays as it is.
        """
        if stage == self.stages:
            return self.budget
        full = self.budget.costs(first.graph, first.largest)
        limits = []
        for limit, cost in zip(self.budget.limits, full.tolist(), strict=True):
            ratio = max(1.0, cost - (cost - 1) * stage / self.stages)
            value = type(limit.value)(limit.value * ratio)
            limits.append(replace(limit, value=value, text=f"{limit.text} (stage {stage} of {self.stages}: {value})"))
        return Budget(tuple(limits))

    def check(self, first: SearchSpace) -> None:
        """Refuse a budget that the first stage's narrowest network, or the last stage's, exceeds.

        Args:
            first: The space of the first stage; the last one's is foreseen with the widths of the model as it is.

        Raises:
            BudgetError: Naming the narrowest network's cost.
        """
        self.budget_at(1, first).check(first)
        if self.stages > 1:
            self.budget.check(self.space_at(self.stages, first.graph, first.graph.full))

    def space_at(self, stage: int, graph: ChannelGraph, model: Mapping[str, int]) -> SearchSpace:
        """Return the space of a later stage: bins up to the widths of ``graph``, limits as for the ``model``."""
        space = flops_bins(graph, self.beta_at(stage), divisor=self.divisor, fixed=self.fixed)
        groups = []
        for g in space.groups:
            low = min(resolve_limit(self.min_width, model[g.name]), g.widest)
            options = {o for o in g.options if o >= low} | {g.widest}
            if self.min_width not in (1, "1") and low % self.divisor == 0 and len(g.options) > 1:
                options.add(low)
            groups.append(replace(g, options=tuple(sorted(options))))
        return replace(space, groups=tuple(groups))


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
        search: Called with a supernet, its budget and the number of the stage.

    Raises:
        BudgetError: If no network of a stage fits its budget.

    Both may take up what an interrupted run left: nothing else is needed to resume.
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
    """Replace a stage's result that is too small to be the next stage's maximum, for its budget could not be filled.

    That happens where the stage's own space has no network in the budget's band. The best judged network that exceeds
    the next budget takes its place, or the largest one.
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
    model: Any,
    train_loader: Any,
    valid_loader: Any,
    budget: Any,
    *,
    stages: int = 3,
    alpha: float = 2.0,
    bins: float | None = None,
    epochs: int = 10,
    strategy: str | Strategy = "bc",
    searcher: str = "greedy",
    min_width: Limit = 1,
    max_width: Limit = "1x",
    divisor: int = 1,
    fixed: Mapping[str, int] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    supernet: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    searching: Mapping[str, Any] | None = None,
) -> Stages:
    """Train and search in stages, from any model to the widths of the last stage.

    Args:
        model: Any ``nn.Module``; it stays as it is.
        train_loader: Batches for training, as in :func:`widthkit.train`.
        valid_loader: Held-out batches, as in :func:`widthkit.search`.
        budget: The last stage's budget, as in :func:`widthkit.search`.
        stages: How many stages (T; the paper takes 3).
        alpha: Bins get finer by this factor from stage to stage (the paper takes 2).
        bins: Channels in a bin of the most sensitive group in the first stage (beta); by default ``alpha ** (stages -
            1)``, so that the last stage has 1.
        epochs: Epochs of every stage's supernet.
        strategy: Sharing strategy.
        searcher: Name of a registered searcher.
        min_width: Narrowest width, in terms of the model's own.
        max_width: Widest width of the first stage.
        divisor: Widths are multiples of this.
        fixed: Group name -> the one width that it keeps.
        seed: Seed of everything.
        out: Folder; every stage has one of its own in it.
        resume: Take up an interrupted run in ``out``; the result is the same as without the interruption.
        supernet: More options of :func:`widthkit.make_supernet`.
        training: More options of :func:`widthkit.train`.
        searching: More options of :func:`widthkit.search`, the searcher's own included.

    Returns:
        The result and the last supernet: ``export(stages.net, stages.result.widths)``.

    Raises:
        WidthkitError: If an option makes no sense here, or no network fits the budget.
    """
    from widthkit.budget import parse_budget
    from widthkit.search import search
    from widthkit.supernet import make_supernet
    from widthkit.train import train

    beta = first_beta(alpha, stages) if bins is None else bins
    limits: dict[str, Any] = {"min_width": min_width, "divisor": divisor, "fixed": fixed}
    net = make_supernet(model, strategy, bins=beta, max_width=max_width, seed=seed, **limits, **(supernet or {}))
    plan = StagePlan(parse_budget(budget, net.graph), stages, alpha, beta, **limits)
    plan.check(net.space)
    folder = None if out is None else Path(out)
    place = (lambda stage: None) if folder is None else (lambda stage: folder / f"stage-{stage}")
    common: dict[str, Any] = {"seed": seed, "resume": resume}

    def train_one(net: Supernet, stage: int) -> object:
        return train(net, train_loader, epochs, out=place(stage), **common, **(training or {}))

    def search_one(net: Supernet, limit: Budget, stage: int) -> SearchResult:
        return search(net, valid_loader, limit, searcher, out=place(stage), **common, **(searching or {}))

    found = run_stages(net, plan, train_one, search_one)
    if folder is not None:
        found.result.save(folder / "search.json")
    return found
