"""BC, bilaterally coupled: a width is judged at both ends of a layer (BCNet, Su et al. 2021)."""

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
from widthkit.supernet.strategy import StepCost, Strategy, train_path
from widthkit.train.step import StepContext


@dataclass(frozen=True)
class BilaterallyCoupled(Strategy):
    """Both ends of a layer, complementary training (BCNet, Eq. 7-12).

    Args:
        complementary: With every width c also train its complement (Eq. 11).
        complement: ``"inside"`` takes the complement among the group's choices: the i-th narrowest width goes with the
            i-th widest, which is ``l + l_min - c`` where the choices are evenly spaced. ``"paper"`` takes ``l - c``.
            Then both widths of a step together train every channel equally often, but as soon as there is a narrowest
            width, most complements are narrower than that: widths are trained that no search judges.
    """

    complementary: bool = True
    complement: str = "inside"

    def __post_init__(self) -> None:
        if self.complement not in ("inside", "paper"):
            raise OptionError(f"complement '{self.complement}': bc knows 'inside' and 'paper'")

    def capacity(self, choices: GroupChoices) -> int:
        """The widest choice: both ends share one layer."""
        return choices.widest

    def paths(self, width: int, choices: GroupChoices) -> Sequence[IntArray]:
        """Two paths: ``[0, c)`` and ``[l - c, l)`` (Eq. 8)."""
        return (np.arange(width), np.arange(choices.widest - width, choices.widest))

    def order(self, ranking: IntArray, choices: GroupChoices) -> IntArray:
        """Important units at both ends, the least important in the middle."""
        inside = min(choices.widest, choices.width)
        return np.concatenate([both_ends(ranking[:inside]), ranking[inside:]])

    def complement_of(self, width: int, choices: GroupChoices) -> int:
        """Return the width that is trained together with one of the group's choices.

        The paper does not say what the complement of the full width is. With ``"paper"`` it is the full width, so that
        both ends train all channels once.
        """
        if self.complement == "paper":
            return choices.widest - width or choices.widest
        return choices.options[-1 - choices.options.index(width)]

    def train_step(self, net: Supernet, step: StepContext) -> Tensor:
        """Train a random width and its complement, each on both ends with half the loss (Eq. 10 and 11).

        The history records the mean loss of both ends, which is the loss of a width in Eq. 10.
        """
        widths = net.space.sample(net.rng(step))
        vectors = [widths]
        if self.complementary:
            vectors.append({g.name: self.complement_of(widths[g.name], g) for g in net.space.groups})
        losses = []
        for vector in vectors:
            # Each end gives half of its loss, so the sum is the mean of both.
            losses.append(torch.stack([train_path(net, step, path, 0.5) for path in net.paths(vector)]).sum())
            net.record(vector, losses[-1])
        return torch.stack(losses).mean()

    def combine(self, scores: Sequence[float]) -> float:
        """The mean of both ends (Eq. 12)."""
        return sum(scores) / len(scores)

    @property
    def cost(self) -> StepCost:
        """Two ends of the width, and of its complement."""
        n = 4 if self.complementary else 2
        return StepCost(n, n)


def both_ends(ranking: IntArray) -> IntArray:
    """Deal a ranking out to the left end and the right end in turns.

    >>> both_ends(np.array([7, 3, 5, 1, 2]))
    array([7, 5, 2, 1, 3])
    """
    return np.concatenate([ranking[0::2], ranking[1::2][::-1]])
