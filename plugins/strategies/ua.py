"""UA, universally slimmable: a width is the leftmost channels (AutoSlim, Yu and Huang 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from widthkit.errors import OptionError
from widthkit.graph import IntArray
from widthkit.graph.space import GroupChoices
from widthkit.supernet import Supernet
from widthkit.supernet.strategy import StepCost, Strategy, can_distill
from widthkit.train.losses import soft_cross_entropy
from widthkit.train.step import StepContext


@dataclass(frozen=True)
class UniversallyAligned(Strategy):
    """Leftmost channels, sandwich rule, distillation (AutoSlim, section 3).

    Args:
        n_random: Random widths per step, besides the largest and the smallest.
        distill: Let all but the largest network learn the largest network's soft output instead of the labels;
            targets that are not class labels always teach directly.
    """

    n_random: int = 2
    distill: bool = True

    def __post_init__(self) -> None:
        if self.n_random < 0:
            raise OptionError(f"n_random={self.n_random}: it cannot be negative")

    def capacity(self, choices: GroupChoices) -> int:
        """The widest choice."""
        return choices.widest

    def paths(self, width: int, choices: GroupChoices) -> Sequence[IntArray]:
        """One path: ``[0, width)`` (BCNet, Eq. 5)."""
        return (np.arange(width),)

    def train_step(self, net: Supernet, step: StepContext) -> Tensor:
        """Train the largest network on the labels, then the smallest and random ones on its output.

        Where the run has a teacher, the largest network learns from it too; the others still learn from the largest,
        so the teacher reaches them through it. Those that learn the targets directly learn from the teacher directly.
        The history records the loss of every width on the labels, also where it learns from soft outputs.
        """
        rng = net.rng(step)
        outputs = net.forward_on(net.paths(net.space.largest)[0], step)
        loss = step.loss(outputs, step.targets)
        step.backward(step.with_teacher(outputs, loss))
        net.record(net.space.largest, loss)
        step.outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
        teach = self.distill and can_distill(outputs, step.targets, step.loss)
        for widths in [net.space.smallest, *(net.space.sample(rng) for _ in range(self.n_random))]:
            student = net.forward_on(net.paths(widths)[0], step)
            with torch.set_grad_enabled(not teach):
                task = step.loss(student, step.targets)
            step.backward(soft_cross_entropy(student, outputs) if teach else step.with_teacher(student, task))
            net.record(widths, task)
        return loss.detach()

    def combine(self, scores: Sequence[float]) -> float:
        """The only path's score."""
        return scores[0]

    @property
    def cost(self) -> StepCost:
        """Largest, smallest and the random ones."""
        return StepCost(self.n_random + 2, self.n_random + 2)
