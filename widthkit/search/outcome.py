"""From trials to a result, measured and described."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from widthkit.budget import Budget, show_count
from widthkit.errors import BudgetError, ModelError, PluginError
from widthkit.graph import IntArray
from widthkit.search.measured import describe_rows, measure_result, remarks
from widthkit.search.near_budget import NEAR
from widthkit.search.result import SearchResult, Trial
from widthkit.search.searcher import WidthVector
from widthkit.search.top_up import best_inside
from widthkit.supernet import Supernet


def check_chosen(net: Supernet, budget: Budget, chosen: Mapping[str, IntArray]) -> None:
    """Refuse a budget that the widths chosen in training exceed.

    Raises:
        BudgetError: If so.
    """
    widths = {name: len(units) for name, units in chosen.items()}
    if not budget.fits(net.graph, widths):
        macs, params = net.graph.macs(widths), net.graph.params(widths)
        raise BudgetError(
            f"training chose widths of {show_count(macs)} MACs and {show_count(params)} params, which exceeds the "
            f"budget {budget}; make and train a new supernet for this budget"
        )


def make_result(
    net: Supernet, budget: Budget, trials: list[Trial], settings: Mapping[str, Any], choice: WidthVector | None = None
) -> SearchResult:
    """Return the result of a search, not measured yet.

    Args:
        net: The supernet.
        budget: What the result may cost.
        trials: Every judged network.
        settings: ``searcher``, ``seed``, and what else the result depends on.
        choice: The searcher's own choice among the trials; by default the best score among those that use more than
            97% of the budget, if there are any, else among those inside it.

    Raises:
        BudgetError: If no trial is inside the budget.
        ModelError: If none that is has a finite score.
        PluginError: If the searcher's choice was not judged, or is outside the budget.
    """
    inside = [t for t in trials if budget.fits(net.graph, t.widths)]
    if not inside:
        raise BudgetError(f"no judged network was inside the budget {budget}; the searcher proposed {len(trials)}")
    if choice is not None:
        best = next((t for t in inside if t.widths == dict(choice)), None)
        if best is None:
            raise PluginError(
                f"searcher '{settings['searcher']}' chose widths that it had not judged inside the budget"
            )
    else:
        best = best_inside(net.space, budget, inside, NEAR) or best_inside(net.space, budget, inside)
    if best is None:
        raise ModelError(
            f"none of the {len(inside)} networks inside the budget has a finite loss; the supernet diverged or the "
            "held-out data holds NaN"
        )
    kept = {name: value for name, value in settings.items() if name not in ("searcher", "seed", "budget")}
    return SearchResult(
        widths=best.widths,
        score=best.score,
        accuracy=best.accuracy,
        macs=best.macs,
        params=best.params,
        budget=str(budget),
        searcher=settings["searcher"],
        seed=settings["seed"],
        full={"widths": net.graph.full, "macs": net.graph.macs(), "params": net.graph.params()},
        trials=trials,
        settings={
            **kept,
            "strategy": repr(net.strategy),
            "space_size": str(net.space.size),
            "limits": [{"kind": limit.kind, "value": limit.value} for limit in budget.limits],
        },
        units={name: units.tolist() for name, units in net.units(best.widths, best.path).items()},
    )


def with_measurements(result: SearchResult, net: Supernet, budget: Budget) -> SearchResult:
    """Measure the best network where the budget is in memory or latency, and note what disappoints."""
    rows = measure_result(net, budget, result.widths)
    notes = [*result.notes, *remarks(rows, result.macs, result.full["macs"])]
    return replace(result, measured=rows, notes=notes)


def describe(result: SearchResult) -> str:
    """Say for people what was found, at which cost; one line, and one more per note."""
    share = result.macs / result.full["macs"]
    accuracy = "" if result.accuracy is None else f", accuracy in the supernet {result.accuracy:.1%}"
    diverged = sum(not math.isfinite(trial.score) for trial in result.trials)
    lost = f", {diverged} of them without a finite loss" if diverged else ""
    measured = "".join(f"; {phrase}" for phrase in describe_rows(result.measured))
    notes = "".join(f"\nnote: {note}" for note in result.notes)
    return (
        f"{show_count(result.macs)} MACs ({share:.1%} of the model), {show_count(result.params)} params"
        f"{accuracy}, {len(result.trials)} networks judged{lost}{measured}"
        + (f"; {result.settings['remark']}" if "remark" in result.settings else "")
        + notes
    )
