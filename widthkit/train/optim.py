"""Optimisers and learning-rate schedules, by timm's names."""

from __future__ import annotations

from typing import Any

import timm.optim
import timm.scheduler
import torch
from torch import nn

from widthkit.errors import ModelError, OptionError
from widthkit.train.settings import Settings


def make_optimizer(net: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make the optimiser; parameters of one dimension (biases, norms) get no weight decay, as timm does it.

    Args:
        net: The module to train; its parameters are not touched.
        settings: Names the optimiser. timm's ``sgd`` has Nesterov momentum, its ``momentum`` is plain SGD.

    Raises:
        ModelError: If the module has no parameter to train.
        OptionError: If the optimiser cannot be made here, as when it needs a package that is not installed.
    """
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ModelError(f"{type(net).__name__} has no parameter that requires a gradient, so nothing can be trained.")
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "momentum": settings.momentum}
    try:
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(net, opt=settings.optimizer, **options)
    except (ImportError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OptionError(
            f"optimizer '{settings.optimizer}' cannot be used: {reason}. Try 'sgd' or 'adamw'."
        ) from error
    return optimizer


class Schedule:
    """A timm scheduler, stepped after every update where the loader knows its length, else after every epoch.

    Args:
        optimizer: A plain torch optimiser.
        settings: ``cosine`` falls to 0 over the run, ``step`` divides by 10 after each third of it, ``constant``
            stays. Warm-up rises from a hundredth of the rate, and is part of the run's epochs.
        updates_per_epoch: Number of updates in an epoch, or ``None`` if not known.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Settings, updates_per_epoch: int | None) -> None:
        self.optimizer = optimizer
        self.updates_per_epoch = updates_per_epoch
        # Not timm's 'constant', which its older versions lack: a step of factor 1 is the same thing.
        constant = settings.schedule == "constant"
        self.scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            sched="step" if constant else settings.schedule,
            num_epochs=settings.epochs,
            decay_epochs=max(1, -(-settings.epochs // 3)),
            decay_rate=1.0 if constant else 0.1,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.lr / 100,
            step_on_epochs=updates_per_epoch is None,
            updates_per_epoch=updates_per_epoch or 0,
        )

    @property
    def lr(self) -> float:
        """The rate of the next update (of the first parameter group)."""
        return float(self.optimizer.param_groups[0]["lr"])

    def after_update(self, updates: int) -> None:
        """Set the rate for the next update, ``updates`` being the number done so far in the run."""
        self.scheduler.step_update(updates)

    def after_epoch(self, epochs: int) -> None:
        """Set the rate for the next epoch, ``epochs`` being the number done so far."""
        self.scheduler.step(epochs)

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's own state."""
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.scheduler.load_state_dict(state)
