"""What one training step sees: the contract between the engine and a network that trains itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from widthkit.train.modes import call_model


@dataclass
class StepContext:
    """One batch and the tools to learn from it.

    A network that :class:`TrainsItself` runs itself under ``step.amp()``, gives every loss to ``step.backward``, and
    returns the detached scalar loss to show. The engine sets gradients to zero before and updates weights after one
    batch, or several that it averages. Any other module gets :func:`plain_step`.

    A step that computes a loss with :attr:`loss` learns from ``step.with_teacher(outputs, loss)``, which is the loss
    itself where the run has no teacher.

    Attributes:
        inputs: A tensor, or a tuple or dict of tensors, on the training device.
        targets: What the loss compares the outputs with, on the training device.
        index: Number of updates done before this one, counted over the whole run.
        epoch: Number of epochs done before this one.
        loss: The criterion, ``(outputs, targets) -> scalar tensor``; one that takes the inputs has them already.
        backward: Computes gradients of a loss; they add up in ``.grad`` over calls.
        generator: A CPU generator for the step's random choices. Its seed follows from the run's seed, the process
            and the number of batches before: processes differ, a resumed run repeats.
        amp: Makes the autocast scope for forwards; it does nothing in full precision.
        outputs: The step may put outputs here; the progress bar shows their accuracy.
        progress: Share of the whole run that is done before this batch, in ``[0, 1)``; it grows by epochs where the
            loader does not know its length.
        teacher: Mixes outputs' loss with what a teacher says of them; ``None`` in a run without one.
    """

    inputs: Any
    targets: Any
    index: int
    epoch: int
    loss: Callable[[Any, Any], Tensor]
    backward: Callable[[Tensor], None]
    generator: torch.Generator
    amp: Callable[[], AbstractContextManager[Any]]
    outputs: Any = None
    progress: float = 0.0
    teacher: Callable[[Any, Tensor], Tensor] | None = None

    def with_teacher(self, outputs: Any, loss: Tensor) -> Tensor:
        """Return what to compute gradients of: the loss, mixed with the teacher's part where there is a teacher.

        Args:
            outputs: What the network returned last; call this before it runs again.
            loss: What :attr:`loss` made of them.
        """
        return loss if self.teacher is None else self.teacher(outputs, loss)


@runtime_checkable
class TrainsItself(Protocol):
    """A network that does its own forwards and backwards."""

    def train_step(self, step: StepContext) -> Tensor:
        """Compute gradients on one batch; return the detached scalar loss to show."""


@runtime_checkable
class EndsEpochs(Protocol):
    """A network with figures of its own for every epoch."""

    def end_epoch(self) -> dict[str, float]:
        """Return the figures of the epoch that has just ended."""


@runtime_checkable
class FollowsUpdates(Protocol):
    """A network that does something of its own after every update of its weights."""

    def after_update(self) -> None:
        """Follow the update that the optimiser has just made."""


@runtime_checkable
class TrainsModel(TrainsItself, Protocol):
    """A network that trains itself by running a model that it holds."""

    @property
    def model(self) -> nn.Module:
        """The model; its modules have the names of the model that a user gave."""


def plain_step(net: nn.Module, step: StepContext) -> Tensor:
    """Run one forward and one backward of an ordinary module.

    Returns:
        The loss that it has learned from, a detached scalar.
    """
    with step.amp():
        step.outputs = call_model(net, step.inputs)
        loss = step.with_teacher(step.outputs, step.loss(step.outputs, step.targets))
    step.backward(loss)
    return loss.detach()
