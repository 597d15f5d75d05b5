"""Optimisers by timm's names, and learning-rate schedules."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import timm.optim
import torch
from torch import nn

from widthkit.errors import ModelError, OptionError, one_line
from widthkit.train.settings import TrainSettings

_WARMUP_START = 0.01


def make_optimizer(net: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make the optimiser.

    Args:
        net: The module to train; its parameters are not touched.
        settings: Names the optimiser, and says whether parameters of one dimension (biases, norms) have weight decay.

    Raises:
        ModelError: If the module has no parameter to train.
        OptionError: If the optimiser cannot be made here, as when it needs a package that is not installed.
    """
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ModelError(f"{type(net).__name__} has no parameter that requires a gradient, so nothing can be trained.")
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "momentum": settings.momentum}
    try:
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
            net, opt=settings.optimizer, filter_bias_and_bn=not settings.decay_norms, **options
        )
    except (ImportError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise OptionError(
            f"optimizer '{settings.optimizer}' cannot be used: {one_line(error)}. Try 'sgd' or 'adamw'."
        ) from error
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser's ``state_dict``; its tensors get the memory formats of their parameters.

    A checkpoint has no memory formats, and kernels may round differently where those of two tensors differ.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()


class Schedule:
    """The learning rate as a function of the position in the run; ``plateau`` also depends on the losses.

    Args:
        optimizer: A plain torch optimiser; its parameter groups may have rates of their own, which keep their ratios.
        settings: Names the schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: TrainSettings) -> None:
        self.optimizer, self.settings = optimizer, settings
        self._bases = [float(group["lr"]) for group in optimizer.param_groups]
        self._falls, self._best, self._waited = 0, math.inf, 0
        self.at(0.0)

    @property
    def lr(self) -> float:
        """The rate of the next update (of the first parameter group)."""
        return float(self.optimizer.param_groups[0]["lr"])

    def at(self, epochs: float) -> None:
        """Set the rate for the next update, ``epochs`` (a fraction, where known) being done so far."""
        factor = self.factor(epochs)
        for group, base in zip(self.optimizer.param_groups, self._bases, strict=True):
            group["lr"] = base * factor

    def factor(self, epochs: float) -> float:
        """Return the rate after so many epochs, as a share of the first one."""
        s = self.settings
        if epochs < s.warmup_epochs:
            return _WARMUP_START + (1 - _WARMUP_START) * epochs / s.warmup_epochs
        floor = s.min_lr / s.lr
        share = min(1.0, (epochs - s.warmup_epochs) / (s.epochs - s.warmup_epochs))
        if s.schedule == "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2
        if s.schedule == "linear":
            return floor + (1 - floor) * (1 - share)
        return max(floor, s.decay ** self._steps_down(epochs))

    def _steps_down(self, epochs: float) -> int:
        s = self.settings
        # Fractions of an epoch are sums of floats; a fall must not come an update late.
        epochs += 1e-9
        if s.schedule == "step":
            return int(epochs // math.ceil(s.epochs / 3))
        if s.schedule == "milestones":
            return bisect_right(sorted(s.milestones), epochs)
        if s.schedule == "exponential":
            return int((epochs - s.warmup_epochs) // s.decay_epochs)
        return self._falls if s.schedule == "plateau" else 0

    def after_epoch(self, loss: float) -> None:
        """Tell the mean training loss of the epoch that has just ended."""
        if loss < self._best:
            self._best, self._waited = loss, 0
        else:
            self._waited += 1
        if self._waited > self.settings.patience:
            self._falls, self._waited = self._falls + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what the losses so far have led to."""
        return {"falls": self._falls, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._falls, self._best, self._waited = state["falls"], state["best"], state["waited"]
