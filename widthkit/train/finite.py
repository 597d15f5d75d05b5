"""Notice losses, gradients and weights that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.train import parallel

LOOK_EVERY = 20
"""Batches between two looks on an accelerator, because reading a value makes it wait."""


@dataclass(frozen=True)
class Seen:
    """One batch that was trained on.

    Attributes:
        update: Number of updates done before.
        batch: Its index in the epoch, among those of this process.
        loss: A scalar.
        widths: Width vectors trained on it, as far as the network recorded them.
        data: Inputs and targets; ``None`` where they are not kept.
    """

    update: int
    batch: int
    loss: Tensor
    widths: list[dict[str, int]] = field(default_factory=list)
    data: tuple[Any, Any] | None = None


class NotFinite(Exception):
    """Something is not finite; every process raises this at the same place.

    Args:
        what: What is not finite, in words.
        process: The process that saw it first.
        update: Number of updates done before.
        batch: The index of its batch.
    """

    def __init__(self, what: str, process: int, update: int, batch: int) -> None:
        super().__init__(what)
        self.process, self.update, self.batch = process, update, batch


class Watch:
    """Looks at losses and gradients: at every batch on the CPU, now and then on an accelerator.

    Args:
        device: Where the network computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.at_once = device, device.type == "cpu"
        self.every = 1 if self.at_once else LOOK_EVERY
        self._seen: list[Seen] = []
        self._first: Seen | None = None

    def note(self, seen: Seen) -> None:
        """Remember a batch until the next look."""
        self._seen.append(seen)

    @property
    def last(self) -> Seen | None:
        """The batch that was not finite, or else the last one."""
        return self._first or (self._seen[-1] if self._seen else None)

    def look(self, parameters: Sequence[nn.Parameter], due: bool) -> bool:
        """Look at what was noted since the last time; every process must call this.

        Gradients are looked at where nothing has to wait for it, before they spoil the weights.

        Args:
            parameters: Those that are trained.
            due: A question of this process.

        Returns:
            Whether ``due`` holds in any process.

        Raises:
            NotFinite: In all processes, if a loss or gradient of any process is not finite.
        """
        found = self._find(parameters)
        stop, due = parallel.any_of([found is not None, due], self.device)
        if stop:
            everybody = parallel.gather_objects(found)
            seen = [(what[2], process, what) for process, what in enumerate(everybody) if what is not None]
            batch, process, (text, update, _) = min(seen)
            raise NotFinite(text, process, update, batch)
        return due

    def check_weights(self, parameters: Sequence[nn.Parameter]) -> None:
        """Look at the weights, the same in all processes; an epoch's last update may spoil them after the last loss.

        Raises:
            NotFinite: If a weight is not finite.
        """
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all()
        if not finite.item():
            last = self.last
            raise NotFinite("a weight is not finite", 0, last.update if last else 0, last.batch if last else 0)

    def _find(self, parameters: Sequence[nn.Parameter]) -> tuple[str, int, int] | None:
        if self._seen:
            finite = torch.stack([seen.loss.detach().isfinite().all() for seen in self._seen]).tolist()
            if not all(finite):
                self._first = self._seen[finite.index(False)]
                return f"the loss is {float(self._first.loss)}", self._first.update, self._first.batch
            self._seen = self._seen[-1:]
            if self.at_once and not _finite_gradients(parameters):
                return "the norm of the gradient is not finite", self._seen[0].update, self._seen[0].batch
        return None


def _finite_gradients(parameters: Sequence[nn.Parameter]) -> bool:
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # The norm takes a few thousandths of a step; testing every number takes a tenth of it.
    return bool(nn.utils.get_total_norm([grad for grad in found if not grad.is_sparse]).isfinite())
