"""The widths that trained best: a supernet's memory of its own training, for searchers that start from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from widthkit.errors import CheckpointError
from widthkit.train import parallel
from widthkit.train.step import StepContext

WidthRecord = tuple[dict[str, int], float]
"""A width vector and its least training loss."""

_FLUSH = 1024


class WidthHistory:
    """Keeps the width vectors with the least training loss (BCNet, section 4.4: the best m = 100).

    It watches training steps: whatever sub-network ran, and what the step's criterion said about its outputs. So a
    strategy has nothing to do, and nothing is computed that the strategy does not compute anyway. Losses of several
    paths of one width vector in one step become one number, as the strategy judges them. A width vector that was
    trained several times counts with its least loss, so the order of steps and processes does not matter.

    Args:
        names: The groups, in order.
        combine: Turns the losses of a width vector's paths in one step into one.
        keep: How many width vectors to keep.

    >>> history = WidthHistory(("a",), lambda widths, losses: sum(losses) / len(losses), keep=2)
    >>> for width, loss in ((3, 0.5), (1, 0.9), (2, 0.7), (3, 0.6)):
    ...     history.add((width,), loss)
    >>> history.records
    [({'a': 3}, 0.5), ({'a': 2}, 0.7)]
    """

    def __init__(
        self, names: Sequence[str], combine: Callable[[dict[str, int], list[float]], float], keep: int = 100
    ) -> None:
        self.names = tuple(names)
        self.keep = keep
        self._combine = combine
        self._best: dict[tuple[int, ...], float] = {}
        self._watching = False
        self._ran: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self._step: dict[tuple[int, ...], list[Tensor]] = {}
        self._pending: list[tuple[tuple[int, ...], list[Tensor]]] = []

    @property
    def records(self) -> list[WidthRecord]:
        """The kept width vectors, the least loss first."""
        return [(dict(zip(self.names, vector, strict=True)), loss) for vector, loss in self._sorted()]

    @contextmanager
    def watch(self, step: StepContext) -> Iterator[None]:
        """Listen to the criterion of one training step."""
        criterion = step.loss

        def listening(outputs: Any, targets: Any) -> Tensor:
            loss = criterion(outputs, targets)
            _, vector = self._ran.pop(id(outputs), (None, None))
            if vector is not None and isinstance(loss, Tensor) and loss.numel() == 1:
                self._step.setdefault(vector, []).append(loss.detach().reshape(()))
            return loss

        # Whoever asks which criterion this is sees through.
        listening.__wrapped__ = criterion  # type: ignore[attr-defined]
        step.loss, self._watching = listening, True
        try:
            yield
            self._pending += self._step.items()
        finally:
            step.loss, self._watching = criterion, False
            self._ran, self._step = {}, {}
        if len(self._pending) >= _FLUSH:
            self._flush()

    def ran(self, units: Mapping[str, Sequence[int] | Any], outputs: Any) -> None:
        """Remember which sub-network made these outputs, until the criterion sees them."""
        if self._watching:
            # The outputs are kept with their number, which could be reused otherwise.
            self._ran[id(outputs)] = outputs, tuple(len(units[name]) for name in self.names)

    def end_epoch(self) -> None:
        """Take in what was heard, on all processes alike; every process must call this."""
        self._flush()
        for other in parallel.gather_objects(self._sorted()):
            for vector, loss in other:
                self.add(vector, loss)

    def drop_pending(self) -> None:
        """Forget what was heard since the last epoch ended, because training diverged."""
        self._pending = []

    def add(self, vector: tuple[int, ...], loss: float) -> None:
        """Put in one width vector; losses that are not finite are left out."""
        if math.isfinite(loss):
            self._best[vector] = min(loss, self._best.get(vector, math.inf))
            if len(self._best) > self.keep:
                del self._best[max(self._best, key=lambda v: (self._best[v], v))]

    def state_dict(self) -> dict[str, Any]:
        """The kept records as plain values."""
        return {"names": list(self.names), "best": [[list(vector), loss] for vector, loss in self._sorted()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            CheckpointError: If they are of another network.
        """
        if tuple(state["names"]) != self.names:
            raise CheckpointError("the checkpoint's record of trained widths names other channel groups")
        self._pending = []
        self._best = {tuple(int(width) for width in vector): float(loss) for vector, loss in state["best"]}

    def _sorted(self) -> list[tuple[tuple[int, ...], float]]:
        return sorted(self._best.items(), key=lambda item: (item[1], item[0]))

    def _flush(self) -> None:
        """Read all losses at once, for reading one makes a GPU wait."""
        if self._pending:
            values = iter(torch.stack([loss for _, losses in self._pending for loss in losses]).tolist())
            for vector, losses in self._pending:
                widths = dict(zip(self.names, vector, strict=True))
                self.add(vector, self._combine(widths, [next(values) for _ in losses]))
        self._pending = []
