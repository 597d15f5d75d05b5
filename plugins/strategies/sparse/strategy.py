"""Sparse: the whole network is trained with a penalty on the norms of units; then a width is the largest ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from widthkit_plugins.strategies.sparse.penalty import GroupPenalty
from widthkit_plugins.strategies.whole import every_unit

from widthkit.budget import parse_budget
from widthkit.errors import ModelError, OptionError
from widthkit.graph import IntArray
from widthkit.graph.space import GroupChoices
from widthkit.supernet import Supernet
from widthkit.supernet.strategy import StepCost, Strategy, train_path
from widthkit.train.step import StepContext


@dataclass(frozen=True)
class SparseTraining(Strategy):
    """Penalties pull weak units to zero, then they are cut (DepGraph, Fang et al. 2023; GReg, Wang et al. 2021).

    Every step trains the whole network. The loss is the task's plus ``sum over units of strength / 2 * |unit|**2``,
    where a unit is all parameters that go with it. The strength is ``reg * 2**(alpha * (max - I) / (max - min))``, with
    the squared norm I of the unit and the extremes of its group (DepGraph, Eq. 4): weak units are pulled up to
    ``2**alpha`` times as hard as strong ones. With ``growth`` the units that will go are pulled harder and harder
    (GReg-1, section 3.1): their strength grows by ``growth`` times the share of the run that is done. These are the
    units that one ranking of all units cuts at the target, chosen anew after every epoch. Groups that cannot become
    narrower have no penalty.

    A width stands for the units of the largest norm, of the weights as they are when it is judged or exported. So
    ranking a model before training changes nothing. Sub-networks are not trained, so no losses of widths are recorded
    for a search.

    Args:
        reg: Strength for the strongest unit of a group; 0 turns this part off.
        alpha: Doublings of the strength from a group's strongest unit to its weakest.
        growth: Strength that units to be cut have gained at the end of the run; 0 turns this part off.
        target: Budget at which ``growth`` chooses units, as ``"0.5x"``; by default the run's, else half the MACs.
    """

    reg: float = 1e-4
    alpha: float = 4.0
    growth: float = 0.0
    target: str | None = None

    def __post_init__(self) -> None:
        for name in ("reg", "alpha", "growth"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"{name}={value}: it cannot be negative")
        if not isinstance(self.target, (str, type(None))):
            raise OptionError(f"target={self.target!r}: write it as '0.5x' or '2.0GMACs'")

    def for_budget(self, budget: str) -> SparseTraining:
        """Take the run's budget as the target, if none was given."""
        return replace(self, target=budget) if self.target is None else self

    def capacity(self, choices: GroupChoices) -> int:
        """The widest choice."""
        return choices.widest

    def paths(self, width: int, choices: GroupChoices) -> Sequence[IntArray]:
        """One path: ``[0, width)``, the units of equal norms; :meth:`subnetworks` takes the weights into account."""
        return (np.arange(width),)

    def attach(self, net: Supernet) -> GroupPenalty:
        """Find the parameters of every unit.

        Raises:
            ModelError: If the network has branches that merge.
        """
        if net.merges:
            raise ModelError(
                "sparse training needs units that own weights of the trained network, but its branches merge first; "
                "leave out merges=True or take another strategy"
            )
        text = "0.5x" if self.target is None else self.target
        return GroupPenalty(net, parse_budget(text, net.reference) if self.growth else None)

    def subnetworks(self, net: Supernet, widths: Mapping[str, int]) -> list[dict[str, IntArray]]:
        """One sub-network: of every group the units of the largest norm."""
        ranked = penalty_of(net).ranked(net.model)
        return [{name: np.sort(ranked[name][:width]) for name, width in widths.items()}]

    def train_step(self, net: Supernet, step: StepContext) -> Tensor:
        """Train the whole network on the task and the penalty; the loss that is shown is the task's."""
        penalty, units = penalty_of(net), every_unit(net)
        if not (self.reg or self.growth):
            return train_path(net, step, units)
        if step.index == 0:
            penalty.choose(net)
        norms = penalty.squared_norms(net.model)
        strengths = penalty.strengths(norms, self.reg, self.alpha, self.growth * step.progress)
        value = penalty.value(net.model, norms, strengths)
        # The penalty joins whatever else the step learns from, in one backward.
        joined = replace(step, backward=lambda loss: step.backward(loss + value.to(loss.dtype)))
        loss = train_path(net, joined, units)
        step.outputs = joined.outputs
        return loss

    def end_epoch(self, net: Supernet) -> dict[str, float]:
        """Choose anew the units that go; return their mean squared norm, where the mean of every group is 1."""
        if not self.growth:
            return {}
        penalty_of(net).choose(net)
        return {"going_norm": penalty_of(net).going_norm(net.model)}

    def combine(self, scores: Sequence[float]) -> float:
        """The only path's score."""
        return scores[0]

    @property
    def cost(self) -> StepCost:
        """One run of the network, as in ordinary training."""
        return StepCost(1, 1)


def penalty_of(net: Supernet) -> GroupPenalty:
    """Return a supernet's penalty."""
    assert isinstance(net.policy, GroupPenalty)
    return net.policy
