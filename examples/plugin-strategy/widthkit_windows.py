"""Windows: a width is any run of neighbouring channels, wherever it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from widthkit.graph import IntArray
from widthkit.graph.space import GroupChoices
from widthkit.supernet import Supernet
from widthkit.supernet.strategy import StepCost, Strategy, train_path
from widthkit.train import StepContext


@dataclass(frozen=True)
class Windows(Strategy):
    """Random windows of neighbouring channels, judged at evenly spaced places.

    Args:
        n_windows: Windows that a width is judged at.
    """

    n_windows: int = 3

    def capacity(self, choices: GroupChoices) -> int:
        """The widest choice."""
        return choices.widest

    def paths(self, width: int, choices: GroupChoices) -> Sequence[IntArray]:
        """Windows from the left end to the right one."""
        return [_window(width, choices, place) for place in np.linspace(0, 1, self.n_windows)]

    def train_step(self, net: Supernet, step: StepContext) -> Tensor:
        """Train the widest, the narrowest and random widths, each at a random place (AutoSlim's sandwich rule)."""
        rng, losses = net.rng(step), []
        for widths in (net.space.largest, net.space.smallest, net.space.sample(rng)):
            place = rng.random()  # the same in all layers, as in the windows that are judged
            units = {g.name: _window(widths[g.name], g, place) for g in net.space.groups}
            losses.append(train_path(net, step, units))
            net.record(widths, losses[-1])
        return sum(losses) / len(losses)

    def combine(self, scores: Sequence[float]) -> float:
        """The mean over windows."""
        return sum(scores) / len(scores)

    @property
    def cost(self) -> StepCost:
        """Three windows."""
        return StepCost(3, 3)


def _window(width: int, choices: GroupChoices, place: float) -> IntArray:
    return round(place * (choices.widest - width)) + np.arange(width)
