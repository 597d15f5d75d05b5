"""Whole: only the whole network is trained, as without a supernet; a width is its leading units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from widthkit.graph import IntArray
from widthkit.graph.space import GroupChoices
from widthkit.supernet import Supernet
from widthkit.supernet.strategy import StepCost, Strategy, train_path
from widthkit.train.step import StepContext


@dataclass(frozen=True)
class WholeNetwork(Strategy):
    """Ordinary training of the whole network; a width is its leading units.

    A model that is made with ``rank`` has its most important units first, so a width stands for these. Without any
    training that is pruning of a trained network: widths can be searched on its own weights. Sub-networks are not
    trained, so no losses of widths are recorded for a search.
    """

    needs_training: ClassVar[bool] = False

    def capacity(self, choices: GroupChoices) -> int:
        """The widest choice."""
        return choices.widest

    def paths(self, width: int, choices: GroupChoices) -> Sequence[IntArray]:
        """One path: ``[0, width)``."""
        return (np.arange(width),)

    def train_step(self, net: Supernet, step: StepContext) -> Tensor:
        """Train the whole network, as ordinary training does, to the last bit."""
        return train_path(net, step, every_unit(net))

    def combine(self, scores: Sequence[float]) -> float:
        """The only path's score."""
        return scores[0]

    @property
    def cost(self) -> StepCost:
        """One run of the network, as in ordinary training."""
        return StepCost(1, 1)


def every_unit(net: Supernet) -> dict[str, IntArray]:
    """Return all units that a supernet holds."""
    return {name: np.arange(width) for name, width in net.wide_graph.full.items()}
