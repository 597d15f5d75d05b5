"""How a search in several stages goes on: budgets, bins and limits (CafeNet, section 3.3, Eq. 10).

The budget falls linearly from the full network's cost to the target, and bins get finer by a factor from stage to
stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from widthkit.budget import Budget
from widthkit.errors import Option, OptionError
from widthkit.graph import ChannelGraph
from widthkit.graph.space import SearchSpace, WidthLimit, flops_bins, resolve_limit
from widthkit.run.config import RunConfig


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
        raise OptionError(Option("alpha", alpha), ": the first bins would be too small or too large; take one near 2")
    return beta


def with_first_bins(config: RunConfig) -> RunConfig:
    """Give a run in several stages the first stage's bins, where the user gives none."""
    if config.stages == 1 or config.bins is not None:
        return config
    return config.changed({"bins": first_beta(config.alpha, config.stages)})


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise OptionError(Option("alpha", alpha), ": it must be a positive number")


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
    min_width: WidthLimit = "0.1x"
    divisor: int = 1
    fixed: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stages, bool) or not isinstance(self.stages, int) or self.stages < 1:
            raise OptionError(Option("stages", self.stages), ": a search has at least 1 stage")
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
