"""Judge sub-networks: loss and accuracy on held-out data, with batch statistics."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from widthkit.errors import DataError, OptionError, PluginError
from widthkit.search.searcher import Span
from widthkit.search.sharing import (
    Sharing,
    generator_states,
    parse_memory,
    restore_generators,
    same_states,
    sharing_order,
)
from widthkit.supernet import Supernet
from widthkit.train.calibrate import batch_statistics
from widthkit.train.losses import accuracy
from widthkit.train.modes import batch_size as count_samples
from widthkit.train.modes import checked_device, model_device
from widthkit.train.rng import seeded

Loss = Callable[[Any, Any], Tensor]
Batch = tuple[Any, Any, int]
Part = tuple[float, "float | None"]
Name = tuple[tuple[str, int], ...]
Key = tuple[Name, int, int]


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


@dataclass(frozen=True)
class Piece:
    """One path of a width vector on one batch, of which the rest is put off; kept for a search that is killed.

    Args:
        widths: Names and widths, sorted.
        path: Which path.
        batch: Which batch.
        loss: Mean loss over the batch.
        accuracy: As in :class:`Judgement`.
    """

    widths: Name
    path: int
    batch: int
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
        parts: At least so many batches, for searchers that ask about parts of the data; batches are then smaller.
        device: Where to run; the supernet moves there. Its own device by default.
        training: Run in training mode, for models that return their losses only then, such as detectors. What they
            draw at random is the same for every width vector.
        memory: Most memory for values that :meth:`many` keeps from one sub-network for the next, such as ``"2GB"``.
        share: Whether :meth:`many` lets sub-networks share what is the same.

    Attributes:
        unshared: Why sub-networks of this model cannot share, once that is found out; they are run one by one then.

        kept_bytes: The most that was ever kept.

    Raises:
        DataError: If the loader has no batch, or too few for the parts.
        OptionError: If the batch size is not positive, or the device is not there.
    """

    def __init__(
        self,
        net: Supernet,
        loader: Iterable[Any],
        loss: Loss,
        *,
        batch_size: int = 2048,
        parts: int = 1,
        device: Any = None,
        training: bool = False,
        memory: str | int = "2GB",
        share: bool = True,
    ) -> None:
        self.net = net
        self.training = training
        if batch_size < 1:
            raise OptionError(f"batch_size={batch_size}: it must be at least 1")
        self.loss = loss
        self.memory = parse_memory(memory)
        self.share = share
        self.unshared = ""
        self.kept_bytes = 0
        self.device = checked_device(device) or model_device(net)
        net.to(self.device)
        self.batches = _rebatch(loader, batch_size, self.device, parts)
        self._numbers: Sequence[int] = range(len(self.batches))
        self._parts: dict[Key, Part] = {}
        self._whole: Evaluator | None = None
        self._spans: dict[Span, Evaluator] = {}

    def __call__(self, widths: Mapping[str, int]) -> Judgement:
        """Judge one width vector on all its paths."""
        scores, losses, accuracies = [], [], []
        for path, units in enumerate(self.net.paths(widths)):
            loss, top1 = self._judge(units, _name(widths), path)
            scores.append(-loss)
            losses.append(loss)
            accuracies.append(top1)
            if self._whole is None:
                for number in self._numbers:
                    self._parts.pop((_name(widths), path, number), None)
        known = [a for a in accuracies if a is not None]
        return Judgement(self._combine(scores), sum(losses) / len(losses), self._combine(known) if known else None)

    def _combine(self, scores: Sequence[float]) -> float:
        found = self.net.strategy.combine(scores)
        try:
            return float(found)
        except (TypeError, ValueError):
            name = type(self.net.strategy).__name__
            raise PluginError(f"strategy {name}: combine() must return a number, not {found!r}") from None

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Flags and running statistics are put back by the scope of batch statistics around this one."""
        if not self.training:
            yield
            return
        with seeded(0):
            self.net.model.train()
            yield

    def many(self, vectors: Sequence[Mapping[str, int]]) -> Iterator[tuple[int, Judgement]]:
        """Judge several width vectors, each as calling the evaluator would, but what they share is computed once.

        Yields:
            The place of a width vector in the list, and its judgement, as soon as it is known. Vectors come in the
            order of :func:`~widthkit.search.sharing.sharing_order`; in their own if this model's runs cannot be shared.
        """
        for found in self.events(vectors):
            if not isinstance(found, Piece):
                yield found

    def events(self, vectors: Sequence[Mapping[str, int]]) -> Iterator[tuple[int, Judgement] | Piece]:
        """Judge as :meth:`many` does, and also yield what is known of width vectors whose judgement must wait."""
        left = self.order(vectors)
        waves = self._waves([vectors[place] for place in left])
        while left:
            if self._shares(vectors):
                found = next(waves)
                if isinstance(found, Piece):
                    yield found
                    continue
                if not found:
                    # Random numbers must be drawn in the order of the list.
                    left.sort()
            place = left.pop(0)
            yield place, self(vectors[place])
        if vectors and self._whole is None:
            self._parts.clear()

    def recall(self, pieces: Iterable[Piece]) -> None:
        """Take over what an interrupted round had found out; the next round does not compute it again."""
        for piece in pieces:
            self._parts[piece.widths, piece.path, piece.batch] = piece.loss, piece.accuracy

    def order(self, vectors: Sequence[Mapping[str, int]]) -> list[int]:
        """Return the places of width vectors in the order in which :meth:`many` judges them."""
        return sharing_order(self.net, vectors) if self._shares(vectors) else list(range(len(vectors)))

    def at(self, span: Span) -> Evaluator:
        """Return an evaluator that judges on a part of the data, in whole batches.

        What it finds out is kept until the next judgement on all of the data, which need not compute it again; the
        supernet must not be trained in between.

        Args:
            span: Which parts; of equally many batches if their number can be divided.

        Raises:
            PluginError: If there are fewer batches than parts, or the span is empty.
        """
        try:
            start, stop, of = map(operator.index, span)
        except TypeError:
            raise PluginError(f"span={span!r} is no Span(start, stop, of) of whole numbers") from None
        n = len(self.batches)
        if not 0 <= start < stop <= of:
            raise PluginError(f"span={tuple(span)}: parts from one number up to a larger one, of so many in all")
        if of > n:
            raise PluginError(f"span={tuple(span)}, but there are {n} batches; the searcher must say parts={of}")
        if span not in self._spans:
            part = copy.copy(self)
            part._numbers = range(n * start // of, n * stop // of)
            part.batches = [self.batches[number] for number in part._numbers]
            part._whole = self
            part._spans = {}
            self._spans[span] = part
        return self._spans[span]

    def _shares(self, vectors: Sequence[Any]) -> bool:
        # A network that merges runs its branches whole, with units taken away where they are read: nothing is sliced.
        return self.share and not self.training and not self.unshared and not self.net.merges and len(vectors) > 1

    def _judge(self, units: Any, name: Name, path: int) -> tuple[float, float | None]:
        parts = []
        for number, batch in zip(self._numbers, self.batches, strict=True):
            part = self._parts.get((name, path, number))
            if part is None:
                part = self._part(batch, lambda inputs: self.net.run(units, inputs))
                if self._whole is not None:
                    self._parts[name, path, number] = part
            parts.append(part)
        total, correct, seen = 0.0, 0.0, 0
        for (loss, top1), (_, _, n) in zip(parts, self.batches, strict=True):
            total += loss * n
            correct += (top1 or 0.0) * n
            seen += n
        return total / seen, correct / seen if all(top1 is not None for _, top1 in parts) else None

    def _batch(self, number: int) -> Batch:
        """Return a batch by its number in all of the data."""
        return self.batches[number - self._numbers[0]]

    def _part(self, batch: Batch, run: Callable[[Any], Any]) -> Part:
        """Return loss and accuracy on one batch."""
        inputs, targets, _ = batch
        with torch.inference_mode(), batch_statistics(self.net.model), self._training_mode():
            outputs = run(inputs)
            return float(self.loss(outputs, targets)), accuracy(outputs, targets)

    def _waves(self, vectors: Sequence[Mapping[str, int]]) -> Iterator[bool | Piece]:
        """Run vectors in order on all paths and batches; yield after every one, ``False`` if runs cannot be shared.

        Where what must be kept for all batches exceeds the memory, the last ones are put off to another wave. A vector
        that lacks them is judged when that wave has come to it; what is known of it by then is yielded.
        """
        sharing = Sharing(self.net, vectors, self.memory)
        pairs = [(p, b) for p in range(max(sharing.n_paths)) for b in self._numbers]
        done = dict.fromkeys(pairs, 0)
        judged = 0
        put_off = pairs
        try:
            while put_off:
                active, put_off = put_off, []
                for who, widths in enumerate(vectors):
                    fresh = []
                    for path, batch in [pair for pair in active if done[pair] == who]:
                        known = path >= sharing.n_paths[who] or (_name(widths), path, batch) in self._parts
                        if not known:
                            if not self._fill(sharing, who, widths, path, batch):
                                yield False
                                return
                            fresh.append((path, batch))
                        done[path, batch] += 1
                    if sharing.crowded and len(active) > 1:
                        put_off.append(active.pop())
                        sharing.drop(*put_off[-1])
                    self.kept_bytes = max(self.kept_bytes, sharing.peak)
                    if fresh and min(done.values()) <= who:
                        yield from self._pieces(widths, fresh)
                    for _ in range(judged, min(done.values())):
                        judged += 1
                        yield True
        finally:
            sharing.close()

    def _pieces(self, widths: Mapping[str, int], pairs: Iterable[tuple[int, int]]) -> Iterator[Piece]:
        for path, batch in pairs:
            name = _name(widths)
            yield Piece(name, path, batch, *self._parts[name, path, batch])

    def _fill(self, sharing: Sharing, who: int, widths: Mapping[str, int], path: int, batch: int) -> bool:
        """Run one vector on one path and batch; ``False`` if that cannot be shared, and then nothing has changed."""
        before = generator_states(self.device)
        try:
            part = self._part(self._batch(batch), lambda inputs: sharing.run(who, path, batch, inputs))
            if same_states(before, generator_states(self.device)):
                self._parts[_name(widths), path, batch] = part
                return True
            self.unshared = "it draws random numbers"
        except Exception as error:
            # Whatever it is: run plainly, the model either works or fails for its own reasons.
            self.unshared = " ".join(f"{type(error).__name__}: {error}".split())
        restore_generators(self.device, before)
        return False


def _name(widths: Mapping[str, int]) -> Name:
    return tuple(sorted(widths.items()))


def _rebatch(loader: Iterable[Any], batch_size: int, device: torch.device, parts: int = 1) -> list[Batch]:
    """Join small batches of equally shaped tensors into large ones; batches of other kinds stay as they come."""
    batches: list[Batch] = []
    joined: list[tuple[float, Batch]] = []
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
        inputs, targets = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        if not len(inputs):
            continue
        # Equal parts, so that no small remainder gets batch statistics of its own; of every kind as many in every part.
        n_batches = min(len(inputs), parts * -(-len(inputs) // (batch_size * parts)))
        cut = zip(inputs.tensor_split(n_batches), targets.tensor_split(n_batches), strict=True)
        joined += [(i / n_batches, (x, y, len(x))) for i, (x, y) in enumerate(cut)]
    batches += [batch for _, batch in sorted(joined, key=lambda pair: pair[0])]
    if not batches:
        raise DataError("the held-out loader has no batch; check the data set's size and drop_last")
    if len(batches) < parts:
        n = sum(size for _, _, size in batches)
        raise DataError(f"{parts} parts need as many held-out batches; here are {len(batches)} of {n} examples")
    return batches
