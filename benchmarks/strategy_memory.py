"""What a training step keeps for its backwards: bytes of activations, counted, for every strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from widthkit.bench.files import write
from widthkit.graph.space import SearchSpace
from widthkit.modules.models import create_model
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.strategy import STRATEGIES, make_strategy
from widthkit.trace import trace
from widthkit.train.losses import cross_entropy
from widthkit.train.step import StepContext


class Saved:
    """Bytes of activations that autograd keeps, by storage: two views of one tensor count once.

    Attributes:
        peak: The most bytes kept at any moment.
        total: Bytes kept over the whole step, whether at the same time or not.
    """

    def __init__(self, batch: int) -> None:
        self.peak = self.total = self._now = 0
        self._batch = batch
        self._counts: dict[int, int] = {}

    def keep(self, tensor: Tensor) -> int | None:
        """Count a tensor; return what :meth:`drop` needs, or ``None`` if it is not counted."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if not tensor.ndim or tensor.shape[0] != self._batch or not storage.nbytes():
            return None
        if not self._counts.get(key):
            self._now += storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self._now)
        self._counts[key] = self._counts.get(key, 0) + 1
        return key

    def drop(self, key: int, size: int) -> None:
        """Forget a tensor that autograd no longer needs."""
        self._counts[key] -= 1
        if not self._counts[key]:
            self._now -= size


class _Kept:
    """A saved tensor; the graph that is freed drops it."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.tensor, self._saved = tensor, saved
        self._key = saved.keep(tensor)
        self._size = tensor.untyped_storage().nbytes()

    def __del__(self) -> None:
        if self._key is not None:
            self._saved.drop(self._key, self._size)


@contextmanager
def count_saved(batch: int) -> Iterator[Saved]:
    """Count the activations that autograd saves in this scope: tensors with one row per example.

    Args:
        batch: Examples per batch; take a number that is no layer's width, or weights of that many rows count, too.

    >>> layer = torch.nn.Linear(4, 4)
    >>> with count_saved(2) as saved:
    ...     layer(torch.zeros(2, 4)).tanh().sum().backward()
    >>> saved.peak  # the input and the output of tanh, 8 numbers each
    64
    """
    saved = Saved(batch)
    with saved_tensors_hooks(lambda tensor: _Kept(saved, tensor), lambda kept: kept.tensor):
        yield saved


def run(model: str, size: int, batch: int, names: list[str], out: Path | None) -> None:
    """Measure one step of every strategy, and print and write the table.

    Beside each strategy stands its two-ended step as the papers write it, with one backward for all paths of the
    width (BCNet, Eq. 10), where it has more than one: what updates in turns are compared with.
    """
    console = Console()
    dense = create_model(model).train()
    graph = trace(dense, (1, 3, size, size))
    rows = []
    for name in names or STRATEGIES.names():
        strategy = make_strategy(name, {})
        net = make_supernet(dense, strategy, graph=graph)
        row = {"strategy": name, **measure(net, size, batch)}
        rows.append(row)
        share = row["peak_bytes"] / row["one_backward_bytes"]
        console.print(
            f"{name}: peak {row['peak_bytes'] / 2**20:.1f} MiB, over the step {row['total_bytes'] / 2**20:.1f} MiB, "
            f"all paths in one backward {row['one_backward_bytes'] / 2**20:.1f} MiB ({share:.2f} of it)",
            highlight=False,
        )
    write(out, "strategy-memory", rows, model=model, image_size=size, batch=batch, widths="the model's own")


def measure(net: Supernet, size: int, batch: int) -> dict[str, Any]:
    """Count the bytes of one step in which every width drawn is the model's own, so that strategies compare."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.zeros(batch, dtype=torch.long)
    step = _step(images, labels)
    with _one_width(net), count_saved(batch) as saved:
        net.train_step(step)
    paths = net.paths(net.graph.full)
    return {
        "forwards": net.strategy.cost.forwards,
        "backwards": net.strategy.cost.backwards,
        "peak_bytes": saved.peak,
        "total_bytes": saved.total,
        "one_backward_bytes": one_backward(net, paths, _step(images, labels)),
    }


def one_backward(net: Supernet, paths: list[Any], step: StepContext) -> int:
    """Peak bytes when the losses of all paths are added and differentiated at once (BCNet, Eq. 10)."""
    with count_saved(len(step.targets)) as saved:
        losses = [step.loss(net.forward_on(units, step), step.targets) for units in paths]
        torch.stack(losses).mean().backward()
    net.zero_grad()
    return saved.peak


class _FullWidth(SearchSpace):
    """A space that always draws the model's own widths."""

    def sample(self, rng: np.random.Generator) -> dict[str, int]:
        """Draw."""
        return {g.name: g.width for g in self.groups}


def _step(images: Tensor, labels: Tensor) -> StepContext:
    generator = torch.Generator().manual_seed(0)
    return StepContext(images, labels, 0, 0, cross_entropy(), Tensor.backward, generator, nullcontext)


@contextmanager
def _one_width(net: Supernet) -> Iterator[None]:
    """Let the space draw the model's own width only, for a step."""
    space = net.space
    net.space = _FullWidth(space.graph, space.groups, space.divisor)
    try:
        yield
    finally:
        net.space = space
        net.zero_grad()
