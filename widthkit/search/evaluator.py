"""Judge sub-networks: loss and accuracy on held-out data, with batch statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from widthkit.errors import DataError, OptionError
from widthkit.supernet import Supernet
from widthkit.train.calibrate import batch_statistics
from widthkit.train.losses import accuracy
from widthkit.train.modes import batch_size as count_samples
from widthkit.train.modes import checked_device, model_device
from widthkit.train.rng import seeded

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Judgement:
    """What one width vector earned.

    Args:
        score: What searchers maximise: minus the mean loss, combined over paths by the strategy.
        loss: Mean loss over examples and paths.
        accuracy: Top-1 share, or ``None`` where outputs are no class scores.
    """

    score: float
    loss: float
    accuracy: float | None


class Evaluator:
    """Runs every path of a width vector over the held-out data.

    Batch-norm layers use the statistics of the batch, as the papers do: running averages of a supernet fit no
    sub-network. The data is read once and kept on the device in batches as large as it allows.

    Args:
        net: The supernet.
        loader: Held-out batches ``(inputs, targets)``.
        loss: The criterion.
        batch_size: Examples per forward pass; batch statistics want many (2,048 in the papers).
        device: Where to run; the supernet moves there. Its own device by default.
        training: Run in training mode, for models that return their losses only then, such as detectors. What they
            draw at random is the same for every width vector.

    Raises:
        DataError: If the loader has no batch.
        OptionError: If the batch size is not positive, or the device is not there.
    """

    def __init__(
        self,
        net: Supernet,
        loader: Iterable[Any],
        loss: Loss,
        *,
        batch_size: int = 2048,
        device: Any = None,
        training: bool = False,
    ) -> None:
        self.net = net
        self.training = training
        if batch_size < 1:
            raise OptionError(f"batch_size={batch_size}: it must be at least 1")
        self.loss = loss
        self.device = checked_device(device) or model_device(net)
        net.to(self.device)
        self.batches = _rebatch(loader, batch_size, self.device)

    def __call__(self, widths: Mapping[str, int]) -> Judgement:
        """Judge one width vector on all its paths."""
        scores, losses, accuracies = [], [], []
        for units in self.net.paths(widths):
            loss, top1 = self._judge(units)
            scores.append(-loss)
            losses.append(loss)
            accuracies.append(top1)
        known = [a for a in accuracies if a is not None]
        return Judgement(
            float(self.net.strategy.combine(scores)),
            sum(losses) / len(losses),
            float(self.net.strategy.combine(known)) if known else None,
        )

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Flags and running statistics are put back by the scope of batch statistics around this one."""
        if not self.training:
            yield
            return
        with seeded(0):
            self.net.model.train()
            yield

    def _judge(self, units: Any) -> tuple[float, float | None]:
        total, correct, seen = 0.0, 0.0, 0
        counts = True
        with torch.inference_mode(), batch_statistics(self.net.model), self._training_mode():
            for inputs, targets, n in self.batches:
                outputs = self.net.run(units, inputs)
                total += float(self.loss(outputs, targets)) * n
                top1 = accuracy(outputs, targets)
                counts = counts and top1 is not None
                correct += (top1 or 0.0) * n
                seen += n
        return total / seen, correct / seen if counts else None


def _rebatch(loader: Iterable[Any], batch_size: int, device: torch.device) -> list[tuple[Any, Any, int]]:
    """Join small batches of equally shaped tensors into large ones; batches of other kinds stay as they come."""
    batches: list[tuple[Any, Any, int]] = []
    pending: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError("a held-out batch must be (inputs, targets); wrap your loader")
        inputs, targets = tree_map_only(Tensor, lambda t: t.to(device), tuple(batch))
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor) and inputs.ndim and targets.ndim:
            if len(inputs) != len(targets):
                raise DataError(f"a held-out batch has {len(inputs)} inputs and {len(targets)} targets")
            kind = inputs.shape[1:], inputs.dtype, targets.shape[1:], targets.dtype
            pending.setdefault(kind, []).append((inputs, targets))
        else:
            n = len(targets) if isinstance(targets, (tuple, list)) else count_samples(inputs)
            batches.append((inputs, targets, n))
    for pairs in pending.values():
        inputs, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if not len(inputs):
            continue
        # Equal parts, so that no small remainder gets batch statistics of its own.
        n_parts = -(-len(inputs) // batch_size)
        for x, y in zip(inputs.tensor_split(n_parts), targets.tensor_split(n_parts), strict=True):
            batches.append((x, y, len(x)))
    if not batches:
        raise DataError("the held-out loader has no batch; check the data set's size and drop_last")
    return batches
