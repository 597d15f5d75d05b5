"""Judge sub-networks: loss and accuracy on held-out data, with batch statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from widthkit.errors import OptionError, PluginError
from widthkit.search.judging import Judgement, Judging, Loss, held_out_batches
from widthkit.search.sharing import Candidates, Unsafe, sharing_order
from widthkit.supernet import Supernet
from widthkit.train.calibrate import batch_statistics
from widthkit.train.losses import accuracy, binding
from widthkit.train.modes import model_device
from widthkit.train.rng import seeded

BLOCK = 8
"""How many sub-networks are judged together, batch by batch, when memory is too short for all batches at once."""


class Separate:
    """Sub-networks that share nothing.

    Args:
        net: The supernet.
        vectors: Width vectors.
        training: Run in training mode.

    Attributes:
        n_paths: Per width vector, how many sub-networks stand for it.
        why: Why nothing is shared, if it might have been.
        crowded: Whether memory was too short for what is shared.
        peak_bytes: The most that was kept.
    """

    crowded = False
    why = ""
    peak_bytes = 0

    def __init__(self, net: Supernet, vectors: Sequence[Mapping[str, int]], training: bool = False) -> None:
        self._net = net
        self._training = training
        self._paths = [net.paths(widths) for widths in vectors]
        self.n_paths = [len(paths) for paths in self._paths]

    def run(self, who: int, path: int, batch: int, inputs: Any) -> Any:
        """Return the outputs of one sub-network on a batch."""
        with self._scope():
            return self._net.run(self._paths[who][path], inputs)

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """Every run begins in the same state: seeds, modes, and running statistics."""
        with seeded(0), batch_statistics(self._net.model):
            if self._training:
                self._net.model.train()
            yield

    def forget(self) -> None:
        """Drop what is kept for later runs."""


class Together(Separate):
    """Sub-networks that share what they have in common; they run separately once sharing has failed."""

    def __init__(self, net: Supernet, vectors: Sequence[Mapping[str, int]], memory: int) -> None:
        super().__init__(net, vectors)
        self._candidates = Candidates(net, self._paths, memory)

    def run(self, who: int, path: int, batch: int, inputs: Any) -> Any:
        """Return the outputs of one sub-network on a batch."""
        if self.why:
            return super().run(who, path, batch, inputs)
        try:
            with self._scope():
                outputs = self._candidates.run(who, path, batch, inputs)
        except Exception as error:
            # Run it again without sharing. If that works, report why sharing failed; else its own error is raised.
            self.forget()
            outputs = super().run(who, path, batch, inputs)
            kind = "" if isinstance(error, Unsafe) else f"{type(error).__name__}: "
            self.why = kind + " ".join(str(error).split())
        self.peak_bytes = max(self.peak_bytes, self._candidates.peak_bytes)
        self.crowded |= self._candidates.crowded
        return outputs

    def forget(self) -> None:
        """Drop what is kept for later runs."""
        self._candidates.forget()


class Evaluator:
    """Runs every path of a width vector over the held-out data.

    Batch norms use the statistics of the batch, as in the papers, because running averages of a supernet fit no
    sub-network. The data is read once and kept on the supernet's device. What a model draws at random is the same for
    every width vector.

    Args:
        net: The supernet; it is judged on the device where it is.
        loader: Held-out batches ``(inputs, targets)``.
        loss: The criterion; it gets a batch's inputs too if it has a parameter named ``inputs``.
        judging: Batch size, mode and memory.
        share: Whether sub-networks that are judged together compute what they have in common once.

    Attributes:
        unshared: Why sub-networks of this model cannot share, once that is found out; they are judged one by one then.
        peak_bytes: The most that was kept for sharing.

    Raises:
        DataError: If the loader has no batch, or a batch is not ``(inputs, targets)``.
    """

    def __init__(
        self, net: Supernet, loader: Iterable[Any], loss: Loss, judging: Judging | None = None, *, share: bool = True
    ) -> None:
        self.net = net
        self.loss, self._bind = loss, binding(loss)
        self.judging = judging or Judging()
        self.share = share
        self.peak_bytes = 0
        self.device = model_device(net)
        self.batches = held_out_batches(loader, self.judging.batch_size, self.device)
        self.unshared = ""
        if net.merges:
            self.unshared = "a network that merges runs all its branches whole"
        elif self.judging.training:
            self.unshared = "the network is judged in training mode"

    def __call__(self, widths: Mapping[str, int]) -> Judgement:
        """Judge one width vector."""
        return self._judge_block(self._separate([widths]), range(1))[0]

    def judge_many(self, vectors: Sequence[Mapping[str, int]]) -> Iterator[tuple[int, Judgement]]:
        """Judge several width vectors, each as calling the evaluator would; what they share is computed once.

        If memory is short, :data:`BLOCK` of them are judged together.

        Yields:
            The place of a width vector in the list, and its judgement, as soon as it is known; in the order of
            :func:`~widthkit.search.sharing.sharing_order`.
        """
        order = sharing_order(self.net, vectors)
        ordered = [vectors[place] for place in order]
        together = self.share and not self.unshared and len(vectors) > 1
        runs = Together(self.net, ordered, self.judging.memory_bytes) if together else self._separate(ordered)
        size, start = 1, 0
        while start < len(order):
            block = range(start, min(start + size, len(order)))
            judged = self._judge_block(runs, block)
            self.unshared = self.unshared or runs.why
            self.peak_bytes = max(self.peak_bytes, runs.peak_bytes)
            yield from zip(order[block.start : block.stop], judged, strict=True)
            start = block.stop
            if runs.crowded and len(self.batches) * max(runs.n_paths) > 1:
                runs.forget()
                size = BLOCK
        runs.forget()

    def _separate(self, vectors: Sequence[Mapping[str, int]]) -> Separate:
        return Separate(self.net, vectors, self.judging.training)

    def _judge_block(self, runs: Separate, block: range) -> list[Judgement]:
        """Judge a slice of the list, batch by batch."""
        parts: dict[int, list[list[tuple[float, float | None]]]] = {who: [] for who in block}
        for path in range(max(runs.n_paths[who] for who in block)):
            for who in block:
                parts[who].append([])
            for number in range(len(self.batches)):
                for who in block:
                    if path < runs.n_paths[who]:
                        parts[who][path].append(self._judge_batch(runs, who, path, number))
                if len(block) > 1:
                    runs.forget()
        return [self._judgement([path for path in parts[who] if path]) for who in block]

    def _judge_batch(self, runs: Separate, who: int, path: int, number: int) -> tuple[float, float | None]:
        """Return loss and accuracy of one sub-network on one batch."""
        batch = self.batches[number]
        with torch.inference_mode():
            outputs = runs.run(who, path, number, batch.inputs)
            loss = self._bind(batch.inputs)(outputs, batch.targets)
            return float(loss), accuracy(outputs, batch.targets)

    def _judgement(self, paths: list[list[tuple[float, float | None]]]) -> Judgement:
        losses = [self._mean([loss for loss, _ in parts]) for parts in paths]
        known = [[top1 for _, top1 in parts if top1 is not None] for parts in paths]
        accuracies = [self._mean(values) for values in known if len(values) == len(self.batches)]
        scores = [-loss for loss in losses]
        if self.judging.criterion == "accuracy":
            if len(accuracies) < len(scores):
                raise OptionError(
                    "criterion='accuracy': the outputs are no class scores [N, C] of integer targets; judge by 'loss'"
                )
            # Where a loss is not a number the network has diverged, whatever its outputs' largest class is.
            scores = [math.nan if math.isnan(s) else top1 for s, top1 in zip(scores, accuracies, strict=True)]
        found = self._combine(accuracies) if accuracies else None
        return Judgement(self._combine(scores), sum(losses) / len(losses), found, _best(scores))

    def _mean(self, values: Sequence[float]) -> float:
        """Return the mean over examples of values per batch."""
        sizes = [batch.n for batch in self.batches]
        return sum(value * n for value, n in zip(values, sizes, strict=True)) / sum(sizes)

    def _combine(self, scores: Sequence[float]) -> float:
        found = self.net.strategy.combine(scores)
        try:
            return float(found)
        except (TypeError, ValueError):
            name = type(self.net.strategy).__name__
            raise PluginError(f"strategy {name}: combine() must return a number, not {found!r}") from None


def _best(scores: Sequence[float]) -> int:
    """Return the place of the best score: the first of equal ones; 0 if none is a number."""
    worth = [-math.inf if math.isnan(score) else score for score in scores]
    return worth.index(max(worth))
