"""How a search in several stages goes on: budgets, choices and limits.

With FLOPs-sensitive bins (CafeNet, section 3.3, Eq. 10) the budget falls linearly from the full network's cost to the
target, and bins get finer by a factor from stage to stage. Without bins (iterative pruning) it falls geometrically, so
that every stage cuts the same share of what is left, and the choices stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from widthkit.budget import Budget
from widthkit.errors import Option, OptionError
from widthkit.graph import ChannelGraph
from widthkit.graph.space import GroupChoices, SearchSpace, WidthLimit, flops_bins, resolve_limit


@dataclass(frozen=True)
class StagePlan:
    """How a search goes on from stage to stage.

    Args:
        budget: The last stage's budget.
        stages: How many stages (T).
        alpha: Bins get finer by this factor from stage to stage.
        beta: Channels in a bin of the most sensitive group, in the first stage; ``None`` if there are no bins.
        min_width: As in :func:`widthkit.make_supernet`, in terms of the model's own widths.
        divisor: Widths are multiples of this.
        fixed: Group name -> the one width that it keeps.
    """

    budget: Budget
    stages: int = 3
    alpha: float = 2.0
    beta: float | None = None
    min_width: WidthLimit = "0.1x"
    divisor: int = 1
    fixed: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stages, bool) or not isinstance(self.stages, int) or self.stages < 1:
            raise OptionError(Option("stages", self.stages), ": a search has at least 1 stage")
        if not 0 < self.alpha < math.inf:
            raise OptionError(Option("alpha", self.alpha), ": it must be a positive number")

    def beta_at(self, stage: int) -> float | None:
        """Channels in a bin of the most sensitive group, in stage 1, 2...; ``None`` if there are no bins.

        >>> plan = StagePlan(Budget(()), beta=4.0)
        >>> [plan.beta_at(stage) for stage in (1, 2, 3)]
        [4.0, 2.0, 1.0]
        """
        return None if self.beta is None else float(self.beta / self.alpha ** (stage - 1))

    def budget_at(self, stage: int, first: SearchSpace) -> Budget:
        """Return the budget of stage 1, 2..., between the cost of the first space's widest network and the target.

        Every bound falls by itself: on a line with bins (Eq. 10), by equal factors without. One that the widest
        network holds stays as it is.
        """
        if stage == self.stages:
            return self.budget
        full = self.budget.costs(first.graph, first.largest)
        limits = []
        for limit, cost in zip(self.budget.limits, full.tolist(), strict=True):
            left = 1 - stage / self.stages
            ratio = max(1.0, cost**left if self.beta is None else 1 + (cost - 1) * left)
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
            self.budget.check(self.space_at(self.stages, first.graph, first))

    def space_at(self, stage: int, graph: ChannelGraph, first: SearchSpace) -> SearchSpace:
        """Return the space of a later stage, up to the widths of ``graph``.

        Without bins these are the first space's choices. With bins the limits are those of the first stage's model.
        """
        beta = self.beta_at(stage)
        if beta is None:
            groups = [_up_to(g, graph.full[g.name]) for g in first.groups]
            return SearchSpace(graph, tuple(groups), self.divisor)
        space = flops_bins(graph, beta, divisor=self.divisor, fixed=self.fixed)
        model = first.graph.full
        groups = []
        for g in space.groups:
            low = min(resolve_limit(self.min_width, model[g.name]), g.widest)
            options = {o for o in g.options if o >= low} | {g.widest}
            if self.min_width not in (1, "1") and low % self.divisor == 0 and len(g.options) > 1:
                options.add(low)
            groups.append(replace(g, options=tuple(sorted(options))))
        return replace(space, groups=tuple(groups))


def _up_to(choices: GroupChoices, width: int) -> GroupChoices:
    """Return a group's choices below the width that it has now, and that width."""
    return GroupChoices(choices.name, width, (*(o for o in choices.options if o < width), width))
