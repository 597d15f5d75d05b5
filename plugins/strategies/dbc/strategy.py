"""DBC, binary gates: widths are learned together with the weights (Pruning-as-Search, Li et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn
from widthkit_plugins.strategies.dbc.policy import THRESHOLD, Policy

from widthkit.budget import Budget, parse_budget
from widthkit.errors import OptionError
from widthkit.graph import IntArray
from widthkit.graph.plan import apply_plan
from widthkit.graph.space import GroupChoices
from widthkit.supernet import Supernet
from widthkit.supernet.strategy import StepCost, Strategy, train_path
from widthkit.train.step import StepContext


@dataclass(frozen=True)
class DepthwiseBinary(Strategy):
    """One binary gate per unit, trained with the weights; no search follows (PaS, Eq. 1-5).

    Every step runs the whole network. Units whose gate is at most 0.5 are multiplied by 0 where they are read.
    Gradients pass the binarisation unchanged. The loss is ``task + beta * ((cost - target) / dense cost)**2``. A closed
    unit keeps its weights, also under momentum and weight decay, and its gate keeps learning, so it can open again. In
    the last part of the run the policy is fixed: the units with the largest gates are kept, as many as the target
    allows, and only that sub-network is trained. Training chooses the widths, so no losses of widths are recorded for a
    search.

    Args:
        target: The cost to end with, as a budget in MACs, parameters or latency: ``"0.5x"``, ``"3.1Mparams"``,
            ``"1.8ms@cpu"``, or several with commas; by default the run's budget, else half the model's MACs,
            or what the space's narrowest network has where that is more.
        beta: Weight of the cost term.
        start: Initial value of every gate.
        settle: Share of the run, at its end, in which the policy is fixed.
    """

    target: str | None = None
    beta: float = 100.0
    start: float = 1.0
    settle: float = 0.25

    def __post_init__(self) -> None:
        if not isinstance(self.target, (str, type(None))):
            raise OptionError(f"target={self.target!r}: write it as a budget, such as '0.5x' or '3.1Mparams'")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise OptionError(f"beta={self.beta}: it cannot be negative")
        if not (math.isfinite(self.start) and self.start > THRESHOLD):
            raise OptionError(f"start={self.start}: gates start open, above {THRESHOLD}")
        if not 0 <= self.settle <= 1:
            raise OptionError(f"settle={self.settle}: it is a share of the run, from 0 to 1")

    def for_budget(self, budget: str) -> DepthwiseBinary:
        """Take the run's budget as the target, if none was given."""
        return replace(self, target=budget) if self.target is None else self

    def capacity(self, choices: GroupChoices) -> int:
        """The widest choice."""
        return choices.widest

    def paths(self, width: int, choices: GroupChoices) -> Sequence[IntArray]:
        """One path: ``[0, width)``, the units of equal gates; :meth:`subnetworks` takes the gates into account."""
        return (np.arange(width),)

    def attach(self, net: Supernet) -> Policy:
        """Make the gates."""
        return Policy(net, _target(net, self.target), self.start)

    def subnetworks(self, net: Supernet, widths: Mapping[str, int]) -> list[dict[str, IntArray]]:
        """One sub-network: of every group the units with the largest gates."""
        policy = policy_of(net)
        return [{name: np.sort(policy.ranked(name)[:width]) for name, width in widths.items()}]

    def chosen(self, net: Supernet) -> dict[str, IntArray]:
        """Return the kept units; they hold the target, as close to it as whole units allow."""
        units: dict[str, IntArray] = policy_of(net).units()
        return units

    def train_step(self, net: Supernet, step: StepContext) -> Tensor:
        """Train weights and gates together; once the policy is settled, only the weights of the kept units."""
        policy = policy_of(net)
        if step.progress >= 1 - self.settle and not policy.is_settled:
            policy.settle()
        if policy.is_settled:
            return train_path(net, step, policy.units())
        bits = policy.bits()
        policy.closed.note(net, bits)
        outputs = net.forward_gated(bits, step)
        task = step.loss(outputs, step.targets)
        excess = policy.excess(bits)
        step.backward(step.with_teacher(outputs, task) + self.beta * excess.to(task.dtype) ** 2)
        step.outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
        return task.detach()

    def after_update(self, net: Supernet) -> None:
        """Give closed units their weights back, which momentum and weight decay have moved."""
        policy_of(net).closed.put_back(net)

    def end_epoch(self, net: Supernet) -> dict[str, float]:
        """Return figures of the policy: its costs, its open units, and which groups are at their narrowest."""
        figures: dict[str, float] = policy_of(net).end_epoch()
        return figures

    def combine(self, scores: Sequence[float]) -> float:
        """The only path's score."""
        return scores[0]

    @property
    def cost(self) -> StepCost:
        """One run of the network, as in ordinary training."""
        return StepCost(1, 1)


def _target(net: Supernet, text: str | None) -> Budget:
    """Read a target; for a latency the networks that correct its prediction are cut from the first stage's supernet."""
    if text is None:
        least = int(net.graph.macs(net.space.smallest))
        text = "0.5x" if least <= net.reference.macs() // 2 else f"{least}MACs"

    def build(widths: Mapping[str, int]) -> nn.Module:
        return apply_plan(net.whole(), net.plan({name: np.arange(width) for name, width in widths.items()}))

    return parse_budget(text, net.reference, build if net.reference is net.graph else None)


def policy_of(net: Supernet) -> Policy:
    """Return a supernet's gates."""
    assert isinstance(net.policy, Policy)
    return net.policy
