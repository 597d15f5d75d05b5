"""BCv2, bilaterally coupled with base widths: both ends have a base of their own (BCNetV2, Su et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from widthkit_plugins.strategies.bc import both_ends

from widthkit.errors import OptionError
from widthkit.graph import IntArray
from widthkit.graph.space import GroupChoices
from widthkit.supernet import Supernet
from widthkit.supernet.strategy import StepCost, Strategy, train_path
from widthkit.train.step import StepContext


@dataclass(frozen=True)
class BilaterallyCoupledV2(Strategy):
    """Both ends with base widths, updated in turns (BCNetV2, Eq. 20-22).

    The base width ``l_s`` of a group is its narrowest choice, so ``min_width`` sets it. Layers grow to ``l + l_s``
    channels, of which the outer ``l_s`` on either side belong to one end alone.

    Args:
        layout: ``"exact"`` gives a layer ``l + l_s`` channels, for which the cardinality is uniform as in Eq. 21.
            ``"text"`` gives the ``l + l_s - d`` of the paper's text (d: the step between choices), which trains the
            shared channels once more than the bases.
        iterative: Train the left network on odd batches and the right one on even ones (Eq. 22), which halves
            activations and work; otherwise both on every batch, with half the loss each (Eq. 10).
        complementary: With every width c also train ``l + l_s - c``.
    """

    layout: str = "exact"
    iterative: bool = True
    complementary: bool = True

    def __post_init__(self) -> None:
        if self.layout not in ("exact", "text"):
            raise OptionError(f"layout '{self.layout}': bcv2 knows 'exact' and 'text'")

    def capacity(self, choices: GroupChoices) -> int:
        """Both bases and the units that the ends share."""
        total = choices.widest + choices.narrowest
        if self.layout == "text" and len(choices.options) > 1:
            total -= round((choices.widest - choices.narrowest) / (len(choices.options) - 1))
        return max(total, choices.widest)

    def paths(self, width: int, choices: GroupChoices) -> Sequence[IntArray]:
        """``[0, c)`` and the last c channels of the grown layer (Eq. 20)."""
        capacity = self.capacity(choices)
        return (np.arange(width), np.arange(capacity - width, capacity))

    def order(self, ranking: IntArray, choices: GroupChoices) -> IntArray:
        """The most important units as the left base, copies of them as the right one, the rest dealt to both ends.

        With the exact layout the right network of full width is then the left one in another order.
        """
        base = min(self.capacity(choices) - choices.width, choices.narrowest)
        if base <= 0 or choices.widest != choices.width:
            base = 0
        placed: IntArray = np.concatenate([ranking[:base], both_ends(ranking[base:]), ranking[:base]])
        return placed

    def complement(self, width: int, choices: GroupChoices) -> int:
        """``l + l_s - c``, which maps the narrowest to the widest and back."""
        return choices.widest + choices.narrowest - width

    def train_step(self, net: Supernet, step: StepContext) -> Tensor:
        """Train a random width and its complement at one end, or at both.

        The history records the mean loss of the ends that the step trains.
        """
        widths = net.space.sample(net.rng(step))
        vectors = [widths]
        if self.complementary:
            vectors.append({g.name: self.complement(widths[g.name], g) for g in net.space.groups})
        # Batches count from 1: the first one is odd and trains the left network.
        ends = [step.index % 2] if self.iterative else [0, 1]
        share = 1 / len(ends)
        losses = []
        for vector in vectors:
            paths = net.paths(vector)
            losses.append(torch.stack([train_path(net, step, paths[end], share) for end in ends]).sum())
            net.record(vector, losses[-1])
        return torch.stack(losses).mean()

    def combine(self, scores: Sequence[float]) -> float:
        """The mean of both ends (Eq. 12)."""
        return sum(scores) / len(scores)

    @property
    def cost(self) -> StepCost:
        """One or two ends of the width, and of its complement."""
        n = (1 if self.iterative else 2) * (2 if self.complementary else 1)
        return StepCost(n, n)
