"""The contract of a sharing strategy: which units stand for a width, how many a layer needs, how a step trains.

Strategies live outside the core and come in through the entry-point group ``widthkit.strategies``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from widthkit.errors import PluginError
from widthkit.graph import IntArray
from widthkit.graph.space import GroupChoices
from widthkit.registry import Registry
from widthkit.train.losses import is_cross_entropy
from widthkit.train.step import StepContext

if TYPE_CHECKING:
    from widthkit.supernet.supernet import Supernet

Units = Mapping[str, IntArray]
"""One sub-network: group name -> the units it uses."""


@dataclass(frozen=True)
class StepCost:
    """Forwards and backwards of sub-networks in one training step."""

    forwards: int
    backwards: int


class Strategy(ABC):
    """Says which units stand for a width, how many units a group needs, and how a step trains.

    Subclasses are frozen dataclasses of their options. :meth:`train_step` calls ``net.record(widths, loss)`` for widths
    that it trains if searches shall start from the best of them.

    Attributes:
        needs_training: Whether sub-networks mean something only after a training of the supernet; runs refuse to search
            without one.
    """

    needs_training: ClassVar[bool] = True

    @abstractmethod
    def capacity(self, choices: GroupChoices) -> int:
        """Return how many units the supernet holds for a group, at least its widest choice."""

    @abstractmethod
    def paths(self, width: int, choices: GroupChoices) -> Sequence[IntArray]:
        """Return the units that stand for a width: one array ``[width]`` of ascending unit indices per path."""

    @abstractmethod
    def train_step(self, net: Supernet, step: StepContext) -> Tensor:
        """Run forwards and backwards for one batch and return the loss to show, detached."""

    @abstractmethod
    def combine(self, scores: Sequence[float]) -> float:
        """Turn the scores of all paths of a width into one."""

    @property
    @abstractmethod
    def cost(self) -> StepCost:
        """Forwards and backwards of one training step."""

    def order(self, ranking: IntArray, choices: GroupChoices) -> IntArray:
        """Return where the units of a ranked model go; by default the most important come first.

        Args:
            ranking: ``[width]``; the model's units, the most important first.
            choices: The group.

        Returns:
            The unit that comes to each place of the supernet. The first ``choices.width`` places hold every unit
            once. Later places, up to the capacity, start as copies of the units named there; places past the end of
            the array are initialised afresh.
        """
        return ranking

    def attach(self, net: Supernet) -> nn.Module | None:
        """Make the module with what the strategy learns beside the weights; it becomes ``net.policy``.

        Its parameters are trained like any other, and its state is part of checkpoints. A strategy itself holds options
        only.
        """
        return None

    def subnetworks(self, net: Supernet, widths: Mapping[str, int]) -> list[dict[str, IntArray]]:
        """List the sub-networks that stand for a width vector; by default path i takes path i of every group."""
        choices = {g.name: g for g in net.space.groups}
        per_group = [self.paths(width, choices[name]) for name, width in widths.items()]
        counts = {len(found): name for name, found in zip(widths, per_group, strict=True)}
        if len(counts) > 1:
            (few, one), *_, (many, other) = sorted(counts.items())
            raise PluginError(
                f"strategy {type(self).__name__}: paths() must give equally many paths for every group, not {few} for "
                f"'{one}' and {many} for '{other}'"
            )
        return [dict(zip(widths, units, strict=True)) for units in zip(*per_group, strict=True)] if widths else [{}]

    def chosen(self, net: Supernet) -> dict[str, IntArray] | None:
        """Return the units that training has chosen; ``None`` if widths are searched after training."""
        return None

    def after_update(self, net: Supernet) -> None:
        """Follow an update: called after the optimiser has changed the weights; by default nothing happens."""
        return

    def end_epoch(self, net: Supernet) -> dict[str, float]:
        """Return figures to show and keep with the epoch that has just ended."""
        return {}

    def for_budget(self, budget: str) -> Strategy:
        """Return the strategy for a run with this budget; by default the budget changes nothing in training."""
        return self


def train_path(net: Supernet, step: StepContext, units: Units, share: float = 1.0) -> Tensor:
    """Train one sub-network on a batch: run it, and compute gradients of ``share`` times its loss.

    The accuracy in the progress bar is that of the first sub-network of a step.

    Returns:
        The loss on the targets times ``share``, detached. The part of a teacher is learned, but not returned: losses of
        widths are compared without it.
    """
    outputs = net.forward_on(units, step)
    loss = step.loss(outputs, step.targets)
    step.backward(step.with_teacher(outputs, loss) * share)
    if step.outputs is None:
        step.outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
    return loss.detach() * share


STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "widthkit.strategies", Strategy)
register = STRATEGIES.register


def check_paths(
    strategy: Strategy, found: Sequence[Units], widths: Mapping[str, int], capacities: Mapping[str, int]
) -> None:
    """Refuse sub-networks of a strategy that do not fit the widths.

    Raises:
        PluginError: Naming the strategy and the first group that is wrong.
    """
    who = f"strategy {type(strategy).__name__}"
    if not found:
        raise PluginError(f"{who}: paths() gives no path; every width needs at least one")
    for path in found:
        for name, width in widths.items():
            units = path.get(name)
            if (
                not isinstance(units, np.ndarray)
                or units.dtype.kind not in "iu"
                or units.shape != (width,)
                or units[0] < 0
                or units[-1] >= capacities[name]
                or (np.diff(units) <= 0).any()
            ):
                shown = " ".join(repr(units).split())[:60]
                raise PluginError(
                    f"{who}: a path of width {width} of group '{name}' must be an array of {width} ascending units "
                    f"below {capacities[name]}, not {shown}"
                )


def can_distill(outputs: Any, targets: Any, loss: Any) -> bool:
    """Whether soft outputs can be learned: class logits ``[N, C, ...]``, integer targets, and cross entropy."""
    return (
        is_cross_entropy(loss)
        and isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.ndim >= 2
        and not targets.is_floating_point()
        and outputs.shape[1] > 1
        and targets.shape == (outputs.shape[0], *outputs.shape[2:])
    )


def make_strategy(strategy: str | Strategy | None, options: Mapping[str, Any]) -> Strategy:
    """Return the strategy itself, or build the one registered under a name; ``None`` is the default one.

    Raises:
        PluginError: If no strategy has that name.
        OptionError: If it does not take one of the options.
    """
    return STRATEGIES.build(STRATEGIES.default if strategy is None else strategy, options)  # type: ignore[no-any-return]
