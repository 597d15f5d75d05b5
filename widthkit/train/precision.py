"""Mixed precision: which type forwards compute in, and how gradients of half precision are kept from vanishing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.errors import Option, OptionError

_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """The precision of one training run.

    Args:
        name: ``no`` (full precision), ``bf16`` or ``fp16``; ``fp16`` scales losses so that gradients do not vanish.
        device: Where the run computes.

    Raises:
        OptionError: If the device cannot compute in this precision.

    >>> Precision("fp16", torch.device("cpu"))
    Traceback (most recent call last):
    widthkit.errors.OptionError: mixed_precision='fp16' cannot be used on a CPU; take 'no' or 'bf16'.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "fp16" and device.type == "cpu":
            raise OptionError(Option("mixed_precision", name), " cannot be used on a CPU; take 'no' or 'bf16'.")
        self._kind, self._type = device.type, _TYPES.get(name)
        self._scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None
        try:
            self.autocast()
        except RuntimeError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            text = f" cannot be used: {reason}. Try 'no' or 'bf16'."
            raise OptionError(Option("mixed_precision", name), text) from error

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the scope for forwards; one that does nothing in full precision."""
        return nullcontext() if self._type is None else torch.autocast(self._kind, dtype=self._type)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss, scaled for ``fp16``."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip_grad: float | None
    ) -> None:
        """Unscale and clip the gradients and take one optimiser step.

        Args:
            optimizer: The optimiser; with ``fp16`` it skips its step where a gradient is not finite.
            parameters: Those that the whole gradient is made of.
            clip_grad: Largest norm of the whole gradient, or ``None``.
        """
        if clip_grad is not None:
            if self._scaler is not None:
                self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state of the loss scale, or ``None`` where there is none."""
        return None if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what :meth:`state_dict` returned."""
        if self._scaler is not None and state is not None:
            self._scaler.load_state_dict(dict(state))
