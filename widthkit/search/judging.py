"""How networks are judged, and on what: settings, held-out batches, judgements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from widthkit.budget import memory_amount
from widthkit.errors import DataError, Option, OptionError
from widthkit.train.losses import Loss as Loss
from widthkit.train.modes import batch_size as count_samples


@dataclass(frozen=True)
class Judgement:
    """Score, loss and accuracy of one width vector.

    Args:
        score: What searchers maximise: minus the mean loss, or the accuracy where :class:`Judging` says so, combined
            over paths by the strategy; or the accuracy of a network that was trained on its own.
        loss: Mean loss over examples and paths; NaN for a network that was trained on its own.
        accuracy: Top-1 share in ``[0, 1]``, or ``None`` where outputs are no class scores.
        path: Which of the strategy's paths has the best score of its own; 0 for a network that was trained on its own.
    """

    score: float
    loss: float
    accuracy: float | None
    path: int = 0


@dataclass(frozen=True)
class Judging:
    """How a supernet judges its sub-networks.

    Args:
        batch_size: Examples per forward pass. Batch norms use the statistics of these batches, which want many examples
            (2,048 in the papers).
        training: Run in training mode, for models that return their losses only then, such as detectors.
        memory: Most memory for values that sub-networks judged together share, in bytes or as ``"2GB"``.
        criterion: What ranks sub-networks: ``"loss"``, or ``"accuracy"`` as in the papers, where outputs are class
            scores.

    Raises:
        OptionError: If the batch size is not positive, the memory is no amount, or the criterion is not known.

    >>> Judging(memory="1.5 MB").memory_bytes
    1500000
    """

    batch_size: int = 2048
    training: bool = False
    memory: str | int = "2GB"
    criterion: str = "loss"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError(f"batch_size={self.batch_size}: it must be at least 1")
        if memory_bytes(self.memory) is None:
            raise OptionError(Option("memory", self.memory), ": this is no amount; write it like 2GB or 500MiB")
        if self.criterion not in ("loss", "accuracy"):
            raise OptionError(f"criterion={self.criterion!r}: networks are ranked by 'loss' or 'accuracy'")

    @property
    def memory_bytes(self) -> int:
        """The memory in bytes."""
        amount = memory_bytes(self.memory)
        assert amount is not None
        return amount


def memory_bytes(memory: str | int) -> int | None:
    """Read an amount of memory; ``None`` if it is none."""
    if isinstance(memory, int):
        return memory if memory >= 0 else None
    return memory_amount(memory)


@dataclass(frozen=True)
class Batch:
    """One held-out batch on its device.

    Args:
        inputs: What the model takes.
        targets: What the loss takes.
        n: How many examples it holds.
    """

    inputs: Any
    targets: Any
    n: int


def held_out_batches(loader: Iterable[Any], batch_size: int, device: torch.device) -> list[Batch]:
    """Read held-out data into batches as large as allowed.

    Batches ``(tensor, tensor)`` of equally shaped examples are joined and divided into equal parts, so that no small
    remainder has batch statistics of its own. Batches of other kinds stay as they come.

    Args:
        loader: Batches ``(inputs, targets)``.
        batch_size: Most examples per batch.
        device: Where the batches go.

    Raises:
        DataError: If there is no batch, or one is not a pair of inputs and targets.
    """
    batches: list[Batch] = []
    joined: list[tuple[float, Batch]] = []
    for kind in _by_kind(loader, device, batches).values():
        inputs, targets = (torch.cat(tensors) for tensors in zip(*kind, strict=True))
        if not len(inputs):
            continue
        n_batches = -(-len(inputs) // batch_size)
        parts = zip(inputs.tensor_split(n_batches), targets.tensor_split(n_batches), strict=True)
        joined += [(i / n_batches, Batch(x, y, len(x))) for i, (x, y) in enumerate(parts)]
    batches += [batch for _, batch in sorted(joined, key=lambda pair: pair[0])]
    if not batches:
        raise DataError("the held-out loader has no batch; check the data set's size and drop_last")
    return batches


def _by_kind(
    loader: Iterable[Any], device: torch.device, others: list[Batch]
) -> dict[Any, list[tuple[Tensor, Tensor]]]:
    """Collect pairs of tensors by the shape and type of their examples; add all other batches to ``others``."""
    pairs: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError("a held-out batch must be (inputs, targets); wrap your loader")
        inputs, targets = tree_map_only(Tensor, lambda t: t.to(device), tuple(batch))
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor) and inputs.ndim and targets.ndim:
            if len(inputs) != len(targets):
                raise DataError(f"a held-out batch has {len(inputs)} inputs and {len(targets)} targets")
            kind = inputs.shape[1:], inputs.dtype, targets.shape[1:], targets.dtype
            pairs.setdefault(kind, []).append((inputs, targets))
        else:
            n = len(targets) if isinstance(targets, (tuple, list)) else count_samples(inputs)
            others.append(Batch(inputs, targets, n))
    return pairs
