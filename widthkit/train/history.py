"""The widths of least training loss: what a supernet remembers of its training, for searchers that start from it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from widthkit.errors import CheckpointError, PluginError
from widthkit.train import parallel

WidthRecord = tuple[dict[str, int], float]
"""A width vector and its least training loss."""

_MOST_PENDING = 1024


class WidthHistory:
    """The width vectors of least training loss (BCNet, section 4.4: the best m = 100).

    A strategy records a loss for every width vector that it trains; nothing is recorded by itself. A width vector that
    is recorded several times counts with its least loss, so the order of steps and processes does not matter.

    Args:
        names: The groups, in order.
        keep: How many width vectors to keep.

    >>> history = WidthHistory(("a",), keep=2)
    >>> for width, loss in ((3, 0.5), (1, 0.9), (2, 0.7), (3, 0.6)):
    ...     history.record({"a": width}, torch.tensor(loss))
    >>> history.end_epoch()
    >>> [(widths, round(loss, 1)) for widths, loss in history.records]
    [({'a': 3}, 0.5), ({'a': 2}, 0.7)]
    """

    def __init__(self, names: Sequence[str], keep: int = 100) -> None:
        self.names = tuple(names)
        self.keep = keep
        self._best: dict[tuple[int, ...], float] = {}
        self._pending: list[tuple[tuple[int, ...], Tensor]] = []
        self._of_step: deque[tuple[int, ...]] = deque(maxlen=_MOST_PENDING)

    @property
    def records(self) -> list[WidthRecord]:
        """The kept width vectors, the least loss first; those of an epoch appear when it ends."""
        return [(dict(zip(self.names, vector, strict=True)), loss) for vector, loss in self._sorted()]

    @property
    def of_step(self) -> list[dict[str, int]]:
        """The width vectors recorded since :meth:`begin_step`."""
        return [dict(zip(self.names, vector, strict=True)) for vector in self._of_step]

    def begin_step(self) -> None:
        """Start a new list of the step's width vectors."""
        self._of_step.clear()

    def record(self, widths: Mapping[str, int], loss: Tensor) -> None:
        """Note the loss of a width vector on the batch of this step.

        Args:
            widths: Group name -> width, for every group.
            loss: A scalar on any device. It is read later, with others, because reading it makes a GPU wait.

        Raises:
            PluginError: If a group is missing or unknown, or if the loss is no scalar tensor.
        """
        if widths.keys() != set(self.names):
            wrong = min(widths.keys() ^ set(self.names))
            raise PluginError(
                f"a strategy must record one width for every group; group '{wrong}' is missing or unknown"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise PluginError(f"a strategy must record one loss, a scalar tensor, not {type(loss).__name__}")
        vector = tuple(int(widths[name]) for name in self.names)
        self._of_step.append(vector)
        self._pending.append((vector, loss.detach().reshape(())))
        if len(self._pending) >= _MOST_PENDING:
            self._read_pending()

    def end_epoch(self) -> None:
        """Add the records so far and share them; every process must call this, at the end of an epoch at the latest."""
        self._read_pending()
        for others in parallel.gather_objects(self._sorted()):
            for vector, loss in others:
                self._add(vector, loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the kept records as plain values; those since the last :meth:`end_epoch` are not among them."""
        return {"names": list(self.names), "best": [[list(vector), loss] for vector, loss in self._sorted()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the records by those that :meth:`state_dict` returned.

        Raises:
            CheckpointError: If they belong to another network.
        """
        if tuple(state["names"]) != self.names:
            raise CheckpointError("the checkpoint's record of trained widths names other channel groups")
        self._pending = []
        self._best = {tuple(int(width) for width in vector): float(loss) for vector, loss in state["best"]}

    def _sorted(self) -> list[tuple[tuple[int, ...], float]]:
        return sorted(self._best.items(), key=lambda item: (item[1], item[0]))

    def _read_pending(self) -> None:
        if self._pending:
            losses = torch.stack([loss for _, loss in self._pending]).tolist()
            for (vector, _), loss in zip(self._pending, losses, strict=True):
                self._add(vector, loss)
        self._pending = []

    def _add(self, vector: tuple[int, ...], loss: float) -> None:
        """Keep a width vector if it is among the best; losses that are not finite are left out."""
        if math.isfinite(loss):
            self._best[vector] = min(loss, self._best.get(vector, math.inf))
            if len(self._best) > self.keep:
                del self._best[max(self._best, key=lambda v: (self._best[v], v))]
